"""Two processes on one device, over gloo: every collective of `hf_longctx/parallel` on tensors of that device, and a
model on shared rows, against one process. Started by torchrun with a device and a precision.

gloo takes CUDA tensors for few collectives, differing between releases. Each that we use is tried first; one that
refuses is run on copies in CPU memory, and its name is printed. Both ranks see the same refusal, before anything is
sent.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.distributed as dist

from hf_longctx import SequenceMesh, gather_sequence, shard_batch
from hf_longctx.parallel import collectives
from hf_longctx.parallel.heads import split_heads
from tests.models import build
from tests.world.test_models_exact import make_batch, upstream


ROWS, LOCAL, SIZE = 2, 3, 8
NAMES = ("all_to_all_single", "all_gather", "all_reduce", "reduce_scatter")


def on_cpu(name: str):
    """The collective `name` on copies in CPU memory; what it wrote is copied back."""
    plain = getattr(dist, name)

    def call(*args, **kwargs):
        copies = {}

        def copy(value):
            if isinstance(value, torch.Tensor):
                return copies.setdefault(id(value), (value, value.cpu()))[1]
            return [copy(part) for part in value] if isinstance(value, list) else value

        plain(*map(copy, args), **{key: copy(value) for key, value in kwargs.items()})
        for value, copied in copies.values():
            value.copy_(copied)

    return call


def try_collectives(device: str, dtype: torch.dtype) -> list[str]:
    """The names of those that gloo refuses for tensors of this device and precision."""

    def numbers(count: int) -> torch.Tensor:
        return torch.ones(count, device=device, dtype=dtype)

    calls = {
        "all_to_all_single": lambda: dist.all_to_all_single(numbers(2), numbers(2), [1, 1], [1, 1]),
        "all_gather": lambda: dist.all_gather([numbers(2), numbers(2)], numbers(2)),
        "all_reduce": lambda: dist.all_reduce(numbers(2)),
        "reduce_scatter": lambda: dist.reduce_scatter(numbers(2), [numbers(2), numbers(2)]),
    }
    refused = []
    for name in NAMES:
        try:
            calls[name]()
        except (RuntimeError, ValueError, NotImplementedError):
            refused.append(name)
    return refused


def whole(seed: int, *shape: int) -> torch.Tensor:
    """Whole numbers, the same on both ranks, whose sums are exact in every precision."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def check_exchange(heads: int, kv_heads: int, mesh: SequenceMesh) -> None:
    """Tokens for heads and back: every number in its place, gradients likewise."""
    rank, split = dist.get_rank(), split_heads(heads, kv_heads, 2)
    tokens = slice(rank * LOCAL, (rank + 1) * LOCAL)
    full = [whole(i, ROWS, count, 2 * LOCAL, SIZE) for i, count in enumerate((heads, kv_heads, kv_heads))]
    local = [x[:, :, tokens].clone().requires_grad_() for x in full]
    outputs = collectives.sequence_to_heads(*local, split, mesh.sp_group)
    ranges = [slice(*split.query[rank]), *[slice(*split.key_value[rank])] * 2]
    for output, x, heads_of in zip(outputs, full, ranges):
        assert output.device.type == DEVICE and torch.equal(output, x[:, heads_of])
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    readers = [sum(start <= head < end for start, end in split.key_value) for head in range(kv_heads)]
    assert torch.equal(local[0].grad, torch.ones_like(local[0]))
    counts = torch.tensor(readers, device=DEVICE, dtype=DTYPE)[None, :, None, None]
    for x in local[1:]:
        assert torch.equal(x.grad, counts.expand_as(x))

    attended = outputs[0].detach().transpose(1, 2).requires_grad_()
    back = collectives.heads_to_sequence(attended, split, mesh.sp_group)
    assert torch.equal(back, full[0][:, :, tokens].transpose(1, 2))
    back.backward(full[0][:, :, tokens].transpose(1, 2))
    assert torch.equal(attended.grad, full[0][:, ranges[0]].transpose(1, 2))


