"""`LongContextSFTTrainer` equals TRL's `SFTTrainer` in one process: every loss type, every way to choose the trained "
"tokens."""

from __future__ import annotations

import tempfile

import datasets
import pytest
from trl import SFTConfig, SFTTrainer

from hf_longctx import LongContextConfig, LongContextSFTTrainer, MemoryConfig
from hf_longctx.proof.ranks import RanksError

from ..models import build
from ..overrides import scales, shifts_a_share, squares, sums_aligned, with_compute_loss
from ..tokenizer import tiny_tokenizer, words
from ..training import assert_same_trajectory, reset_state, steps, weights_of


def dataset_of(kind: str) -> datasets.Dataset:
    rows = []
    for index in range(16):
        prompt, answer = words(3 + index % 5, index), words(2 + (index * 3) % 11, index + 50)
        if kind == "text":
            rows.append({"text": f"{prompt} {answer}"})
        elif kind == "completion":
            rows.append({"prompt": prompt, "completion": f" {answer}"})
        else:
            turns = [(prompt, "user"), (answer, "assistant"), (answer, "user"), (prompt, "assistant")]
            rows.append({"messages": [{"role": role, "content": text} for text, role in turns]})
    return datasets.Dataset.from_list(rows)


def fit(
    size: int,
    kind: str = "text",
    evaluate: bool = False,
    lora: bool = False,
    loss_function=None,
    attention: str = "ulysses",
    collator=None,
    memory=None,
    stream: bool = False,
    override=None,
    ramp=None,
    **changes,
):
    """Train with TRL's own trainer (`size` 0) or ours, and return (history, weights, eval metrics)."""
    reset_state()
    stock = size == 0
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "num_train_epochs": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
        "max_length": 64,
        "gradient_checkpointing": False,
        "dataset_num_proc": None,
    }
    options = {
        "model": build("llama", "sdpa" if stock else attention),
        "data_collator": collator,
        "args": SFTConfig(**{**settings, **changes}),
        "train_dataset": dataset_of(kind),
        "processing_class": tiny_tokenizer(),
        "compute_loss_func": loss_function,
    }
    if stream:
        options["train_dataset"] = options["train_dataset"].to_iterable_dataset()
    if evaluate:
        options["eval_dataset"] = dataset_of(kind).select(range(5))
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights="pissa"
        )
    if stock:
        base = SFTTrainer if override is None else with_compute_loss(SFTTrainer, override)
        trainer = base(**options)
    else:
        long_context = LongContextConfig(sequence_parallel_size=size)
        base = LongContextSFTTrainer if override is None else with_compute_loss(LongContextSFTTrainer, override)
        trainer = base(**options, long_context=long_context, memory=MemoryConfig(**(memory or {})), ramp=ramp)
    trainer.train()
    return trainer.state.log_history, weights_of(trainer), trainer.evaluate() if evaluate else None


def compare(world, size, **options):
    data_parallel = world.size // size
    batch = options.pop("per_device_train_batch_size", 2)
    expected = fit(0, per_device_train_batch_size=batch * data_parallel, **options)
    results = world.run(run_here, size, {"per_device_train_batch_size": batch, **options})
    for actual in results:
        assert_same_trajectory(actual, expected, 2e-5)
    return expected, results


def run_here(size, options):
    return fit(size, **options)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_types(world4, loss_type):
    compare(world4, 2, loss_type=loss_type, gradient_accumulation_steps=2)


@pytest.mark.parametrize(("kind", "choice"), [("completion", {}), ("chat", {"assistant_only_loss": True})])
def test_only_completions_or_assistant_turns_are_trained(world2, kind, choice):
    expected, results = compare(world2, 2, kind=kind, **choice)
    everything = fit(0, kind=kind, **({"completion_only_loss": False} if kind == "completion" else {}))
    assert abs(steps(everything[0])[0][0] - steps(expected[0])[0][0]) > 1e-3, "the choice made no difference"


def test_token_metrics_count_every_token_once(world4):
    expected, results = compare(world4, 2)
    for history, _, _ in results:
        for ours, theirs in zip(history[:4], expected[0][:4]):
            assert ours["num_tokens"] == theirs["num_tokens"]
            assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=1e-6)
            assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)


def test_lora(world2):
    compare(world2, 2, lora=True, learning_rate=0.05)


def test_label_smoothing(world2):
    compare(world2, 2, label_smoothing_factor=0.1)


def shifting_loss(outputs, labels, num_items_in_batch=None):
    """Cross entropy by hand, with a focal weight, shifted inside."""
    import torch

    logits, labels = outputs.logits[..., :-1, :].transpose(1, 2), labels[..., 1:]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * (1 - torch.exp(-losses))).sum() / num_items_in_batch


@pytest.mark.parametrize("override", [scales, sums_aligned])
@pytest.mark.parametrize("options", [{"kind": "completion"}, {"packing": True, "max_length": 24}], ids=str)
def test_overrides_of_compute_loss(world2, override, options):
    expected, results = compare(world2, 2, override=override, **options)
    if override is scales:  # the proof ran the metrics of `SFTTrainer` too, and left nothing in them
        for history, _, _ in results:
            for ours, theirs in zip(history[:4], expected[0][:4]):
                assert ours["num_tokens"] == theirs["num_tokens"]
                assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"), [(squares, "its means are local"), (shifts_a_share, "last target is on the next rank")]
)
def test_overrides_of_compute_loss_that_do_not_add_up_are_refused(world2, override, message):
    with pytest.raises(RanksError, match=message):
        world2.run(run_here, 2, {"override": override})


def test_compute_loss_func(world2):
    compare(world2, 2, loss_function=shifting_loss)


def test_evaluation_is_sharded_and_token_weighted(world4):
    expected = fit(1, evaluate=True, per_device_train_batch_size=4, per_device_eval_batch_size=8)
    for actual in world4.run(run_here, 2, {"evaluate": True, "per_device_eval_batch_size": 2}):
        assert actual[2]["eval_loss"] == pytest.approx(expected[2]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows(world2, strategy):
    compare(world2, 2, packing=True, packing_strategy=strategy, max_length=24, per_device_train_batch_size=2)


@pytest.mark.parametrize("options", [{"kind": "completion"}, {"packing": True, "max_length": 24}], ids=str)
def test_streams(world2, options):
    compare(world2, 2, stream=True, per_device_train_batch_size=1, **options)


def test_gradient_checkpointing(world2):
    compare(world2, 2, gradient_checkpointing=True)
