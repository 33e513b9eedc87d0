"""Runs of models with fast weights that would go on otherwise than they began, pack rows, or lose their reference."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_longctx import InnerLearningRateWarmup, LongContextConfig, LongContextTrainer, MemoryConfig
from hf_longctx.config.pair_rows import PreferenceConfig
from tests.fast_weights import tiny_base, tiny_ttt, tokens


BOTH = pytest.mark.parametrize("trainer", [Trainer, LongContextTrainer])


def rows(count: int = 4, **columns) -> list[dict]:
    return [{"input_ids": ids, "labels": ids, **columns} for ids in tokens(count, 20)]


def make(trainer, folder, model=None, data=None, callbacks=None, **changes):
    chosen = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    chosen |= {"report_to": "none", "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, **changes}
    return trainer(
        model=tiny_ttt(torch.float32) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=rows() if data is None else data,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def with_dropout(**settings):
    model = tiny_ttt(torch.float32, base=tiny_base(dtype=torch.float32, attention="eager"), **settings)
    for layer in model.base.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def test_what_is_logged_changes_no_step_that_draws_dropout(tmp_path):
    """The gain is measured with random numbers of its own."""
    found = []
    for steps in (1, 1000):
        run = make(LongContextTrainer, tmp_path, with_dropout(), max_steps=3, logging_steps=steps)
        run.train()
        found.append({name: weight.clone() for name, weight in run.model.state_dict().items()})
        assert any("inner_gain" in entry for entry in run.state.log_history)
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_gain_is_of_the_weights_and_not_of_other_dropout():
    """Two passes that draw the same: a step of no size gains nothing."""
    model = with_dropout(inner_learning_rate=1e-30).train()
    model.measures_gain = True
    model(tokens(), labels=tokens())
    assert len(model.last_rows.gains) == 4 and not torch.stack(model.last_rows.gains).any()


class Stops(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    warmup = InnerLearningRateWarmup(start=0.2, ratio=0.5)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    make(Trainer, folder, callbacks=[warmup, Stops()], **options).train()
    return folder / "checkpoint-2"


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suffix_layers": 1}, "`suffix_layers` 2"),
        ({"inner_learning_rate": 0.5}, "`inner_learning_rate` 1.0, but .* `inner_learning_rate` 0.5"),
        ({"meta_gradient": "first_order"}, "`meta_gradient` 'exact'"),
    ],
)
def test_a_run_is_resumed_with_its_settings_only(trainer, settings, message, checkpoint, tmp_path):
    run = make(trainer, tmp_path, tiny_ttt(torch.float32, **settings), max_steps=8)
    with pytest.raises(ValueError, match=f"the checkpoint was trained with {message}"):
        run.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("trainer", "callbacks"),
    [
        (Trainer, [InnerLearningRateWarmup(start=0.2, ratio=0.6)]),
        (LongContextTrainer, [InnerLearningRateWarmup(start=0.3, ratio=0.5)]),
        (LongContextTrainer, None),
    ],
)
def test_a_run_is_resumed_with_its_warmup_only(trainer, callbacks, checkpoint, tmp_path):
    run = make(trainer, tmp_path, max_steps=8, callbacks=callbacks)
    with pytest.raises(ValueError, match="the checkpoint's run warms up with `start` 0.2 and `ratio` 0.5"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_a_warmup_that_is_over_may_be_left_out(checkpoint, tmp_path):
    run = make(LongContextTrainer, tmp_path, max_steps=3)  # 2 steps of the checkpoint are more than half of it
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 3


def test_a_run_without_warmup_is_resumed_without_one(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    make(Trainer, tmp_path, max_steps=1, **saves).train()
    run = make(Trainer, tmp_path, max_steps=9, callbacks=[InnerLearningRateWarmup(ratio=0.5)])
    with pytest.raises(ValueError, match="warms up with `start` 1.0 and `ratio` 0.0"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    run = make(LongContextTrainer, tmp_path, **saves)  # writes what the checkpoint did not say
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    none = InnerLearningRateWarmup(start=1.0, ratio=0.9)
    run = make(LongContextTrainer, tmp_path, max_steps=3, callbacks=[none], **saves)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3


def test_an_adapter_alone_is_resumed_with_the_settings_of_its_run(tmp_path):
    """Its weights hold no prime MLPs, and so none of their facts."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(tiny_ttt(torch.float32), config)
    make(LongContextTrainer, tmp_path, model, save_strategy="steps", save_steps=1).train()
    other = peft.get_peft_model(tiny_ttt(torch.float32, chunk_tokens=4), config)
    run = make(LongContextTrainer, tmp_path, other, max_steps=4)
    with pytest.raises(ValueError, match="trained with `chunk_tokens` 6, but the model of this run has .* 4"):
        run.train(resume_from_checkpoint=True)


@BOTH
def test_two_warmups(trainer, tmp_path):
    run = make(trainer, tmp_path, callbacks=[InnerLearningRateWarmup(), InnerLearningRateWarmup(start=0.5)])
    with pytest.raises(ValueError, match="there are two `InnerLearningRateWarmup` among the callbacks"):
        run.train()


