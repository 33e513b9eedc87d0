"""Packed rows in a trainer: rows built by token budget, assigned evenly to the groups, and checked for leaks once.

The overridden methods of [`TrainerBase`] call these; nothing here is arithmetic of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.utils import is_datasets_available

from ..adapters.peft_kinds import PACKED_ROWS, check_peft
from ..adapters.wrapped import unwrap
from ..attention.contamination import assert_no_cross_document
from ..attention.unadapted import refuse_token_mixing
from ..data.blend.blended_rows import find_blend
from ..data.packing.collator import PackingCollator, fills_rows
from ..data.packing.samplers import BalancedSampler
from ..families import position_axes, text_marks
from ..parallel.collectives import gather_integers
from ..parallel.position_planes import text_positions
from ..parallel.segments import PAD_SEGMENT, segment_rows
from ..tiny_check import random_tokens


# The check needs several documents of several tokens; longer ones would prove the same.
_CHECKED_DOCUMENTS, _CHECKED_TOKENS = 8, 12


def check_collator(trainer) -> None:
    """Refuse a packing collator whose labels would train one document on the next, or such adapters."""
    collator = trainer.data_collator
    if isinstance(collator, PackingCollator) and trainer.shifts_labels and not collator.mask_first_label:
        raise ValueError(
            "`mask_first_label` (False) leaves the label of every document's first token, which the last token of the "
            f"document before would learn to predict in `{type(unwrap(trainer.model)).__name__}`: leave it at True; "
            "False is for masked language models."
        )
    if fills_rows(collator):
        check_peft(trainer.model, *PACKED_ROWS)


def pack_dataset(trainer, dataset, description: str, group_size: int, sampler_fn, is_training: bool):
    """The data set's documents as packed rows, and who orders them.

    Columns that the model does not know are dropped first, where the trainer would. In training, where it would
    shuffle, the `group_size` rows of one step have nearly the same cost; those of a stream are chosen within a buffer.

    Returns:
        tuple of the packed rows and the function that makes their sampler, as transformers' `sampler_fn`.

    Raises:
        ValueError: the arguments ask to sort rows by length.
    """
    strategy = getattr(trainer.args, "train_sampling_strategy", "random")
    if is_training and strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy` ({strategy!r}) sorts rows by length, but packed rows all have up to "
            f"`max_tokens` ({trainer.data_collator.max_tokens}): use 'random', which also balances their cost."
        )
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset):
            dataset = trainer._remove_unused_columns(dataset, description=description)
    balances = is_training and strategy == "random" and find_blend(dataset) is None
    group_size = group_size if balances else 1
    linear_tokens = 12 * getattr(unwrap(trainer.model).config.get_text_config(), "hidden_size", 1024)
    packed = trainer.data_collator.pack(
        dataset, seed=trainer.data_seed, group_size=group_size, linear_tokens=linear_tokens
    )
    if isinstance(packed, IterableDataset) or group_size == 1:
        return packed, sampler_fn
    costs = packed.packing.costs(linear_tokens)
    return packed, lambda _: BalancedSampler(costs, group_size, seed=trainer.data_seed)


def check_packed_batch(trainer, inputs: dict[str, Any]) -> bool:
    """Prove on a miniature of the first packed batch that this model keeps its documents apart.

    Returns:
        `bool`: whether that is settled. `False`: no row has two documents yet, so look again; where the model runs its
        own attention, or weights are sharded over all ranks, only the first batch is looked at.

    Raises:
        NotImplementedError: documents see each other.

    Communication: with a shard, that of a few forwards of at most 96 tokens. If weights are sharded over all ranks, a
    sum over them as well, since all must then take part.
    """
    shard = inputs.get("sequence_shard")
    axes = position_axes(unwrap(trainer.model).config)
    segments = shard.segment_ids if shard is not None else _segments_of_batch(inputs, axes)
    lengths = [] if segments is None else _document_lengths(segments)
    packed = len(lengths) > 1
    sharded_weights = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded_weights:
        if not trainer.accelerator.reduce(torch.tensor(int(packed), device=trainer.args.device)):
            return True
        lengths = lengths if packed else [_CHECKED_TOKENS] * 3
    elif not packed:
        return shard is None  # reading the documents of every batch again would slow an unsharded run
    check_peft(trainer.model, *PACKED_ROWS)
    refuse_token_mixing(type(unwrap(trainer.model)).__name__, unwrap(trainer.model).config)
    model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.accelerator.unwrap_model(trainer.model)
    batch = _miniature(trainer, inputs, lengths, unwrap(model).config)
    # The wrapper that shards the weights owns their backward.
    settings: dict[str, Any] = {"check_gradients": not sharded_weights}
    if shard is not None:
        settings |= {"mesh": trainer.mesh, "inner_attention": trainer.long_context.inner_attention}
    try:
        with trainer.accelerator.autocast():
            assert_no_cross_document(model, batch, **settings)
    except AssertionError as error:
        name = type(unwrap(model)).__name__
        raise NotImplementedError(f"`{name}` cannot train on this packed batch: {error}") from error
    return True


def packs_rows_of(inputs: dict[str, object]) -> bool:
    """Whether a batch of whole rows holds a row of several documents."""
    segments = _segments_of_batch(inputs)
    return segments is not None and bool(_document_lengths(segments))


def _segments_of_batch(inputs: dict[str, Any], axes: int = 0) -> torch.Tensor | None:
    """Documents of a batch that goes to the model's own attention."""
    inputs = {**inputs, "position_ids": text_positions(inputs, axes) if axes else inputs.get("position_ids")}
    ids, *others = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    given = [ids, *(x for x in others if x is not None)]
    if ids is None or not all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in given):
        return None  # several choices a row, or a mask or positions of the model's own kind
    rows, num_tokens = ids.shape
    return segment_rows(inputs, rows, num_tokens, ids.device)[0]


