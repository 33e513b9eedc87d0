"""Layers with a convolution along the sequence: ranks that share rows get the numbers of one process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from hf_longctx import SequenceMesh, gather_sequence, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent.pieces import pieces_of
from hf_longctx.adapters.recurrent.window import run_window
from hf_longctx.parallel.gathered import gather_shares, joined

from ..recurrent import (
    PACKED,
    all_rows,
    build_hybrid,
    gradients,
    logits_alone,
    numbers_alone,
    packed_rows,
    padded_rows,
    upstream,
    window_layer,
    worst,
)


# Some modules cast to float32 inside, the same on both sides but for the order of sums.
CLOSE = 1e-6


def cut(whole: torch.Tensor, shard) -> torch.Tensor:
    """A rank's tokens of numbers `(B, T, D)`."""
    whole = torch.nn.functional.pad(whole, (0, 0, 0, shard.local_len * shard.size - whole.shape[1]))
    return whole[:, shard.rank * shard.local_len :][:, : shard.local_len]


def local_weights(batch, shard) -> torch.Tensor:
    return cut(upstream(batch), shard)


def summed(model, mesh) -> dict[str, torch.Tensor]:
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient, group=mesh.sp_group)
    return found


def numbers_shared(model, batch, mesh):
    share = shard_batch(batch, mesh)
    weights = local_weights(batch, share["sequence_shard"])
    logits = model(**share).logits
    (logits * weights).sum().backward()
    whole = gather_sequence(logits.detach() * (weights != 0), mesh.sp_group)[:, : batch["input_ids"].shape[1]]
    return whole, summed(model, mesh)


def on_all_rows(kernel: int, size: int) -> dict[str, float]:
    mesh, model, plain = SequenceMesh.build(size), build_hybrid("ulysses", kernel), build_hybrid("sdpa", kernel)
    attach_adapters(model)
    return {
        kind: worst(numbers_shared(model, batch, mesh), numbers_alone(plain, batch))
        for kind, batch in all_rows().items()
    }


@pytest.mark.parametrize("kernel", [1, 3, 8])
def test_ranks_equal_one_process_on_every_kind_of_rows(world4, kernel):
    for errors in world4.run(on_all_rows, kernel, 4):
        assert max(errors.values()) <= CLOSE, errors


def test_two_groups_of_two_ranks(world4):
    for errors in world4.run(on_all_rows, 3, 2):
        assert max(errors.values()) <= CLOSE, errors


def windows(reach: int) -> list[float]:
    """Outputs and gradients of a layer that looks back in code of its own."""
    mesh, layer, errors = SequenceMesh.build(4), functools.partial(window_layer, reach=reach), []
    for batch in all_rows().values():
        shard, generator = shard_batch(batch, mesh)["sequence_shard"], torch.Generator().manual_seed(0)
        rows, tokens = batch["input_ids"].shape
        inputs, weights = (torch.rand(rows, tokens, 4, generator=generator).double() for _ in range(2))
        theirs, ours = inputs.requires_grad_(), inputs.detach().clone().requires_grad_()
        mask = batch.get("attention_mask")
        mine = None if mask is None else cut(mask[..., None], shard)[..., 0]
        tensors = {"hidden_states": cut(ours, shard), "conv_mask": mine}
        outputs = run_window(layer, pieces_of(shard, rows, "cpu"), reach, tensors, "conv_mask")
        sum((part * cut(weights, shard)).sum() for part in outputs).backward()
        expected = _on_documents(layer, batch, theirs, mask)
        sum((part * weights).sum() for part in expected).backward()
        dist.all_reduce(ours.grad)
        found = (*(gather_sequence(part, mesh.sp_group)[:, :tokens] for part in outputs), ours.grad)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, (*expected, theirs.grad))))
    return errors


def _on_documents(layer, batch, inputs, mask):
    if "position_ids" not in batch:
        return layer(inputs, mask)
    lengths = [(positions == 0).nonzero().flatten().tolist() + [len(positions)] for positions in batch["position_ids"]]
    rows = [
        [layer(row[None, a:b]) for a, b in zip(bounds, bounds[1:])]
        for row, bounds in zip(inputs, lengths, strict=True)
    ]
    return tuple(torch.cat([torch.cat([piece[i] for piece in row], dim=1) for row in rows]) for i in range(2))


@pytest.mark.parametrize("reach", [1, 3, 8])
def test_layers_that_look_back_in_their_own_code(world4, reach):
    for errors in world4.run(windows, reach):
        assert max(errors) <= 1e-12, errors


def checkpoint_layers(model, kind: str) -> None:
    if kind == "torch":
        layers = tuple({type(layer) for layer in model.model.layers})
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layers))
    elif kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.train()


