"""The watches of a long run on `P x dp = 2 x 2` ranks: all act after the same step, and what goes on is exact."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_longctx import CheckpointAdvisor, KillSwitch, LossSpikeGuard, RampConfig, SlowRankWatch
from hf_longctx.reporting.meter import ThroughputMeter
from hf_longctx.resilience.kill_switch import NOTE

from ..training import Rows, reset_state, train


RUN = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "rows": Rows(41),
}
SAVE = {"save_strategy": "steps", "save_steps": 2}
SPIKE = 5  # steps before it
loads_moments = pytest.mark.skipif(
    'device.type != "cpu"' not in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers cannot load an optimizer's state in several processes on a CPU",
)


class Trouble(TrainerCallback):
    """In one step, one rank's logits are huge, or a file appears; notes weights and rates before each step."""

    def __init__(self, step: int, rank: int, file: str | None = None, times: int = 1) -> None:
        self.step, self.rank, self.file, self.times = step, rank, file, times
        self.is_on, self.weights, self.rates = False, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == self.rank and self.file is None:
            model.get_submodule("lm_head").register_forward_hook(self.spoil)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.is_on = self.step <= state.global_step < self.step + self.times
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        self.rates.append(optimizer.param_groups[0]["lr"])
        if self.is_on and self.file is not None and args.process_index == self.rank:
            Path(self.file).touch()

    def spoil(self, module, args, output):
        return output * 200 if self.is_on and torch.is_grad_enabled() else output


def run_here(size, options, watches=(), trouble=None, ramp=None):
    """(error, history, weights, state, what `Trouble` noted, the guard's notes)"""
    watches = [copy.deepcopy(watch) for watch in watches]
    noted = Trouble(*trouble) if trouble else Trouble(-1, 0)
    given = {"callbacks": [*watches, noted], **({"ramp": ramp} if ramp else {})}
    try:
        history, weights, extra = train(size, trainer_options=given, **options)
    except (ValueError, RuntimeError) as error:
        return str(error), None, None, None, noted.weights, noted.rates, []
    finally:
        reset_state()
    notes = [watch.notes for watch in watches if isinstance(watch, LossSpikeGuard)]
    return None, history, weights, extra["state"], noted.weights, noted.rates, notes


def logged(history, after=0):
    return [
        tuple(e[name] for name in ("step", "loss", "grad_norm", "learning_rate", "epoch"))
        for e in history
        if "loss" in e and e["step"] > after
    ]


def assert_goes_on(resumed, whole, step: int) -> None:
    for before, after in zip(whole, resumed):
        assert after[0] is None and logged(after[1]) == logged(before[1])  # a checkpoint keeps the log before it
        assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())


@loads_moments
def test_a_file_ends_the_run_after_one_step_on_all_ranks_and_it_goes_on_bit_for_bit(world4, tmp_path):
    ramp = RampConfig(start=4, increment=4, rows=24)
    run = {**RUN, "gradient_accumulation_steps": 3, "context": {"on_nonfinite": "off"}}
    whole = world4.run(run_here, 2, {**run, "output_dir": str(tmp_path / "whole")}, [], None, ramp)
    run |= {"output_dir": str(tmp_path / "run")}
    file = str(tmp_path / "STOP")
    stopped = world4.run(run_here, 2, run, [KillSwitch(file)], (3, 0, file), ramp)
    for rank in stopped:
        assert rank[0] is None and rank[3]["global_step"] == 4, rank[0]
    note = (tmp_path / "run" / NOTE).read_text()
    assert f"`KillSwitch` ('{file}') ended the run after step 4, saved in `{tmp_path}/run/checkpoint-4`" in note
    run |= {"resume": str(tmp_path / "run" / "checkpoint-4")}
    refused = world4.run(run_here, 2, run, [KillSwitch(file)], None, ramp)
    assert {rank[0] for rank in refused} == {
        f"the file of `KillSwitch` ('{file}') is there, so the run does not start: remove it to train."
    }
    Path(file).unlink()
    assert_goes_on(world4.run(run_here, 2, run, [KillSwitch(file)], None, ramp), whole, 4)


def test_only_the_first_process_looks(world2, tmp_path):
    """Another rank's file system may show the file later, or never."""
    assert all(rank == [False, True] for rank in world2.run(look_here, str(tmp_path)))


def look_here(folder):
    """A switch whose file only one rank sees: rank 1 sees it from the start, rank 0 from step 3 on."""

    class Seen(KillSwitch):
        def is_thrown(self):
            return dist.get_rank() == 1 or self.step >= 3

        def on_step_begin(self, args, state, control, **kwargs):
            self.step = state.global_step

    switch = Seen(f"{folder}/STOP")
    switch.step = 0
    try:
        extra = train(1, attention="packed", trainer_options={"callbacks": [switch]}, **{**RUN, "output_dir": folder})[
            2
        ]
    finally:
        reset_state()
    return [extra["state"]["global_step"] < 4, extra["state"]["global_step"] == 4]


