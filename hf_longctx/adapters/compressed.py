"""DeepSeek-V4's compressed attention on rows that ranks share, and on packed documents.

What: transformers counts the windows of its compressors from the first token of a row, and compares positions that
restart with entries that count on, so a packed document sees the entries of the first one and never its own. On a
share of a row, every rank would compress its own tokens only. Here windows, entries and what a query sees belong to
documents, whichever rank holds them.

How: patches `forward` of the layer, its compressor and its indexer. The layer's own code runs with a cache-shaped
object that puts the last tokens of the ranks before in front of its keys. The compressor projects its tokens, gets the
`2 m - 1` (`m - 1` where windows do not overlap) projected tokens before them, computes the entries whose last token is
on this rank and gathers those of all ranks.

Price a layer: two all-gathers of the ranks' last tokens, one of the entries and one of the indexer's, forward; the
reduce-scatters of all but the indexer's, backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..attention.cache_names import CACHE_NAMES
from ..attention.call import AttentionCall, KeySelection
from ..attention.compressed import EntryTable, RowsOfDocuments, WindowAndEntries
from ..attention.explain import note_selection
from ..attention.indexed import QUERY_BLOCK
from ..attention.registry import find_attention
from ..attention.side_inputs import validate_side_inputs
from ..parallel.gathered import gather_shares, tokens_before
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .sparse_rows import FIRST_POSITIONS, SparseLayerPatch, documents_from_start, shard_of_layer


LAYER, COMPRESSOR, HASH = "compressed layer", "compressor", "routing by hash"


def follow_compressors(model: torch.nn.Module) -> PatchHandle:
    """Patch the layers of one model that attend to windows and compressed entries.

    Args:
        model (`torch.nn.Module`): any; one without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    for module in list(model.modules()):
        if is_compressed_layer(module):
            put_on(module, _LayerPatch())
            if module.compressor is not None:
                put_on(module.compressor, _CompressorPatch())
        elif getattr(module, "is_hash", False) and hasattr(module, "gate"):
            put_on(module, _HashPatch())
    return PatchHandle(model, LAYER, COMPRESSOR, HASH)


def is_compressed_layer(module: torch.nn.Module) -> bool:
    """Whether `module` attends to a window, and to what a compressor makes of windows of tokens if it has one."""
    compressor = getattr(module, "compressor", None)
    if compressor is None:
        return all(hasattr(module, name) for name in ("compressor", "sinks", "sliding_window", "rope_layer_type"))
    return compresses(compressor)


def compresses(module: torch.nn.Module | None) -> bool:
    """Whether `module` makes entries of windows of tokens: a compressor, or an indexer that has one of its own."""
    return all(hasattr(module, name) for name in ("compress_rate", "gate_proj", "position_bias", "rotary_emb"))


