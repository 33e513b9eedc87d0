"""What the columns of a data set say that it is for, so that another command's data is recognised."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..data.documents import DOCUMENT_EXTENSIONS, column_names, load_documents
from ..data.sources.rows import LABEL_COLUMNS


# By columns, the most telling first: what such rows are, and which commands train on them.
_KINDS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("chosen", "rejected"), "pairs of a preferred and a rejected answer", ("dpo", "reward", "kto")),
    (("completion", "label"), "answers marked as good or bad", ("kto",)),
    (("messages",), "conversations", ("sft",)),
    (("conversations",), "conversations", ("sft",)),
    (("prompt", "completion"), "prompts and completions", ("sft",)),
    (("anchor", "positive"), "pairs of texts for an embedder", ("embed",)),
    (("query", "pos"), "pairs of texts for an embedder", ("embed",)),
    (("sentence1", "sentence2"), "pairs of texts for an embedder", ("embed",)),
    (("text",), "plain texts", ("sft", "pretrain")),
)

_CHATS = {"messages", "conversations"}
_FILES_LOOKED_AT = 100  # of a folder without pairs


def other_data(columns: Collection[str], command: str) -> str | None:
    """What rows with these columns are, and the command that trains on them; `None` if `command` does, or nobody.

    Args:
        columns (`Collection[str]`): of the data set.
        command (`str`): the one that was given it, such as `"pretrain"`.
    """
    for names, what, commands in _KINDS:
        if set(names) <= set(columns):
            if command in commands:
                return None
            those = " or ".join(f"`hf-longctx {name}`" for name in commands)
            return f"{what} ({', '.join(f'`{name}`' for name in names)}), which {those} trains on"
    return None


def other_documents(place: str, command: str, **where: object) -> str | None:
    """What a place holds whose documents could not be read, and who trains on it; `None` if no column tells."""
    try:
        rows = load_documents(place, text_field=None, **where)  # type: ignore[arg-type]
        columns = list(rows.column_names or next(iter(rows), {}))
    except Exception:  # the caller has a message about what is wrong with it
        return None
    return other_data(columns, command)


def refuse_other_data(
    place: str, documents: Any, command: str, text_field: str | None, or_columns: Collection[str]
) -> None:
    """Raise `ValueError` for documents without any column that `command` reads, by what they are instead."""
    columns = column_names(documents)
    wanted = {text_field, *or_columns} - {None}
    if (wanted | {"input_ids"}) & set(columns):
        return
    found = other_data(columns, command)
    what = f"{found}: run that command, or give" if found else f"the columns {', '.join(columns)}: give"
    names = ", ".join(f"`{name}`" for name in sorted(map(str, wanted)))
    raise ValueError(f"`dataset_name` ({place}) holds {what} rows with one of {names}.")


def refuse_documents(name: str, place: str) -> None:
    """Raise `ValueError` for a text file or a folder of them: documents, and no pairs of texts."""
    path = Path(place).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*"))[:_FILES_LOOKED_AT] if path.is_dir() else []
    suffixes = {file.suffix.lower() for file in files if file.is_file()}
    if suffixes and suffixes <= {*DOCUMENT_EXTENSIONS, ""}:
        raise ValueError(
            f"source `{name}`: `{place}` holds plain text, which `hf-longctx sft` or `hf-longctx pretrain` trains on; "
            "an embedder learns from pairs of texts: run that command, or give jsonl, parquet or csv with two columns."
        )


def refuse_rows_without_pairs(name: str, place: str, dataset: Any, columns: list[str] | None) -> None:
    """Raise `ValueError` for conversations, and for rows of one text."""
    found = list(columns or dataset.column_names or next(iter(dataset), {}))
    texts = [column for column in found if column not in LABEL_COLUMNS]
    if columns is None and _CHATS & set(found):
        what = other_data(found, "embed")
    elif len(texts) == 1:
        what = other_data(texts, "embed") or f"one column (`{texts[0]}`)"
    else:
        return
    raise ValueError(
        f"source `{name}`: `{place}` holds {what}; an embedder learns from pairs of texts: give two columns, which "
        "`source_columns` can name."
    )


def explain_source(name: str, place: str, columns: list[str] | None, error: ValueError) -> ValueError:
    """A better error for a file that could not be read, where its columns say that it is another command's."""
    try:
        refuse_rows_without_pairs(name, place, load_documents(place, text_field=None), columns)
    except ValueError as better:
        return better if str(better).startswith("source ") else error
    return error
