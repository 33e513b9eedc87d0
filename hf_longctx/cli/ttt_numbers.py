"""`hf-longctx ttt eval`: loss by position and recall of a needle, in four arms.

All that can be refused is refused before a model is loaded.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config.values import validate_count
from ..data.model_files import check_model_files
from ..tasks.named_models import find_model, load_base, load_tokenizer, read_model_config
from ..tasks.needle_rows import DIGITS, needle_distances, needle_recall
from ..tasks.ttt_eval import (
    MEASURES,
    arms_table,
    explain_arms,
    losses_by_position,
    make_arms,
    position_table,
)
from ..ttt.fast_config import TTTModelConfig


if TYPE_CHECKING:
    from .answer import Answer

NO_BASE = "none"
# What a base model shares with the model that was made of it.
_SHARED = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


def measure(answer: Answer, options: argparse.Namespace) -> int:
    """Print what is asked for and return the exit code."""
    wanted = _measures(options.by)
    validate_count("--num_rows", options.num_rows, "rows")
    source = find_model(options.model, "`model`")
    config = _fast_config(source)
    window, chunk = config.settings.window, config.settings.chunk_tokens
    assert window is not None
    if options.row_tokens <= window:
        raise ValueError(
            f"`--row_tokens` ({options.row_tokens}) must be above the window ({window}), where nothing is lost."
        )
    tokenizer = load_tokenizer(source, "`model`", config=config)
    sizes = (window, chunk, options.row_tokens, options.num_rows)
    distances = needle_distances(tokenizer, *sizes) if "needle" in wanted else []
    base_name, base_source = _find_base(options, config)
    text = read_tokens(options, tokenizer, config.vocab_size)
    model, base = _load(answer, options, source, base_source)
    arms = make_arms(model, base)
    explained = explain_arms(model, base_name, base)
    rows = [row[None] for row in text.split(options.row_tokens) if len(row) == options.row_tokens][: options.num_rows]
    _say(answer, explained, options, config, len(rows) if "position" in wanted else options.num_rows)
    numbers: dict[str, Any] = {"model": str(options.model), "base": base_name, "arms": explained}
    numbers |= {"window": window, "chunk_tokens": chunk, "row_tokens": options.row_tokens}
    with _finite_steps(), answer.working("measuring"):
        if "position" in wanted:
            losses = losses_by_position(arms, rows, chunk, answer.progress)
            numbers |= {"num_rows": len(rows), "position": losses}
        if "needle" in wanted:
            counts = (options.row_tokens, distances, options.num_rows)
            recall = needle_recall(arms, tokenizer, text, *counts, answer.progress)
            numbers |= {"num_needles": options.num_rows, "needle": {"distances": distances, **recall}}
    if "position" in wanted:
        answer.print(f"\nMean loss in {_rows(len(rows))} of {options.row_tokens:,} tokens, by position")
        answer.console.print(position_table(losses, chunk, options.row_tokens))
    if "needle" in wanted:
        answer.print(f"\nNumbers of {DIGITS} digits repeated, of {options.num_rows} for each distance")
        answer.console.print(_needle_table(window, distances, recall))
        answer.print("For verbatim recall beyond the window use full attention.")
    answer.facts |= numbers
    return 0


def _measures(by: str) -> list[str]:
    """What `--by` names."""
    wanted = [name.strip() for name in by.split(",")]
    for name in wanted:
        if not name:
            raise ValueError(f"`--by` ({by!r}) has an empty name: give {' or '.join(MEASURES)}, or both with a comma.")
        if name not in MEASURES:
            near = difflib.get_close_matches(name, MEASURES, 1)
            remedy = f"did you mean {near[0]}?" if near else f"name {' or '.join(MEASURES)}, or both with a comma."
            raise ValueError(f"`--by` names {name!r}, which is nothing that is measured: {remedy}")
    return wanted


def _fast_config(source: str) -> TTTModelConfig:
    """The configuration of a model with fast weights."""
    found = read_model_config(source, "`model`")
    if found.get("model_type") != TTTModelConfig.model_type:
        raise ValueError(
            f"`model` ({source}) is of type `{found.get('model_type')}`, and has no fast weights: make a model with "
            f"`hf-longctx ttt convert {source} --output FOLDER`, and measure that."
        )
    config = TTTModelConfig.from_pretrained(source)
    config.build_base()
    return config


def _find_base(options: argparse.Namespace, config: TTTModelConfig) -> tuple[str | None, str | None]:
    """Its name and where it is, or `None` for both where it is to be left out."""
    name = config.base_name if options.base is None else options.base
    if name == NO_BASE or (not name and options.base is None):
        return None, None
    try:
        source = find_model(name, "it" if options.base is None else "`--base`", options.gguf_file)
    except ValueError as error:
        if options.base is not None:
            raise
        raise ValueError(
            f"the base model that the configuration names cannot be used: {error} Name another with `--base`, or "
            f"leave its arms out with `--base {NO_BASE}`."
        ) from error
    if options.gguf_file is None:
        _validate_same(source, config)
    return name, source


def _validate_same(source: str, config: TTTModelConfig) -> None:
    """Refuse a base model that this model was not made of."""
    found, own = read_model_config(source, "`--base`"), config.base_config or {}
    if found.get("model_type") == TTTModelConfig.model_type:
        raise ValueError(
            f"`--base` ({source}) has fast weights itself: name the model without them, `{found.get('base_name')}`."
        )
    check_model_files(source, weights=True)
    for name in _SHARED:
        if found.get(name, own.get(name)) != own.get(name):
            raise ValueError(
                f"`--base` ({source}) has `{name}` {found[name]}, and the model was made of one with "
                f"{own.get(name)}: name that one, or leave it out with `--base {NO_BASE}`."
            )


def read_tokens(options: argparse.Namespace, tokenizer: Any, vocab_size: int | None) -> Any:
    """All tokens that are needed, of the documents one after the other, `(n,)`.

    Raises:
        ValueError: there are not enough for a row, a document is no text, or the model has not all of the tokens.
    """
    import torch

    from ..data.documents import check_texts, column_names
    from ..tasks.document_places import open_documents

    place, column = options.dataset_name, options.text_field
    if not place.strip():
        raise ValueError(
            "`--dataset_name` is empty: give a folder of documents, a file, a name on the Hub, or stdlib:"
        )
    documents = open_documents(place, text_field=column)
    names = column_names(documents)
    if column not in names:
        raise ValueError(
            f"`--dataset_name` ({place}) has no column `{column}`, only {', '.join(names)}: give documents."
        )
    found: list[int] = []
    for number, document in enumerate(documents):
        check_texts([document[column]], column, [number], f"`--dataset_name` ({place})")
        found += tokenizer(document[column], add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= options.row_tokens * (options.num_rows + 1):
            break
    if len(found) < options.row_tokens:
        raise ValueError(
            f"`--dataset_name` ({place}) has {len(found)} tokens, a row has {options.row_tokens}: make rows shorter, "
            "or name more documents."
        )
    if vocab_size is not None and max(found) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(found)}, and the model has {vocab_size} of them: save the tokenizer that "
            "belongs to the model in its folder."
        )
    return torch.tensor(found)


def _load(answer: Answer, options: argparse.Namespace, source: str, base_source: str | None) -> tuple[Any, Any]:
    from ..ttt.fast_model import TTTForCausalLM

    with answer.working(f"loading {options.model}"):
        model = TTTForCausalLM.from_pretrained(source).eval()
        if base_source is None:
            return model, None
        answer.progress(f"loading its base model, {base_source}")
        return model, load_base(base_source, options.gguf_file).eval()


def _say(
    answer: Answer, explained: dict[str, str], options: argparse.Namespace, config: TTTModelConfig, rows: int
) -> None:
    """What the numbers are, before they come."""
    for name, what in explained.items():
        answer.print(f"{name}: {what}")
    if len(explained) == 2:
        answer.print("Without a base model (`--base`), full attention and the untrained arm are left out.")
    known = config.max_position_embeddings
    if known is not None and options.row_tokens > known:
        answer.print(
            f"Rows of {options.row_tokens:,} tokens go beyond the {known:,} positions that the base model knows "
            "(`max_position_embeddings`), so its loss there says little about attention."
        )
    if rows < options.num_rows:
        answer.print(f"The documents fill {_rows(rows)}, and `--num_rows` asks for {options.num_rows}.")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _needle_table(window: int, distances: list[int], recall: dict[str, list[float]]) -> Any:
    table = arms_table("asked, tokens later", recall)
    for index, distance in enumerate(distances):
        place = "in the window" if distance <= window else "beyond it"
        table.add_row(f"{distance:,}, {place}", *(f"{each[index]:.0%}" for each in recall.values()))
    return table


@contextmanager
def _finite_steps() -> Iterator[None]:
    """A step that is not finite is a property of the model, and no fault of this program."""
    try:
        yield
    except RuntimeError as error:
        if "inner step is not finite" not in str(error):
            raise
        raise ValueError(f"the model cannot be measured: {error}") from error
