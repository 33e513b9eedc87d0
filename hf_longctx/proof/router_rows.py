"""One process's outputs and loss of rows, where its model adds the loss of its routers: once for each batch.

The batches are those of the groups. Packed documents go through the model one by one, and what their routers say is
put together: the model's own function then sees the tokens of the packed rows, in which no document saw another.
"""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.rebind import called_names, rebind
from ..adapters.rotary_lengths import forget_lengths
from ..parallel.shard import IGNORE_INDEX
from .random_rows import ROWS_OF_A_GROUP, Rows


_FUNCTION = "load_balancing_loss_func"


def rows_with_router_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], rows: Rows, settings: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the loss of one optimizer step in which every group's rows are a batch, times its trained tokens.

    Args:
        model (`torch.nn.Module`): as transformers runs it.
        batch (`dict`): full rows of all groups.
        rows ([`Rows`]): the same, with their documents.
        settings (`dict`): of every call.
    """
    outputs, total = [], torch.zeros((), dtype=torch.float64, device=batch["input_ids"].device)
    for first in range(0, len(batch["input_ids"]), ROWS_OF_A_GROUP):
        of_group = slice(first, first + ROWS_OF_A_GROUP)
        group = {name: value[of_group] for name, value in batch.items()}
        if rows.kind == "packed":
            places = [(row - first, start, stop) for row, start, stop in rows.documents]
            places = [place for place in places if 0 <= place[0] < ROWS_OF_A_GROUP]
            logits, loss = _by_document(model, group, places, {**settings, "num_items_in_batch": rows.num_items})
        else:
            result = model(**group, **settings, num_items_in_batch=rows.num_items)
            logits, loss = result.logits, result.loss
        outputs.append(logits)
        total = total + loss * rows.num_items
    return torch.cat(outputs), total


def _by_document(
    model: torch.nn.Module,
    group: dict[str, torch.Tensor],
    places: list[tuple[int, int, int]],
    settings: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each document alone; the last one with a target adds the loss of all routers."""
    documents = [
        {name: value[row : row + 1, start:stop] for name, value in group.items()} for row, start, stop in places
    ]
    trains = [bool((document["labels"][:, 1:] != IGNORE_INDEX).any()) for document in documents]
    order = sorted(range(len(documents)), key=lambda index: trains[index])
    pieces: dict[int, torch.Tensor] = {}
    together = _Together(model)
    loss = 0.0
    for index in order:
        forget_lengths(model)
        together.is_last = index == order[-1]
        document = documents[index]
        if not trains[index]:
            document = {name: value for name, value in document.items() if name != "labels"}
        result = together.forward(**document, **settings)
        pieces[index] = result.logits[0]
        loss = loss + result.loss if trains[index] else loss
    logits = torch.cat([pieces[index] for index in range(len(pieces))])
    return logits.view(*group["input_ids"].shape, -1), torch.as_tensor(loss)


class _Together:
    """A model whose function gets the router logits of all calls, in the last of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.is_last = model, False
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._forward = type(model).forward
        if _FUNCTION in called_names(self._forward):  # others return router logits and compute nothing of them
            self._own = _undecorated(self._forward).__globals__[_FUNCTION]
            self._forward = rebind(self._forward, {_FUNCTION: self._function})

    def forward(self, **batch: Any) -> Any:
        return self._forward(self.model, **batch)

    def _function(self, gate_logits: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        self._parts.append(gate_logits)
        if not self.is_last:
            return gate_logits[0].new_zeros(())
        tokens = -2  # product keys have two sets of logits in front
        return self._own(tuple(torch.cat(layer, dim=tokens) for layer in zip(*self._parts)), *args, **kwargs)


def _undecorated(function: Any) -> Any:
    while getattr(function, "__wrapped__", None) is not None:
        function = function.__wrapped__
    return function
