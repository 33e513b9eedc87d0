"""Models in which a layer reads a row's length or counts positions: ranks get the numbers of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from hf_longctx import SequenceMesh, gather_sequence, shard_batch
from hf_longctx.adapters.row_lengths import follow_lengths

from ..lengths import LENGTH_MODELS, THRESHOLD, build_with_lengths
from ..models import VOCAB


# Rows on both sides of the threshold, in an order in which one process remembers the longest so far.
TOKENS = (9, 23, 16, 7, 14)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda tokens: torch.randint(3, VOCAB, (2, tokens), generator=generator)
    found = [{"input_ids": draw(tokens)} for tokens in TOKENS]
    padded = {"input_ids": draw(15), "attention_mask": torch.ones(2, 15, dtype=torch.long)}
    padded["attention_mask"][0, :6] = 0
    short = {"input_ids": draw(7), "position_ids": torch.arange(7)[None] + THRESHOLD - 3}  # brought, and past it
    lengths = ((15, 1, 7), (2, 6, 15))
    packed = {"input_ids": draw(23)}
    packed["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return [*found, padded, short, packed]


def upstream(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(*batch["input_ids"].shape, VOCAB, generator=generator, dtype=torch.float64)
    return weights * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def on_one_process(name, rope):
    model, results = build_with_lengths(name, rope, "sdpa"), []
    for batch in batches():
        weights = upstream(batch)
        if "attention_mask" in batch or len(batch.get("position_ids", ())) < 2:
            logits = model(**batch, use_cache=False).logits
        else:
            logits = torch.stack([_alone(model, batch, row) for row in range(2)])
        (logits * weights).sum().backward()
        results.append((logits.detach() * (weights != 0), gradients(model)))
    return results


def _alone(model, batch, row: int) -> torch.Tensor:
    """The documents of a row, each where nothing has run before it."""
    ids, positions = batch["input_ids"][row], batch["position_ids"][row]
    bounds = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    pieces = []
    for start, stop in zip(bounds, bounds[1:]):
        with torch.no_grad():
            model(input_ids=ids[None, :1], use_cache=False)  # transformers forgets what it has grown to
        pieces.append(model(input_ids=ids[None, start:stop], use_cache=False).logits[0])
    return torch.cat(pieces)


def on_the_world(name, rope, size):
    mesh, model, results = SequenceMesh.build(size), build_with_lengths(name, rope, "ulysses"), []
    with pytest.raises(NotImplementedError, match=r"adapt\(model, mesh\)"):
        model(**shard_batch(batches()[1], mesh))
    follow_lengths(model)
    for batch in batches():
        share, weights = shard_batch(batch, mesh), upstream(batch)
        shard = share["sequence_shard"]
        whole = torch.nn.functional.pad(weights, (0, 0, 0, shard.local_len * size - weights.shape[1]))
        mine = whole[:, shard.rank * shard.local_len :][:, : shard.local_len]
        logits = model(**share).logits
        (logits * mine).sum().backward()
        found = gradients(model)
        for gradient in found.values():
            dist.all_reduce(gradient, group=mesh.sp_group)
        logits = gather_sequence(logits.detach() * (mine != 0), mesh.sp_group)[:, : shard.num_tokens]
        results.append((logits, found))
    return results


@pytest.mark.parametrize(("name", "rope"), LENGTH_MODELS)
def test_ranks_that_share_rows_equal_one_process(world2, name, rope):
    expected = on_one_process(name, rope)
    for actual in world2.run(on_the_world, name, rope, 2):
        for place, ((logits, found), (their_logits, theirs)) in enumerate(zip(actual, expected)):
            error = float((logits - their_logits).abs().max() / their_logits.abs().max())
            assert error <= 1e-6, f"logits of batch {place}: {error:.1e}"
            largest = max(float(gradient.abs().max()) for gradient in theirs.values())
            for parameter, gradient in theirs.items():
                error = float((found[parameter] - gradient).abs().max()) / largest
                assert error <= 1e-6, f"gradient of `{parameter}` on batch {place}: {error:.1e}"


def rotations(rope, size):
    """What the rotary embedding gives on whole rows, one batch after another."""
    model = build_with_lengths("llama", rope, "ulysses", torch.float32)
    rotary, found = model.model.rotary_emb, []
    if size > 1:
        follow_lengths(model)
        mesh = SequenceMesh.build(size)
    rotary.register_forward_hook(lambda module, args, output: found.append(output))
    for batch in batches()[:-1]:
        with torch.no_grad():
            if size == 1:
                model.set_attn_implementation("sdpa")
                model(**batch)
                continue
            model(**shard_batch(batch, mesh))
        tokens = batch["input_ids"].shape[1]
        found[-1] = tuple(gather_sequence(part, mesh.sp_group)[:, :tokens] for part in found[-1])
    return copy.deepcopy(found)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotations_are_those_of_one_process_to_the_bit_also_what_it_remembers(world2, rope):
    expected = rotations(rope, 1)
    for actual in world2.run(rotations, rope, 2):
        for ours, theirs in zip(actual, expected, strict=True):
            assert all(torch.equal(one, two.expand_as(one)) for one, two in zip(ours, theirs))
