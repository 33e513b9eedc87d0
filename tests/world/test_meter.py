"""`ThroughputMeter` over several processes: the counts of one process, and a share of time in the exchange."""

from __future__ import annotations

import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from hf_longctx import LongContextConfig, LongContextTrainer
from hf_longctx.reporting.meter import ThroughputMeter

from ..models import build
from ..training import Rows, arguments, pad_right, reset_state


class Recorder(ThroughputMeter):
    """Keeps the counts of every log: tokens and pairs, all ranks."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "loss" in logs:
            self.counts = getattr(self, "counts", [])
            self.counts.append(torch.stack([step[:, :-1].sum(0) for step in self._steps]).sum(0).tolist())
        super().on_log(args, state, control, logs=logs, **kwargs)


def meter(size: int, rows: int, delay: float = 0.0):
    """Counts and logs of four steps; size 0 is the stock trainer. `delay` holds up every collective of rank 1."""
    reset_state()
    options = {"args": arguments(tempfile.mkdtemp(), per_device_train_batch_size=rows), "train_dataset": Rows()}
    options |= {"model": build("llama", "ulysses" if size else "sdpa"), "data_collator": pad_right}
    if size:
        trainer = LongContextTrainer(**options, long_context=LongContextConfig(sequence_parallel_size=size))
    else:
        trainer = Trainer(**options)
    recorder, exchange = Recorder().attach(trainer), dist.all_to_all_single

    def late(*args, **kwargs):
        if dist.get_rank() == 1:
            time.sleep(delay)
        return exchange(*args, **kwargs)

    dist.all_to_all_single = late
    try:
        trainer.train()
    finally:
        dist.all_to_all_single = exchange
    return recorder.counts, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("size", [1, 2], ids=["rows_apart", "rows_shared"])
def test_counts_are_those_of_one_process(world2, size):
    expected, _ = meter(0, 4)
    for counts, logs in world2.run(meter, size, 4 if size == 2 else 2):
        assert counts == expected
        assert all(("exchange_share" in entry) == (size == 2) for entry in logs)


def test_time_in_the_exchange_is_told(world2):
    """Eight exchanges a step of 10 ms each, on a model that needs less than that."""
    for rank, (_, logs) in enumerate(world2.run(meter, 2, 4, 0.01)):
        for entry in logs[1:]:
            assert 0.3 < entry["exchange_share"] <= 1, (rank, logs)
