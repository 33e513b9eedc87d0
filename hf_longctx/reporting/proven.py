"""What the sweep over all model types has proven of a model's type, for its card.

The table is the one that `hf-longctx check` answers from. Rooms above this one read it for more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


_TABLE = Path(__file__).parents[1] / "proof" / "conformance.json"
# The tasks under which a model of a task of the Hub was proven, the nearest first.
_TASKS = {
    "text-generation": ("causal-lm", "multimodal-lm"),
    "image-text-to-text": ("multimodal-lm", "causal-lm"),
    "fill-mask": ("masked-lm", "encoder"),
}
_OTHERS = ("encoder", "masked-lm", "causal-lm", "multimodal-lm")
_DOES = "compares loss, outputs and every gradient of two processes that share rows with those of one process."


def proof_of(metrics: dict[str, Any]) -> str | None:
    """Sentences and a table for a card; `None` for a model that is not its type's own (fast weights, ALiBi ...)."""
    kind = metrics.get("model_type")
    if not kind or metrics.get("fast_weights") or metrics.get("own_settings"):
        return None
    text = f"`hf-longctx verify {kind}` {_DOES}"
    found = _look_up(kind, _TASKS.get(metrics.get("pipeline_tag") or "", _OTHERS))
    if found is None:
        return f"{text} This type is not in the table of the installed release."
    rows, versions = found
    libraries = " and ".join(f"{name} {number}" for name, number in sorted(versions.items(), reverse=True))
    lines = [f"{text} On a tiny model of this type, with {libraries}:", "", "| Rows | Outcome |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {outcome} |" for name, outcome in rows.items())])


def _look_up(kind: str, tasks: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]] | None:
    content = json.loads(_TABLE.read_text(encoding="utf-8"))
    known = {(record["task"], record["type"]): record["rows"] for record in content["models"]}
    rows = next((known[task, kind] for task in tasks if (task, kind) in known), None)
    return None if rows is None else ({row["rows"]: row["outcome"] for row in rows}, content["versions"])
