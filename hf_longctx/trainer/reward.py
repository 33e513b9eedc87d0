"""`LongContextRewardTrainer`: TRL's `RewardTrainer` on rows shared by several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adapters.instance_forward import InstancePatch, put_on
from ..adapters.wrapped import unwrap
from ..config.audiences import TRAINERS
from .pooled_rows import pool_whole_rows
from .whole_rows_mixin import WholeRowsMixin


try:
    from trl import RewardTrainer
except ImportError as error:
    raise ImportError("`LongContextRewardTrainer` needs trl: `pip install hf-longctx[trl]`.") from error


class LongContextRewardTrainer(WholeRowsMixin, RewardTrainer):
    """`trl.RewardTrainer` on shared rows.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        args, kwargs: those of `trl.RewardTrainer`, unchanged: margins, `center_rewards_coefficient`, adapters.

    Losses, gradients, metrics and checkpoints equal those of the same run with `sequence_parallel_size` 1 and the same
    number of data-parallel groups.
    """

    configs = TRAINERS["LongContextRewardTrainer"]
    attach_rows = staticmethod(pool_whole_rows)

    def prepare_arguments(self, given: dict[str, Any]) -> None:
        refuse_no_padding(given.get("processing_class"), given.get("args"))
        super().prepare_arguments(given)

    def prepare_model(self) -> None:
        super().prepare_model()
        put_on(unwrap(self.model), _WithoutMargin())


class _WithoutMargin(InstancePatch):
    """On the model: TRL passes it the margins of pairs with its inputs, which an attention of ours would refuse."""

    name = "margins of pairs"

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        kwargs.pop("margin", None)
        return own(*args, **kwargs)


def refuse_no_padding(tokenizer: Any, args: Any) -> None:
    """Raise `ValueError` where the end of a row could not be told from its padding."""
    if tokenizer is None or getattr(args, "pad_token", None):
        return
    if getattr(tokenizer, "pad_token", None) is None and getattr(tokenizer, "eos_token", None) is None:
        raise ValueError(
            f"the tokenizer (`{type(tokenizer).__name__}`) has neither a `pad_token` nor an `eos_token`, so the last "
            "token of a padded row cannot be found: set `tokenizer.pad_token`, or `pad_token` of `RewardConfig`."
        )
