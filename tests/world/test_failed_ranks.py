"""What happens in the middle of a run, done to real processes: SIGTERM, a dead data worker, a rank that hangs."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_longctx.resilience import failed_ranks
from hf_longctx.resilience.failed_ranks import clear_fault, describe_hang, report_fault
from hf_longctx.resilience.termination import EXIT_CODE

from ..training import Rows, reset_state, train
from .test_resume import loads_moments


class InSecondStep(TrainerCallback):
    """Calls `act` on one rank while the second step runs."""

    def __init__(self, rank: int, act) -> None:
        self.rank, self.act = rank, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == self.rank:
            self.act()


class Sentences(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def watched(size, act, rank=1, **options):
    """(how it ended, what was logged, the last step, weights)"""
    messages, weights, state = Sentences(), None, {}
    logging.getLogger("hf_longctx").addHandler(messages)

    class Last(TrainerCallback):
        def on_step_end(self, args, trainer_state, control, **kwargs):
            state["step"] = trainer_state.global_step

    try:
        _, weights, _ = train(size, trainer_options={"callbacks": [InSecondStep(rank, act), Last()]}, **options)
        ended = "returned"
    except (Exception, SystemExit) as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("hf_longctx").removeHandler(messages)
        reset_state()
    return ended, messages.lines, state.get("step"), weights


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_here(size, options):
    before = signal.getsignal(signal.SIGTERM)
    result = watched(size, terminate, **options)
    return (*result, signal.getsignal(signal.SIGTERM) == before)


@loads_moments
@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_of_one_rank_saves_and_ends_all_in_the_same_step(world2, tmp_path, size):
    options = {"enable_jit_checkpoint": True, "output_dir": str(tmp_path), "optim": "adamw_torch"}
    plain = {**options, "enable_jit_checkpoint": False, "output_dir": str(tmp_path / "plain")}
    whole = world2.run(resume_here, size, plain)
    stopped = world2.run(terminate_here, size, options)
    for rank, (ended, lines, step, _, is_given_back) in enumerate(stopped):
        assert ended == f"SystemExit: {EXIT_CODE}" and step == 2 and is_given_back
        told = f"SIGTERM: the run stops after step 2, saved in `{tmp_path / 'checkpoint-2'}`"
        assert [told in line for line in lines] == ([True] if rank == 0 else [])
    resumed = world2.run(resume_here, size, {**plain, "output_dir": str(tmp_path), "resume": True})
    for before, after in zip(whole, resumed):
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def resume_here(size, options):
    try:
        return train(size, **options)[1]
    finally:
        reset_state()


def test_sigterm_is_left_alone_unless_asked_for(world2):
    """The default action would have killed the process, so a handler of the test's own stands in for it."""
    results = world2.run(terminate_by_default, 2)
    assert results == [("returned", 0), ("returned", 1)]


def terminate_by_default(size):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        return watched(size, terminate)[0], len(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


class DiesWith(Dataset):
    """Rows whose seventh kills the process that reads it."""

    def __init__(self) -> None:
        self.rows, self.parent = Rows(16).rows, os.getpid()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == 6 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


def test_dead_data_worker_ends_the_run_and_is_named():
    """Torch says so itself, unless it was just receiving a batch: then it has a broken connection to tell of."""
    ended, lines, *_ = watched(1, lambda: None, rows=DiesWith(), dataloader_num_workers=1, max_steps=8)
    assert "DataLoader worker" in ended or "Connection" in ended or "EOFError" in ended
    told = [line for line in lines if line.startswith("the run stops after step ")]
    assert len(told) == 1 and "a data worker died" in told[0], (ended, lines)


def test_dead_data_worker_is_named_if_torch_says_so_while_the_cause_is_told(monkeypatch, caplog):
    """A broken connection comes first, and the signal of the worker's end while its traceback is read."""
    said = iter([RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])
    right = failed_ranks.traceback.extract_tb

    def interrupted(trace):
        for error in said:
            raise error
        return right(trace)

    monkeypatch.setattr(failed_ranks.traceback, "extract_tb", interrupted)
    with caplog.at_level("ERROR", logger="hf_longctx"):
        failed_ranks.report_fault(EOFError(), 3)
    assert next(said, None) is None
    assert [
        record.getMessage().startswith("the run stops after step 3: a data worker died") for record in caplog.records
    ] == [True]


def sleep_here(size, seconds):
    return watched(size, lambda: time.sleep(seconds), ddp_timeout=8)


def test_hang_is_told_by_rank_and_call_before_the_timeout(world2):
    """Rank 1 sleeps for a while; both ranks say so, and in which call rank 0 waits for it. Then the run goes on."""
    for ended, lines, step, _ in world2.run(sleep_here, 2, 5.5):
        assert ended == "returned" and step == 4
        told = [line for line in lines if line.startswith("no progress for ")]
        assert len(told) == 1, lines
        assert "rank 1, after step 1, is in no collective, so the others wait for it: in `" in told[0]
        assert "world/test_failed_ranks.py, line " in told[0]
        assert "; rank 0, after step 1, waits for the others: `all_" in told[0]


def test_silent_rank_is_the_first_suspect():
    waiting = {"step": 3, "words": "`all_reduce`, called in `f` (a.py, line 1)", "waits": True}
    message = describe_hang({0: waiting, 2: waiting}, 3, 60.0)
    assert message.startswith("no progress for 60 s")
    assert message.index("rank 1 did not respond") < message.index("rank 0, after step 3, waits for the others")


def report_here(errors):
    import torch.distributed as dist

    messages = Sentences()
    clear_fault()
    dist.barrier()
    logging.getLogger("hf_longctx").addHandler(messages)
    rank = dist.get_rank()
    for turn in (1, 0):
        if rank == turn:
            report_fault(RuntimeError(errors[rank]), 7)
        dist.barrier()
    logging.getLogger("hf_longctx").removeHandler(messages)
    return messages.lines


def test_rank_that_lost_another_says_that_ones_cause(world2):
    first, second = world2.run(report_here, ["Connection closed by peer [127.0.0.1]:3", "no such file"])
    assert second == ["rank 1 of 2 stops after step 7: RuntimeError: no such file"]
    assert first == ["rank 0 of 2 stops after step 7 because rank 1 failed with RuntimeError: no such file"]
    first, _ = world2.run(report_here, ["Connection closed by peer"] * 2)
    assert "it lost another rank, and none has reported why" in first[0]