@loads_moments
@pytest.mark.parametrize("action", ["warn", "skip", "rollback", "stop"])
def test_a_spike_of_one_rank_acts_on_all_in_the_same_step(world4, tmp_path, action):
    run = {**RUN, **SAVE, "output_dir": str(tmp_path)}
    guard = [LossSpikeGuard(action, window=4, deviations=20)]
    trouble = (SPIKE, 1)
    whole = world4.run(run_here, 2, run, guard, trouble)
    assert len({str(rank[6]) for rank in whole}) == 1, "ranks noted different spikes"
    error, history, _, state, weights, rates, notes = whole[0]
    assert error is None and [(n["step"], n["rows"], n["action"]) for n in notes[0]] == [(6, [20, 24], action)]
    assert notes[0][0]["loss"] > 20 and [e["loss_spikes"] for e in history if e.get("step") == 6 and "loss" in e] == [
        1
    ]
    if action == "stop":
        assert state["global_step"] == 6 and (tmp_path / "checkpoint-6" / "trainer_state.json").is_file()
        return
    assert state["global_step"] == 8
    # The optimizer took the step if, and only if, it was to.
    assert torch.equal(weights[6], weights[5]) == (action == "skip")
    assert torch.equal(weights[6], weights[4]) == (action == "rollback")
    assert (
        rates[6] == {"warn": rates[5] - 1e-2 / 8, "skip": rates[5], "rollback": rates[4]}[action] or action == "warn"
    )
    if action == "rollback":
        saved = [load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6)]
        assert all(torch.equal(saved[1][name], weight) for name, weight in saved[0].items())
        for name in ("optimizer.pt", "scheduler.pt"):
            first, second = (torch.load(tmp_path / f"checkpoint-{step}" / name) for step in (4, 6))
            assert str(first) == str(second), name
    for step in (4,) if action == "warn" else (4, 6):  # before and after the spike
        resumed = {**run, "resume": str(tmp_path / f"checkpoint-{step}"), "save_steps": 2}
        again = world4.run(run_here, 2, resumed, guard, trouble)
        assert_goes_on(again, whole, step)
        assert again[0][6] == whole[0][6]


@loads_moments
def test_a_guard_counts_rows_of_a_ramp_spares_the_warm_up_and_stops_acting(world4, tmp_path):
    ramp = RampConfig(start=4, increment=4, rows=24)
    run = {**RUN, **SAVE, "gradient_accumulation_steps": 3, "max_steps": 10, "output_dir": str(tmp_path)}
    guard = [LossSpikeGuard("rollback", window=2, deviations=40, limit=2)]
    whole = world4.run(run_here, 2, {**run, "warmup_steps": 1}, guard, (4, 3, None, 4), ramp)
    notes = whole[0][6][0]
    assert [(note["step"], note["rows"]) for note in notes] == [(5, [20, 28]), (6, [28, 40])]
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["LossSpikeGuard"]["attributes"]["notes"]) == 2
    resumed = {**run, "warmup_steps": 1, "resume": str(tmp_path / "checkpoint-6")}
    again = world4.run(run_here, 2, resumed, guard, (4, 3, None, 4), ramp)
    assert_goes_on(again, whole, 6)
    warm = {**run, "warmup_steps": 9, "output_dir": str(tmp_path / "warm")}
    assert world4.run(run_here, 2, warm, guard, (4, 3, None, 2), ramp)[0][6] == [[]]


def test_without_a_checkpoint_yet_a_rollback_is_a_skip(world2, tmp_path, caplog):
    run = {**RUN, "save_strategy": "steps", "save_steps": 7, "output_dir": str(tmp_path)}
    found = world2.run(run_here, 1, {**run, "attention": "packed"}, [LossSpikeGuard("rollback", window=4)], (SPIKE, 1))
    for rank in found:
        assert rank[6][0][0]["action"] == "skip" and torch.equal(rank[4][6], rank[4][5])


class Slowed(TrainerCallback):
    """A clock of its own: one part of a step takes a second, or more on one rank."""

    now = 0.0

    def __init__(self, rank: int | None, part: str) -> None:
        self.rank, self.part = rank, part

    def __call__(self) -> float:
        return self.now

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seconds = 1.1 if args.process_index == self.rank else 1.0
        if self.part == "optimizer":
            optimizer.optimizer.register_step_pre_hook(self.pass_time)
        elif self.part == "backward":  # the last of its nodes
            model.get_input_embeddings().weight.register_hook(lambda grad: self.pass_time())
        else:
            model.get_submodule("lm_head").register_forward_hook(self.pass_time)

    def pass_time(self, *_):
        self.now += self.seconds


