"""`TrainerBase`: which configs a trainer takes, and a trainer of one's own on it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice, Trainer

import hf_longctx
from hf_longctx import (
    LongContextConfig,
    LongContextTrainer,
    MemoryConfig,
    SequenceMesh,
    SleepConfig,
    SourcesConfig,
    TextsConfig,
)
from hf_longctx.config.audiences import TRAINERS, take_configs
from hf_longctx.trainer.base import TrainerBase

from ..models import build
from ..training import Rows, arguments, pad_right, reset_state


@pytest.fixture
def given(tmp_path):
    """Arguments of a trainer, by name."""
    reset_state()
    args = arguments(str(tmp_path), max_steps=1)
    return {"model": build("llama", "packed"), "args": args, "data_collator": pad_right, "train_dataset": Rows()}


# Which trainer takes which config


def test_the_table_names_every_trainer_and_is_what_it_takes():
    pytest.importorskip("trl")
    pytest.importorskip("sentence_transformers")
    assert set(TRAINERS) == {name for name in hf_longctx.__all__ if name.endswith("Trainer")}
    for name, row in TRAINERS.items():
        assert getattr(hf_longctx, name).configs is row
        assert row["long_context"] is LongContextConfig


def test_every_config_has_one_keyword_and_is_public():
    known = {(name, kind) for row in TRAINERS.values() for name, kind in row.items()}
    assert len(known) == len(dict(known)) == len({kind for _, kind in known})
    public = {name for name in hf_longctx.__all__ if name.endswith("Config")}
    assert {kind.__name__ for _, kind in known} == public - {
        "TTTConfig",
        "LSHConfig",
    }  # which are of a model, and not of a run


def test_configs_are_attributes_at_their_defaults_or_as_given(given):
    plain = LongContextTrainer(**given)
    assert (plain.long_context, plain.memory) == (LongContextConfig(), MemoryConfig())
    config = MemoryConfig(mlp_tile_size=3)
    assert LongContextTrainer(**given, memory=config, long_context=None).memory is config


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            {"sources": SourcesConfig(deduplicate=True)},
            r"`sources` \(SourcesConfig\(.*\)\) is for `LongContextSentenceTransformerTrainer`, and "
            "`LongContextTrainer` takes `long_context`, `memory`, `indexer`, `ramp` and `sleep`: leave it out",
        ),
        ({"texts": TextsConfig()}, "`texts` .* is for `LongContextSentenceTransformerTrainer`, and"),
        (
            {"long_context": MemoryConfig()},
            r"`long_context` \(MemoryConfig\(.*\)\) must be given as a `LongContextConfig`: pass the `MemoryC",
        ),
        (
            {"memory": SourcesConfig()},
            "must be given as a `MemoryConfig`: a `SourcesConfig` is for `LongContextSentenceTransformerTrainer`, as",
        ),
        ({"memory": "max"}, r"`memory` \('max'\) must be given as a `MemoryConfig`: write `memory=MemoryConfig\("),
        ({"long_context": {"sequence_parallel_size": 2}}, "must be given as a `LongContextConfig`"),
    ],
)
def test_a_config_that_the_trainer_does_not_take_is_refused(given, configs, message):
    with pytest.raises(ValueError, match=message):
        LongContextTrainer(**given, **configs)


def test_a_trainer_that_refuses_a_config_is_not_recommended_for_it():
    arguments = {"sleep": SleepConfig(window=8)}
    with pytest.raises(ValueError, match=r"is for `LongContextTrainer`, and `LongContextDPOTrainer` takes"):
        take_configs("LongContextDPOTrainer", TRAINERS["LongContextDPOTrainer"], arguments)


def test_the_embedding_trainer_refuses_what_is_for_language_models():
    pytest.importorskip("sentence_transformers")
    from hf_longctx import LongContextSentenceTransformerTrainer

    message = (
        "is for `LongContextTrainer`, `LongContextSFTTrainer`, `LongContextDPOTrainer`, `LongContextKTOTrainer` and "
        "`LongContextRewardTrainer`, and `LongContextSentenceTransformerTrainer` takes `long_context`, `sources` and "
        "`texts`: leave it out"
    )
    with pytest.raises(ValueError, match=message):
        LongContextSentenceTransformerTrainer(memory=MemoryConfig(memory="checkpoint"))


# Arguments of the library's constructor


def test_positional_arguments_reach_the_library(given):
    trainer = LongContextTrainer(*given.values())
    assert trainer.args is given["args"] and trainer.train_dataset is given["train_dataset"]
    assert trainer.data_collator is pad_right


@pytest.mark.parametrize("more", [{"model": None}, {"no_such_argument": 1}])
def test_arguments_that_the_library_would_refuse_are_refused(given, more):
    with pytest.raises(TypeError, match=next(iter(more))):
        LongContextTrainer(*given.values(), **more)


def test_a_library_that_passes_positional_arguments_on_is_looked_through(given):
    class PassesOn(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Own(TrainerBase, PassesOn):
        pass

    assert Own(*given.values()).train_dataset is given["train_dataset"]


@pytest.mark.parametrize("preset", ["checkpoint", "max", "auto"])
def test_memory_that_needs_arguments_is_refused_without_them(given, preset):
    with pytest.raises(ValueError, match=f"`memory` .'{preset}'. asks for activation checkpointing .* `args` is miss"):
        LongContextTrainer(given["model"], memory=MemoryConfig(memory=preset))


# A trainer of one's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginConfig:
    margin: float = 0.5


class MarginTrainer(TrainerBase, Trainer):
    """All that a trainer of one's own needs: the configs it understands, its hooks and its loss."""

    configs = {**TrainerBase.configs, "margin": MarginConfig}

    def prepare_arguments(self, given):
        assert self.margin.margin and not hasattr(self, "args")
        given["args"].label_names = ["labels"]

    def check_model(self):
        assert not hasattr(self, "mesh")
        super().check_model()

    def prepare_model(self):
        assert isinstance(self.mesh, SequenceMesh)
        self.prepared = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return torch.relu(self.margin.margin - model(input_ids=inputs["input_ids"]).logits).mean()


