"""What the sweep over all model types has proven, by type, task and version of transformers.

`make conformance` writes the table and `docs/conformance.md` from the same results; the wheel carries the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .result import WORST_FIRST


TABLE = Path(__file__).with_name("conformance.json")


@dataclass(frozen=True)
class KnownType:
    """One type of the table.

    Args:
        model_type (`str`), task (`str`): which.
        outcome (`str`): the worst of its rows: `"exact"`, `"refused"`, `"unbuildable"` or `"wrong"`.
        rows (`dict[str, str]`): the outcome of each kind of rows.
        message (`str`): why, for an outcome other than exact.
        unadapted (`str`): the outcome in a loop that does not call `adapt`; `"wrong"` is noticed by nobody.
        versions (`dict[str, str]`): of transformers and torch with which it was proven.
    """

    model_type: str
    task: str
    outcome: str
    rows: dict[str, str]
    message: str
    unadapted: str
    versions: dict[str, str]


def look_up(model_type: str, task: str) -> KnownType | None:
    """What is known of a type on the installed transformers; `None` if it was proven on another, or not at all."""
    table = read_table()
    known = table.get((task, model_type))
    return known if known is not None and known.versions["transformers"] == version("transformers") else None


@cache
def read_table() -> dict[tuple[str, str], KnownType]:
    """Every type of the table, by task and type."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    found = {}
    for record in content["models"]:
        rows = {row["rows"]: row["outcome"] for row in record["rows"]}
        outcome = min(rows.values(), key=WORST_FIRST.index)
        message = next((row["message"] for row in record["rows"] if row["outcome"] == outcome), "")
        key = record["task"], record["type"]
        found[key] = KnownType(key[1], key[0], outcome, rows, message, record["bare"], content["versions"])
    return found
