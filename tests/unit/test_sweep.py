"""What `make conformance` shows: progress and failures, and the libraries' noise only below a failure."""

from __future__ import annotations

import os
import subprocess

import pytest

from ..conformance.sweep import disagreements, problems_of
from ..conformance.terminal import EVERY, Terminal


def record(name: str, outcome: str, message: str = "") -> dict:
    return {"task": "causal-lm", "type": name, "rows": [{"rows": "dense", "outcome": outcome, "message": message}]}


def test_noise_of_processes_is_shown_below_a_failure_and_nowhere_else(capfd):
    with Terminal() as terminal:
        terminal.expect(EVERY + 2)
        for number in range(EVERY + 2):
            mark = terminal.mark()
            subprocess.run(["sh", "-c", f"echo warning {number}; echo error {number} >&2"], check=True)
            if number == 7:
                terminal.fail(["model-7 (causal-lm) is wrong: [0.5]"], mark)
            terminal.advance(f"model-{number}")
    os.write(2, b"after\n")
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "FAILED: model-7 (causal-lm) is wrong: [0.5]",
        "    warning 7",
        "    error 7",
        f"  {EVERY} of {EVERY + 2}, the last is model-{EVERY - 1}",
        f"  {EVERY + 2} of {EVERY + 2}, the last is model-{EVERY + 1}",
    ]
    assert err == "after\n"


def test_a_sweep_that_breaks_off_shows_what_was_written(capfd):
    with pytest.raises(RuntimeError, match="broken"), Terminal():
        os.write(2, b"the cause\n")
        raise RuntimeError("broken")
    assert capfd.readouterr().out == "the cause\n"


def test_wrong_and_worse_types_are_problems_and_the_others_are_not():
    before = [record("a", "exact"), record("b", "refused"), record("c", "exact"), record("d", "refused")]
    now = [
        record("a", "wrong", "off by 1"),
        record("b", "wrong", "off by 1"),
        record("c", "refused"),
        record("d", "exact"),
    ]
    assert problems_of(now, before) == [
        "a (causal-lm) is wrong: off by 1",
        "b (causal-lm) is wrong: off by 1",
        "a (causal-lm), dense rows: was exact, is wrong",
        "b (causal-lm), dense rows: was refused, is wrong",
        "c (causal-lm), dense rows: was exact, is refused",
    ]


def test_a_type_that_is_exact_and_that_check_refuses_is_a_problem():
    assert disagreements([record("qwen3", "exact"), record("t5", "refused")]) == []
    (problem,) = disagreements([record("gemma4_assistant", "exact")])
    assert problem.startswith("gemma4_assistant (causal-lm) is exact, and `check` says: ")