def _document_lengths(segments: torch.Tensor) -> list[int]:
    """Lengths of the documents of the first row that has several."""
    for row in segments:
        ids, lengths = row.unique_consecutive(return_counts=True)
        lengths = lengths[ids != PAD_SEGMENT].tolist()
        if len(lengths) > 1:
            return lengths
    return []


def _miniature(trainer, inputs: dict[str, Any], lengths: list[int], config: Any) -> dict[str, Any]:
    """A row of a few short documents, described in the way that `inputs` describes its own."""
    device, shard = inputs["input_ids"].device, inputs.get("sequence_shard")
    sizes = torch.tensor([min(length, _CHECKED_TOKENS) for length in lengths[:_CHECKED_DOCUMENTS]])
    total, bounds = int(sizes.sum()), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32).to(device)
    ids = random_tokens(config.get_text_config().vocab_size, 1, total).to(device)
    batch = {"input_ids": ids, **text_marks(config, ids)}
    positions = inputs.get("position_ids")
    if positions is not None:
        # The earliest start: RoBERTa-likes do not count from 0, and from a later one a longer document could leave the
        # table of positions.
        real = positions if shard is None else positions[..., : shard.num_local_tokens]
        start = int(real.min()) if real.numel() else torch.iinfo(torch.int64).max
        if shard is not None and shard.group is not None:
            start = min(gather_integers(start, shard.group))
        counts = torch.cat([start + torch.arange(size) for size in sizes])
        batch["position_ids"] = counts.expand(*positions.shape[:-2], 1, -1).to(device)
    if "cu_seq_lens_q" in inputs or shard is not None:
        longest = int(sizes.max())
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if "seq_idx" in inputs:
        index = torch.arange(len(sizes), dtype=torch.int32)
        batch["seq_idx"] = index.repeat_interleave(sizes)[None].to(device)
    return batch