class _TokensBefore:
    """What a layer gets as its cache: it puts the tokens before mine in front of the keys of mine."""

    def __init__(self, rows: RowsOfDocuments, window: int) -> None:
        self.rows, self.window = rows, window

    def update(self, keys: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(B, 1, t, H)` of my tokens to `(B, 1, window - 1 + t, H)`."""
        extended = tokens_before(keys[:, 0], self.window - 1, self.rows.shard)[:, None]
        return extended, extended


class _LayerPatch(SparseLayerPatch):
    """Runs the layer's own code on keys and entries of whole rows."""

    name = LAYER

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        forward, given = self.rows_of_call(module), named_arguments(module, args, kwargs)
        if find_attention(module.config._attn_implementation) is None:
            return own(*args, **kwargs)
        shard = shard_of_layer(module, forward, given, module.sliding_window)
        if shard is None:  # generation: transformers' own states and bias, which needs its own kind of mask
            mask = given["attention_mask"]
            return own(**{**given, "attention_mask": None if mask is None else mask.build("eager")})
        rows = documents_from_start(module, shard, given)
        mask = given["attention_mask"] = _Mask()
        given |= dict.fromkeys(
            set(CACHE_NAMES) & inspect.signature(type(module).forward).parameters.keys(),
            _TokensBefore(rows, module.sliding_window),
        )
        given["sequence_shard"] = shard
        if module.compressor is None:
            mask.facts = WindowAndEntries(rows, EntryTable.none(rows), module.sliding_window, None)
            return own(**given)
        # The compressor completes the mask with what its indexer picks, before attention reads it.
        compressor = patch_on(module.compressor, COMPRESSOR)
        compressor.rows, compressor.mask, compressor.window = rows, mask, module.sliding_window
        try:
            return own(**given)
        finally:
            compressor.rows = compressor.mask = None

    def picks_all_below(self, module: torch.nn.Module) -> int:
        indexer = getattr(module.compressor, "indexer", None)
        return 0 if indexer is None else indexer.index_topk * indexer.compress_rate


class _Mask(KeySelection):
    """The mask of a call, once the compressor has run."""

    facts: WindowAndEntries

    def attend(self, call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
        validate_side_inputs(call, type(call.module).__name__)
        shard.readers.add(id(call.module))
        facts, rule = self.facts, f"causal, window of {self.facts.window:,} tokens"
        if facts.table.ends.shape[1]:
            many = "all" if facts.picks is None else f"{facts.picks.shape[-1]:,} picked"
            rule += f" and {many} entries of {facts.table.width:,} tokens each"
        note_selection(shard, rule, _numbers_gathered(call.module, facts) / (shard.size * shard.local_len))
        return facts.attend(call)


def _numbers_gathered(module: torch.nn.Module, facts: WindowAndEntries) -> int:
    """What all ranks together send each other for a row: last tokens, and entries."""
    shard, entries = facts.rows.shard, facts.table.ends.shape[1]
    tails = lambda reach, width: shard.size * min(reach, shard.local_len) * width
    numbers = tails(facts.window - 1, module.head_dim)
    compressor = module.compressor
    for part in () if compressor is None else (compressor, getattr(compressor, "indexer", None)):
        if part is not None:
            numbers += tails(_reach(part), 2 * part.kv_proj.out_features) + entries * part.head_dim
    return numbers


def _reach(module: torch.nn.Module) -> int:
    """How many tokens before a window's last one its entry is made of."""
    overlaps = module.kv_proj.out_features == 2 * module.head_dim
    return (2 if overlaps else 1) * module.compress_rate - 1


class _HashPatch(InstancePatch):
    """Asks for the token ids by which experts are chosen."""

    name = HASH

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        if named_arguments(module, args, kwargs).get("input_ids") is None:
            raise ValueError(
                f"`{type(module).__name__}` routes tokens to experts by their ids, and the batch has `inputs_embeds` "
                "without `input_ids`: pass `input_ids`."
            )
        return own(*args, **kwargs)


class _CompressorPatch(InstancePatch):
    """Entries of whole rows, computed where the last tokens of their windows are."""

    name = COMPRESSOR

    def __init__(self) -> None:
        self.rows: RowsOfDocuments | None = None
        self.mask: _Mask | None = None
        self.window = 0

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows, given = self.rows, named_arguments(module, args, kwargs)
        if rows is None or self.mask is None:
            return own(*args, **kwargs)
        table = EntryTable.of_rows(rows, module.compress_rate)
        entries = _entries(module, rows, table, given["hidden_states"])
        picks = None if getattr(module, "indexer", None) is None else _picks(module.indexer, rows, table, given)
        self.mask.facts = WindowAndEntries(rows, table, self.window, picks)
        return entries[:, None], None


def _entries(
    module: torch.nn.Module, rows: RowsOfDocuments, table: EntryTable, hidden_states: torch.Tensor
) -> torch.Tensor:
    """The entries of all ranks, `(B, P * n, H)`, rotated to where their windows begin.

    Gradient: of the hidden states whose windows they are, on whichever rank.
    """
    width, size, shard = module.compress_rate, module.head_dim, rows.shard
    projected = torch.cat([module.kv_proj(hidden_states), module.gate_proj(hidden_states)], dim=-1)
    overlaps, reach = projected.shape[-1] == 4 * size, _reach(module)
    values, gates = tokens_before(projected, reach, shard).chunk(2, dim=-1)
    ends = table.ends[:, table.mine]
    last = (ends - rows.start + reach).clamp(min=0)
    slots = last[..., None] - width + 1 + torch.arange(width, device=last.device)
    row = torch.arange(len(ends), device=last.device)[:, None, None]
    pick = lambda tensor, index: tensor[row, index.clamp(min=0)]
    bias = module.position_bias
    if not overlaps:
        window, gate = pick(values, slots), pick(gates, slots) + bias
    else:
        # An entry is made of its own window and of the other half of what the window before was projected to.
        has_before = (table.positions[:, table.mine] >= 2 * width - 1)[..., None, None]
        earlier = slots - width
        window = torch.cat([pick(values, earlier)[..., :size] * has_before, pick(values, slots)[..., size:]], dim=2)
        before = torch.where(has_before, pick(gates, earlier)[..., :size] + bias[:, :size], float("-inf"))
        gate = torch.cat([before, pick(gates, slots)[..., size:] + bias[:, size:]], dim=2)
    kind = torch.promote_types(gate.dtype, torch.float32)
    compressed = module.kv_norm((window * gate.softmax(dim=2, dtype=kind).to(window.dtype)).sum(dim=2))
    first = shard.derived[FIRST_POSITIONS].gather(1, (ends - rows.start).clamp(min=0))
    begins = (table.positions[:, table.mine] - width + 1).clamp(min=0) + first
    cos, sin = module.rotary_emb(compressed, position_ids=begins, layer_type=module.rope_layer_type)
    compressed = _rotate(module)(compressed.unsqueeze(1), cos, sin).squeeze(1)
    if shard.size == 1:
        return compressed
    return gather_shares(compressed, shard.group, shard.stopwatch).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def _picks(indexer: torch.nn.Module, rows: RowsOfDocuments, table: EntryTable, given: dict[str, Any]) -> torch.Tensor:
    """The entries that each of my queries picks, `(B, t, k)`; -1 for none."""
    hidden_states, residual = given["hidden_states"], given["q_residual"]
    keys = _entries(indexer, rows, table, hidden_states)
    cos, sin = indexer.rotary_emb(
        hidden_states, position_ids=given["position_ids"], layer_type=indexer.rope_layer_type
    )
    queries = indexer.q_b_proj(residual).unflatten(-1, (-1, indexer.head_dim)).transpose(1, 2)
    queries = _rotate(indexer)(queries, cos, sin).transpose(1, 2)
    count, picks = min(indexer.index_topk, keys.shape[1]), []
    for start in range(0, hidden_states.shape[1], QUERY_BLOCK):
        part = slice(start, min(start + QUERY_BLOCK, hidden_states.shape[1]))
        scores = indexer.scorer(queries[:, part], keys, hidden_states[:, part])
        seen = rows.sees_entries(part, table)
        best = scores.masked_fill(~seen, float("-inf")).topk(count, dim=-1).indices
        picks.append(torch.where(seen.gather(2, best), best, -1))
    return torch.cat(picks, dim=1)


def _rotate(module: torch.nn.Module) -> Callable:
    """The rotary function of the module's own file."""
    return inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
