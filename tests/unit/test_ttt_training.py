"""Training of models with fast weights: trainers, PEFT, warm-up, logs, resuming, steps that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_longctx import InnerLearningRateWarmup, LongContextConfig, LongContextTrainer, TTTConfig, TTTForCausalLM
from hf_longctx.trainer import inner_steps
from tests.fast_weights import loss_and_gradients, tiny_base, tiny_ttt, tokens, worst


def rows(count: int = 8, length: int = 20) -> list[dict]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(count, length)]


def arguments(tmp_path, **changes) -> TrainingArguments:
    chosen = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    chosen |= {"report_to": "none", "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(tmp_path), **{**chosen, **changes})


def trained(trainer: type, tmp_path, model=None, data=None, callbacks=None, resume=None, **changes):
    model = tiny_ttt(torch.float32) if model is None else model
    run = trainer(
        model=model,
        args=arguments(tmp_path, **changes),
        train_dataset=rows() if data is None else data,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    run.train(resume_from_checkpoint=resume)
    return run


def history(run, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def test_both_trainers_and_accumulation_take_the_same_steps(tmp_path):
    runs = [
        trained(Trainer, tmp_path),
        trained(LongContextTrainer, tmp_path),
        trained(LongContextTrainer, tmp_path, gradient_checkpointing=True),
        trained(LongContextTrainer, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2),
    ]
    losses = [history(run, "loss") for run in runs]
    assert all(one == pytest.approx(losses[0], rel=1e-4) for one in losses)
    ours = runs[1]
    assert all(value > 0 for value in history(ours, "inner_grad_norm"))
    assert all(0 < value <= 1 for value in history(ours, "inner_step_norm"))
    assert len(history(ours, "inner_gain")) == 2 and history(ours, "inner_learning_rate") == [1.0, 1.0]


def test_logged_inner_steps_are_those_of_a_forward(tmp_path):
    model, data = tiny_ttt(torch.float32), rows(2)
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        logits = model(ids).logits
        norms = model.last_rows.squares.sum(1).sqrt()
        caches = [model.make_cache(), model.make_cache()]
        gains = []
        for begin in (6, 12, 18):  # the step before a chunk, taken or not
            for cache, end in zip(caches, (begin, begin - 6)):
                cache.__init__(**model.cache_facts())
                if end:
                    model.read(ids[:, :end], cache)
            after = logits[:, begin : begin + 6][:, : 19 - begin]
            gains.append((caches[1], after))
    run = trained(LongContextTrainer, tmp_path, model=model, data=data, max_steps=1)
    assert history(run, "inner_grad_norm")[0] == pytest.approx(float(norms.mean()), rel=1e-4)
    assert history(run, "inner_step_norm")[0] == pytest.approx(float(norms.clamp(max=1).mean()), rel=1e-4)
    assert len(gains) == norms.shape[0] == 3


def test_the_gain_is_the_loss_without_the_step_minus_the_loss_with_it():
    model, ids = tiny_ttt(torch.float32), tokens(2, 12)
    still = tiny_ttt(torch.float32, inner_learning_rate=0.0)
    model.train()
    model.measures_gain = True
    model(ids, labels=ids)
    (gain,) = model.last_rows.gains
    each = []
    with torch.no_grad():
        for one in (still, model.eval()):
            logits = one(ids).logits[:, 6:11]
            each.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 7:], reduction="none").mean(1))
    assert torch.allclose(gain, each[0] - each[1], atol=1e-5)


def test_the_inner_learning_rate_warms_up_and_a_resumed_run_goes_on(tmp_path):
    callback = {"callbacks": [InnerLearningRateWarmup(start=0.2, ratio=0.5)], "max_steps": 8}
    run = trained(LongContextTrainer, tmp_path, **callback)
    rates = history(run, "inner_learning_rate")
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert run.model.inner_learning_rate == 1.0
    trained(LongContextTrainer, tmp_path, **{**callback, "save_strategy": "steps"}, save_steps=2)
    resumed = trained(
        LongContextTrainer, tmp_path, tiny_ttt(torch.float32), resume=str(tmp_path / "checkpoint-2"), **callback
    )
    assert history(resumed, "loss")[2:] == pytest.approx(history(run, "loss")[2:], rel=1e-4)
    assert history(resumed, "inner_learning_rate")[2:] == pytest.approx(rates[2:])
    other = tiny_ttt(torch.float32, chunk_tokens=4)
    with pytest.raises(ValueError, match="trained with `chunk_tokens` 6, but this model has .* 4"):
        trained(Trainer, tmp_path, other, resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("trainer", [Trainer, LongContextTrainer])
def test_evaluations_of_the_warmup_read_at_the_whole_rate(trainer, tmp_path):
    """Such as a checkpoint of that step does when it is loaded."""

    class Looks(TrainerCallback):
        rates: list[float] = []

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.rates.append(model.inner_learning_rate)

    looks = Looks()
    looks.rates = []
    model, data = tiny_ttt(torch.float32), rows(4)
    run = trainer(
        model=model,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=default_data_collator,
        callbacks=[InnerLearningRateWarmup(start=0.1, ratio=1.0), looks],
    )
    run.train()
    assert looks.rates == [1.0, 1.0]
    ids = torch.stack([row["input_ids"] for row in data[:2]])
    saved = TTTForCausalLM.from_pretrained(tmp_path / "checkpoint-1", attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert history(run, "eval_loss")[0] == pytest.approx(float(saved(ids, labels=ids).loss), rel=1e-4)
    if trainer is LongContextTrainer:
        assert history(run, "inner_learning_rate") == pytest.approx([0.1, 1.0])  # the last step is whole


@pytest.mark.parametrize(
    ("changes", "logs"),
    [
        ({"max_steps": 2, "logging_steps": 500}, 1),  # its summary is the only log
        ({"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"}, 2),
    ],
)
def test_short_runs_and_logs_by_epoch_have_a_gain(changes, logs, tmp_path):
    run = trained(LongContextTrainer, tmp_path, data=rows(6), **changes)
    for name in ("inner_gain", "inner_grad_norm", "inner_step_norm", "inner_learning_rate"):
        assert len(history(run, name)) == logs


def test_a_run_that_logged_has_no_second_gain_in_its_summary(tmp_path):
    run = trained(LongContextTrainer, tmp_path, max_steps=3, logging_steps=2)
    assert len(history(run, "inner_gain")) == 1 and "inner_gain" not in run.state.log_history[-1]


def test_an_interrupted_run_leaves_no_rate_of_its_warmup(tmp_path):
    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = tiny_ttt(torch.float32)
    with pytest.raises(KeyboardInterrupt):
        trained(LongContextTrainer, tmp_path, model, callbacks=[InnerLearningRateWarmup(start=0.2), Interrupts()])
    assert model.inner_learning_rate == model.settings.inner_learning_rate == 1.0


@pytest.mark.parametrize("changes", [{"start": -0.1}, {"start": math.nan}, {"ratio": 2}, {"ratio": "x"}])
def test_a_warmup_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match="must be a number from 0 to 1"):
        InnerLearningRateWarmup(**changes)


def test_a_warmup_without_inner_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`LlamaForCausalLM` takes no inner steps"):
        trained(Trainer, tmp_path, tiny_base(dtype=torch.float32), callbacks=[InnerLearningRateWarmup()])


def test_lora_trains_slow_weights_and_prime_mlps_in_full(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["primes"], r=2)
    model = peft.get_peft_model(tiny_ttt(torch.float32), config)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "prime" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    loss, gradients = loss_and_gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    again, others = loss_and_gradients(model, tokens())
    assert abs(again - loss) < 1e-5 and worst(others, gradients) < 1e-3
    assert any("lora_A" in name for name in gradients) and any("prime_gate" in name for name in gradients)
    run = trained(LongContextTrainer, tmp_path, model=model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_ttt(torch.float32), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(tokens()).logits, run.model.eval()(tokens()).logits, atol=1e-5)


@pytest.mark.parametrize(("zero", "saved", "warns"), [(True, None, 1), (True, ["primes"], 0), (False, None, 0)])
def test_an_adapter_without_what_fast_weights_start_from_is_warned_of(zero, saved, warns, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    said = []
    monkeypatch.setattr(inner_steps.logger, "warning", said.append)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, r=2)
    model = peft.get_peft_model(tiny_ttt(torch.float32, zero=zero), config)
    LongContextTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows(2), data_collator=default_data_collator
    )
    assert len(said) == warns and all("are new and frozen" in text for text in said)


def test_labels_of_another_loss_still_train(tmp_path):
    """A loss of one's own gets logits that came out of inner steps."""
    losses = []
    for smoothing in (0.0, 0.1):
        run = trained(LongContextTrainer, tmp_path, label_smoothing_factor=smoothing)
        losses += history(run, "loss")[:1]
    assert losses[0] != losses[1]


