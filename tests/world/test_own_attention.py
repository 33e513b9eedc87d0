"""Families with an attention of their own, on rows that two ranks share: outputs and every gradient of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_longctx import SequenceMesh, gather_sequence
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.parallel.shard import share_of_group

from ..own_attention import (
    CASES,
    TOLERANCE,
    difference,
    forward,
    gradients_of,
    model_of,
    one_process,
    projection,
    rows_of,
)


KINDS = ("left", "packed")


def errors_of_shares(cases: list[str], size: int) -> dict[str, float]:
    """By case and rows, the largest relative difference of outputs and gradients."""
    mesh, errors = SequenceMesh.build(size), {}
    for case in cases:
        reference, model = model_of(case, "eager"), model_of(case, "ulysses")
        attach_adapters(model)
        for kind in KINDS:
            errors[f"{case}, {kind}"] = share_error(model, reference, mesh, kind, case)
    return errors


def share_error(model, reference, mesh: SequenceMesh, kind: str, case: str = "gpt_neo") -> float:
    """The largest relative difference of outputs and gradients on rows of a kind, whose tokens are any case's."""
    batch = rows_of(case, kind, reference.config)
    expected = one_process(reference, batch)
    weights = projection(batch, expected.shape[-1])
    theirs = gradients_of(reference, (expected * weights).sum())
    share = share_of_group(batch, mesh, inner_attention="auto", shift_labels=False)
    shard = share["sequence_shard"]
    outputs = forward(model, share)
    missing = shard.local_len * shard.size - shard.num_tokens
    mine = torch.nn.functional.pad(weights, (0, 0, 0, missing))[:, shard.rank * shard.local_len :][
        :, : shard.local_len
    ]
    ours = gradients_of(model, (outputs * mine).sum())
    for name in theirs:  # a rank without a gradient of its own takes part, too
        ours[name] = ours.get(name, torch.zeros_like(theirs[name]))
        dist.all_reduce(ours[name], group=mesh.sp_group)
    whole = gather_sequence(outputs, mesh.sp_group)[:, : shard.num_tokens]
    real = weights != 0
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    found = [difference(ours[name], theirs[name], largest) for name in theirs]
    return max(difference(whole * real, expected.detach() * real), *found)


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_rows_are_exact(worlds, size):
    four = ["gpt_neo", "mpnet", "roformer", "stablelm", "xglm", "bloom, 6 heads", "mpt, 6 heads, clipped", "falcon"]
    cases = CASES if size == 2 else [*four, "falcon alibi"]
    for errors in worlds(size).run(errors_of_shares, cases, size):
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        assert not wrong
        assert len(errors) == len(KINDS) * len(cases)
