"""What is refused where a loss looks at whole rows, and the proof that sharing them changes nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ..adapters.attach import attach_adapters
from ..adapters.instance_forward import patch_on
from ..adapters.peft_kinds import PACKED_ROWS, check_peft
from ..adapters.wrapped import backbone_of, unwrap
from ..attention.registry import packs_rows
from ..attention.unadapted import refuse_token_mixing
from ..families import text_marks
from ..tiny_check import REORDERED_SUMS, random_tokens, whole_model
from .inner_checks import has_fast_weights
from .pooled_rows import POOLED_ROWS
from .sanity_check import run_sanity_check
from .scored_rows import SCORED_ROWS, score_whole_rows
from .whole_rows import RowSharing, rows_shared


logger = logging.getLogger(__name__)

_IMAGE_COLUMNS = ("image", "images", "video", "videos", "pixel_values")


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Errors about a model that is not the trained one say which it is."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if name == "model":
            raise
        raise type(error)(f"`{name}`: {error}") from error


def refuse_images(dataset: Any, size: int) -> None:
    """Raise `NotImplementedError` for pairs with images under sharding."""
    if size == 1:
        return
    found = next((column for column in _IMAGE_COLUMNS if column in _columns(dataset)), None)
    if found is not None:
        raise NotImplementedError(
            f"`train_dataset` has a column `{found}`, and the tokens of images are not shared by "
            f"`sequence_parallel_size` ({size}) processes: train on text alone, or set it to 1."
        )


def refuse_no_rows(dataset: Any, name: str) -> None:
    """Raise `ValueError` for a set without rows, whose first one TRL would read."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"the {name} set has no rows: pass one that has, or none.")


def warn_dropped_rows(before: Any, after: Any, args: Any, name: str) -> None:
    """Raise `ValueError` where TRL dropped every row for its length, and say how many where it dropped some."""
    if not (hasattr(before, "__len__") and hasattr(after, "__len__")) or len(before) == len(after):
        return
    limit = f"`max_length` ({getattr(args, 'max_length', None)})"
    if len(after) == 0:
        raise ValueError(
            f"all {len(before):,} rows of the {name} set were dropped, since their prompts alone, or their whole rows "
            f"for a reward model, fill {limit}: raise it, or shorten them."
        )
    logger.warning(f"{len(before) - len(after):,} of {len(before):,} rows of the {name} set do not fit {limit}")


def check_flattened(model: Any) -> None:
    """Refuse a model whose rows cannot run as documents of one row, by its configuration and adapters."""
    base = unwrap(model)
    if has_fast_weights(base):
        raise NotImplementedError(
            f"`flatten_rows` (True) runs rows as documents of one row, and `{type(base).__name__}` would read each "
            "with what it learned from those before: set it to False."
        )
    attention = base.config.get_text_config()._attn_implementation
    if not packs_rows(attention):
        raise ValueError(
            f"`flatten_rows` (True) runs rows as documents of one row, which attn_implementation={attention!r} of "
            f"`{type(base).__name__}` would not keep apart: load it with attn_implementation='packed', or 'ulysses'."
        )
    check_peft(model, *PACKED_ROWS)
    refuse_token_mixing(type(base).__name__, base.config)


def in_place(trainer: Any, model: Any = None) -> bool:
    """Whether the weights of a model are where a forward can use them: not under FSDP, which shards them later."""
    model = trainer.model if model is None else model
    return next(model.parameters()).device.type == trainer.args.device.type and not trainer.is_fsdp_enabled


