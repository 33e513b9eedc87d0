"""What preference and reward trainers refuse under sharding, before the first step, and what they do not."""

from __future__ import annotations

import importlib

import datasets
import pytest


trl = pytest.importorskip("trl")

from hf_longctx import LongContextConfig, LongContextRewardTrainer, MemoryConfig  # noqa: E402
from hf_longctx.proof.ranks import RanksError  # noqa: E402
from hf_longctx.trainer.base import TrainerBase  # noqa: E402

from ..models import build  # noqa: E402
from ..preference import fit, pairs, reward_model, settings_of, trainer_of, worst  # noqa: E402
from ..tokenizer import tiny_tokenizer  # noqa: E402
from ..training import reset_state, weights_of  # noqa: E402


REFUSED = [
    (
        {"options": {"ref_model": "sdpa"}},
        ValueError,
        "`ref_model`: `LlamaForCausalLM` runs attn_implementation='sdpa'",
    ),
    ({"options": {"ref_model": "one head"}}, ValueError, "`ref_model`: .*head"),
    ({"use_liger_kernel": True}, NotImplementedError, "`use_liger_kernel` .* cannot be used"),
    ({"options": {"train_dataset": "images"}}, NotImplementedError, "has a column `images`"),
    ({"max_length": 1}, ValueError, "all 16 rows of the train set were dropped"),
    ({"memory": {"loss_tile_size": 64}}, NotImplementedError, "`DPOTrainer` computes it in tiles of its own"),
    ({"memory": {"memory": "auto"}}, NotImplementedError, "plans the step of one language model"),
    ({"memory": {"reversible_layers": True}}, NotImplementedError, "another function than its reference"),
    ({"task": "reward", "memory": {"loss_tile_size": 64}}, NotImplementedError, "has none over a vocabulary"),
    ({"flatten": True, "attention": "sdpa"}, ValueError, "`flatten_rows` .* would not keep apart"),
    ({"flatten": True, "model": "lfm2", "attention": "eager"}, ValueError, "`flatten_rows` .* would not keep apart"),
    ({"options": {"peft_config": "prompt"}, "reference": "none"}, NotImplementedError, "on a share of a row"),
]


def build_with(size: int, settings: dict) -> None:
    """Build a trainer; some of its options are named, since they cannot be sent."""
    options = dict(settings.get("options", {}))
    if options.get("ref_model") == "sdpa":
        options["ref_model"] = build("llama", "sdpa")
    elif "ref_model" in options:
        options["ref_model"] = build("llama", "ulysses", num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    if "train_dataset" in options:
        options["train_dataset"] = pairs(images=True)
    if "peft_config" in options:
        from peft import PromptTuningConfig

        options["peft_config"] = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    trainer_of(size, **{**settings, "options": options})


def all_refused(size: int) -> None:
    for settings, kind, message in REFUSED:
        if settings.get("flatten") and size > 1 and settings["attention"] != "ulysses":
            continue  # refused for its attention first
        with pytest.raises(kind, match=message):
            build_with(size, settings)


def test_bad_settings(world2):
    world2.run(all_refused, 2)


@pytest.mark.parametrize(("settings", "kind", "message"), [case for case in REFUSED if case[0].get("flatten")])
def test_flattened_rows_need_an_attention_that_packs(settings, kind, message):
    with pytest.raises(kind, match=message):
        build_with(1, settings)


def other_axes() -> None:
    from accelerate import ParallelismConfig

    for axis in ("cp_size", "sp_size"):
        with pytest.raises((NotImplementedError, ValueError), match=axis):
            trainer_of(
                2, options={"args": trl.DPOConfig(**settings_of(parallelism_config=ParallelismConfig(**{axis: 2})))}
            )


def no_completion() -> None:
    trainer = trainer_of(2)
    batch = trainer.data_collator([dict(trainer.train_dataset[0])])
    batch["completion_mask"].zero_()
    with pytest.raises(ValueError, match=r"none of the 2 rows of a batch has a token of a completion"):
        trainer.compute_loss(trainer.model, batch)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(3))])
    batch = {name: value.flip(1) for name, value in batch.items()}
    batch["completion_mask"] = batch["attention_mask"]
    with pytest.raises(ValueError, match="padding on the left has a target"):
        trainer.compute_loss(trainer.model, batch)
    with pytest.raises(NotImplementedError, match="`predict` returns the logits of whole rows"):
        trainer.args.prediction_loss_only = False
        trainer.predict(trainer.train_dataset)
    with pytest.raises(ValueError, match="the eval set has no rows"):
        trainer.evaluate(trainer.train_dataset.select([]))


def test_bad_batches(world2):
    world2.run(no_completion)
    world2.run(other_axes)


def other_rows(size: int) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()

    def rows():
        for row in pairs():
            yield {**row, "prompt": f"w{rank + 1} {row['prompt']}"}

    fit(size, {"options": {"train_dataset": datasets.IterableDataset.from_generator(rows)}})


def test_groups_whose_ranks_read_other_rows(world2):
    with pytest.raises(RanksError, match="drew different rows"):
        world2.run(other_rows, 2)


def test_a_tokenizer_without_padding():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither a `pad_token` nor an `eos_token`"):
        reset_state()
        LongContextRewardTrainer(
            model=reward_model("ulysses"),
            args=trl.RewardConfig(**settings_of()),
            train_dataset=pairs("reward"),
            processing_class=tokenizer,
            memory=MemoryConfig(),
        )


def test_trainers_that_sample_are_left_alone_on_one_process():
    """A step of GRPO on our attention, sampled and scored, is that of transformers' attention."""
    weights = {}
    for attention, bases in (("packed", (TrainerBase, trl.GRPOTrainer)), ("sdpa", (trl.GRPOTrainer,))):
        reset_state()
        names = ("max_length", "gradient_checkpointing", "dataset_num_proc")
        settings = {name: value for name, value in settings_of(max_steps=1).items() if name not in names}
        args = trl.GRPOConfig(**settings, num_generations=2, max_completion_length=4)
        trainer = type("Mixed", bases, {})(
            model=build("llama", attention),
            reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
            args=args,
            train_dataset=pairs().select_columns("prompt"),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        weights[attention] = weights_of(trainer)
    assert worst(weights["packed"], weights["sdpa"]) <= 2e-5


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "DistillationTrainer"])
def test_trainers_that_sample(tmp_path, name):
    library = getattr(importlib.import_module(f"trl.trainer.{name.removesuffix('Trainer').lower()}_trainer"), name)
    trainer = type("Mixed", (TrainerBase, library), {})
    reset_state()
    with pytest.raises(NotImplementedError, match=f"`{name}` samples completions while it trains"):
        trainer(model=build("llama", "ulysses"), long_context=LongContextConfig(sequence_parallel_size=2))
