"""ALiBi in the place of a rotation, on rows that ranks share: outputs, every gradient and a training run."""

from __future__ import annotations

import pytest
import torch

from hf_longctx import SequenceMesh, adapt, use_alibi

from ..training import assert_same_trajectory, train
from ..unit.test_use_alibi import build
from .test_own_attention import share_error


KINDS = ("dense", "left", "packed")


def errors_of_shares(size: int) -> dict[str, float]:
    mesh, errors = SequenceMesh.build(size), {}
    for kind in ("llama", "mistral", "stablelm"):
        reference, model = build(kind), build(kind, "ulysses")
        use_alibi(reference)
        use_alibi(model)
        adapt(model, mesh)
        for rows in KINDS:
            errors[f"{kind}, {rows}"] = share_error(model, reference, mesh, rows)
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_rows_are_exact(worlds, size):
    for errors in worlds(size).run(errors_of_shares, size):
        assert max(errors.values()) <= 1e-9, errors


def with_alibi(model: torch.nn.Module) -> torch.nn.Module:
    use_alibi(model)
    return model


def test_training_is_that_of_one_process(world2):
    expected = train(0, attention="packed", prepare=with_alibi)
    for actual in world2.run(train_on_two):
        assert_same_trajectory(actual, expected)


def train_on_two():
    return train(2, prepare=with_alibi)
