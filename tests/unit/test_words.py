"""Words that the project has given up for transformers' and torch's own, in code, docs and tests.

Each pattern is a use that a reader would need a glossary for. Ordinary English meanings stay: a line of a file, an
answer to a question, words of a text.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
THIS = Path(__file__)
FILES = sorted(
    path
    for pattern in (
        "hf_longctx/**/*.py",
        "recipes/**/*.py",
        "recipes/*.md",
        "tests/**/*.py",
        "docs/*.md",
        "docs/*.py",
        "*.md",
    )
    for path in ROOT.glob(pattern)
    # made from the code and its tests
    if path != THIS and path.name not in ("refusals.md", "conformance.md", "conformance_embeddings.md")
)

RETIRED = {
    r"\bhosts?\b(?!name)": "name the library; CPU memory; node",
    r"\brungs?\b|\bladders?\b": "memory preset",
    r"\b(lend|lent|lends|lending)\b": "pass",
    r"\b(deal|deals|dealt|dealing)\b (?!with)": "assign, distribute",
    r"\bfillers?\b": "dummy sample",
    r"\bputs? off\b": "deferred",
    r"\bseams?\b": "overridden methods",
    r"\b[Ll]edgers?\b": "memory breakdown",
    r"\bplanned[ _]attention\b": "fake (shape-only) attention",
    r"\b[Pp]rob(e|es|ed|ing)\b|\bProbeResult\b": "sanity check",
    r"\bblind(ly)?\b": "without communication",
    r"\b[Ss]ubjects?\b|\b[Vv]erdicts?\b": "model under test, outcome",
    r"\b(twin|oracle)s?\b": "reference implementation",
    r"\bdigests?\b(?!\(|_size)": "hash, checksum",
    r"\bits kin\b|\bwhoever\b|\bfor ever\b|\bat hand\b": "similar models, the caller, infinite, available",
    r"\bown[ _]positions\b": "implicit position ids",
    r"\baligned[ _]labels\b|\bAlignedLoss\b": "unshifted labels",
    r"\b(is|are|was|were) (said|told)\b": "reported, logged",
    r"\bcovers? (it|them|the forward|its forward)\b|\bforward is covered\b": "patch",
}


def retired_uses(text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, instead in RETIRED.items():
            match = re.search(pattern, line)
            if match:
                found.append(f"{number}: {match[0]!r}, say: {instead}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_retired_word(path):
    assert retired_uses(path.read_text(encoding="utf-8")) == []


def test_the_reader_sees_retired_words_and_lets_ordinary_english_pass():
    assert len(retired_uses("the host's rung\nrows are dealt to ranks\nwhoever asks\nthe probe is blind")) == 6
    assert retired_uses("localhost\nhostname\ndeal with it\nhashlib.sha256(x).digest()\na good answer in words") == []