def watch_here(size, rank, part="forward"):
    clock = Slowed(rank, part)
    watch = SlowRankWatch(every=2, clock=clock)
    meter = ThroughputMeter()
    options = {**RUN, "max_steps": 6, "attention": "ulysses" if size > 1 else "packed"}
    try:
        history = train(
            size,
            trainer_options={
                "callbacks": [meter, *([clock, watch] if part != "optimizer" else [watch, clock]), CheckpointAdvisor()]
            },
            **options,
        )[0]
    finally:
        reset_state()
    exchange = [entry.get("exchange_share", 0) > 0 for entry in history if "loss" in entry]
    return watch.named, [entry.get("slowest_rank") for entry in history if "loss" in entry], exchange


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_slower_by_a_tenth_is_named_within_three_windows(world4, size):
    for named, logs, exchange in world4.run(watch_here, size, 3):
        (message,) = named
        assert message.startswith("rank 3 (") and "cpu:0) computes 10% longer than its peers, 1.1 s" in message
        assert "in 3 windows of 2 steps" in message and logs[-1] == 1.1 and logs[0] is None
        assert all(exchange) == (size == 2)
    for named, logs, _ in world4.run(watch_here, size, None):
        assert named == [] and set(logs) == {None}
    for part in ("backward", "optimizer") if size == 2 else ():
        for named, logs, _ in world4.run(watch_here, size, 3, part):
            assert len(named) == 1 and named[0].startswith("rank 3 (") and logs[-1] == 1.1


def differ_here(watches):
    return run_here(1, {**RUN, "attention": "packed"}, watches[dist.get_rank()])[0]


@pytest.mark.parametrize(
    ("watches", "message"),
    [
        (
            [[KillSwitch("a")], []],
            "`callbacks.KillSwitch.file` differs between ranks ('a' on rank 0, unset on rank 1), ",
        ),
        (
            [[KillSwitch("a")], [KillSwitch("b")]],
            "`callbacks.KillSwitch.file` differs between ranks ('a' on rank 0, 'b'",
        ),
        ([[], [LossSpikeGuard(window=2)]], "`callbacks.LossSpikeGuard.action` differs between ranks (unset on rank 0"),
        ([[SlowRankWatch()], [SlowRankWatch(every=3)]], "`callbacks.SlowRankWatch.every` differs"),
        ([[CheckpointAdvisor()], []], "`callbacks.CheckpointAdvisor.given` differs"),
    ],
)
def test_ranks_with_other_watches_are_refused(world2, watches, message):
    assert all(found.startswith(message) for found in world2.run(differ_here, watches))


def shard_here():
    """Under FSDP2 the layers count, and what the root gathers does not."""
    from torch.distributed.fsdp import fully_shard

    from hf_longctx.resilience.own_seconds import OwnSeconds

    from ..models import build

    model, now = build("llama", "sdpa").train(), [0.0]
    layers = model.model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
        fully_shard(layer)
    model.lm_head.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 100))
    fully_shard(model)
    own = OwnSeconds(model, torch.device("cpu"), lambda: now[0])
    rows = torch.arange(6)[None]
    model(input_ids=rows, labels=rows).loss.backward()
    first = own.take()
    with torch.no_grad():
        model(input_ids=rows)
    own.remove()
    model(input_ids=rows)
    return first == len(layers), own.take()


def wait_here():
    """DDP's exchange of gradients ends once the own part of the backward has: it would hang if that waited for it."""
    import threading

    from torch.nn.parallel import DistributedDataParallel

    from hf_longctx.resilience.own_seconds import OwnSeconds

    now, computed, seen = [0.0], threading.Event(), []
    model = torch.nn.Linear(2, 2)
    wrapped = DistributedDataParallel(model)

    def exchange(state, bucket):
        future = torch.futures.Future()

        def wait_for_peers():
            seen.append(computed.wait(60))
            now[0] += 100
            future.set_result(bucket.buffer())

        threading.Thread(target=wait_for_peers).start()
        return future

    wrapped.register_comm_hook(None, exchange)

    def clock():
        computed.set() if model.weight.grad is not None or is_last[0] else None
        return now[0]

    is_last = [False]
    model.weight.register_hook(lambda grad: (is_last.__setitem__(0, True), now.__setitem__(0, now[0] + 1))[0])
    own = OwnSeconds(wrapped, torch.device("cpu"), clock, torch.optim.SGD(model.parameters()))
    wrapped(torch.ones(1, 2)).sum().backward()
    return seen, own.take()


def test_the_wait_for_gradients_is_no_part_of_a_backward(world2):
    assert world2.run(wait_here) == [([True], 1.0)] * 2


def test_under_fsdp2_layers_are_timed_without_what_is_gathered_between_them(world2):
    assert world2.run(shard_here) == [(True, 0.0)] * 2
