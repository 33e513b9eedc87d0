"""The arithmetic of the watches of a long run, and what they refuse. On ranks: `tests/world/test_watches.py`."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_longctx import CheckpointAdvisor, KillSwitch, LossSpikeGuard, SlowRankWatch
from hf_longctx.config.watches import WatchConfig
from hf_longctx.parallel.stopwatch import Stopwatch
from hf_longctx.planner.checkpoint_interval import checkpoint_interval, expected_hours_between_failures
from hf_longctx.resilience.held_step import hold_step
from hf_longctx.resilience.slow_ranks import SlowRanks
from hf_longctx.resilience.spike_window import spike_threshold

from ..training import Rows, arguments, build, pad_right, train


def noisy(ranks: int, steps: int, noise: float, slow: int | None = None, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    slower = [1.1 if rank == slow else 1.0 for rank in range(ranks)]
    return [sum(factor * draw.gauss(1, noise) for _ in range(steps)) / steps for factor in slower]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64])
def test_a_rank_slower_by_a_tenth_is_named_in_three_windows_and_noise_names_nobody(ranks):
    """The watch's defaults: windows of 50 steps, 3 % over the median, 3 windows. Noise of 2 % a step."""
    watch = SlowRankWatch()
    for seed in range(5):
        quiet = SlowRanks(watch.windows, watch.tolerance, [0] * ranks)
        assert not any(quiet.add(noisy(ranks, 50, 0.02, seed=100 * seed + window)) for window in range(20))
        loud = SlowRanks(watch.windows, watch.tolerance, [0] * ranks)
        named = [loud.add(noisy(ranks, 50, 0.02, slow=ranks - 1, seed=100 * seed + w)) for w in range(6)]
        assert [len(found) for found in named] == [0, 0, 1, 0, 0, 0] and named[2][0][0] == ranks - 1
        assert named[2][0][1] / named[2][0][2] == pytest.approx(1.1, abs=0.02)


def test_ranks_with_more_heads_are_compared_among_themselves():
    watch = SlowRanks(1, 0.03, [3, 2, 2, 3])
    assert watch.add([1.5, 1.0, 1.0, 1.5]) == []
    assert watch.add([1.5, 1.0, 1.1, 1.5]) == [(2, 1.1, 1.0)]
    assert SlowRanks(1, 0.03, [0, 0]).add([0.0, 0.0]) == []
    assert SlowRanks(1, 0.03, [5, 4, 4]).without_peers == [0] and watch.without_peers == []