@pytest.mark.parametrize(("ratio", "steps"), [(1, 4), (1, 1), (0.5, 8), (0.9, 10), (0.0, 3)])
def test_the_last_step_has_the_whole_rate(ratio, steps):
    warmup = InnerLearningRateWarmup(start=0.1, ratio=ratio)
    rates = [warmup.factor(step, steps) for step in range(steps)]
    assert rates[-1] == 1.0 and rates == sorted(rates) and (rates[0] == 0.1 or steps == 1 or ratio == 0)


@BOTH
def test_metrics_get_logits_alone(trainer, tmp_path):
    seen = []

    def compute(found):
        seen.append(found.predictions.shape)
        return {}

    run = make(trainer, tmp_path)
    run.compute_metrics = compute
    run.evaluate(rows(3))
    assert seen == [(3, 20, 97)]


@pytest.mark.parametrize("name", ["packing", "eval_packing", "padding_free"])
def test_packing_of_trl(name, tmp_path):
    """Ours refuses it; TRL's own has no trace of it in a batch, and the warm-up sees it in the arguments."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from hf_longctx import LongContextSFTTrainer
    from tests.tokenizer import tiny_tokenizer

    data = Dataset.from_list([{"input_ids": ids.tolist()} for ids in tokens(4, 20)])
    options = {"packing_strategy": "wrapped"} if "packing" in name else {}
    chosen = {"use_cpu": True, "report_to": "none", "bf16": False, "max_steps": 1}
    chosen["max_length"] = 16 if options else None
    args = trl.SFTConfig(output_dir=str(tmp_path), **chosen, **options, **{name: True})
    given = {"args": args, "train_dataset": data, "eval_dataset": data, "processing_class": tiny_tokenizer()}
    with pytest.raises(NotImplementedError, match=rf"`{name}` \(True\) packs documents"):
        LongContextSFTTrainer(model=tiny_ttt(torch.float32), **given)
    run = trl.SFTTrainer(model=tiny_ttt(torch.float32), callbacks=[InnerLearningRateWarmup()], **given)
    with pytest.raises(NotImplementedError, match=rf"`{name}` \(True\) packs documents"):
        run.train()


@pytest.mark.parametrize("column", ["seq_lengths", "seq_idx"])
def test_data_sets_that_are_packed_already(column, tmp_path):
    data = rows(seq_lengths=[10, 10]) if column == "seq_lengths" else rows(seq_idx=[0] * 10 + [1] * 10)
    with pytest.raises(NotImplementedError, match=f"`train_dataset` has a column `{column}`, so its rows are packed"):
        make(LongContextTrainer, tmp_path, data=data)


def preferences(tmp_path, **changes):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from hf_longctx import LongContextDPOTrainer
    from tests.tokenizer import tiny_tokenizer

    data = Dataset.from_list([{"prompt": "a b", "chosen": " c d e", "rejected": " f"}] * 2)
    chosen = {"use_cpu": True, "report_to": "none", "bf16": False, "max_steps": 1, "gradient_checkpointing": False}
    given = {"model": tiny_ttt(torch.float32), "train_dataset": data, "processing_class": tiny_tokenizer()}
    of_args = {key: changes.pop(key) for key in ("precompute_ref_log_probs",) if key in changes}
    args = trl.DPOConfig(output_dir=str(tmp_path), save_strategy="no", **chosen, **of_args)
    return LongContextDPOTrainer(args=args, **given, **changes)


def test_a_reference_that_would_be_loaded_by_name(tmp_path):
    with pytest.raises(ValueError, match="`ref_model` is unset, and `DPOTrainer` would load it by name"):
        preferences(tmp_path)
    for changes in ({"ref_model": tiny_ttt(torch.float32)}, {"precompute_ref_log_probs": True}):
        run = preferences(tmp_path, **changes)
        run.train()
        assert run.state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_context": LongContextConfig(sequence_parallel_size=2)}, "its rows cannot be shared"),
        (
            {"preference": PreferenceConfig(flatten_rows=True)},
            r"`flatten_rows` \(True\) runs rows as documents of one",
        ),
        ({"memory": MemoryConfig(memory="checkpoint")}, r"`memory` \('checkpoint'\) tiles losses or MLPs"),
    ],
)
def test_preferences_that_would_be_inexact(changes, message, tmp_path):
    with pytest.raises(NotImplementedError, match=message):
        preferences(tmp_path, ref_model=copy.deepcopy(tiny_ttt(torch.float32)), **changes)


def test_a_reference_of_trainers_that_sample(tmp_path):
    trl = pytest.importorskip("trl")
    from hf_longctx.trainer.inner_checks import refuse_lost_reference

    args = trl.GRPOConfig(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False, report_to="none")
    given = {"model": tiny_ttt(torch.float32), "args": args}
    with pytest.raises(ValueError, match=r"`beta` \(0.1\) compares with a reference, which `GRPOTrainer` would load"):
        refuse_lost_reference(trl.GRPOTrainer, given)
    args.beta = 0.0
    refuse_lost_reference(trl.GRPOTrainer, given)
