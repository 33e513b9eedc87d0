"""The recurrent blocks of RecurrentGemma on rows that several ranks share, and on packed documents.

A block convolves with a module of its own, runs a linear recurrence with a method of another, and keeps their cache in
itself. Both are patched on the instances; the cache is off for such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...parallel.gathered import joined
from ..instance_forward import put_on
from ..pass_shard import ForwardRows, ShardReader
from .convolution import convolve
from .pieces import SharePieces, pieces_of, run_pieces
from .reader import RECURRENT, RecurrentReader
from .scan import add_where_continued, incoming_state


class RecurrentBlockPatch(RecurrentReader):
    """`RecurrentGemmaRecurrentBlock` without its cache, where rows are shared or packed."""

    def follow(
        self, module: torch.nn.Module, own: Callable, pieces: SharePieces, rows: ForwardRows, given: dict[str, Any]
    ) -> Any:
        return own(**{**given, "use_cache": False})


def follow_block(block: torch.nn.Module) -> None:
    """Patch a block, its convolution and its recurrence.

    Args:
        block (`torch.nn.Module`): a `RecurrentGemmaRecurrentBlock`, changed in place.
    """
    parts: Any = block
    put_on(block, RecurrentBlockPatch())
    put_on(parts.conv_1d, _ConvolutionPatch())
    put_on(parts.rg_lru, _ScanPatch(), method="_rnn_scan")


class _PartReader(ShardReader):
    """A part of a block, which has marked the shard as read."""

    name = RECURRENT

    def pieces(self, module: torch.nn.Module, tokens: torch.Tensor) -> SharePieces | None:
        """Of the tokens of a call, or `None` where the part is right as it is."""
        shard = self.rows_of_call(module).shard
        pieces = None if shard is None else pieces_of(shard, len(tokens), tokens.device)
        return None if pieces is None or pieces.is_whole else pieces


class _ConvolutionPatch(_PartReader):
    """`conv_1d`, of whose output a block takes the first tokens."""

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs) -> torch.Tensor:
        hidden_states = args[0]
        pieces = self.pieces(module, hidden_states)
        if pieces is None:
            return own(*args, **kwargs)
        run = lambda inputs, *_, **__: own(inputs)[..., : inputs.shape[-1]]
        layer: Any = module
        return convolve(run, pieces, hidden_states, layer.weight.squeeze(1), layer.bias)


class _ScanPatch(_PartReader):
    """`_rnn_scan`, which starts anew where positions do."""

    def call(
        self,
        module: torch.nn.Module,
        own: Callable,
        hidden_states: torch.Tensor,
        recurrent_gate: torch.Tensor,
        reset: torch.Tensor,
        recurrent_states: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        pieces = self.pieces(module, hidden_states)
        if pieces is None:
            return own(hidden_states, recurrent_gate, reset, recurrent_states, **kwargs)
        run = lambda *tensors: own(*tensors, None, **kwargs)
        reset = reset.expand(len(hidden_states), -1, -1)
        outputs, state = run_pieces(pieces, run, hidden_states, recurrent_gate, reset)
        if not pieces.is_shared:
            return outputs, None
        assert state is not None
        decay = (recurrent_gate * ~reset).to(state.dtype).cumprod(dim=1)
        incoming, gathered = incoming_state(pieces, state, decay[:, -1])
        if pieces.shard.rank:
            outputs = add_where_continued(pieces, outputs, decay * incoming[:, None])
        return joined(outputs, gathered), None
