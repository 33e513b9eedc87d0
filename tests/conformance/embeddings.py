"""Embedding models of the installed transformers, packed and shared, against the padded one:
`python -m tests.conformance.embeddings` writes `docs/conformance_embeddings.md`.

All masked language models, and the decoders that embedding models are made of, with their causal mask and without. The
exit code is 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from transformers.models.auto import modeling_auto

from hf_longctx.proof.model_under_test import EMBEDDING_KINDS, ModelUnderTest, Setting, default_config
from hf_longctx.proof.ranks import Ranks
from hf_longctx.proof.result import EXACT, UNBUILDABLE, WRONG, RowsResult
from hf_longctx.proof.verification import run_proof

from .page import WORDS
from .terminal import Terminal


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance_embeddings.md"
SIZE = 2
SECONDS_A_MODEL = 300.0
DECODERS = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
PREFACE = """# Conformance of embedding models

All masked language models of transformers {transformers}, and the decoders that embedding models are made of, as
sentence-transformers {sentence_transformers}: a tiny random model of each with all six ways of pooling,
packed on one process and shared by two, against the padded model on one process. Embeddings, the loss of multiple
negatives and **every** gradient; [verify.md](verify.md#embedding-models) says what is compared. Written by
`make conformance_embeddings`, which fails if one is wrong.
"""


def models() -> list[tuple[str, bool]]:
    """`(model type, whether its causal mask is off)`."""
    masked = [(name, False) for name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    return masked + [(name, both) for name in DECODERS for both in (False, True)]


def prove(ranks: Ranks, name: str, bidirectional: bool) -> dict:
    """The record of one model."""
    try:
        config = default_config(name)
        if bidirectional:
            config.is_causal = False
        tested = ModelUnderTest.of(config, "embedding", SIZE)
    except Exception as error:
        rows = [RowsResult(k, UNBUILDABLE, message=f"no configuration: {error}") for k in EMBEDDING_KINDS]
    else:
        rows = run_proof(ranks, tested, Setting(SIZE, kinds=EMBEDDING_KINDS), SECONDS_A_MODEL)
    kept = [{"rows": r.rows, "outcome": r.outcome, "message": r.message} for r in rows]
    return {"type": name, "bidirectional": bidirectional, "rows": kept}


def page(records: list[dict]) -> str:
    """The table, without numbers that differ from machine to machine."""
    versions = {name: version(name.replace("_", "-")) for name in ("transformers", "sentence_transformers")}
    exact = sum(all(row["outcome"] == EXACT for row in record["rows"]) for record in records)
    heads = ("type", *EMBEDDING_KINDS, "why")
    lines = [PREFACE.format(**versions), f"{exact} of {len(records)} are exact in both ways.", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for record in records:
        reasons = " ".join(dict.fromkeys(row["message"] for row in record["rows"] if row["message"]))
        name = f"`{record['type']}`" + (", no causal mask" if record["bidirectional"] else "")
        outcomes = " | ".join(WORDS[row["outcome"]] for row in record["rows"])
        lines.append(f"| {name} | {outcomes} | {reasons.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prove all models, write the page, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="*", help="only these model types; the page is not written")
    options = parser.parse_args(arguments)
    began, records = time.perf_counter(), []
    wanted = [item for item in models() if not options.types or item[0] in options.types]
    with Terminal() as terminal, Ranks(SIZE) as ranks:
        terminal.expect(len(wanted))
        for name, both in wanted:
            mark = terminal.mark()
            records.append(prove(ranks, name, both))
            wrong = [r["message"] for r in records[-1]["rows"] if r["outcome"] == WRONG]
            if wrong:
                terminal.fail([f"{name}: {message}" for message in dict.fromkeys(wrong)], mark)
            terminal.advance(name)
    for record in records if options.types else ():
        print(json.dumps(record))
    print(f"{len(records)} models in {time.perf_counter() - began:.0f} s")
    if not options.types:
        PAGE.write_text(page(records))
    return int(any(row["outcome"] == WRONG for record in records for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
