"""sentence-transformers' GradCache with two additions: one reduction a step under FSDP2, and a loss with weights.

Why not its own `forward_cached`: it drops the graph of what `calculate_loss` returns, and so the gradient of a
temperature. Its mini-batches, random states and backward hook are used as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import _backward_hook, _minibatch_ranges
from torch.distributed.fsdp import FSDPModule

from ..parallel.collectives import gather_integer_rows


def cached_loss(loss: Any, features: list[dict], calculate: Callable[[list[list[torch.Tensor]]], torch.Tensor]):
    """The loss of all rows, with the model's activations of one mini-batch at a time.

    Args:
        loss: the module that has the `model`, mini-batch sizes and `embed_minibatch_iter` of a `CachedLossMixin`.
        features (`list[dict]`): the columns of a batch.
        calculate (`Callable`):
            Embeddings of every mini-batch of every column to the loss, which has put gradients into the embeddings. It
            may return a tensor with a graph of its own, to parameters that are not the model's.

    Returns:
        `torch.Tensor`: a scalar; its backward runs the model again with the same random numbers, times the upstream
        gradient.

    Communication: under DDP and FSDP2 gradients are reduced once, with the last mini-batch; never where the caller
        has switched that off to accumulate. Under FSDP2 also one all-gather of integers, so that all ranks run as
        many mini-batches.
    """
    ranges = [_minibatch_ranges(column, loss.mini_batch_size, loss.mini_batch_num_tokens) for column in features]
    if any(isinstance(module, FSDPModule) for module in loss.model.modules()):
        ranges = _as_many_as_others(ranges)
    with_grad = torch.is_grad_enabled()
    embeddings, random_states = [], []
    for column, parts in zip(features, ranges):
        passes = loss.embed_minibatch_iter(column, with_grad=False, copy_random_state=with_grad, ranges=parts)
        mine, states = zip(*passes) if parts else ((), ())
        embeddings.append([x.detach().requires_grad_(with_grad) for x in mine])
        random_states.append(list(states))
    if not with_grad:
        return calculate(embeddings)
    total = calculate(embeddings)
    leaf = total.detach().requires_grad_()
    cache = [[x.grad for x in column] for column in embeddings]
    leaf.register_hook(partial(_replay, loss, features, cache, random_states, ranges))
    # The second term is 0 and carries the graph of `total`.
    return leaf + (total - total.detach()) if total.requires_grad else leaf


def _as_many_as_others(ranges: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Split mini-batches until every rank has as many: each of them gathers the weights from all ranks."""
    rows = [parts[-1][1] if parts else 0 for parts in ranges]
    # On the device of the backend: gloo's tensors are on the CPU, NCCL's are not.
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mine = torch.tensor([rows, list(map(len, ranges))], device=device)
    everyone = gather_integer_rows(mine, dist.group.WORLD)
    most, fewest = everyone[:, 1].amax(0).tolist(), everyone[:, 0].amin(0).tolist()
    for column, (count, texts) in enumerate(zip(most, fewest)):
        if texts < count:
            raise ValueError(
                f"column {column} has {texts} texts on one rank and {count} mini-batches on another, but under FSDP2 "
                "all ranks run as many mini-batches: raise `mini_batch_size`, or distribute rows more evenly."
            )
    return [_split(parts, count) for parts, count in zip(ranges, most)]


def _split(parts: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The same rows in `count` ranges, of which the longest are halved."""
    parts = list(parts)
    while len(parts) < count:
        index = max(range(len(parts)), key=lambda i: parts[i][1] - parts[i][0])
        begin, end = parts[index]
        parts[index : index + 1] = [(begin, (begin + end) // 2), ((begin + end) // 2, end)]
    return parts


def _replay(loss, features, cache, random_states, ranges, upstream: torch.Tensor) -> None:
    """The second forward of every mini-batch, and its backward from the cached gradients."""
    with reduced_once(loss, sum(map(len, cache))) as source:
        _backward_hook(upstream, features, source, cache, random_states, ranges)


class _Source:
    """What the GradCache hook needs from a loss; it switches FSDP2's reduction on before the last mini-batch."""

    def __init__(self, loss: Any, count: int, switch_on: Callable[[], None], sharded: bool) -> None:
        self.model, self.loss = loss.model, loss
        self.left, self.switch_on, self.sharded = count, switch_on, sharded

    def embed_minibatch_iter(self, **arguments) -> Iterator[tuple]:
        passes = self.loss.embed_minibatch_iter(**arguments)
        for _ in arguments["ranges"]:
            self.left -= 1
            if self.left == 0:
                self.switch_on()
            embedded = next(passes)
            if self.left == 0 and self.sharded and not embedded[0].requires_grad:
                raise RuntimeError(
                    "the last column's model is frozen, but FSDP2 reduces all gradients with the last mini-batch: "
                    "put a column that is trained last, or set `mini_batch_size=None`."
                )
            yield embedded


@contextlib.contextmanager
def reduced_once(loss: Any, count: int) -> Iterator[_Source]:
    """Let FSDP2 reduce gradients with the last of `count` mini-batches only, if it reduces them now at all."""
    groups = [group for module in loss.model.modules() if isinstance(module, FSDPModule) for group in _groups(module)]
    before = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]

    def restore() -> None:
        for group, reduce, all_reduce in before:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce

    for group in groups:
        group.reduce_grads = group.all_reduce_grads = False
    try:
        yield _Source(loss, count, restore, bool(groups))
    finally:
        restore()


def _groups(module: FSDPModule) -> list:
    """The parameter groups whose flags `set_requires_gradient_sync` sets, and which nothing public reads."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
