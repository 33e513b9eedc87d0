"""`docs/conformance.md` and the table in the wheel: what the sweep found, and whether it got worse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hf_longctx.proof.model_under_test import KINDS
from hf_longctx.proof.result import EXACT, REFUSED, UNBUILDABLE, WORST_FIRST, WRONG


# Of a loop that does not call `adapt`.
_BARE = {EXACT: "exact", WRONG: "**unnoticed**", REFUSED: "refused", UNBUILDABLE: ""}
WORDS = {EXACT: "exact", WRONG: "**wrong**", REFUSED: "refused", UNBUILDABLE: "not buildable"}
_TASKS = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "multimodal-lm": "Multimodal language models",
    "encoder": "Encoders",
}
_KINDS = KINDS


def worse(before: list[dict], results: list[dict]) -> list[str]:
    """What each type lost since the committed page, one message each."""
    now = {(record["task"], record["type"]): _outcomes(record) for record in results}
    messages = []
    for old in before:
        outcomes = now.get((old["task"], old["type"]))
        for kind, was in _outcomes(old).items() if outcomes else ():
            if WORST_FIRST.index(outcomes[kind]) < WORST_FIRST.index(was):
                messages.append(f"{old['type']} ({old['task']}), {kind} rows: was {was}, is {outcomes[kind]}")
    return messages + _newly_unnoticed(before, results)


def _newly_unnoticed(before: list[dict], results: list[dict]) -> list[str]:
    """Types that a loop without `adapt` gets wrong in silence, and that the committed page does not list."""
    if not any("bare" in old for old in before):
        return []
    listed = {(old["task"], old["type"]) for old in before if old.get("bare") == WRONG}
    return [
        f"{record['type']} ({record['task']}): a loop without `adapt` gets wrong numbers unnoticed"
        for record in results
        if record.get("bare") == WRONG and (record["task"], record["type"]) not in listed
    ]


def write_pages(page: Path, table: Path, results: list[dict], versions: dict[str, str]) -> None:
    """Write both. Numbers that differ from machine to machine stay out, so that equal results are equal files."""
    models = [
        {
            "task": record["task"],
            "type": record["type"],
            "rows": [{"rows": r["rows"], "outcome": r["outcome"], "message": r["message"]} for r in record["rows"]],
            "bare": record["bare"],
        }
        for record in results
    ]
    lines = ",\n".join(json.dumps(model) for model in models)  # one line a model, so that a change is one line
    text = f'{{"versions": {json.dumps(versions)}, "models": [\n{lines}\n]}}\n'
    table.write_text(text)
    page.write_text("\n".join(_page(results, versions)) + "\n")


def _outcomes(record: dict) -> dict[str, str]:
    return {row["rows"]: row["outcome"] for row in record["rows"]}


def _page(results: list[dict], versions: dict[str, str]) -> list[str]:
    return [*_preface(versions), *summary(results), *_tables(results)]


def summary(results: list[dict]) -> list[str]:
    """How many models of each task are what, as a table."""
    found = {task: [record for record in results if record["task"] == task] for task in _TASKS}
    return [
        "| | models | " + " | ".join(f"{kind} exact" for kind in _KINDS) + " | all exact | refused | not buildable |",
        "|" + "---|" * (len(_KINDS) + 5),
        *(_summary(title, found[task]) for task, title in _TASKS.items() if found[task]),
    ]


def _preface(versions: dict[str, str]) -> list[str]:
    return [
        "# Conformance",
        "",
        f"Every text model type of transformers {versions['transformers']}, on torch {versions['torch']}: "
        "a tiny random model of each",
        "was shared by two processes and compared with one process on transformers' own attention: loss, outputs and",
        "**every** gradient. Written by `make conformance`, which fails if a type is wrong or worse than this page.",
        "",
        "- **exact**: all numbers equal one process's up to rounding ([verify.md](verify.md) says what is allowed).",
        "- **refused**: a message before the first step says why it cannot be shared. It still trains with",
        "  `sequence_parallel_size` 1.",
        "- **not buildable**: there is no tiny model of it here to compare with, for the reason given.",
        "",
        "The column **no adapt** is for a training loop of one's own that does not call",
        "[`hf_longctx.adapt`](loop.md): exact all the same, refused by the forward, or **unnoticed**: wrong, because",
        "neither the attention layers nor the batch show it. It was run on even and packed rows of two processes, and",
        "on packed rows of one.",
        "",
        "Multimodal models are proven on rows of text alone, marked as text where the model asks.",
        "Encoders are listed where transformers has no language model head for them: types of its plain mapping whose",
        "configuration has a vocabulary of its own, is no encoder-decoder, and names no other input than text.",
        "",
    ]


def _tables(results: list[dict]) -> list[str]:
    lines = []
    for task, title in _TASKS.items():
        heads = ("type", *_KINDS, "no adapt", "why")
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        lines += [_row(record) for record in results if record["task"] == task]
    return lines


def _summary(title: str, records: list[dict]) -> str:
    outcomes = [_outcomes(record) for record in records]
    exact = [sum(v[kind] == EXACT for v in outcomes) for kind in _KINDS]
    counts = Counter("all" if set(v.values()) == {EXACT} else v["dense"] for v in outcomes)
    cells = (title, len(records), *exact, counts["all"], counts[REFUSED], counts[UNBUILDABLE])
    return "| " + " | ".join(map(str, cells)) + " |"


def _row(record: dict) -> str:
    cells = [WORDS[outcome] for outcome in _outcomes(record).values()] + [_BARE[record["bare"]]]
    reasons = list(dict.fromkeys(row["message"] for row in record["rows"] if row["message"]))
    why = " ".join(reasons).replace("|", "\\|")
    return f"| `{record['type']}` | {' | '.join(cells)} | {why} |"
