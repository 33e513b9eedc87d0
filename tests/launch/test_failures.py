"""A rank that fails takes the run down within 30 s, with the cause and the rank; nobody is left waiting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("failing_rank.py")
SENTENCES = {
    "raise": ("rank 1 of 2 stops after step 1: ValueError: rank 1 lost its disk", r"rank +: 1 "),
    "kill": (r"Signal 9 \(SIGKILL\) received by PID", r"rank +: 1 "),
    "hang": (
        "no progress for .* rank 1, after step 1, is in no collective, so the others wait for it: in `on_step_begin` "
        r"\(tests/launch/failing_rank.py",
        r"rank 0, after step 1, waits for the others: `all_",
        "rank 0 of 2 stops after step 1: it lost another rank",
    ),
}


@pytest.mark.parametrize("how", SENTENCES)
def test_the_other_ranks_stop_when_one_fails(tmp_path, how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = subprocess.run(
        [*command, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ended = time.time()
    assert done.returncode != 0
    for message in SENTENCES[how]:
        assert re.search(message, done.stderr), (message, done.stderr[-5000:])
    failed = float(re.search(r"failing at ([\d.]+)", done.stdout).group(1))
    assert ended - failed < 30, "the others waited for the failed rank"
