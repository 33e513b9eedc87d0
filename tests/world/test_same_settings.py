"""Ranks that were started with different settings end at once, with the field and the values."""

from __future__ import annotations

import tempfile

import pytest
import torch.distributed as dist

from hf_longctx import LongContextConfig, LongContextTrainer, MemoryConfig, SequenceMesh
from hf_longctx.proof.ranks import RanksError
from hf_longctx.resilience.same_settings import settings_of

from ..models import build
from ..training import Rows, arguments, pad_right, reset_state


def start(sizes=(1, 1), context=({}, {}), memory=({}, {}), **changes):
    """A trainer whose settings are given by rank; `changes` are of the arguments, one value a rank."""
    rank = dist.get_rank()
    reset_state()
    return LongContextTrainer(
        model=build("llama", "ulysses"),
        args=arguments(tempfile.mkdtemp(), **{name: values[rank] for name, values in changes.items()}),
        train_dataset=Rows(4),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=sizes[rank], **context[rank]),
        memory=MemoryConfig(**memory[rank]),
    )


def first_of(cases):
    """What each case raises, one world for all."""
    messages = []
    for case in cases:
        try:
            start(**case)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


DIFFERENT = [
    (
        {"context": ({"on_nonfinite": "skip"}, {})},
        "`long_context.on_nonfinite` differs between ranks ('skip' on",
    ),
    (
        {"context": ({}, {"check_replicas": 7})},
        "`long_context.check_replicas` differs between ranks (100 on",
    ),
    ({"context": ({}, {"inner_attention": "eager"}), "sizes": (2, 2)}, "`long_context.inner_attention` differs"),
    (
        {"memory": ({"loss_tile_size": 4}, {"loss_tile_size": 8})},
        "`memory.loss_tile_size` differs between ranks (4",
    ),
    ({"sizes": (2, 1)}, "`long_context.sequence_parallel_size` differs between ranks (2 on rank 0, 1 on rank 1)"),
    ({"learning_rate": (0.1, 0.2)}, "`args.learning_rate` differs between ranks (0.1 on rank 0, 0.2 on rank 1)"),
    ({"logging_steps": (1, 2), "max_steps": (3, 4)}, "`args.logging_steps` differs between ranks (1 on"),
    ({"seed": (1, 2)}, "`args.seed` differs"),
    ({"accelerator_config": ({}, {"even_batches": False})}, "`args.accelerator_config` differs"),
]
EQUAL = [
    {"report_to": ("none", []), "disable_tqdm": (True, False), "run_name": ("a", "b"), "hub_token": ("a", "b")},
    {"dataloader_num_workers": (0, 2), "dataloader_multiprocessing_context": (None, "spawn")},
    {"log_level": ("error", "info"), "seed": (1, 2), "data_seed": (3, 3)},
    {"sizes": (2, 2)},
]


def test_settings_that_differ_are_named_before_any_collective_of_the_run(world2):
    for (_, expected), messages in zip(DIFFERENT, zip(*world2.run(first_of, [case for case, _ in DIFFERENT]))):
        assert messages[0].startswith(expected), messages[0]
        assert messages[0] == messages[1]
    assert "and so do 1 more settings" in world2.run(first_of, [DIFFERENT[6][0]])[0][0]


def test_what_may_differ_is_not_compared(world2):
    assert world2.run(first_of, EQUAL) == [[""] * len(EQUAL)] * 2


def build_meshes():
    SequenceMesh.build(2 - dist.get_rank())


def test_sizes_of_a_loop_of_ones_own_are_compared_too(world2):
    with pytest.raises(RanksError, match=r"`sequence_parallel_size` differs between ranks \(2 on rank 0, 1 on rank 1"):
        world2.run(build_meshes)


def test_texts_of_settings_hold_no_addresses_and_no_secrets(tmp_path):
    args = arguments(str(tmp_path), hub_token="secret")
    text = str(settings_of({"long_context": LongContextConfig()}, args, shares_rows=False))
    assert "secret" not in text and " at 0x" not in text and str(tmp_path) not in text
