"""What the columns of a data set say that it is for, so that data of another command is told by that command."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..data.documents import column_names, load_documents


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


def explain_documents(error: ValueError, place: str, command: str, **where: object) -> ValueError:
    """A better error for a place whose documents could not be read, where its columns tell what they are."""
    try:
        rows = load_documents(place, text_field=None, **where)  # type: ignore[arg-type]
        columns = list(rows.column_names or next(iter(rows), {}))
    except Exception:  # what is wrong with it has been told
        return error
    found = other_data(columns, command)
    if found is None:
        return error
    return ValueError(f"`dataset_name` ({place}) holds {found}: run that command, or give documents.")


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
