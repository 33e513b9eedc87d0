"""A batch ramp equals a loop that takes the same rows, and a resumed ramp the uninterrupted one, to the bit."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_longctx import PackingCollator, RampConfig
from hf_longctx.trainer.ramp_plan import RampPlan

from ..models import build
from ..training import Rows, Stream, pad_right, reset_state, train
from .test_replicas import with_dropout
from .test_sft import fit


RAMP = RampConfig(start=4, increment=4, rows=36)
RUN = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 7,
    "rows": Rows(41),
}
SAVE = {"save_strategy": "steps", "save_steps": 1}
loads_moments = pytest.mark.skipif(
    'device.type != "cpu"' not in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers cannot load an optimizer's state in several processes on a CPU",
)


class Sizes(TrainerCallback):
    """Micro-batches of every step, and what the arguments say while a checkpoint is written."""

    def __init__(self) -> None:
        self.sizes, self.seen, self.saved, self.epochs = [], 1, [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.sizes.append(self.seen)
        self.epochs.append(state.epoch)
        self.seen = 1

    def on_save(self, args, state, control, **kwargs):
        path = f"{args.output_dir}/checkpoint-{state.global_step}/training_args.bin"
        self.saved.append(torch.load(path, weights_only=False).gradient_accumulation_steps)


def ramped(size, options, ramp=RAMP):
    sizes = Sizes()
    collator = {"data_collator": options["collator"]} if "collator" in options else {}
    options = {key: value for key, value in options.items() if key != "collator"}
    try:
        found = train(size, trainer_options={"ramp": ramp, "callbacks": [sizes], **collator}, **options)
    finally:
        reset_state()
    return found[0], found[1], found[2]["state"], vars(sizes)


def logged(history, after=0):
    return [
        (e["step"], e["loss"], e["grad_norm"], e["learning_rate"], e["epoch"])
        for e in history
        if "loss" in e and e["step"] > after
    ]


def test_steps_take_the_rows_of_the_plan_and_the_rate_follows_rows(world4, tmp_path):
    """`P x dp = 2 x 2`: 4 rows at once, 12 in a whole step, 41 rows an epoch, so step 5 or so is cut short."""
    run = {**RUN, **SAVE, "output_dir": str(tmp_path), "max_steps": 9}
    ranks = world4.run(ramped, 2, run)
    plan = RampPlan(RAMP, 4, 3, 11)
    history, _, state, seen = ranks[0]
    assert seen["sizes"] == [plan.size_after(step) for step in range(9)] == [1, 1, 1, 1, 1, 2, 2, 2, 3]
    assert seen["epochs"] == pytest.approx([plan.batches_after(step + 1) / 11 for step in range(9)])
    assert set(seen["saved"]) == {3} and state["max_steps"] == 9
    if hasattr(Trainer, "is_distributed_loading_by_transformers"):  # older ones count a whole schedule
        rows = history[-1]["train_samples_per_second"] * history[-1]["train_runtime"]
        assert rows == pytest.approx(4 * plan.batches_after(9), rel=0.02)  # rounded in the log
    # The same schedule over whole steps, at the rows that were trained.
    model = torch.nn.Linear(1, 1)
    from transformers import get_cosine_schedule_with_warmup

    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
    rate = get_cosine_schedule_with_warmup(sgd, 2, -(-plan.batches_after(9) // 3)).lr_lambdas[0]
    rates = [entry[3] for entry in logged(history)]
    assert rates == [1e-2 * rate(plan.full_steps(step)) for step in range(9)]
    assert len({str(logged(rank[0])) for rank in ranks}) == 1


@loads_moments
@pytest.mark.parametrize("kind", ["rows", "packed", "stream"])
def test_resumed_before_at_and_after_a_step_of_the_ramp(world4, tmp_path, kind):
    data = {
        "rows": {},
        "packed": {
            "rows": Rows(60),
            "collator": PackingCollator(max_tokens=48),
            "max_steps": -1,
            "num_train_epochs": 2.5,
        },
        "stream": {"rows": Stream(Rows(17))},
    }[kind]
    run = {**RUN, "max_steps": 8, **data, "prepare": with_dropout, "output_dir": str(tmp_path)}
    whole = world4.run(ramped, 2, {**run, **SAVE})
    for step in (4, 5, 6) if kind == "rows" else (5,):
        resumed = world4.run(ramped, 2, {**run, "resume": str(tmp_path / f"checkpoint-{step}")})
        for before, after in zip(whole, resumed):
            assert len(logged(after[0])) == before[2]["max_steps"] > step and logged(after[0]) == logged(before[0])
            assert after[3]["sizes"] == before[3]["sizes"][step:]
            assert all(torch.equal(after[1][name], weight) for name, weight in before[1].items())


@loads_moments
def test_other_ramps_and_other_starts_of_data_are_refused(world2, tmp_path):
    run = {**RUN, "per_device_train_batch_size": 4, "max_steps": 8, "output_dir": str(tmp_path)}
    world2.run(ramped, 2, {**run, "save_strategy": "steps", "save_steps": 3})
    run["resume"] = str(tmp_path / "checkpoint-3")
    for change, message in (
        ({"ramp": RampConfig(start=4, increment=8, rows=24)}, "says `ramp` [4, 4, 36], and this run has [4, 8, 24]"),
        ({"ignore_data_skip": True}, "`ignore_data_skip` (True) begins the data anew"),
    ):
        assert all(message in found for found in world2.run(refused_here, {**run, **change}))


def refused_here(options):
    ramp = options.pop("ramp", RAMP)
    try:
        ramped(2, options, ramp)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def test_a_ramp_equals_a_loop_over_the_same_rows(world2):
    """Rows in order, constant rate, plain SGD with clipping, against a loop of five lines: 1e-5, sums in float32."""
    run = {**RUN, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 9, "rows": Rows(80)}
    run |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    history = world2.run(ramped, 2, run)[0][0]
    model, rows, first = build("llama", "sdpa").train(), Rows(80).rows, 0
    sgd, plan = torch.optim.SGD(model.parameters(), lr=1e-2), RampPlan(RAMP, 4, 3, 20)
    for entry in logged(history):
        size = 4 * plan.size_after(entry[0] - 1)
        batch = pad_right(rows[first : first + size])
        count = batch["labels"][:, 1:].ne(-100).sum()
        first += size
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sgd.step()
        sgd.zero_grad()
        assert (loss.item(), norm.item()) == pytest.approx(entry[1:3], rel=1e-5)
    assert first == 60


def test_a_ramp_equals_one_process_with_more_micro_batches(world2):
    """`P = 2` to one process, and twice the micro-batches of half the rows: sums in another order, 1e-5."""
    run = {**RUN, "per_device_train_batch_size": 4, "optim": "sgd", "max_steps": 9, "rows": Rows(40)}
    run["include_num_input_tokens_seen"] = "all"
    ours = world2.run(ramped, 2, run)[0]
    halves = {**run, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "attention": "packed"}
    alone = ramped(1, halves)
    assert [2 * size for size in ours[3]["sizes"]] == alone[3]["sizes"]
    for mine, other in zip(logged(ours[0]), logged(alone[0])):
        assert mine == pytest.approx(other, rel=1e-5)
    assert ours[0][-1]["total_flos"] > 0 and ours[2]["num_input_tokens_seen"] > 60 * 10  # of 60 rows


@loads_moments
def test_a_ramp_goes_on_with_other_groups(world2, tmp_path):
    """`dp = 2` to `P = 2`, 4 rows at once in both; 1e-6, sums in another order."""
    run = {**RUN, "rows": Rows(48), "max_steps": 8, "output_dir": str(tmp_path)}
    whole = world2.run(ramped, 1, {**run, **SAVE, "attention": "packed"})[0]
    resume = {"resume": str(tmp_path / "checkpoint-5"), "per_device_train_batch_size": 4}
    after = world2.run(ramped, 2, {**run, **resume})[0]
    assert after[3]["sizes"] == whole[3]["sizes"][5:]
    assert len(logged(after[0], 5)) == 3
    for mine, other in zip(logged(after[0], 5), logged(whole[0], 5)):
        assert mine == pytest.approx(other, rel=1e-6)


def test_sft_counts_every_micro_batch_of_a_ramp():
    """TRL counts tokens where it computes the loss: after 1, 2, 3, 4, 7 and 10 micro-batches of one row."""
    run = {"attention": "packed", "per_device_train_batch_size": 1}
    plain = fit(1, max_steps=10, gradient_accumulation_steps=1, **run)[0]
    ramp = RampConfig(start=1, increment=2, rows=4)
    grown = fit(1, max_steps=6, gradient_accumulation_steps=3, ramp=ramp, **run)[0]
    mine, other = ([entry for entry in each if "loss" in entry] for each in (grown, plain))
    for name in ("num_tokens", "epoch"):
        assert [entry[name] for entry in mine] == [other[taken - 1][name] for taken in (1, 2, 3, 4, 7, 10)], name
    assert [entry["loss"] for entry in mine[:4]] == [entry["loss"] for entry in other[:4]]
    assert 0.5 < mine[5]["loss"] / other[9]["loss"] < 2  # a mean over the step, not a sum of means