def test_sft_scores_what_inner_steps_made(tmp_path):
    trl = pytest.importorskip("trl")
    from hf_longctx import LongContextSFTTrainer
    from tests.tokenizer import tiny_tokenizer

    for trainer in (trl.SFTTrainer, LongContextSFTTrainer):
        model, data = tiny_ttt(torch.float32), [{"input_ids": ids.tolist()} for ids in tokens(2, 20)]
        ids = torch.tensor([row["input_ids"] for row in data])
        with torch.no_grad():
            expected, frozen = model(ids, labels=ids).loss, model(ids, labels=ids, learn=False).loss
        from datasets import Dataset

        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
        )
        run = trainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tiny_tokenizer())
        run.train()
        assert history(run, "loss")[0] == pytest.approx(float(expected), abs=1e-4)
        assert abs(expected - frozen) > 1e-3


def test_a_step_that_is_not_finite_is_named(tmp_path):
    model = tiny_ttt(torch.float32)
    with torch.no_grad():
        model.primes.prime_layers[1].prime_down.fill_(1e30)
        model.primes.prime_layers[1].prime_up.fill_(1e30)
    data = rows(2)
    with pytest.raises(RuntimeError, match="layer .*, chunk 0, row 0"):
        model.read(data[0]["input_ids"][None])
    run = LongContextTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
        data_collator=default_data_collator,
        long_context=LongContextConfig(on_nonfinite="raise"),
    )
    with pytest.raises(Exception, match="in the inner step of layer 1, chunk 0, row 0"):
        run.train()


