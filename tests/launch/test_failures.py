"""A rank that dies takes the run down, with its own error, instead of leaving the others waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("failing_rank.py")


@pytest.mark.parametrize(("how", "sentence"), [("raise", "rank 1 lost its disk"), ("kill", "Signal 9")])
def test_the_other_ranks_stop_when_one_dies(tmp_path, how, sentence):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert sentence in done.stderr, done.stderr[-3000:]
    assert time.monotonic() - started < 120, "the others waited for the dead rank"
