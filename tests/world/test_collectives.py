"""The exchanges move every number to the right place, once, and their gradients come back summed.

The reference is plain indexing of the full tensor, which every rank makes from one seed. Values are small whole
numbers, so sums are exact in bfloat16 too and every comparison is for equality.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_longctx.parallel.collectives import gather_integers, gather_sequence, heads_to_sequence, sequence_to_heads
from hf_longctx.parallel.heads import split_heads
from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.parallel.shard import SequenceShard, shard_batch


ROWS, LOCAL, HEAD, VALUE_HEAD = 2, 3, 4, 6
GEOMETRIES = [(8, 8), (8, 2), (6, 1), (9, 3), (7, 7)]
DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random whole numbers from -8 to 8: sums of a few are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def full_inputs(heads: int, key_value_heads: int, tokens: int, dtypes, seed: int = 0) -> list[torch.Tensor]:
    """Query, key and value of whole rows: `(B, heads, T, H)`, with another head size for values."""
    shapes = [(heads, HEAD), (key_value_heads, HEAD), (key_value_heads, VALUE_HEAD)]
    return [
        numbers(ROWS, count, tokens, size, seed=seed + i, dtype=dtype)
        for i, ((count, size), dtype) in enumerate(zip(shapes, dtypes))
    ]


def ranges_of(split, rank: int) -> list[slice]:
    return [slice(*split.query[rank]), slice(*split.key_value[rank]), slice(*split.key_value[rank])]


def mine(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    return tensor.narrow(dim, rank * LOCAL, LOCAL)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert torch.equal(actual, expected), what


def exchange_to_heads(heads: int, key_value_heads: int, dtypes, group, seed: int = 0) -> None:
    """Forward and backward of `sequence_to_heads` against indexing of the full tensors and autograd through it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    split = split_heads(heads, key_value_heads, size)
    full = [x.requires_grad_() for x in full_inputs(heads, key_value_heads, LOCAL * size, dtypes, seed)]
    local = [mine(x.detach(), rank, 2).clone().requires_grad_() for x in full]

    outputs = sequence_to_heads(*local, split, group)
    expected = [[x[:, heads_of] for x, heads_of in zip(full, ranges_of(split, r))] for r in range(size)]
    for name, output, wanted in zip("qkv", outputs, expected[rank]):
        assert_equal(output, wanted, f"{name} on rank {rank}")

    upstream = [
        [numbers(*x.shape, seed=seed + 100 + 10 * r + i, dtype=x.dtype) for i, x in enumerate(expected[r])]
        for r in range(size)
    ]
    torch.autograd.backward(outputs, upstream[rank])
    torch.autograd.backward([x for r in expected for x in r], [g for r in upstream for g in r])
    for name, x, whole in zip("qkv", local, full):
        assert_equal(x.grad, mine(whole.grad, rank, 2), f"gradient of {name} on rank {rank}")


