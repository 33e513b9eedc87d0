"""Per-token numbers of whole rows, from a model that runs on shares of them: TRL's fused head, shared.

What: TRL's preference and reinforcement losses ask a model for one thing, `model(..., labels=labels,
fused_lm_head=True)`: log-probabilities, entropies and the like of every token of whole rows. The patch takes whole
rows, cuts them there, lets the head score the share against targets that were shifted before the cut, and gathers what
it found. So losses, metrics, reference models and adapters that are switched off stay TRL's, unchanged.

How: a patch of `forward` on the model below an adapter, on top of TRL's head. A forward without `fused_lm_head` (a
generation, say) is the model's own, on whole rows, without communication.

Price: one all-gather of one number a token for each field that TRL asks for, and one reduce-scatter in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adapters.instance_forward import InstancePatch, PatchHandle, named_arguments, put_on
from ..adapters.wrapped import unwrap
from ..parallel.shard import IGNORE_INDEX
from .whole_rows import WholeRows, WholeRowsPatch


SCORED_ROWS = "scored rows"
# What TRL's head returns for each token.
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def score_whole_rows(model: torch.nn.Module, counts_real_tokens: bool = False) -> PatchHandle:
    """Patch a model that has TRL's fused head: within [`rows_shared`] it scores whole rows on shares of them.

    Args:
        model (`torch.nn.Module`): wrapped or not, after `add_fused_lm_head` and after its adapters are attached.
        counts_real_tokens (`bool`, *optional*, defaults to `False`): it numbers the tokens that its mask keeps.

    Returns:
        [`PatchHandle`]: `remove()` takes the patch off. Patching twice is patching once.

    Communication: in a block of [`rows_shared`], that of the model's layers, and that of [`gather_tokens`] once for
        the numbers of each dtype.
    Gradient: that of one process, after a wrapper's mean over the ranks, for any loss of the numbers that every rank
        of a group computes alike.
    """
    put_on(unwrap(model), ScoredRowsPatch(counts_real_tokens))
    return PatchHandle(model, SCORED_ROWS)


class ScoredRowsPatch(WholeRowsPatch, InstancePatch):
    """On a causal language model with TRL's fused head."""

    name = SCORED_ROWS

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        if self.sharing is None or not given.get("fused_lm_head") or given.get("sequence_shard") is not None:
            return own(*args, **kwargs)
        labels, targets = given.pop("labels", None), given.pop("shift_labels", None)
        count = given.pop("num_items_in_batch", None)
        given.pop("fused_lm_head")
        columns = labels.shape[1] - 1 if targets is None else targets.shape[1]
        if targets is None:
            targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()
        _validate_trained(targets)
        rows = WholeRows(module, given, self, targets)
        outputs = own(**rows.share(), fused_lm_head=True)
        found = _gathered({name: getattr(outputs, name, None) for name in FIELDS}, rows, columns)
        aux_loss = outputs.aux_loss
        log_probs, trained = found["log_probs"], found["label_mask"]
        loss = -log_probs.sum() / (trained.sum().clamp(min=1) if count is None else count)
        if aux_loss is not None:
            loss = loss + getattr(module.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return type(outputs)(loss=loss, aux_loss=aux_loss, **found)


def _gathered(fields: dict[str, Any], rows: WholeRows, columns: int) -> dict[str, Any]:
    """The fields of whole rows: those of one dtype in one collective."""
    alike: dict[torch.dtype, list[str]] = {}
    for name, field in fields.items():
        if field is not None:
            alike.setdefault(field.dtype, []).append(name)
    found = dict(fields)
    for names in alike.values():
        whole = rows.gather(torch.stack([fields[name] for name in names], dim=-1))[:, :columns]
        found.update(zip(names, whole.unbind(-1)))
    return found


def _validate_trained(targets: torch.Tensor) -> None:
    """Raise `ValueError` where nothing is scored: such a batch would train nothing, and say so nowhere."""
    if not (targets != IGNORE_INDEX).any():
        raise ValueError(
            f"none of the {len(targets)} rows of a batch has a token of a completion (all labels are -100): give each "
            "row a completion, or raise `max_length`."
        )
