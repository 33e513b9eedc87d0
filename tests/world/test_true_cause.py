"""Where sharding is not the cause, the message says what is: weights, precision, labels, positions, a compiler."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import transformers

from hf_longctx import LongContextConfig, PackingCollator, SequenceMesh, shard_batch
from hf_longctx.trainer.mixin import SequenceParallelMixin

from ..models import build
from ..training import Rows, arguments, assert_same_trajectory, pad_right, reset_state, train


def with_weight(value: float):
    model = build("llama", "ulysses")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    return model


def overflowing():
    model = build("llama", "ulysses")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    return model


def with_head_of_another_type():
    model = build("llama", "ulysses")
    model.lm_head.double()
    return model


def compiled():
    return torch.compile(build("llama", "ulysses"))


MODELS = {
    "nan": (lambda: with_weight(float("nan")), "its parameter `model.layers.1.mlp.up_proj.weight` holds nan"),
    "inf": (lambda: with_weight(float("inf")), "its parameter `model.layers.1.mlp.up_proj.weight` holds inf"),
    "overflow": (overflowing, "while its parameters are finite: its activations overflow"),
    "precision": (with_head_of_another_type, "cannot run in one process either .*`lm_head.weight` is float64"),
    "compiled": (compiled, "the model is compiled .`OptimizedModule` from `torch.compile`"),
}


def messages_of_models(size):
    return {name: message_of(partial(train, size, model=make(), max_steps=1)) for name, (make, _) in MODELS.items()}


def message_of(run) -> str:
    try:
        run()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def batch_of(change):
    def collate(rows):
        return change(pad_right(rows))

    return collate


def positions_of(batch, positions):
    return {**batch, "position_ids": positions[None, : batch["input_ids"].shape[1]].expand_as(batch["input_ids"])}


BATCHES = {
    "float labels": (lambda batch: {**batch, "labels": batch["labels"].float()}, "`labels` have type float32"),
    "lists": (lambda batch: {k: v.tolist() for k, v in batch.items()}, "`input_ids` is a `list`, but rows are cut"),
    "arrays": (lambda batch: {k: v.numpy() for k, v in batch.items()}, "`input_ids` is a `ndarray`, but rows are cut"),
    "one list": (lambda batch: {**batch, "labels": batch["labels"].tolist()}, "`labels` is a `list`"),
    "another list": (
        lambda batch: {**batch, "token_kinds": batch["labels"].tolist()},
        "`token_kinds` is a `list`, but rows are cut",
    ),
    "tuple": (lambda batch: tuple(batch.values()), "the collator returned a `tuple`, but a batch is a mapping"),
    "fractions": (
        lambda batch: {
            key: value for key, value in positions_of(batch, torch.arange(40) * 0.5).items() if key != "attention_mask"
        },
        "`position_ids` .* are no whole numbers, and without an `attention_mask`",
    ),
    "restarts": (lambda batch: positions_of(batch, torch.arange(40) % 5), "packs several documents"),
}


def messages_of_batches():
    collators = {name: {"data_collator": batch_of(change)} for name, (change, _) in BATCHES.items()}
    return {name: message_of(partial(train, 2, trainer_options=made, max_steps=1)) for name, made in collators.items()}


def matches(messages: dict, cases: dict) -> None:
    for name, message in messages.items():
        assert re.search(cases[name][1], message), f"{name}: {message!r}"
        assert "mixes tokens" not in message and "drop `attention_mask`" not in message or name == "restarts"


def test_a_broken_model_is_not_called_one_that_mixes_tokens(world2):
    for messages in world2.run(messages_of_models, 2):
        matches(messages, MODELS)


def test_on_one_process_too():
    models = {name: MODELS[name][0]() for name in ("nan", "overflow")}
    messages = {name: message_of(partial(train, 1, model=model, max_steps=1)) for name, model in models.items()}
    matches(messages, MODELS)


def test_a_batch_is_refused_for_what_is_wrong_with_it(world2):
    for messages in world2.run(messages_of_batches):
        matches(messages, BATCHES)


def skipping(batch):
    positions = torch.arange(40)
    return positions_of(batch, positions + 100 * (positions > 3))


def fractional(batch):
    return positions_of(batch, torch.arange(40) * 0.5)


def train_with(size, change):
    return train(size, trainer_options={"data_collator": batch_of(change)})


@pytest.mark.parametrize("change", [skipping, fractional])
def test_positions_that_skip_ahead_or_interpolate_beside_a_mask_are_one_document(world2, change):
    assert_same_trajectory(world2.run(train_with, 2, change)[0], train_with(0, change))


def shard_a_tuple():
    mesh = SequenceMesh.build(2)
    return message_of(lambda: shard_batch((torch.ones(1, 4),), mesh))


def test_a_loop_is_told_that_a_batch_is_a_mapping(world2):
    assert world2.run(shard_a_tuple)[0].startswith("`batch` is a `tuple`, but a batch is a mapping")


def test_packed_classification_on_one_process_is_not_told_to_use_one_process():
    model = transformers.LlamaForSequenceClassification._from_config(
        build("llama", "packed").config, attn_implementation="packed"
    )
    with pytest.raises(NotImplementedError, match="would pool the documents of a packed one together") as error:
        train(1, model=model, max_steps=1, trainer_options={"data_collator": PackingCollator()})
    assert "set `sequence_parallel_size` to 1" not in str(error.value)


def of_library(kind: str, name: str) -> type:
    if kind == "trl":
        trl = pytest.importorskip("trl")
        return getattr(trl, name)
    return getattr(pytest.importorskip("sentence_transformers"), name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("trl", "DPOTrainer"),
        ("trl", "RewardTrainer"),
        ("trl", "GRPOTrainer"),
        ("sentence", "SentenceTransformerTrainer"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_trainers_whose_batches_are_not_rows_of_tokens_are_refused(tmp_path, kind, name, size):
    trainer = type("Mixed", (SequenceParallelMixin, of_library(kind, name)), {})
    reset_state()
    message = f"`{name}` does not train on rows of tokens"
    if (name, size) == ("GRPOTrainer", 2):
        message = "`GRPOTrainer` samples completions while it trains"
    with pytest.raises(NotImplementedError, match=message):
        trainer(
            model=build("llama", "packed" if size == 1 else "ulysses"),
            args=arguments(str(tmp_path)),
            train_dataset=Rows(2),
            long_context=LongContextConfig(sequence_parallel_size=size),
        )
