"""A Hub model card that says how a long-context run was made: lengths, processes, command, versions, curves.

The card is huggingface_hub's `ModelCard`; metadata that a trainer or PEFT already wrote is kept and added to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..planner.settings import GIB
from .card_rules import card_problems
from .origin import base_model_of, is_hub_name
from .proven import proof_of
from .usage import needs, usage


logger = logging.getLogger(__name__)

TAGS = ("hf_longctx", "long-context", "sequence-parallel")
_TRAINER_TAGS = {*TAGS, "generated_from_trainer", "trl", "sft"}
_PEFT_TAG = "base_model:adapter:"
_NOT_OURS = ("licence",)  # TRL writes `licence: license`
_OF_ITS_AUTHOR = ("license", "license_name", "license_link", "language")  # in a card that was there before

_FAST_WEIGHTS = (
    "Attention sees a window only. The last layers carry fast weights that take a gradient step of next-token loss "
    "after every chunk that is read (TTT-E2E, arXiv 2512.23675), so that memory and time a token do not grow with "
    "length. What left the window is not recalled word for word: for that use full attention."
)


def write_model_card(folder: Path, metrics: dict, picture: str | None, earlier_card: str | None = None) -> Path:
    """Write `README.md` into `folder`.

    Args:
        folder (`Path`): the run's output folder.
        metrics (`dict`): what `metrics.json` holds.
        picture (`str`, *optional*): file name of the curves, next to the card.
        earlier_card (`str`, *optional*):
            Text of a `README.md` that stood there before the run; unless a trainer wrote it, it is kept as
            `README.before_training.md`.

    Returns:
        `Path`: the card.
    """
    path = folder / "README.md"
    earlier = _metadata(earlier_card) if earlier_card is not None else {}
    if earlier_card is not None and not _TRAINER_TAGS & set(earlier.get("tags") or []):
        kept = folder / "README.before_training.md"
        kept.write_bytes(earlier_card.encode("utf-8", "surrogateescape"))  # as it was, in whatever encoding
        logger.warning("`%s` was there before the run: it is kept as `%s`", path, kept.name)
    metadata = _metadata(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    metadata = {**{key: earlier[key] for key in _OF_ITS_AUTHOR if key in earlier}, **metadata}
    data = ModelCardData(**merge_metadata(metadata, metrics), ignore_metadata_errors=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(folder, metrics, picture)}").save(path)
    return path


def _metadata(text: str) -> dict[str, Any]:
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # a README that is no model card
        return {}


def merge_metadata(
    metadata: dict[str, Any], metrics: dict[str, Any], new_tags: Sequence[str] = TAGS
) -> dict[str, Any]:
    """Front matter that the Hub accepts: a trainer's own, ours, and no path of this machine.

    Args:
        metadata (`dict`): what the card in the folder says.
        metrics (`dict`): what `metrics.json` holds.
        new_tags (`Sequence[str]`): tags of this package.
    """
    base = metrics.get("base_model_id") or _public_base(metadata.get("base_model"))
    kept = [tag for tag in metadata.get("tags") or [] if isinstance(tag, str) and not tag.startswith("base_model:")]
    if base and any(str(tag).startswith(_PEFT_TAG) for tag in metadata.get("tags") or []):
        kept.append(_PEFT_TAG + (base if isinstance(base, str) else base[0]))
    ours: dict[str, Any] = dict(metrics.get("license") or {}) if not metadata.get("license") else {}
    if metrics.get("license_given"):
        ours = {"license": metrics["license_given"]}
    ours["base_model"] = base
    listed = metadata.get("datasets") or []
    listed = [listed] if isinstance(listed, str) else listed
    ours["datasets"] = [*dict.fromkeys([*metrics.get("datasets", []), *filter(is_hub_name, listed)])] or None
    ours["pipeline_tag"] = metadata.get("pipeline_tag") or metrics.get("pipeline_tag")
    needs_us = metrics.get("fast_weights") or metrics.get("own_settings")
    library = metadata.get("library_name") or "transformers"
    ours["library_name"] = "hf_longctx" if needs_us and library in ("transformers", "peft") else library
    ours["tags"] = sorted({*kept, *new_tags})
    rest = {key: value for key, value in metadata.items() if key not in ours and key not in _NOT_OURS}
    merged = {key: value for key, value in {**ours, **rest}.items() if value is not None}
    for key, problem in card_problems(merged).items():
        logger.warning("`%s` of the model card %s: it is left out, since the Hub would refuse the card", key, problem)
        del merged[key]
    return merged


def _public_base(names: Any) -> Any:
    """`base_model` of a card that a trainer wrote; `None` for a folder."""
    found = [base_model_of(name) for name in (names if isinstance(names, list) else [names])]
    return None if None in found else found if isinstance(names, list) else found[0]


def _body(folder: Path, metrics: dict, picture: str | None) -> str:
    size, row_tokens = metrics["sequence_parallel_size"], metrics["row_tokens"]
    kind = metrics.get("model_type")
    base = _link(metrics["base_model"], "") or (f"A `{kind}` model" if kind else "A model")
    length = f"rows of up to {row_tokens:,} tokens" if row_tokens else "rows as long as its documents"
    if size > 1:
        length += f", each shared by {size} processes (Ulysses sequence parallelism)"
    source = f" on {_link(metrics['dataset'], 'datasets/')}" if metrics["dataset"] else ""
    fast = metrics.get("fast_weights")
    packages = needs(folder, metrics)
    needed = ("" if "hf_longctx" in packages else "only ") + " and ".join(f"`{name}`" for name in packages)
    parts = [
        f"# {metrics['name']}",
        f"{base} trained{source} with `hf_longctx`: {length}. To run, the saved model needs {needed}.",
    ]
    if picture is not None:
        parts.append(f"![Loss and throughput]({picture})")
    code = usage(folder, metrics)
    if code is not None:
        parts += ["## How to use", code_block(code, "python")]
    parts += ["## Results", markdown_table("Measure", "Value", run_results(metrics))]
    if metrics.get("sources"):
        parts += ["## Data", sources_table(metrics["sources"])]
    parts += ["## Training", markdown_table("Setting", "Value", run_settings(metrics))]
    if fast:
        parts += ["## Learning while reading", _FAST_WEIGHTS]
        parts.append(markdown_table("Setting", "Value", {_in_words(name): str(fast[name]) for name in fast}))
    where = ", from the folder with the recipes" if "recipes/" in metrics["command"] else ""
    parts += [f"Command{where}:", code_block(metrics["command"])]
    proof = proof_of(metrics)
    if proof is not None:
        parts += ["## Exactness", proof]
    parts += [
        "## Versions",
        markdown_table("Library", "Version", metrics["versions"]),
        "Numbers of every step: `metrics.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _link(name: str | None, kind: str) -> str | None:
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub_name(name) else name


def run_results(metrics: dict) -> dict[str, str]:
    """What a run reached: losses, tokens, time and memory."""
    unit = metrics.get("loss_unit", "nats per token")
    history, evaluations, train = metrics["history"], metrics["eval_history"], metrics["train"]
    rows = {"Optimizer steps": str(metrics["num_steps"])}
    if history:
        first, last = history[0], history[-1]
        rows[f"Training loss, {unit}"] = f"{last['loss']:.4f} (at step {first['step']}: {first['loss']:.4f})"
    if evaluations:
        rows[f"Evaluation loss, {unit}"] = f"{evaluations[-1]['eval_loss']:.4f}"
    if train.get("num_input_tokens_seen"):
        rows["Tokens seen"] = f"{train['num_input_tokens_seen']:,}"
    if train.get("train_runtime"):
        rows["Seconds of training"] = f"{train['train_runtime']:.1f}"
    speeds = [entry["tokens_per_second"] for entry in history if entry.get("tokens_per_second")]
    if speeds:
        rows["Tokens per second, all processes, median"] = f"{median(speeds):,.0f}"
    for name, shown in (("device", "device"), ("cpu", "CPU")):
        peaks = [rank[f"{name}_bytes"] for rank in metrics["peak_memory"] if rank[f"{name}_bytes"]]
        if peaks:
            rows[f"Peak {shown} memory of a process"] = f"{max(peaks) / GIB:.2f} GiB"
    if train.get("planned_memory_gib"):
        measured = train.get("measured_memory_gib")
        beside = f"; measured, libraries left out: {measured:.2f} GiB" if measured else ""
        rows["Planned memory of a process"] = f"{train['planned_memory_gib']:.2f} GiB{beside}"
    return rows


def run_settings(metrics: dict, length: str = "Context length, tokens per row") -> dict[str, str]:
    """How a run was set up: lengths, processes, optimizer."""
    rows = {
        length: f"{metrics['row_tokens']:,}" if metrics["row_tokens"] else "as in the data",
        "Sequence-parallel size": str(metrics["sequence_parallel_size"]),
        "Data-parallel size": str(metrics["data_parallel_size"]),
    }
    return {**rows, **{_in_words(name): str(value) for name, value in metrics["settings"].items()}}


def sources_table(sources: dict[str, dict[str, float]]) -> str:
    """What a run read of each source of its blend, as Markdown."""
    lines = ["| Source | Rows | Passes | Tokens | Mean loss, nats per token |", "|---|---|---|---|---|"]
    for name, read in sources.items():
        loss = f"{read['mean_loss']:.4f}" if "mean_loss" in read else ""
        cell = name.replace("|", "\\|")
        lines.append(f"| {cell} | {read['rows']:,} | {read['passes']:.3g} | {read['tokens']:,} | {loss} |")
    return "\n".join(lines)


def _in_words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def code_block(command: str, language: str = "bash") -> str:
    """A shell command, or other code, as a block of Markdown, in a fence longer than any run of back-ticks in it."""
    fence = "`" * (max([2, *map(len, re.findall("`+", command))]) + 1)
    return f"{fence}{language}\n{command}\n{fence}"


def markdown_table(name: str, value: str, rows: dict[str, str]) -> str:
    """Two columns, as Markdown."""
    return "\n".join([f"| {name} | {value} |", "|---|---|", *(f"| {key} | {cell} |" for key, cell in rows.items())])
