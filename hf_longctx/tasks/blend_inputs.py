"""The blend of a recipe: its sources, weights and rows as they stand in YAML and on a command line."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

from ..data.blend.blend_settings import read_num_rows
from ..data.blend.blended_rows import BlendedRows
from ..data.documents import split_into_rows
from .inputs import RecipeArguments, read_documents


@dataclass
class BlendArguments:
    """Several sources instead of one `dataset_name`."""

    blend_sources: list[str] | None = field(
        default=None,
        metadata={"help": "NAME=PLACE of every source; a place is whatever `dataset_name` may be."},
    )
    blend_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "'NAME=WEIGHT NAME=WEIGHT ...', one text a blend, one blend after the other; unset: all alike."
        },
    )
    blend_rows: list[int] | None = field(
        default=None, metadata={"help": "Rows of each blend; unset: the rows of all sources."}
    )
    blend_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the blend's index; unset: `blend` in `output_dir`."}
    )


def read_blend(blend: BlendArguments, recipe: RecipeArguments, args: Any, tokenizer: Any, **options: Any):
    """The rows of a blend, and those held out of each source by name, or `None`.

    Args:
        options: of [`split_into_rows`], `row_tokens` included.

    Raises:
        ValueError: names, weights and rows that do not fit together; see also [`BlendedRows`].
    """
    if recipe.dataset_name:
        raise ValueError(
            f"`dataset_name` ({recipe.dataset_name!r}) and `blend_sources` both say what is read: leave one of them "
            "out."
        )
    if recipe.dataset_streaming:
        raise ValueError(
            "`dataset_streaming` reads rows as they come, and a blend needs their number: set it to false."
        )
    places = _pairs("blend_sources", blend.blend_sources or ())
    blends = read_weights(blend, list(places))
    if blend.blend_rows is not None:
        read_num_rows(blend.blend_rows, len(blends), "blend_rows")
    row_tokens, sources, held_out = options.pop("row_tokens"), {}, {}
    for name, place in places.items():
        one = copy.copy(recipe)
        one.dataset_name = place
        parts = read_documents(one, args, options["text_field"])
        sources[name], held_out[name] = (
            part and split_into_rows(part, tokenizer, row_tokens, **options) for part in parts
        )
    num_rows = blend.blend_rows or [sum(map(len, sources.values()))]
    rows = BlendedRows(
        [{name: (sources[name], weight) for name, weight in weights.items()} for weights in blends],
        num_rows,
        seed=args.seed if args.data_seed is None else args.data_seed,
        cache_dir=blend.blend_cache_dir or os.path.join(args.output_dir, "blend"),
    )
    return rows, held_out if recipe.num_eval_documents else None


def read_weights(blend: BlendArguments, names: list[str]) -> list[dict[str, float]]:
    """The weights of each blend, by source."""
    if not blend.blend_weights:
        return [dict.fromkeys(names, 1.0)]
    blends = []
    for text in blend.blend_weights:
        weights = {}
        for name, value in _pairs("blend_weights", text.split()).items():
            if name not in names:
                raise ValueError(
                    f"`blend_weights` names the source `{name}`, but `blend_sources` has {', '.join(names)}: use one "
                    "of these."
                )
            try:
                weights[name] = float(value)
            except ValueError:
                raise ValueError(
                    f"`blend_weights` gives `{name}` the weight {value!r}, which is no number: write `{name}=0.3`."
                ) from None
        blends.append(weights)
    unused = [name for name in names if not any(name in weights for weights in blends)]
    if unused:
        raise ValueError(
            f"`blend_weights` has no weight for the source `{unused[0]}`: give it one, or leave the source out."
        )
    return blends


def _pairs(setting: str, texts: Any) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not (name and equals and value):
            raise ValueError(f"`{setting}` has {text!r}, which is not a name and a value: write `NAME=VALUE`.")
        if name in pairs:
            raise ValueError(f"`{setting}` names `{name}` twice: give every source one entry.")
        pairs[name] = value
    return pairs
