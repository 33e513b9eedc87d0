"""`EmbeddingReport`: the report of an embedding run, added to sentence-transformers' own model card.

That card tells data, losses and scores; ours adds what it cannot know: lengths, processes, which sources were there,
command, versions and a picture. It is one section behind theirs, written anew each time.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .model_card import code_block, markdown_table, merge_metadata, run_results, run_settings
from .proven import proof_of
from .redaction import redact_text
from .report import METRICS_FILE, RunReport


HEADING = "## How it was trained with hf_longctx"
_TAGS = ("hf_longctx", "long-context")
_MOST_NAMED = 20
_NO_NAME = "sentence_transformers_model_id"  # in the usage of a card whose model was not given a name


class EmbeddingReport(RunReport):
    """[`RunReport`] of a `LongContextSentenceTransformerTrainer`.

    Args:
        sources (`dict`, *optional*): what was drawn from and what was absent, for the card and `metrics.json`.
        score (`str`, *optional*): the evaluator's figure that is drawn, such as `"eval_docs_cosine_mrr@10"`.
        kwargs: those of [`RunReport`]; `row_tokens` is the longest text.
    """

    loss_unit = "nats per query"

    def __init__(self, *, sources: dict | None = None, score: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sources, self.score = sources, score

    def _collect(self, args, state, peaks, model) -> dict:
        metrics = super()._collect(args, state, peaks, model)
        scores = []
        for entry in state.log_history:
            found = {key: value for key, value in entry.items() if key.startswith("eval_") and "@" in key}
            if found:
                scores.append({"step": entry["step"], **found})
        sources = self.sources
        if sources and sources.get("absent"):  # a place may be an address with a signature
            absent = {name: redact_text(reason) for name, reason in sources["absent"].items()}
            sources = {**sources, "absent": absent}
        return {**metrics, "scores": scores, "score": self.score, "sources": sources}

    def _evaluations(self, metrics: dict) -> tuple[str, list[tuple[int, float]]]:
        points = [(entry["step"], entry[self.score]) for entry in metrics["scores"] if self.score in entry]
        return (self.score or "").removeprefix("eval_").replace("_", " "), points

    def _write_card(self, folder: Path, metrics: dict, picture: str | None) -> None:
        path = folder / "README.md"
        if not path.is_file():  # sentence-transformers writes its card with the model
            return
        card = ModelCard.load(path, ignore_metadata_errors=True)
        data = ModelCardData(**merge_metadata(card.data.to_dict(), metrics, _TAGS), ignore_metadata_errors=True)
        text = card.text.split(HEADING)[0].rstrip().replace(_NO_NAME, metrics["hub_model_id"] or metrics["name"])
        ModelCard(f"---\n{data.to_yaml()}\n---\n{text}\n\n{_section(metrics, picture)}").save(path)


def _section(metrics: dict, picture: str | None) -> str:
    parts = [HEADING]
    if picture is not None:
        parts.append(f"![Loss, score and throughput]({picture})")
    results = run_results(metrics)
    first, last = (metrics["scores"] or [{}])[0], (metrics["scores"] or [{}])[-1]
    for name, value in last.items():
        if name.endswith(("accuracy@1", "mrr@10", "ndcg@10")):
            before = f" (at step {first['step']}: {first[name]:.4f})" if last is not first and name in first else ""
            results[name.removeprefix("eval_").replace("_", " ")] = f"{value:.4f}{before}"
    parts += [markdown_table("Measure", "Value", results)]
    parts += [markdown_table("Setting", "Value", run_settings(metrics, "Longest text, tokens"))]
    if metrics["sources"]:
        parts += ["### Sources", *_sources(metrics["sources"])]
    parts.append("### Command")
    parts += ["From the folder with the recipes:"] if "recipes/" in metrics["command"] else []
    parts.append(code_block(metrics["command"]))
    proof = proof_of(metrics)
    parts += ["### Exactness", proof] if proof is not None else []
    parts += ["### Libraries", markdown_table("Library", "Version", metrics["versions"])]
    return "\n\n".join([*parts, f"Numbers of every step: `{METRICS_FILE}`."]) + "\n"


def _sources(sources: dict) -> list[str]:
    present, absent = sources["present"], sources["absent"]
    rows = {
        name: f"{'a stream' if rows is None else f'{rows:,}'}" for name, rows in list(present.items())[:_MOST_NAMED]
    }
    lines = [markdown_table("Source", "Rows", rows)]
    if len(present) > len(rows):
        lines.append(f"and {len(present) - len(rows)} more, see `{METRICS_FILE}`.")
    if absent:
        share, count = sources["absent_weight_share"], sources["absent_rows"]
        known = "" if share is None else f", {share:.1%} of the weight and {count:,} rows"
        named = ", ".join(list(absent)[:_MOST_NAMED]) + (", ..." if len(absent) > _MOST_NAMED else "")
        lines.append(f"**Absent**: {len(absent)} of {sources['num_sources']} sources{known}: {named}.")
    return lines