def check_gathers(mesh: SequenceMesh) -> None:
    """Rows, sums, means and integers of both ranks."""
    rank, group = dist.get_rank(), mesh.sp_group
    rows = [whole(9, 5, SIZE)[:2], whole(9, 5, SIZE)[2:]]
    mine = rows[rank].clone().requires_grad_()
    (gathered,) = collectives.gather_rows([mine], [2, 3], group)
    assert torch.equal(gathered, torch.cat(rows))
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(mine.grad, torch.full_like(mine, 3))
    total = mine.detach()[:2].clone().requires_grad_()
    summed = collectives.sum_over_sequence(total, group)
    assert torch.equal(summed, rows[0] + rows[1][:2])
    summed.backward(torch.full_like(summed, rank + 1))
    assert torch.equal(total.grad, torch.full_like(total, 3))
    weight = torch.ones(3, device=DEVICE, dtype=DTYPE, requires_grad=True)
    (collectives.mean_gradient(weight, group) * 2 * rank).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert collectives.gather_integers(rank + 7, group) == [7, 8]
    integers = torch.tensor([rank, 5], device=DEVICE)
    assert collectives.gather_integer_rows(integers, group).tolist() == [[0, 5], [1, 5]]


def check_model(rows: str, mesh: SequenceMesh) -> None:
    """Logits and gradients of shared rows against whole ones on this rank."""
    wide = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}
    stock, ours = (build("llama", way, **wide).to(DEVICE, DTYPE) for way in ("sdpa", "ulysses"))
    weights = upstream(make_batch(rows, "llama"), DTYPE).to(DEVICE)
    full = {key: value.to(DEVICE) for key, value in make_batch(rows, "llama").items()}
    expected = stock(**full, use_cache=False).logits
    (expected * weights).sum().backward()
    share = shard_batch(full, mesh, inner_attention="sdpa")
    local = ours(**share).logits
    tokens, rank = local.shape[1], dist.get_rank()
    padded = torch.nn.functional.pad(weights, (0, 0, 0, 2 * tokens - weights.shape[1]))
    (local * padded[:, rank * tokens : (rank + 1) * tokens]).sum().backward()
    actual = gather_sequence(local, mesh.sp_group)[:, : expected.shape[1]]
    real = full.get("attention_mask", torch.ones_like(full["input_ids"])).bool()
    assert_close(actual[real], expected.detach()[real], rows)
    theirs = dict(stock.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values())
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad.clone()
        collectives.dist.all_reduce(gradient, group=mesh.sp_group)
        assert_close(gradient, theirs[name].grad, f"{rows}, {name}", 0.1 * largest)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, floor: float = 1e-3) -> None:
    """bf16 keeps 8 bits, and a gradient sums many such roundings; float32 on a GPU sums in another order."""
    tolerance = 3e-2 if DTYPE is torch.bfloat16 else 2e-4
    error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=floor))
    assert error < tolerance, f"{what}: {error:.1e}"


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("gloo")
    mesh = SequenceMesh.build(2)
    refused = sorted({name for kind in (DTYPE, torch.int64) for name in try_collectives(DEVICE, kind)})
    if dist.get_rank() == 0:
        print(f"gloo on {DEVICE}, through CPU memory: {', '.join(refused) or 'nothing'}")
    with ExitStack() as stack:
        for name in refused:
            stack.enter_context(patch.object(dist, name, on_cpu(name)))
        for heads, kv_heads in ((8, 2), (6, 1), (9, 3)):
            check_exchange(heads, kv_heads, mesh)
        check_gathers(mesh)
        for rows in ("full", "left", "packed"):
            check_model(rows, mesh)
    dist.destroy_process_group()


DEVICE, DTYPE = sys.argv[1], getattr(torch, sys.argv[2])
main()