def test_interval_of_bloom():
    """40 s a save, one or two failures a week: 116 and 82 minutes."""
    minutes = [checkpoint_interval(40, 168 / failures) / 60 for failures in (1, 2)]
    assert minutes == pytest.approx([115.93, 81.98], abs=0.01)
    assert expected_hours_between_failures(384) == pytest.approx(112)
    for arguments_, message in (
        ((0, 1), r"`save_seconds` \(0\) must be a finite number above 0"),
        ((1, math.inf), r"`hours_between_failures` \(inf\)"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint_interval(*arguments_)
    with pytest.raises(ValueError, match=r"`num_devices` \(0\) must be a whole number of devices"):
        expected_hours_between_failures(0)


def advised(save_steps: int, strategy: str = "steps"):
    """Steps of 105 s, evaluations of 720 s and saves of 40 s, on an injected clock."""
    now = [0.0]
    advisor = CheckpointAdvisor(hours_between_failures=168, clock=lambda: now[0])
    args = TrainingArguments(output_dir="unused", save_strategy=strategy, save_steps=save_steps, use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    state.save_steps = save_steps
    advisor.on_train_begin(args, state, control)
    for step in range(6):
        now[0] += 105
        advisor.on_step_end(args, state, control)
        if step % 2:
            now[0] += 720
            advisor.on_evaluate(args, state, control)
            now[0] += 40
            advisor.on_save(args, state, control)
    return advisor.figures()


def test_advice_is_that_of_bloom_and_warns_where_it_is_twice_off(caplog):
    caplog.set_level("INFO")
    assert advised(66) == {"save_seconds": 40.0, "advised_save_steps": 66}  # 116 minutes of steps of 105 s
    assert "saving every 66 steps (115.9 minutes) loses least" in caplog.text and "times off" not in caplog.text
    for steps, times in ((133, "2.02"), (400, "6.06"), (32, "2.06")):
        caplog.clear()
        advised(steps)
        assert f"`save_steps` ({steps}) is {times} times off: a checkpoint takes 40 s and a step 105 s" in caplog.text
        assert caplog.text.count("times off") == 1
    caplog.clear()
    advised(400, "epoch")
    assert "times off" not in caplog.text
    assert CheckpointAdvisor().figures() == {}


def test_threshold_of_spikes():
    assert spike_threshold([1, 2, 3, 4, 100], 2) == 3 + 2 * 1
    assert spike_threshold([2.0] * 5, 10) == pytest.approx(2.02)  # rounding is no spike
    guard = LossSpikeGuard("skip", window=4, deviations=3, limit=2)
    for loss in (3.0, 2.9, 3.1, 3.0):
        assert guard.judge(loss, 1.0, False) is None
    assert "its loss (9) is above 3.15, the median of 4 steps and 3 median dev" in guard.judge(9.0, 1.0, False)
    assert "its gradient norm (2) is above" in guard.judge(3.0, 2.0, False)
    assert "its loss (nan)" in guard.judge(math.nan, 1.0, False)
    assert len(guard.losses) == 4 and guard.judge(9.0, 1.0, True) is None
    guard.notes = [{}, {}]
    assert guard.judge(30.0, 99.0, False) is None and guard.figures() == {"loss_spikes": 2}


def test_a_held_step_leaves_optimizer_schedule_and_scale_as_they_are():
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for is_held in (False, True, False):
        scaler.scale((weight * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        scaler.unscale_(adam)
        before = (
            weight.detach().clone(),
            schedule.last_epoch,
            scaler.get_scale(),
            adam.step,
            vars(schedule).get("step"),
        )
        if is_held:
            release = hold_step(adam, schedule, scaler)
            adam.step()
            schedule.step()
            release()
            assert torch.equal(weight, before[0]) and (schedule.last_epoch, scaler.get_scale()) == before[1:3]
        else:
            scaler.step(adam)
            scaler.update()
            schedule.step()
            assert not torch.equal(weight, before[0])
        assert (adam.step, vars(schedule).get("step")) == before[3:]
        adam.zero_grad()
    assert adam.state[weight]["step"] == 2 and schedule.last_epoch == 2 and scaler.get_scale() == 32


def test_a_stopwatch_tells_others_and_stops():
    now = iter(range(100))
    other = Stopwatch(clock=lambda: next(now))
    watch = Stopwatch(clock=lambda: next(now), also=(other,))
    with watch.measure(torch.device("cpu")):
        pass
    watch.is_on = False
    with watch.measure(torch.device("cpu")):
        pass
    assert (watch.take(), other.take()) == (1, 3 + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KillSwitch(""), r"`file` \(''\) must name a file"),
        (lambda: KillSwitch(" "), r"`file` \(' '\) must name a file"),
        (lambda: KillSwitch("a\0b"), r"`file` \('a\\x00b'\) must name a file"),
        (lambda: WatchConfig(kill_switch=5), r"`kill_switch` \(5\) must name a file"),
        (lambda: WatchConfig(kill_switch="\0"), r"`kill_switch` \('\\x00'\) must name a file"),
        (lambda: KillSwitch(None), r"`file` \(None\) must name a file"),
        (lambda: LossSpikeGuard("ignore"), "`action` .*must be one of warn, skip, rollback, stop"),
        (lambda: LossSpikeGuard(window=1), r"`window` \(1\) must be a whole number of steps, at least 2"),
        (lambda: LossSpikeGuard(deviations=math.nan), r"`deviations` \(nan\) must be a finite number above 0"),
        (lambda: LossSpikeGuard(limit=0), r"`limit` \(0\) must be a whole number of spikes, at least 1"),
        (lambda: SlowRankWatch(every=0), r"`every` \(0\) must be a whole number of steps"),
        (lambda: SlowRankWatch(windows=0), r"`windows` \(0\)"),
        (lambda: SlowRankWatch(tolerance=0), r"`tolerance` \(0\) must be a finite number above 0"),
        (lambda: CheckpointAdvisor(hours_between_failures=-1), r"`hours_between_failures` \(-1\)"),
        (lambda: WatchConfig(kill_switch=""), r"`kill_switch` \(''\)"),
        (lambda: WatchConfig(spike_action="no"), "`spike_action`"),
        (lambda: WatchConfig(spike_window=0), "`spike_window`"),
        (lambda: WatchConfig(spike_deviations=0), "`spike_deviations`"),
        (lambda: WatchConfig(spike_limit=0), "`spike_limit`"),
        (lambda: WatchConfig(slow_rank_every=0), "`slow_rank_every`"),
        (lambda: WatchConfig(hours_between_failures=3), "set `advise_checkpoints`, or leave it out"),
        (lambda: WatchConfig(hours_between_failures=0, advise_checkpoints=True), "`hours_between_failures`"),
    ],
)
def test_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def refused(error, message, *callbacks, **changes):
    with pytest.raises(error, match=message):
        train(1, attention="packed", trainer_options={"callbacks": list(callbacks)}, **changes)


def test_runs_are_refused(tmp_path):
    refused(ValueError, r"`window` \(4\) of .* no shorter than the run \(4 steps\)", LossSpikeGuard(window=4))
    refused(ValueError, "`save_strategy` is 'no': save whole", LossSpikeGuard("rollback", window=2))
    saving = {"save_strategy": "steps", "save_only_model": True}
    refused(ValueError, "`save_only_model` leaves it out", LossSpikeGuard("rollback", window=2), **saving)
    refused(ValueError, "two `LossSpikeGuard`s", LossSpikeGuard(window=2), LossSpikeGuard(window=3))
    (tmp_path / "STOP").touch()
    refused(ValueError, "is there, so the run does not start: remove it", KillSwitch(tmp_path / "STOP"))
    refused(ValueError, "in a folder that does not exist: make", KillSwitch(tmp_path / "none" / "STOP"))


def test_other_trainers_are_refused(tmp_path):
    for callback, message in (
        (KillSwitch("x"), "`KillSwitch` needs a trainer"),
        (LossSpikeGuard(), "`LossSpikeGuard` n"),
    ):
        trainer = Trainer(
            model=build("llama", "sdpa"),
            args=arguments(str(tmp_path)),
            train_dataset=Rows(),
            data_collator=pad_right,
            callbacks=[callback],
        )
        with pytest.raises(RuntimeError, match=message):
            trainer.train()


def test_a_guard_may_join_a_run_that_resumes(tmp_path):
    run = {"attention": "packed", "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    train(1, **run)
    guard = LossSpikeGuard(window=2)
    train(
        1, trainer_options={"callbacks": [guard]}, **{**run, "max_steps": 6, "resume": str(tmp_path / "checkpoint-4")}
    )
    assert len(guard.losses) == 2
    saved = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    assert repr(guard.losses[-1]) in saved and repr(guard.norms[-1]) in saved
    again = LossSpikeGuard(window=3)  # transformers' own way to restore callbacks takes the settings that were saved
    resumed = {**run, "max_steps": 7, "resume": str(tmp_path / "checkpoint-6"), "save_strategy": "no"}
    resumed["restore_callback_states_from_checkpoint"] = True
    history = train(1, trainer_options={"callbacks": [again]}, **resumed)[0]
    assert [entry["step"] for entry in history if "loss" in entry][-1] == 7 and again.losses == []
