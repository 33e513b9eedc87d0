"""Spawned processes, the only kind on Windows and the usual one on macOS: what is handed to them arrives whole."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import torch

import hf_longctx
from hf_longctx.data.blend.marked_collator import MarkedCollator
from hf_longctx.data.endless import EndlessBatches
from tests.models import build
from tests.training import Rows, assert_same_trajectory, train


COLLATOR = hf_longctx.PackingCollator(max_tokens=48)
RUN = {"trainer_options": {"data_collator": COLLATOR}, "max_steps": 4, "per_device_train_batch_size": 1}
WORKER = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
CONFIGS = [
    hf_longctx.LongContextConfig(sequence_parallel_size=2),
    hf_longctx.MemoryConfig(loss_tile_size=8),
    hf_longctx.IndexerConfig(loss="sparse"),
    hf_longctx.SleepConfig(window=8, passes=2),
    hf_longctx.SourcesConfig(),
    hf_longctx.TextsConfig(),
    hf_longctx.TTTConfig(),
    hf_longctx.PreferenceConfig(flatten_rows=True),
    hf_longctx.LSHConfig(),
]


def objects() -> dict:
    """Collators, data sets and a patched model, as a caller hands them to processes."""
    rows = Rows(6)
    model = build("llama", "packed")
    hf_longctx.use_alibi(model)
    blended = hf_longctx.BlendedRows({"a": (rows, 2.0), "b": (rows, 1.0)}, 9, seed=1)
    return {
        "packed": hf_longctx.PackedDataset(list(rows.rows), max_tokens=48),
        "blended": blended,
        "endless": EndlessBatches(torch.utils.data.DataLoader(rows, batch_size=None)),
        "marked": MarkedCollator(COLLATOR),
        "trainer": hf_longctx.LongContextTrainer,
        "model": model,
        "configs": CONFIGS,
    }


def read(given: dict) -> dict:
    """Plain values of all of them."""
    batch = COLLATOR([given["packed"][0]])
    with torch.no_grad():
        given["model"].config.use_cache = False
        logits = given["model"](**{key: value for key, value in batch.items() if key != "labels"}).logits
    return {
        "packed": [COLLATOR([given["packed"][index]])["input_ids"].tolist() for index in range(len(given["packed"]))],
        "blended": [given["blended"][index]["input_ids"] for index in range(9)],
        "endless": [row["input_ids"] for row, _ in zip(given["endless"], range(8))],
        "marked": given["marked"]([given["packed"][0]])["input_ids"].tolist(),
        "trainer": given["trainer"].__mro__[1].__name__,
        "model": logits.double().sum().item(),
        "configs": [dataclasses.asdict(config) for config in given["configs"]],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carrying(hf_longctx.PackingCollator):
    """A collator that takes everything along to the process that runs it, and writes down what arrived there."""

    given: dict
    file: str

    def __call__(self, rows) -> dict:
        if not os.path.exists(self.file):
            Path(self.file).write_bytes(pickle.dumps((os.getpid(), read(self.given))))
        return super().__call__(rows)


def test_a_spawned_worker_gets_everything_whole_and_feeds_the_same_run(tmp_path):
    given, file = objects(), tmp_path / "worker"
    collator = Carrying(max_tokens=48, given=given, file=str(file))
    found = train(1, attention="packed", **{**RUN, "trainer_options": {"data_collator": collator}}, **WORKER)
    worker, arrived = pickle.loads(file.read_bytes())
    assert worker != os.getpid() and arrived == read(given)
    assert_same_trajectory(found, train(1, attention="packed", **RUN))
