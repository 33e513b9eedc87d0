"""The world of local ranks itself: answers in rank order, tracebacks, time limits, what is started anew and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_longctx.proof.ranks import Limits, RanksError

from ..harness import World


def me(*_) -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def pids(world: World) -> list[int]:
    return [pid for _, pid in world.run(me)]


def double(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def raise_on(ranks: tuple[int, ...]) -> str:
    if dist.get_rank() in ranks:
        raise KeyError(f"bad input on {dist.get_rank()}")
    return "fine"


def end_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def sleep_on(rank: int) -> str:
    if dist.get_rank() == rank:
        time.sleep(30)
    return "fine"


def return_what_no_pipe_carries():
    return lambda: None


class Unreadable:
    """Refuses where it arrives."""

    def __setstate__(self, state) -> None:
        raise ValueError("not here")

    def __getstate__(self) -> dict:
        return {"a": 1}


def groups_after_one_more(ranks: list[int]) -> int:
    """How many groups there are in addition to the world, after one more."""
    dist.new_group(ranks)
    return len(dist.distributed_c10d._world.pg_map) - 1


@pytest.fixture
def impatient():
    """Two ranks that get a second where others get minutes."""
    with World(2, Limits(grace=1)) as world:
        yield world


def test_answers_come_in_rank_order_and_carry_tensors(world2):
    assert [rank for rank, _ in world2.run(me)] == [0, 1]
    results = world2.run(double, torch.arange(3.0))
    assert all(torch.equal(result, torch.tensor([0.0, 2.0, 4.0])) for result in results)


def test_ranks_that_all_raised_live_on(world2):
    before = pids(world2)
    with pytest.raises(RanksError, match=r"(?s)rank 0: Traceback.*bad input on 0.*rank 1: Traceback.*bad input on 1"):
        world2.run(raise_on, (0, 1))
    assert pids(world2) == before


def test_one_that_raised_ends_all_and_the_answers_of_the_others_are_kept(world2):
    before = pids(world2)
    with pytest.raises(RanksError, match=r"(?s)^rank 1: Traceback.*KeyError: 'bad input on 1'") as failure:
        world2.run(raise_on, (1,))
    assert failure.value.answers == ["fine", None]
    assert not set(pids(world2)) & set(before)


def test_one_that_ended_is_named_with_its_exit_code(world2):
    with pytest.raises(RanksError, match=r"rank 1: the process ended \(exit code 3\)"):
        world2.run(end_on, 1)
    assert [rank for rank, _ in world2.run(me)] == [0, 1]


def test_one_that_ended_between_calls_is_named_too(world2):
    os.kill(pids(world2)[0], signal.SIGKILL)
    with pytest.raises(RanksError, match=r"rank 0: the process ended \(exit code -9\)"):
        world2.run(me)


def test_one_that_is_silent_has_the_grace_of_the_others(impatient):
    with pytest.raises(RanksError, match="^rank 0: no answer in time$") as failure:
        impatient.run(sleep_on, 0)
    assert failure.value.answers == [None, "fine"]


def test_a_call_has_the_time_that_it_is_given(world2):
    with pytest.raises(RanksError, match="^rank 0: no answer in time\nrank 1: no answer in time$"):
        world2.run(signal.pause, seconds=0.5)


@pytest.mark.parametrize("call", [(return_what_no_pipe_carries,), (me, Unreadable())], ids=["answer", "argument"])
def test_what_cannot_be_sent_is_a_traceback_and_ends_no_rank(world2, call):
    before = pids(world2)
    with pytest.raises(RanksError, match="rank 0: Traceback"):
        world2.run(*call)
    assert pids(world2) == before


def test_groups_that_calls_made_end_at_the_next_meeting(world2):
    counts = [world2.run(groups_after_one_more, [0, 1])[0] for _ in range(7)]
    assert max(counts) <= 3 and counts.count(1) >= 2


# Without `if __name__ == "__main__"`: a child that imported it would start children of its own.
SCRIPT = """
from hf_longctx.proof.ranks import Ranks
print("script", flush=True)
with Ranks(1) as ranks:
    print(ranks.run(len, "abc"), flush=True)
"""


def test_fresh_interpreters_never_import_the_callers_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["script", "[3]"], done.stderr
