"""What a model draws at random outside attention: numbers a token, and noise that is scaled by the length of a row.

Numbers a token are valid training under sharding, but not those of one process: a warning. NEFTune's noise shrinks
with the square root of a row's tokens, so on a share, and in a row of several documents, it is another amount:
refused.
Price: one pass over the modules when a trainer is built.
"""

from __future__ import annotations

import logging

import torch

from ..data.packing.collator import PackingCollator
from .packed_rows import packs_rows_of


logger = logging.getLogger(__name__)


def warn_about_draws(model: torch.nn.Module, size: int) -> None:
    """Warn if dropout, a router's jitter or layer dropping draws on each rank for its own tokens."""
    if size == 1:
        return
    active = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    if active:
        logger.warning(
            f"`{active[0]}` and {len(active) - 1} more dropout layers draw on every rank for its own tokens, from "
            "equal seeds: training is valid, but losses are not those of one process; set dropout (also "
            "`lora_dropout`) to 0 to compare."
        )
    for field, places in _noisy_fields(model).items():
        value = getattr(model.get_submodule(places[0]), field)
        logger.warning(
            f"`{field}` ({value}) of `{places[0]}` and {len(places) - 1} more modules makes each rank draw for its "
            "own tokens, from equal seeds: training is valid, but losses are not those of one process; set it to 0 in "
            "the configuration to compare."
        )


def _noisy_fields(model: torch.nn.Module) -> dict[str, list[str]]:
    """The modules that hold a positive jitter (of a router or its input) or chance to drop a layer, by its name."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for field, value in vars(module).items():
            draws = "jitter" in field or field == "layerdrop"
            if draws and isinstance(value, (int, float)) and value > 0:
                found.setdefault(field, []).append(name)
    return found


def neftune_alpha(args, model: torch.nn.Module) -> float | None:
    """The strength of NEFTune's noise, from the arguments or from a module that carries its hook; `None` without."""
    if getattr(args, "neftune_noise_alpha", None):
        return args.neftune_noise_alpha
    carried = (getattr(module, "neftune_noise_alpha", None) for module in model.modules())
    return next((alpha for alpha in carried if alpha), None)


def check_noise(trainer) -> float | None:
    """Refuse NEFTune where rows are shared, or where the trainer itself packs them.

    Returns:
        `float`: the strength of the noise that is left, for [`check_noise_of_batch`]; `None` without.

    Raises:
        NotImplementedError: its noise would be scaled by the length of a share or of a packed row.
    """
    alpha, size = neftune_alpha(trainer.args, trainer.model), trainer.long_context.sequence_parallel_size
    if alpha is None:
        return None
    if size > 1:
        raise NotImplementedError(
            f"`neftune_noise_alpha` ({alpha!r}) cannot be used with `sequence_parallel_size` ({size}): its noise is "
            "scaled by the local length of a row; leave it unset."
        )
    packing = [f"`{name}=True`" for name in ("packing", "padding_free") if getattr(trainer.args, name, False)]
    if trainer.flattens_rows or isinstance(trainer.data_collator, PackingCollator):
        packing.append("packed rows")
    if packing:
        _refuse_noise(alpha, packing[0])
    return alpha


def check_noise_of_batch(alpha: float | None, inputs: dict[str, object]) -> None:
    """The same for rows that a collator or a data set of the user packed; read only if there is noise."""
    if alpha is not None and packs_rows_of(inputs):
        _refuse_noise(alpha, "a batch that packs several documents in a row")


def _refuse_noise(alpha: float, reason: str) -> None:
    raise NotImplementedError(
        f"`neftune_noise_alpha` ({alpha!r}) cannot be used with {reason}: its noise is scaled by the length of the "
        "row, not of each document, so it would be several times too small; leave it unset, or pad documents instead "
        "of packing them."
    )