def two_forwards_before_a_backward(kind: str) -> float:
    mesh, plain = SequenceMesh.build(2), build_hybrid("sdpa")
    model = build_hybrid("ulysses")
    attach_adapters(model)
    checkpoint_layers(model, kind)
    batches = [packed_rows(*PACKED), padded_rows("0" * 4 + "1" * 8, "1" * 12), packed_rows((3, 4), (7,))]
    total, expected = 0.0, 0.0
    for batch in batches:
        share = shard_batch(batch, mesh)
        # The inputs of a checkpoint must require gradients where it is reentrant.
        share["inputs_embeds"] = model.get_input_embeddings()(share.pop("input_ids"))
        total = total + (model(**share, use_cache=False).logits * local_weights(batch, share["sequence_shard"])).sum()
        expected = expected + (logits_alone(plain, batch) * upstream(batch)).sum()
    total.backward()
    expected.backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in summed(model, mesh).items()}
    return worst((torch.ones(1), found), (torch.ones(1), gradients(plain)))


@pytest.mark.parametrize("kind", ["none", "plain", "reentrant", "torch"])
def test_layers_recomputed_after_other_rows_get_their_own(world2, kind):
    assert max(world2.run(two_forwards_before_a_backward, kind)) <= CLOSE


def frozen(trained: str) -> float:
    """Only parameters with `trained` in their name learn, so some gathers have no gradient on any rank."""
    mesh, model, plain = SequenceMesh.build(2), build_hybrid("ulysses"), build_hybrid("sdpa")
    attach_adapters(model)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad = trained in name
    batch = packed_rows(*PACKED)
    return worst(numbers_shared(model, batch, mesh), numbers_alone(plain, batch))


@pytest.mark.parametrize("trained", ["layers.0.conv.conv.", "layers.2.", "embedding_norm", "layers.0.conv.in_proj"])
def test_frozen_weights(world2, trained):
    assert max(world2.run(frozen, trained)) <= CLOSE


def without_gradients() -> list[float]:
    mesh, model, batch = SequenceMesh.build(2), build_hybrid("ulysses"), packed_rows(*PACKED)
    attach_adapters(model)
    plain, errors = build_hybrid("sdpa"), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = logits_alone(plain, batch)
            logits = gather_sequence(model(**shard_batch(batch, mesh)).logits, mesh.sp_group)[:, :23]
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
    return errors


def test_evaluation_with_the_default_of_use_cache(world2):
    for errors in world2.run(without_gradients):
        assert max(errors) <= CLOSE


def in_half_precision() -> float:
    mesh, batch = SequenceMesh.build(2), packed_rows(*PACKED)
    results = []
    for attention, dtype in (("ulysses", torch.bfloat16), ("sdpa", torch.bfloat16), ("sdpa", torch.float64)):
        model = build_hybrid(attention, dtype=dtype)
        if attention == "sdpa":
            results.append(numbers_alone(model, batch))
            continue
        attach_adapters(model)
        results.append(numbers_shared(model, batch, mesh))
    ours, theirs, exact = results
    return worst(ours, exact) / worst(theirs, exact)


def test_bf16_is_as_far_from_float64_as_one_process_is(world2):
    assert max(world2.run(in_half_precision)) <= 2  # of transformers' own rounding


def after_an_exception() -> float:
    """A forward that raises in its middle on every rank leaves nothing behind."""
    mesh, model, batch = SequenceMesh.build(2), build_hybrid("ulysses"), packed_rows(*PACKED)
    attach_adapters(model)
    checkpoint_layers(model, "plain")
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]

    def fail(module, args, output):
        raise ArithmeticError("in the middle")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        model(**shard_batch(packed_rows((3, 4)), mesh))
    hook.remove()
    with pytest.raises(RuntimeError, match="called outside of a forward of its model"):
        model.model.layers[0].conv(torch.zeros(1, 3, 32, dtype=torch.float64))
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == functions
    return worst(numbers_shared(model, batch, mesh), numbers_alone(build_hybrid("sdpa"), batch))


def test_an_exception_leaves_no_state(world2):
    assert max(world2.run(after_an_exception)) <= CLOSE


def gathered_parts() -> list[torch.Tensor]:
    group, rank = dist.group.WORLD, dist.get_rank()
    local = torch.full((2, 3), rank + 1.0, requires_grad=True)
    parts = gather_shares(local.t().contiguous().t(), group)
    output = joined(torch.zeros(1, requires_grad=True), parts) if rank == 0 else (parts * (rank + 1)).sum()
    output.sum().backward()
    return [parts.detach(), local.grad]


def test_gathered_shares_carry_the_gradient_of_all_ranks_and_one_may_need_nothing(world2):
    for rank, (parts, gradient) in enumerate(world2.run(gathered_parts)):
        assert parts.tolist() == [[[1.0] * 3] * 2, [[2.0] * 3] * 2]
        assert gradient.tolist() == [[2.0] * 3] * 2, rank  # rank 1 alone reads the parts, twice each
