"""In-batch negatives of several ranks: the loss and gradients of one process with all rows, however they are
assigned."""

from __future__ import annotations

import copy
import re
import tempfile
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_longctx.losses.contrastive import contrastive_loss
from hf_longctx.losses.contrastive_rules import ContrastiveRule
from hf_longctx.parallel.collectives import gather_rows
from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.proof.ranks import RanksError


pytest.importorskip("sentence_transformers")
from ..embedders import batch, tiny_embedder


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RULES = {
    "default": {},
    "all": {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    "symmetric": {"directions": ("doc_to_query", "query_to_doc"), "partition_mode": "per_direction"},
}
COUNTS = {1: [23], 2: [9, 14], 4: [7, 0, 11, 5]}  # rows of every data-parallel rank; one of four has none


def numbers(rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(columns)]


def assert_same(actual, expected, tolerance: float) -> None:
    """Every tensor, relative to the largest entry of its expectation."""
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max().clamp_min(1e-3), (x - y).abs().max()


def mine(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


@contextmanager
def counted():
    """How often this rank called each collective."""
    calls = {}

    def wrap(name, function):
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    names = ("all_gather", "reduce_scatter", "all_reduce", "batch_isend_irecv", "all_to_all_single", "broadcast")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(dist, name, wrap(name, getattr(dist, name))))
        yield calls


# Embeddings alone


def gathered_rows() -> None:
    """`gather_rows` is concatenation, and its gradient the sum over ranks of random gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = COUNTS[size]
    full = numbers(sum(counts), 2)
    local = [x[mine(counts, rank)].clone().requires_grad_() for x in full]
    with counted() as calls:
        gathered = gather_rows(local, counts, dist.group.WORLD)
        upstream = [numbers(sum(counts), 2, seed=1 + r) for r in range(size)]
        torch.autograd.backward(gathered, upstream[rank])
    assert calls == {"all_gather": 1, "reduce_scatter": 1}
    assert all(torch.equal(x, y) for x, y in zip(gathered, full))
    expected = [sum(upstream[r][i] for r in range(size))[mine(counts, rank)] for i in range(2)]
    assert_same([x.grad for x in local if len(x)], [x for x in expected if len(x)], 1e-14)


def losses_on_a_mesh(sequence_parallel_size: int, rule: str, negatives: str) -> None:
    mesh = SequenceMesh.build(sequence_parallel_size)
    assert (mesh.dp_group is None) == (mesh.data_parallel_size == 1)
    counts = COUNTS[mesh.data_parallel_size]
    rows, rule = mine(counts, mesh.data_parallel_rank), ContrastiveRule(**RULES[rule])
    full = [x.requires_grad_() for x in numbers(sum(counts), 3)]
    hashes = [torch.arange(sum(counts)) + 100 * i for i in range(3)]
    hashes[0][20], hashes[1][3], hashes[2][22] = hashes[0][2], hashes[1][19], hashes[1][1]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    expected = contrastive_loss(full, scale=scale, rule=rule, hashes=hashes)
    (0.7 * expected).backward()

    seen = []
    for tile_size in (4, 64):
        local = [x.detach()[rows].clone().requires_grad_() for x in full]
        my_scale = scale.detach().clone().requires_grad_()
        with counted() as calls:
            actual = contrastive_loss(
                local,
                scale=my_scale,
                rule=rule,
                hashes=[x[rows] for x in hashes],
                tile_size=tile_size,
                group=mesh.dp_group,
                negatives=negatives,
            )
            (0.7 * actual).backward()
        seen.append(calls)
        # What a wrapper makes of the ranks: their mean.
        total = torch.stack([actual.detach(), my_scale.grad])
        dist.all_reduce(total)
        assert_same(total / dist.get_world_size(), [expected, scale.grad], 1e-12)
        gradients = [x.grad / mesh.data_parallel_size for x in local]
        if len(local[0]):
            assert_same(gradients, [x.grad[rows] for x in full], 1e-12)
    assert seen[0] == seen[1]
    dp = mesh.data_parallel_size
    messages = {"batch_isend_irecv": 2 * dp - 1} if negatives == "ring" else {"reduce_scatter": 1}
    gathers = 2 if negatives == "ring" else 3
    assert seen[0] == ({} if dp == 1 else {"all_gather": gathers, **messages})


def test_gathered_rows_are_in_order_and_their_gradients_are_summed(worlds):
    for size in (2, 4):
        worlds(size).run(gathered_rows)


@pytest.mark.parametrize("negatives", ["gather", "ring"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "shared"), [(2, 1), (2, 2), (4, 1), (4, 2)], ids=["2", "1x2", "4", "2x2"])
def test_loss_and_gradients_equal_one_process(worlds, size, shared, rule, negatives):
    worlds(size).run(losses_on_a_mesh, shared, rule, negatives)


def bad_columns(kind: str) -> None:
    columns = numbers(6, 2 if kind == "columns" and dist.get_rank() == 1 else 3)
    if kind == "finite" and dist.get_rank() == 1:
        columns[0][4, 0] = torch.inf
    if kind == "rows" and dist.get_rank() == 1:
        columns[2] = columns[2][:5]
    contrastive_loss(columns, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("columns", r"got 3 columns on data-parallel rank 0 but 2 on data-parallel rank 1: all ranks must draw"),
        ("finite", r"column 0 \(queries\) are not finite in 1 row\(s\) on data-parallel rank 1, the first is row 4"),
        ("rows", r"column 2 has 5 rows on data-parallel rank 1, but column 0 has 6"),
    ],
)
def test_what_is_wrong_on_one_rank_is_said_on_all(world2, kind, message):
    with pytest.raises(RanksError, match=message) as failure:
        world2.run(bad_columns, kind)
    assert len(re.findall(message, str(failure.value))) == 2


# A model under its wrappers


def losses_of(model, mesh=None, **arguments):
    from hf_longctx.embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss

    arguments = {"learnable_scale": True, "loss_tile_size": 4, **arguments}
    return TiledMultipleNegativesRankingLoss(model, mesh=mesh, gather_across_devices=mesh is not None, **arguments)


@contextmanager
def reductions_of_fsdp():
    """How often FSDP2 reduced the gradients of a group of parameters."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    calls, original = [], module.foreach_reduce

    def reduce(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with patch.object(module, "foreach_reduce", reduce):
        yield calls


def wrap(kind: str, model):
    """The wrapped model and a list that grows with every reduction."""
    if kind == "ddp":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        # BERT has a pooler that mean pooling does not use.
        calls, wrapped = [], DistributedDataParallel(model, find_unused_parameters=True)

        def hook(state, bucket):
            calls.append(1)
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, hook)
        return wrapped, calls
    for layer in model[0].auto_model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    return model, None


def gradients_of(model) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def steps_of_a_model(kind: str, sequence_parallel_size: int, negatives: str, mini_batch_size: int | None) -> None:
    """Two accumulated micro-batches, of which only the second is reduced, against one process with all rows."""
    mesh = SequenceMesh.build(sequence_parallel_size)
    counts = COUNTS[2]
    rows, micro_batches = mine(counts, mesh.data_parallel_rank), [batch(sum(counts), 3, seed=s) for s in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_embedder(folder)
    one = copy.deepcopy(model)
    loss = losses_of(one, mini_batch_size=None)
    expected = [loss(copy.deepcopy(features), None) for features in micro_batches]
    sum(expected).backward()
    wrapped, calls = wrap(kind, model)
    ours = losses_of(model, mesh, negatives=negatives, mini_batch_size=mini_batch_size)
    ours.model = wrapped  # as sentence-transformers' trainer does
    # DDP puts so small a model into one bucket, or two at first. FSDP2 reduces two layers and the rest, and without
    # GradCache a layer for each of its two forwards.
    allowed = (1, 2) if kind == "ddp" else (5 if mini_batch_size is None else 3,)
    with reductions_of_fsdp() as fsdp_calls:
        calls = fsdp_calls if calls is None else calls
        for index, features in enumerate(micro_batches):
            features = [{key: value[rows] for key, value in column.items()} for column in features]
            if kind == "ddp":
                wrapped.require_backward_grad_sync = index == 1
            else:
                wrapped.set_requires_gradient_sync(index == 1)
            value = ours(features, None)
            value.backward()
            value = value.detach().clone()
            dist.all_reduce(value)
            assert_same([value / dist.get_world_size()], [expected[index].detach()], 1e-5)
            assert len(calls) in (allowed if index else (0,)), calls
    # fp32, and gradients that several micro-batches and ranks add up in another order.
    assert_same(gradients_of(wrapped), gradients_of(one), 2e-5)
    assert_same([ours.log_scale.grad], [loss.log_scale.grad], 1e-5)
    everyone = [torch.empty(()) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, ours.log_scale.grad)
    assert all(torch.equal(x, everyone[0]) for x in everyone)


@pytest.mark.parametrize(
    ("kind", "size", "shared", "negatives", "mini_batch_size"),
    [
        ("ddp", 2, 1, "gather", 4),
        ("ddp", 2, 1, "ring", None),
        ("ddp", 4, 2, "gather", 4),
        ("fsdp", 2, 1, "ring", 4),
        ("fsdp", 2, 1, "gather", None),
        ("fsdp", 4, 2, "gather", 5),
    ],
)
def test_wrapped_models_get_the_gradients_of_one_process_from_one_reduction(
    worlds, kind, size, shared, negatives, mini_batch_size
):
    worlds(size).run(steps_of_a_model, kind, shared, negatives, mini_batch_size)


def uneven_mini_batches() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_embedder(folder)
    fully_shard(model)
    losses_of(model, SequenceMesh.build(), mini_batch_size=1)(batch(2 if dist.get_rank() else 9), None)


def test_mini_batches_that_cannot_be_made_even_are_refused_under_fsdp(world2):
    with pytest.raises(RanksError, match="column 0 has 2 texts on one rank and 9 mini-batches on another"):
        world2.run(uneven_mini_batches)


def frozen_last_column() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_embedder(folder).requires_grad_(False)
    fully_shard(model)
    losses_of(model, SequenceMesh.build())(batch(4), None).backward()


def test_a_frozen_last_column_is_refused_under_fsdp(world2):
    with pytest.raises(RanksError, match="the last column's model is frozen, but FSDP2 reduces all gradients"):
        world2.run(frozen_last_column)


def unbound() -> None:
    from hf_longctx.embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_embedder(folder)
    TiledMultipleNegativesRankingLoss(model)(batch(4), None)


def test_a_loss_without_a_mesh_is_refused_on_several_processes(world2):
    with pytest.raises(RanksError, match=r"runs on 2 processes and does not know which of them hold different rows"):
        world2.run(unbound)