def prove_whole_rows(
    model: Any, sharing: RowSharing, attach_rows: Callable, placed: bool = True, autocast: Callable = nullcontext
) -> None:
    """Attach what a model needs, patch it, and compare what it gives for tiny rows with what it gave before.

    Args:
        model (`torch.nn.Module`): with TRL's head, or with one that pools rows.
        sharing ([`RowSharing`]): how the rows of the run are shared.
        attach_rows (`Callable`): `score_whole_rows` or `pool_whole_rows`.
        placed (`bool`, *optional*, defaults to `True`): a forward can run; without it nothing is compared.
        autocast (`Callable`, *optional*): makes a context manager around each forward.

    Raises:
        NotImplementedError: sharing or flattening rows changes it.

    Communication: that of the sanity check, and of one forward.
    """
    inner = unwrap(model)
    attach_adapters(model)
    counts = False
    if placed:
        counts = run_sanity_check(
            inner if attach_rows is score_whole_rows else backbone_of(inner),
            sharing.mesh,
            sharing.inner_attention,
            False,
            check_loss=False,
            context=autocast(),
            adds_router_loss=False,
        ).needs_position_ids
    attach_rows(model, counts)
    if placed:
        with autocast():
            compare_whole_rows(model, sharing)


def compare_whole_rows(model: Any, sharing: RowSharing) -> None:
    """Raise `NotImplementedError` where a patched model gives other numbers for tiny rows that are shared.

    A model that gives others for rows with padding on the left is asked to refuse these.
    """
    inner = unwrap(model)
    with whole_model(model), torch.no_grad():
        _compare(inner, sharing)
        patch = patch_on(inner, SCORED_ROWS) or patch_on(inner, POOLED_ROWS)
        if patch is not None and not patch.reads_left_padding:
            patch.reads_left_padding = bool(_differences(inner, sharing, pads_left=True))


def _compare(model: Any, sharing: RowSharing) -> None:
    for name, error in _differences(model, sharing).items():
        way = "flattened" if sharing.flatten else "shared"
        raise NotImplementedError(
            f"`{type(model).__name__}` gives other `{name}` where rows are {way} (largest relative difference "
            f"{error:.1e}): one of its layers, or its head, mixes tokens; set `sequence_parallel_size` to 1 and "
            "`flatten_rows` to False."
        )


def _differences(model: Any, sharing: RowSharing, pads_left: bool = False) -> dict[str, float]:
    """By name, the numbers of tiny rows that differ by more than rounding, relative to the largest."""
    batch = _tiny_rows(model, 4 * sharing.mesh.sequence_parallel_size + 3, pads_left)
    expected = _numbers(model, batch)
    with rows_shared(sharing, model):
        found = _numbers(model, batch)
    allowed = REORDERED_SUMS.of(next(model.parameters()).dtype)
    errors = {
        name: float((found[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-12))
        for name, whole in expected.items()
    }
    return {name: error for name, error in errors.items() if not error <= allowed}


def _numbers(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if patch_on(model, SCORED_ROWS) is not None:
        outputs = model(**batch, fused_lm_head=True)
        return {name: getattr(outputs, name) for name in ("log_probs", "aux_loss") if outputs.get(name) is not None}
    batch = {key: value for key, value in batch.items() if key != "labels"}
    return {"logits": model(**batch, use_cache=False).logits}


def _tiny_rows(model: Any, num_tokens: int, pads_left: bool = False) -> dict[str, torch.Tensor]:
    """Three rows, one of them much shorter, padded on one side, whose later half is scored."""
    config, device = model.config, next(model.parameters()).device
    ids = random_tokens(config.get_text_config().vocab_size, 3, num_tokens)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 3:] = mask[2, num_tokens - 2 :] = 0
    labels[:, : num_tokens // 2] = -100
    labels[1] = ids[1]
    if pads_left:
        mask, labels[:, :-2] = mask.flip(1), -100
    labels[mask == 0] = -100
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is not None:
        ids[mask == 0] = pad
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **text_marks(config, ids)}
    return {key: value.to(device) for key, value in batch.items()}


def _columns(dataset: Any) -> list[str]:
    names = getattr(dataset, "column_names", None)
    if isinstance(names, dict):  # a dictionary of splits
        names = [column for columns in names.values() for column in columns or ()]
    if names is None and dataset is not None:
        names = list(next(iter(dataset), {}))
    return list(names or ())