def test_a_trainer_of_ones_own_starts_in_order_and_trains_guarded(given):
    trainer = MarginTrainer(**given, margin=MarginConfig(margin=2.0))
    assert trainer.prepared and trainer.args.label_names == ["labels"]
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.state.log_history[-1]["train_loss"] > 0
    trainer = MarginTrainer(**given, margin=MarginConfig(margin=float("nan")))
    with pytest.raises(RuntimeError, match="step 1 is not finite"):
        trainer.train()


def test_a_trainer_of_ones_own_refuses_what_others_take(given):
    with pytest.raises(ValueError, match="`MarginTrainer` takes `long_context` and `margin`: leave it out"):
        MarginTrainer(**given, memory=MemoryConfig())
    with pytest.raises(ValueError, match=r"`margin` \(0.5\) must be given as a `MarginConfig`"):
        MarginTrainer(**given, margin=0.5)


@pytest.mark.parametrize("data_seed", [None, 11])
def test_rows_are_drawn_by_the_data_seed_where_there_is_one(given, data_seed):
    given["args"].data_seed = data_seed
    assert LongContextTrainer(**given).data_seed == (data_seed or given["args"].seed)


def choices(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of three choices a row."""
    ids = torch.arange(3, 3 + 18 * len(rows)).view(len(rows), 3, 6)
    return {"input_ids": ids, "labels": torch.arange(len(rows)) % 3}


def own_mask(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch whose mask was made by hand, for each query and key."""
    batch = pad_right(rows)
    keys = batch["attention_mask"].bool()[:, None, None, :]
    seen = torch.ones(2 * batch["input_ids"].shape[1:], dtype=torch.bool).tril() & keys
    return {**batch, "attention_mask": seen}


@pytest.mark.parametrize("collator", [choices, own_mask])
def test_batches_that_describe_no_documents_train_as_with_the_library(given, collator):
    def trained(trainer) -> list[torch.Tensor]:
        reset_state()
        if collator is choices:
            kind = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
            torch.manual_seed(0)
            model = BertForMultipleChoice(kind)
        else:
            model = build("llama", "sdpa")
        run = trainer(**{**given, "model": model, "data_collator": collator})
        run.train()
        return [parameter.detach() for parameter in run.model.parameters()]

    for ours, theirs in zip(trained(LongContextTrainer), trained(Trainer), strict=True):
        assert torch.equal(ours, theirs)


# Evaluation before training


@pytest.mark.parametrize("is_patched", [True, False])
def test_an_evaluation_in_bfloat16_leaves_the_forward_as_it_was(given, is_patched):
    """accelerate casts in a forward of its own, and takes TRL's head and every patch away together with it."""
    model, args = given["model"], arguments(str(given["args"].output_dir), max_steps=1, bf16=True)
    original, calls = model.forward, []

    @functools.wraps(original)
    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    if is_patched:
        model.forward = forward
    run = LongContextTrainer(**{**given, "args": args}, eval_dataset=Rows())
    patched = vars(model).get("forward")
    run.evaluate()
    assert vars(model).get("forward") is patched and "_original_forward" not in vars(model)
    calls.clear()
    run.train()
    assert bool(calls) == is_patched