def exchange_to_sequence(heads: int, key_value_heads: int, dtype, group, seed: int = 0) -> None:
    """Forward and backward of `heads_to_sequence` against indexing of the full tensor."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    split = split_heads(heads, key_value_heads, size)
    full = numbers(ROWS, LOCAL * size, heads, VALUE_HEAD, seed=seed, dtype=dtype)
    output = full[:, :, slice(*split.query[rank])].clone().requires_grad_()
    back = heads_to_sequence(output, split, group)
    assert_equal(back, mine(full, rank, 1), f"rank {rank}")
    upstream = numbers(*full.shape, seed=seed + 1, dtype=dtype)
    back.backward(mine(upstream, rank, 1))
    assert_equal(output.grad, upstream[:, :, slice(*split.query[rank])], f"gradient on rank {rank}")


def exchanges_of_the_world(heads, key_value_heads, dtype) -> None:
    exchange_to_heads(heads, key_value_heads, [dtype] * 3, dist.group.WORLD)
    exchange_to_sequence(heads, key_value_heads, dtype, dist.group.WORLD)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_value_heads"), GEOMETRIES)
def test_exchange_and_its_gradient_equal_indexing_of_the_full_tensor(worlds, heads, key_value_heads, dtype, size):
    worlds(size).run(exchanges_of_the_world, heads, key_value_heads, dtype)


def test_shared_key_value_heads_are_really_tested():
    """The geometries hold a head read by all ranks, a head read by two, and uneven splits."""
    assert split_heads(6, 1, 4).key_value == ((0, 1),) * 4
    assert split_heads(9, 3, 2).key_value == ((0, 2), (1, 3))
    assert [split_heads(7, 7, 2).query_count(rank) for rank in range(2)] == [4, 3]


def exchange_of_strided_views(heads, key_value_heads) -> None:
    """Inputs and upstream gradients as models have them: transposed views, not contiguous."""
    rank, size = dist.get_rank(), dist.get_world_size()
    split = split_heads(heads, key_value_heads, size)
    full = full_inputs(heads, key_value_heads, LOCAL * size, [torch.float32] * 3)
    local = [mine(x, rank, 2).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in full]
    assert not any(x.is_contiguous() for x in local)
    outputs = sequence_to_heads(*local, split, dist.group.WORLD)
    for output, x, heads_of in zip(outputs, full, ranges_of(split, rank)):
        assert_equal(output, x[:, heads_of], "strided")
    upstream = [numbers(*o.transpose(2, 3).shape, seed=i).transpose(2, 3) for i, o in enumerate(outputs)]
    again = [mine(x, rank, 2).clone().requires_grad_() for x in full]
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(
        sequence_to_heads(*again, split, dist.group.WORLD), [gradient.contiguous() for gradient in upstream]
    )
    for x, wanted in zip(local, again):
        assert_equal(x.grad, wanted.grad, "strided gradient")


def test_exchange_does_not_care_how_tensors_lie_in_memory(world2):
    world2.run(exchange_of_strided_views, 9, 3)


def there_and_back(heads, key_value_heads) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    split = split_heads(heads, key_value_heads, size)
    full = full_inputs(heads, key_value_heads, LOCAL * size, [torch.float32] * 3)
    local = [mine(x, rank, 2).clone().requires_grad_() for x in full]
    query, _, _ = sequence_to_heads(*local, split, dist.group.WORLD)
    back = heads_to_sequence(query.transpose(1, 2), split, dist.group.WORLD)
    assert_equal(back.transpose(1, 2), local[0], "there and back")
    upstream = numbers(*back.shape, seed=50 + rank)
    back.backward(upstream)
    assert_equal(local[0].grad, upstream.transpose(1, 2), "gradient there and back")
    for unused in local[1:]:
        assert_equal(unused.grad, torch.zeros_like(unused), "gradient of what nobody used")


@pytest.mark.parametrize("size", [2, 4])
def test_two_inverse_exchanges_are_the_identity_and_unused_outputs_get_zero_gradients(worlds, size):
    worlds(size).run(there_and_back, 9, 3)


def exchange_of_mixed_dtypes() -> None:
    exchange_to_heads(9, 3, [torch.float32, torch.float32, torch.bfloat16], dist.group.WORLD)
    exchange_to_heads(9, 3, [torch.bfloat16, torch.float32, torch.bfloat16], dist.group.WORLD)


def test_mixed_dtypes_come_back_as_they_were(world2):
    world2.run(exchange_of_mixed_dtypes)


def exchange_in_groups() -> tuple[int, ...]:
    mesh = SequenceMesh.build(2)
    assert dist.get_world_size(mesh.sp_group) == 2
    assert dist.get_rank(mesh.sp_group) == mesh.sequence_parallel_rank
    seed = 1000 * mesh.data_parallel_rank  # each group has rows of its own
    exchange_to_heads(9, 3, [torch.float32] * 3, mesh.sp_group, seed)
    exchange_to_sequence(9, 3, torch.float32, mesh.sp_group, seed)
    assert gather_integers(dist.get_rank(), mesh.sp_group) == [2 * mesh.data_parallel_rank + i for i in (0, 1)]
    ranks = gather_sequence(torch.full((1, 1), dist.get_rank()), mesh.sp_group)
    assert ranks.tolist() == [[2 * mesh.data_parallel_rank + i for i in (0, 1)]]
    return (
        mesh.data_parallel_size,
        mesh.sequence_parallel_size,
        mesh.data_parallel_rank,
        mesh.sequence_parallel_rank,
        mesh.world_size,
    )


def test_groups_are_neighbours_and_do_not_mix(world4):
    assert world4.run(exchange_in_groups) == [(2, 2, r // 2, r % 2, 4) for r in range(4)]


# Buffers that a collective forgot to write


@contextmanager
def poisoned_buffers():
    """Fresh memory is full of NaN; yields a list that grows with every poisoned buffer."""
    makers = {(owner, name): getattr(owner, name) for owner, name in _MAKERS}
    made = []

    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
                made.append(tensor)
            return tensor

        return poisoned

    patches = [patch.object(owner, name, poison(make)) for (owner, name), make in makers.items()]
    for one in patches:
        one.start()
    try:
        yield made
    finally:
        for one in patches:
            one.stop()


_MAKERS = [(torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")]


def exchanges_with_poison(heads, key_value_heads, dtype) -> int:
    with poisoned_buffers() as made:
        exchanges_of_the_world(heads, key_value_heads, dtype)
        local = numbers(ROWS, LOCAL, HEAD, seed=dist.get_rank(), dtype=dtype)
        assert torch.isfinite(gather_sequence(local, dist.group.WORLD)).all()
    return len(made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_buffer_is_written_in_full(world2, dtype):
    for buffers in world2.run(exchanges_with_poison, 9, 3, dtype):
        assert buffers >= 4  # two exchanges, forward and backward


# What leaves a rank

_COLLECTIVES = (
    "all_to_all_single",
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "send",
    "isend",
    "batch_isend_irecv",
)


@contextmanager
def counted_collectives():
    """A list of `(name, bytes that leave this rank)`, one entry a collective."""
    calls = []

    def counting(name, function):
        def counted(*args, **kwargs):
            leaving = None
            if name == "all_to_all_single":
                received, sent, receive_sizes, send_sizes = args
                assert received.numel() == sum(receive_sizes) and sent.numel() == sum(send_sizes)
                others = sum(send_sizes) - send_sizes[dist.get_rank(kwargs["group"])]
                leaving = others * sent.element_size()
            calls.append((name, leaving))
            return function(*args, **kwargs)

        return counted

    patches = [patch.object(dist, name, counting(name, getattr(dist, name))) for name in _COLLECTIVES]
    for one in patches:
        one.start()
    try:
        yield calls
    finally:
        for one in patches:
            one.stop()


def formula(split, rank: int, size: int, element_size: int) -> tuple[int, int, int, int]:
    """Bytes that should leave `rank`: query/key/value and output forward, output and query/key/value backward."""
    n, k = split.query_count, split.key_value_count
    cell = ROWS * LOCAL * element_size
    peers = [peer for peer in range(size) if peer != rank]
    inputs = sum(n(peer) * HEAD + k(peer) * (HEAD + VALUE_HEAD) for peer in peers) * cell
    output = len(peers) * n(rank) * VALUE_HEAD * cell
    output_gradient = sum(n(peer) * VALUE_HEAD for peer in peers) * cell
    input_gradients = len(peers) * (n(rank) * HEAD + k(rank) * (HEAD + VALUE_HEAD)) * cell
    return inputs, output, output_gradient, input_gradients


def bytes_of_exchanges(heads, key_value_heads, dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    split = split_heads(heads, key_value_heads, size)
    full = full_inputs(heads, key_value_heads, LOCAL * size, [dtype] * 3)
    local = [mine(x, rank, 2).clone().requires_grad_() for x in full]
    with counted_collectives() as calls:
        query, key, value = sequence_to_heads(*local, split, dist.group.WORLD)
        pooled = value.mean(dim=1, keepdim=True) + key.mean() + query.mean()
        output = pooled.expand(-1, query.shape[1], -1, -1).transpose(1, 2)
        heads_to_sequence(output, split, dist.group.WORLD).sum().backward()
    return calls


def expected_calls(heads, key_value_heads, size, element_size):
    split = split_heads(heads, key_value_heads, size)
    return [
        [("all_to_all_single", count) for count in formula(split, rank, size, element_size)] for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_value_heads"), GEOMETRIES)
def test_bytes_on_the_wire_equal_the_formula(worlds, heads, key_value_heads, dtype, size):
    calls = worlds(size).run(bytes_of_exchanges, heads, key_value_heads, dtype)
    assert calls == expected_calls(heads, key_value_heads, size, dtype.itemsize)


def test_formula_is_the_one_of_the_paper():
    """`(P-1)/P` of query and output, each key/value head once to every other rank that reads it; backward the same."""
    for heads, key_value_heads in GEOMETRIES:
        for size in (2, 4):
            split = split_heads(heads, key_value_heads, size)
            totals = [sum(column) for column in zip(*(formula(split, rank, size, 1) for rank in range(size)))]
            tokens = ROWS * LOCAL * size
            query = tokens * heads * HEAD * (size - 1) // size
            readers = [sum(start <= h < stop for start, stop in split.key_value) for h in range(key_value_heads)]
            # A key head of T tokens is sent by every rank, T/P tokens each, to all its readers but the sender itself.
            copies = sum(readers) * (size - 1) * tokens // size
            assert totals[0] == totals[3] == query + copies * (HEAD + VALUE_HEAD)
            assert totals[1] == totals[2] == tokens * heads * VALUE_HEAD * (size - 1) // size


def bytes_of_attention(heads, key_value_heads):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rank, size = dist.get_rank(), dist.get_world_size()
    full = full_inputs(heads, key_value_heads, LOCAL * size, [torch.float32] * 3)
    local = [mine(x, rank, 2).clone().requires_grad_() for x in full]
    module = torch.nn.Module()
    module.is_causal, module.config = True, SimpleNamespace()
    shard = SequenceShard(
        size=size, rank=rank, num_tokens=LOCAL * size, local_len=LOCAL, inner_attention="sdpa", group=dist.group.WORLD
    )
    with counted_collectives() as forward:
        output, _ = ALL_ATTENTION_FUNCTIONS["ulysses"](module, *local, None, sequence_shard=shard)
    with counted_collectives() as backward:
        output.backward(numbers(*output.shape, seed=rank))
    return forward, backward


@pytest.mark.parametrize(("heads", "key_value_heads"), [(8, 2), (9, 3), (6, 1)])
def test_attention_call_is_two_collectives_each_way_and_key_value_heads_travel_unexpanded(
    world2, heads, key_value_heads
):
    expected = expected_calls(heads, key_value_heads, 2, 4)
    for (forward, backward), calls in zip(world2.run(bytes_of_attention, heads, key_value_heads), expected):
        assert forward == calls[:2]
        assert backward == calls[2:]


# Gathers


def gathers() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    full = numbers(2, LOCAL * size, 3 * size, seed=0)
    assert_equal(gather_sequence(mine(full, rank, 1), dist.group.WORLD), full, "along tokens")
    columns = full[..., 3 * rank : 3 * rank + 3]
    assert_equal(gather_sequence(columns, dist.group.WORLD, dim=-1), full, "along another dimension")
    assert not gather_sequence(columns.clone().requires_grad_(), dist.group.WORLD, dim=-1).requires_grad
    values = [2**62 + 7 * r for r in range(size)]
    assert gather_integers(values[rank], dist.group.WORLD) == values


def test_gathers_are_in_rank_order_and_carry_no_gradient(world4):
    world4.run(gathers)


def test_gathers_without_a_group_are_my_own():
    local = numbers(2, LOCAL, seed=0).requires_grad_()
    gathered = gather_sequence(local, None)
    assert torch.equal(gathered, local) and not gathered.requires_grad
    assert gather_integers(5, None) == [5]


# Rows of a group


def shard_rows(differ: bool):
    mesh = SequenceMesh.build(2)
    row = dist.get_rank() if differ else mesh.data_parallel_rank
    batch = {"input_ids": torch.arange(5)[None] + row, "labels": torch.arange(5)[None] + row}
    try:
        return gather_sequence(shard_batch(batch, mesh)["input_ids"], mesh.sp_group).tolist()
    except RuntimeError as error:
        return str(error)


def test_group_that_drew_different_rows_is_stopped_on_every_rank(world4):
    for message in world4.run(shard_rows, True):
        assert "the 2 ranks of one sequence-parallel group drew different rows" in message
        assert "`mesh.data_parallel_rank`" in message


def test_groups_may_differ_from_each_other(world4):
    rows = world4.run(shard_rows, False)
    assert rows == [[[*(i + rank // 2 for i in range(5)), 0]] for rank in range(4)]


def size_of_three() -> str:
    with pytest.raises(ValueError) as error:
        SequenceMesh.build(3)
    return str(error.value)


def test_size_that_does_not_divide_the_running_world_is_refused(world4):
    for message in world4.run(size_of_three):
        assert "`sequence_parallel_size` (3) must divide the number of processes (4)" in message
        assert "set it to 1 or 2 or 4" in message
