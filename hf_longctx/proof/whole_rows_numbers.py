"""Numbers of pairs of answers: a policy and its reference (DPO), or rewards, of one process and of ranks.

Rows come in pairs, the chosen answer before the rejected one. The loss is TRL's of one pair, and for DPO a random sum
of what its head returns besides, since losses of other types weigh tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from ..trainer.whole_rows import RowSharing, rows_shared
from .model_under_test import Setting
from .numbers import Numbers, mean_gradients, mean_of_ranks
from .random_rows import ROWS_OF_A_GROUP, Rows


BETA, CENTER = 0.1, 0.01
# What TRL's head computes of every token for these losses and their metrics.
FIELDS = ("log_probs", "entropy")


@dataclass
class Side:
    """The models of one side of the comparison.

    Args:
        model (`torch.nn.Module`): that is trained; with an adapter it is its own reference.
        reference (`torch.nn.Module`, *optional*): of DPO.
    """

    model: torch.nn.Module
    reference: torch.nn.Module | None = None

    @property
    def models(self) -> tuple[torch.nn.Module, ...]:
        return tuple(model for model in (self.model, self.reference) if model is not None)


def of_one_process(side: Side, task: str, rows: Rows) -> Numbers:
    """The reference implementation: TRL's head, or transformers', on the whole rows of each group in turn."""
    groups = len(rows.valid) // ROWS_OF_A_GROUP
    loss_of = loss_of_task(task)
    for model in side.models:
        model.zero_grad()
    found = [loss_of(side, side.model.train(), rows, group) for group in range(groups)]
    outputs, losses = (torch.stack(parts) for parts in zip(*found))
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in side.model.named_parameters() if p.grad is not None}
    side.model.zero_grad()
    side.model.eval()
    with torch.no_grad():
        evaluation = torch.stack([loss_of(side, side.model, rows, group)[1] for group in range(groups)]).mean()
    side.model.train()
    loss = losses.mean().detach()
    # Rounding is that of scores and log-ratios, which are of the order of 1, however small the loss.
    scale = max(float(loss.abs()), 1.0)
    return Numbers(outputs.detach().flatten(0, 1), loss, evaluation, gradients, scale)


def on_the_ranks(
    side: Side, wrapped: torch.nn.Module, task: str, rows: Rows, sharing: RowSharing, setting: Setting
) -> Numbers:
    """The same from ranks that share rows, as an optimizer sees it. Every rank calls this."""
    loss_of, group = loss_of_task(task), sharing.mesh.data_parallel_rank
    wrapped.zero_grad()
    with rows_shared(sharing, *side.models):
        outputs, loss = loss_of(side, wrapped.train(), rows, group)
        loss.backward()
        gradients = mean_gradients(wrapped, setting.wrapper)
        wrapped.zero_grad()
        wrapped.eval()
        with torch.no_grad():
            evaluation = loss_of(side, wrapped, rows, group)[1]
        wrapped.train()
    return Numbers(outputs.detach(), mean_of_ranks(loss), mean_of_ranks(evaluation), gradients)


def loss_of_task(task: str) -> Callable[[Side, torch.nn.Module, Rows, int], tuple[torch.Tensor, torch.Tensor]]:
    """What gives the outputs, `(rows, tokens, numbers)`, and the loss of one group."""
    return _preference if task == "dpo" else _reward


def _preference(side: Side, model: torch.nn.Module, rows: Rows, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`model`: that of `side`, wrapped or not."""
    batch: dict[str, Any] = {**rows.of_group(group), "fused_lm_head": True}
    asked = {"output_router_logits": True} if adds_router_loss(side.model) else {}
    outputs = model(**batch, **asked)
    without = side.reference
    with torch.no_grad(), contextlib.nullcontext() if without is not None else use_adapter(side.model, None):
        expected = (side.model if without is None else without)(**batch).log_probs
    ratios = (outputs.log_probs - expected).sum(1)
    loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()
    fields = torch.stack([getattr(outputs, name) for name in FIELDS], dim=-1)
    loss = loss + (_upstream(rows, fields) * fields).sum() / fields.numel()
    if asked:
        loss = loss + side.model.config.get_text_config().router_aux_loss_coef * outputs.aux_loss
    return torch.cat([fields, expected[..., None]], dim=-1), loss


def _reward(side: Side, model: torch.nn.Module, rows: Rows, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = {name: value for name, value in rows.of_group(group).items() if name != "labels"}
    scores = model(**batch, use_cache=False).logits
    chosen, rejected = scores[0::2], scores[1::2]
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean() + CENTER * ((chosen + rejected) ** 2).mean()
    return scores[:, None], loss


def adds_router_loss(model: torch.nn.Module) -> bool:
    """As TRL decides it, for the models whose experts it can count."""
    text: Any = model.config.get_text_config()
    wanted = hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0) != 0.0
    return wanted and hasattr(text, "num_experts") and hasattr(text, "num_experts_per_tok")


def _upstream(rows: Rows, fields: torch.Tensor) -> torch.Tensor:
    """A random gradient for every number of a group's tokens, the same for each group."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(fields.shape, generator=generator, dtype=torch.float64).to(fields.dtype)


def outputs_of_the_last_share(side: Side, task: str, rows: Rows, group: int, first: int, start: int) -> torch.Tensor:
    """What the tokens from `first` on give by themselves, as on a rank that gets nothing from the others.

    Args:
        start (`int`): the position of a row's first token.
    """
    batch = {name: value[:, first:] for name, value in rows.of_group(group).items()}
    counted = torch.arange(start + first, start + rows.valid.shape[1])
    batch["position_ids"] = counted.expand(len(batch["input_ids"]), -1).contiguous()
    with torch.no_grad():
        if task == "dpo":
            return side.model(**batch, fused_lm_head=True).log_probs
        return side.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, None, 0]