def test_rows_of_any_length_and_right_padding_train(tmp_path):
    from tests.tokenizer import tiny_tokenizer

    data = [{"input_ids": tokens(1, length)[0].tolist()} for length in (5, 20, 13, 7)]
    run = LongContextTrainer(
        model=tiny_ttt(torch.float32),
        args=arguments(tmp_path),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    run.train()
    assert all(math.isfinite(loss) for loss in history(run, "loss"))


def test_evaluation_of_a_trainer_is_the_loss_of_rows(tmp_path):
    model, data = tiny_ttt(torch.float32), rows(3)
    run = LongContextTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=2),
        eval_dataset=data,
        data_collator=default_data_collator,
    )
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_model_from_random_weights_is_built_from_its_config():
    config = TTTForCausalLM.from_base(
        tiny_base(dtype=torch.float32), TTTConfig(window=8, chunk_tokens=4, suffix_layers=1)
    ).config
    model = TTTForCausalLM(config)
    assert model(tokens(1, 10), labels=tokens(1, 10)).loss.isfinite()


@pytest.mark.parametrize("trainer", [Trainer, LongContextTrainer])
def test_label_smoothing_scores_the_next_token(trainer, tmp_path):
    model, batch = tiny_ttt(torch.float32), {"input_ids": tokens(2, 20), "labels": tokens(2, 20)}
    run = trainer(
        model=model,
        args=arguments(tmp_path, label_smoothing_factor=0.1),
        train_dataset=rows(),
        data_collator=default_data_collator,
    )
    scores = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    right = scores.gather(-1, batch["labels"][:, 1:, None]).mean()
    loss = float(run.compute_loss(model, dict(batch)).detach())
    assert loss == pytest.approx(float(-0.9 * right - 0.1 * scores.mean()), abs=1e-5)
    assert repr(model).startswith("TTTForCausalLM(\n  (base): LlamaForCausalLM(")
