"""The batch ramp as arithmetic, and what it refuses. Trained on ranks: `tests/world/test_ramp.py`."""

from __future__ import annotations

import pytest

from hf_longctx import RampConfig
from hf_longctx.trainer.ramp_plan import RampPlan

from ..training import train


BLOOM = RampConfig(start=192, increment=16, rows=9_765_625)


@pytest.mark.parametrize("epoch", [None, 1, 3, 7, 20, 64, 100])
def test_plan_covers_every_micro_batch_once_and_reads_back(epoch):
    plan = RampPlan(RampConfig(start=4, increment=2, rows=57), micro_rows=2, full=7, epoch=epoch)
    taken, sizes = 0, []
    for step in range(120):
        assert plan.batches_after(step) == taken and plan.steps_for(taken) == step
        size = plan.size_after(step)
        rows, stages = taken * 2, (14 - 4) // 2
        wanted = (4 + min(rows * stages // 57, stages) * 2) // 2
        assert size == (wanted if epoch is None else min(wanted, epoch - taken % epoch))
        sizes.append(size)
        assert plan.steps_for(taken + 1) == step + 1
        taken += size
    assert max(sizes) == (7 if epoch is None else min(7, epoch))
    if epoch is None:
        assert sorted(sizes) == sizes and sizes[0] == 2 and set(sizes) == {2, 3, 4, 5, 6, 7}


def test_ramp_of_bloom():
    """192 to 2048 by 16 over 9,765,625 rows: 116 increments of 84,186 rows."""
    plan = RampPlan(BLOOM, micro_rows=16, full=128, epoch=None)
    sizes = [plan.size_after(step) * 16 for step in (0, 437, 438, 439)]
    assert sizes == [192, 192, 192, 208]  # 439 steps of 192 rows are the first 84,186
    over = plan.steps_for(-(-9_765_625 // 16))
    assert plan.size_after(over) == 128 and plan.size_after(over - 1) == 127
    assert plan.full_steps(over + 1000) - plan.full_steps(over) == 1000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": 0, "increment": 1, "rows": 8}, r"`start` \(0\) must be a positive number of rows"),
        ({"start": 2, "increment": True, "rows": 8}, r"`increment` \(True\) must be"),
        ({"start": 2, "increment": 2, "rows": 1.5}, r"`rows` \(1.5\) must be"),
        ({"start": 2}, "`increment` and `rows` are unset: set all three"),
        ({"start": 2, "rows": 4}, "`increment` is unset"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        RampConfig(**values)
    assert not RampConfig().is_on


GOOD = {"start": 2, "increment": 2, "rows": 12}


def refused(error, message, ramp=None, options=None, **changes):
    run = {"gradient_accumulation_steps": 4, "max_steps": 6, "attention": "packed", **changes}
    with pytest.raises(error, match=message):
        train(1, trainer_options={"ramp": RampConfig(**{**GOOD, **(ramp or {})}), **(options or {})}, **run)


@pytest.mark.parametrize(
    ("ramp", "changes", "message"),
    [
        (
            {"start": 3},
            {},
            r"`ramp`'s `start` \(3\) is no multiple of the 2 rows that are drawn .* 1 group of",
        ),
        ({"increment": 3}, {}, r"`increment` \(3\) is no multiple of the 2 rows .*: set it to 2 or 4"),
        ({"start": 8}, {}, r"`start` \(8\) must be below the global batch \(8 rows"),
        (
            {"increment": 4},
            {},
            r"`increment` \(4\) does not lead from `start` \(2\) .*: their difference, 6",
        ),
        ({"rows": 1}, {}, r"`rows` \(1\) are fewer than its first batch"),
        ({}, {"max_steps": 2}, r"`max_steps` \(2\) ends the run after 4 rows, before .* at least 4 steps"),
        ({"rows": 60}, {"max_steps": -1}, r"`num_train_epochs` \(.* steps\) ends the run after 48 rows"),
    ],
)
def test_numbers_are_refused(ramp, changes, message):
    refused(ValueError, message, ramp, **changes)


def test_what_counts_steps_itself_is_refused(tmp_path):
    import torch

    refused(NotImplementedError, "`auto_find_batch_size` .* changes the rows", auto_find_batch_size=True)
    refused(NotImplementedError, "'batch_rebalance'", train_sampling_strategy="batch_rebalance")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    pair = (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3))
    refused(ValueError, "`optimizers` brings a `StepLR`, which counts steps", options={"optimizers": pair})


def test_order_by_length_and_token_budgets_say_who_wins(caplog):
    from hf_longctx import PackingCollator

    from ..training import Rows

    ramp = {"ramp": RampConfig(**GOOD)}
    run = {"gradient_accumulation_steps": 4, "max_steps": 4, "attention": "packed", "rows": Rows(30)}
    train(1, trainer_options=ramp, train_sampling_strategy="group_by_length", **run)
    assert "the order stays, and steps of the ramp hold rows of more similar lengths" in caplog.text
    train(1, trainer_options={**ramp, "data_collator": PackingCollator(max_tokens=48)}, **run)
    assert "it counts packed rows, not documents" in caplog.text


def test_what_a_user_overrides_sees_every_micro_batch_and_a_second_run_begins_anew(tmp_path):
    from hf_longctx import LongContextTrainer

    from ..training import Rows, arguments, build, pad_right

    seen = []

    class Mine(LongContextTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not self.is_on_trial:
                seen.append((len(inputs["input_ids"]), self.accelerator.sync_gradients))
            return super().training_step(model, inputs, num_items_in_batch)

    args = arguments(str(tmp_path), max_steps=5, gradient_accumulation_steps=4)
    trainer = Mine(
        model=build("llama", "packed"),
        args=args,
        train_dataset=Rows(40),
        data_collator=pad_right,
        ramp=RampConfig(**GOOD),
    )
    for _ in range(2):
        seen.clear()
        trainer.train()
        assert len(seen) == RampPlan(RampConfig(**GOOD), 2, 4, 20).batches_after(5) == 11
        assert {rows for rows, _ in seen} == {2} and sum(is_last for _, is_last in seen) == 5
        assert args.gradient_accumulation_steps == 4 and trainer._earlier_batches == []
