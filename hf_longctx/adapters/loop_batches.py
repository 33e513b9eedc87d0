"""The batches of a training loop: each is looked at before the forward, and counted after it where the model does not.

A trainer knows which loss it computes and what it feeds; a loop calls `model(**batch)`, so what can be wrong with a
batch has to be seen there. Put on by `hf_longctx.adapt`, which knows the answers that it asks for.
Price: some Python a forward. A model that mixes packed documents also has its positions read, once a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from ..attention.call_documents import document_facts, shard_of_rows
from ..attention.implicit_positions import packs_documents
from ..attention.registry import name_that_shards, shards_rows
from ..families import first_position, skips_layers
from ..losses.token_mean import token_mean
from ..parallel.adapted import Adapted
from ..parallel.segments import DOCUMENT_BOUND_KEYS, positions_of
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, named_arguments
from .sparse.sparse_rows import SparseRowsWatch


LOOP_BATCHES = "batches of a loop"


class LoopBatches(InstancePatch):
    """Refuses batches that the model would get wrong, and counts its loss over the whole step.

    Args:
        adapted ([`Adapted`]): how the model trains.
        needs ([`SanityResult`][hf_longctx.trainer.sanity_check.SanityResult]): what it needs in a batch.
        leaks (`Mapping[str, str]`): by the way in which a batch tells its documents, why the model mixes them.
        sparse ([`SparseRowsWatch`]): of the model.
    """

    name = LOOP_BATCHES

    def __init__(self, adapted: Adapted, needs, leaks: Mapping[str, str], sparse: SparseRowsWatch) -> None:
        self.adapted, self.needs, self.leaks, self.sparse = adapted, needs, dict(leaks), sparse

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given: dict[str, Any] = named_arguments(module, args, kwargs)
        shard = given.get("sequence_shard")
        if shard is None:
            return own(*args, **self._on_whole_rows(module, given, kwargs))
        self._validate_share(module, shard, given)
        shard.readers.clear()
        outputs = own(*args, **kwargs)
        self._validate_readers(module, shard)
        return self._counted(module, outputs, given)

    def _on_whole_rows(self, module, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a batch that no one cut: bounds without positions get them."""
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        has_bounds = any(given.get(name) is not None for name in DOCUMENT_BOUND_KEYS)
        counts = has_bounds and given.get("position_ids") is None
        first = first_position(module.config) if self.needs.needs_position_ids else 0
        if tokens is None or not (counts or first or self.leaks):
            return kwargs
        rows, num_tokens = tokens.shape[:2]
        documents = document_facts(given, num_tokens, self.adapted.position_axes)
        facts = {**documents, "attention_mask": given.get("attention_mask")}
        shard = shard_of_rows(facts, rows, num_tokens, tokens.device)
        if not packs_documents(shard):
            return kwargs
        self._validate_documents(module, _told_by(given))
        if not counts:
            self.needs.validate_first_positions(module, shard, given)
            return kwargs
        if "position_ids" not in inspect.signature(type(module).forward).parameters:
            return kwargs
        return {**kwargs, "position_ids": positions_of(shard.segment_ids, num_tokens, tokens.device) + first}

    def _validate_documents(self, module: torch.nn.Module, told_by: str) -> None:
        if told_by in self.leaks:
            raise NotImplementedError(f"`{type(module).__name__}` cannot take packed rows: {self.leaks[told_by]}")

    def _validate_share(self, module, shard: SequenceShard, given: dict[str, Any]) -> None:
        name, attention = type(module).__name__, module.config.get_text_config()._attn_implementation
        if shard.size != self.adapted.sequence_parallel_size:
            raise RuntimeError(
                f"the batch was cut for {shard.size} rank(s) a row, but `{name}` was adapted for "
                f"{self.adapted.sequence_parallel_size}: call `hf_longctx.adapt(model, mesh)` with the mesh of the "
                "batch."
            )
        if shard.size > 1 and not shards_rows(attention):
            raise ValueError(
                f"`{name}` was changed to attn_implementation={attention!r} after it was adapted, which would attend "
                f"to this rank's tokens only: call `model.set_attn_implementation({name_that_shards()!r})`."
            )
        if packs_documents(shard):
            self._validate_documents(module, "shard")
        self.sparse.see(shard.num_tokens)
        self.needs.validate_batch(module, shard, given)
        if given.get("labels") is not None:
            self._validate_labels(name, shard, given)

    def _validate_readers(self, module, shard: SequenceShard) -> None:
        """Every attention layer that read the shard when the model was checked has read this one."""
        name, layers = type(module).__name__, len(self.needs.readers)
        missing = layers - len(shard.readers)
        if shard.size > 1 and missing > 0 and not skips_layers(module.config):
            raise RuntimeError(
                f"{missing} of {layers} attention layers of `{name}` did not read the "
                "`sequence_shard` of the batch, so they saw this rank's tokens only: leave every layer on "
                f"attn_implementation={name_that_shards()!r}, or call `hf_longctx.adapt(model, mesh)` anew."
            )

    def _validate_labels(self, name: str, shard: SequenceShard, given: dict[str, Any]) -> None:
        shifts, are_shifted = self.adapted.shifts_labels, given.get("shift_labels") is not None
        if shifts is not None and shifts != are_shifted:
            raise ValueError(
                f"`{name}` {'predicts the next token' if shifts else 'compares each token with its own label'}, but "
                f"the labels were cut {'without being shifted' if shifts else 'after being shifted'}: leave "
                "`shift_labels` out of `shard_batch(batch, mesh, model)`, which asks the model."
            )
        if shard.size > 1 and given.get("num_items_in_batch") is None:
            raise ValueError(
                f"the share has `labels` and no `num_items_in_batch`, so `{name}` would average over this rank's "
                "tokens: pass what `shard_batch` returns, or compute the loss from the logits and `shift_labels`."
            )

    def _counted(self, module, outputs, given: dict[str, Any]):
        """The outputs, with a loss over the whole step where the model's own is a mean over its tokens."""
        count, labels = given.get("num_items_in_batch"), given.get("labels")
        if not self.needs.loss_ignores_count or count is None or labels is None:
            return outputs
        if not isinstance(outputs, MutableMapping):
            raise NotImplementedError(
                f"`{type(module).__name__}` ignores `num_items_in_batch`, and its loss cannot be replaced in a tuple: "
                "leave `return_dict` at True."
            )
        targets = given["shift_labels"] if given.get("shift_labels") is not None else labels
        outputs["loss"] = token_mean(outputs, targets, count)
        return outputs


def _told_by(given: Mapping[str, object]) -> str:
    """The way in which a batch that no one cut tells its documents."""
    if given.get("cu_seq_lens_q") is not None:
        return "cu_seq_lens_q"
    return "seq_idx" if given.get("seq_idx") is not None else "position_ids"
