"""The lengths that `hf-longctx pack` packs: of whatever the recipes read.

Columns decide, in this order: `length` or `input_ids` are taken as they are; conversations (`messages`,
`conversations`, or `prompt` and `completion` made of turns) go through the tokenizer's chat template; `prompt` and
`completion` as texts are one document with the end-of-sequence token, as TRL makes them; pairs (`chosen`, `rejected`)
are two documents, each with its prompt; anchors and positives of embedding sources are a document each; else the
column of the text is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..data.documents import check_texts
from ..data.packing.datasets import measure_lengths
from ..data.streams import is_stream
from ..tasks.docstrings import FUNCTIONS, MODULES, mine_functions, mine_modules
from ..tasks.document_places import open_documents


_LENGTH_COLUMN = "length"
_COUNTED = (_LENGTH_COLUMN, "input_ids")  # columns that make a tokenizer needless
_CHATS = ("messages", "conversations")
_ANSWERS, _PAIRS = ("prompt", "completion"), ("chosen", "rejected")
_MINED = {FUNCTIONS: mine_functions, MODULES: mine_modules}
_DEFAULT_FIELD = "text"
_ROWS_AT_ONCE = 1000
# The names of ShareGPT's turns.
_ROLES = {"human": "user", "gpt": "assistant"}


def read_lengths(options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Tokens of every document, and where the numbers come from.

    Raises:
        ValueError: nothing is there, or no column that can be counted.
    """
    dataset = _open(options)
    if options.limit is not None:
        dataset = dataset.take(options.limit)
    row: dict[str, Any] = next(iter(dataset), {})
    if isinstance(row.get(_LENGTH_COLUMN), int):
        column = _LENGTH_COLUMN
    elif "input_ids" in row:
        column = "input_ids"
    else:
        return _count_tokens(dataset, row, options)
    if is_stream(dataset):
        values = (row[column] for row in dataset)
        lengths = np.fromiter((value if column == _LENGTH_COLUMN else len(value) for value in values), np.int64)
    else:
        lengths = measure_lengths(dataset, _LENGTH_COLUMN)
    return lengths, f"the column `{column}`"


def _open(options: argparse.Namespace) -> Any:
    place = options.dataset
    mined = next((kind for kind in _MINED if place.startswith(kind)), None)
    if mined is not None:
        from datasets import Dataset

        return Dataset.from_list(list(_MINED[mined](place[len(mined) :])))
    others = (*_COUNTED, *_CHATS, *_ANSWERS, *_PAIRS)
    fields = options.text_field.split(",")
    where = {"split": options.split, "config_name": options.config_name, "streaming": options.streaming}
    return open_documents(place, text_field=fields[0], or_columns=(*others, *fields[1:]), **where)


def _count_tokens(dataset: Any, row: Mapping[str, Any], options: argparse.Namespace) -> tuple[np.ndarray, str]:
    if not row:
        raise ValueError(f"`{options.dataset}` has no rows in `--split` {options.split}: check what was read.")
    columns, is_chat = _columns_of(row, options)
    if options.model_name_or_path is None:
        raise ValueError(
            f"`{options.dataset}` holds {'conversations' if is_chat else 'text'}, whose tokens only a tokenizer can "
            "count: name it with `--model_name_or_path`, a hub id or a folder."
        )
    from transformers import AutoTokenizer

    from ..tasks.document_places import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(options.model_name_or_path))
    if is_chat and not tokenizer.chat_template:
        raise ValueError(
            f"`{options.dataset}` holds conversations, and the tokenizer of `{options.model_name_or_path}` has no "
            "chat template to write them with: name a model that chats."
        )
    count = _counter(tokenizer, columns, is_chat, f"`{options.dataset}`")
    lengths: list[int] = []
    for number, batch in enumerate(dataset.iter(batch_size=_ROWS_AT_ONCE)):
        lengths += count(batch, number * _ROWS_AT_ONCE)
    names = " and ".join(f"`{column}`" for column in columns)
    how = f"{options.model_name_or_path}'s chat template" if is_chat else options.model_name_or_path
    what = "columns" if len(columns) > 1 else "column"
    return np.array(lengths, dtype=np.int64), f"{how} on the {what} {names}"


def _columns_of(row: Mapping[str, Any], options: argparse.Namespace) -> tuple[tuple[str, ...], bool]:
    """The columns that are counted, and whether they hold conversations."""
    fields = tuple(options.text_field.split(","))
    if options.text_field != _DEFAULT_FIELD or _DEFAULT_FIELD in row:
        missing = [name for name in fields if name not in row]
        if not missing:
            return fields, False
    chat = next((name for name in _CHATS if name in row), None)
    if chat is not None:
        return (chat,), True
    for wanted in (_PAIRS, _ANSWERS):
        if set(wanted) <= set(row):
            columns = ("prompt", *wanted) if wanted is _PAIRS and "prompt" in row else wanted
            return columns, not isinstance(row[wanted[0]], str)
    if options.dataset.startswith(tuple(_MINED)):
        return tuple(name for name, value in row.items() if isinstance(value, str)), False
    raise ValueError(
        f"`{options.dataset}` has none of the columns `{_LENGTH_COLUMN}`, `input_ids`, `messages`, `prompt` with "
        f"`completion`, `chosen` with `rejected`, and `{options.text_field}`, only {', '.join(row)}: name the column "
        "of the text with `--text_field`."
    )


def _counter(
    tokenizer: Any, columns: tuple[str, ...], is_chat: bool, name: str
) -> Callable[[Mapping[str, list], int], list[int]]:
    """A function from a batch, and the number of its first row, to the lengths of its documents."""
    if set(_PAIRS) <= set(columns):
        parts = [(*columns[:-2], column) for column in columns[-2:]]
    elif columns == _ANSWERS:
        parts = [columns]
    else:
        parts = [(column,) for column in columns]
    end = tokenizer.eos_token or ""

    def of_chats(batch: Mapping[str, list], first: int) -> list[int]:
        lengths = []
        tools = batch.get("tools")
        for number in range(len(batch[columns[0]])):
            for part in parts:
                turns = [_plain_turn(turn) for column in part for turn in batch[column][number]]
                ids = tokenizer.apply_chat_template(turns, tools=tools and tools[number], return_dict=False)
                lengths.append(len(ids))
        return lengths

    def of_texts(batch: Mapping[str, list], first: int) -> list[int]:
        for column in columns:
            check_texts(batch[column], column, range(first, first + len(batch[column])), name)
        joined = ["".join(texts) for part in parts for texts in zip(*(batch[column] for column in part))]
        if columns == _ANSWERS or set(_PAIRS) <= set(columns):
            joined = [text if end and text.endswith(end) else text + end for text in joined]
        return [len(ids) for ids in tokenizer(joined, return_attention_mask=False, verbose=False)["input_ids"]]

    return of_chats if is_chat else of_texts


def _plain_turn(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn as chat templates read it; ShareGPT's are renamed, as TRL does."""
    if "from" in turn:
        return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    return {name: value for name, value in turn.items() if value is not None}
