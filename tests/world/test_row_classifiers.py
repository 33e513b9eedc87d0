"""`LongContextTrainer` with a head that pools a row equals transformers' trainer in one process."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_longctx import IndexerConfig, LongContextTrainer, RampConfig, SleepConfig
from hf_longctx.proof.ranks import RanksError

from ..models import VOCAB, config_of
from ..training import Rows, arguments, assert_same_trajectory, train


def classifier(name: str, attention: str, labels: int = 3) -> torch.nn.Module:
    changes = {"num_labels": labels} | ({"pad_token_id": 0} if name == "gpt2" else {})
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_config(
        config_of(name, **changes), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1.0 if parameter.dim() == 1 else 0.0) + noise)
    return model


class Texts(Rows):
    """Rows with one label each: a class, or a number."""

    numbers = False

    def __getitem__(self, index: int) -> dict:
        label = 0.5 * (index % 4) if self.numbers else index % 3
        return {"input_ids": super().__getitem__(index)["input_ids"], "labels": label}


class Numbers(Texts):
    numbers = True


class Pad:
    """A collator that pads on one side."""

    def __init__(self, side: str) -> None:
        self.side = side

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            place = slice(0, length) if self.side == "right" else slice(longest - length, longest)
            ids[index, place], mask[index, place] = torch.tensor(row["input_ids"]), 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fit(size: int, name: str, options: dict, attention: str = "ulysses"):
    options = dict(options)
    numbers, side = options.pop("numbers", False), options.pop("side", "right")
    rows = (Numbers if numbers else Texts)()
    given = {"data_collator": Pad(side), "eval_dataset": torch.utils.data.Subset(rows, range(5))}
    model = classifier(name, "sdpa" if size == 0 else attention, 1 if numbers else 3)
    return train(size, model=model, rows=rows, trainer_options=given, after="evaluate", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"gradient_accumulation_steps": 2}),
        ("llama", {"numbers": True, "side": "left", "learning_rate": 0.05}),
        ("bert", {}),
        ("modernbert", {"average_tokens_across_devices": False}),
        ("gpt2", {"side": "left"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_row_classifiers(world2, name, options):
    options = {"learning_rate": 0.05, "per_device_eval_batch_size": 2, **options}
    expected = fit(0, name, options)
    for actual in world2.run(fit, 2, name, options):
        assert_same_trajectory(actual, expected, 3e-5)
        assert actual[2]["after"]["eval_loss"] == pytest.approx(expected[2]["after"]["eval_loss"], rel=2e-5)


def test_two_groups(world2, world4):
    """transformers multiplies a loss that ignores its count by the processes: by the groups, as two processes do."""
    options = {"learning_rate": 0.05, "per_device_train_batch_size": 2}
    expected = world2.run(fit, 1, "llama", options, "sdpa")[0]
    for actual in world4.run(fit, 2, "llama", options):
        assert_same_trajectory(actual, expected, 3e-5)


def test_on_one_process_padded_rows_train_as_they_are():
    assert_same_trajectory(
        fit(1, "llama", {"learning_rate": 0.05}, "packed"), fit(0, "llama", {"learning_rate": 0.05})
    )


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"indexer": IndexerConfig(loss="sparse")}, "trains indexers next to"),
        ({"ramp": RampConfig(start=2, increment=2, rows=8)}, "counts the tokens"),
        ({"sleep": SleepConfig(window=8)}, "cuts rows for a loss over tokens"),
    ],
)
def test_configs_of_losses_over_tokens_are_refused(tmp_path, configs, message):
    model = classifier("llama", "ulysses")
    args = arguments(str(tmp_path), gradient_accumulation_steps=4)
    with pytest.raises(NotImplementedError, match=message):
        LongContextTrainer(model=model, args=args, train_dataset=Texts(), **configs)


def packed_batches(size):
    def collate(rows):
        ids = torch.tensor([token for row in rows for token in row["input_ids"]])[None]
        positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
        return {"input_ids": ids % VOCAB, "position_ids": positions, "labels": torch.tensor([0])}

    rows = Texts()
    train(size, model=classifier("llama", "ulysses"), rows=rows, trainer_options={"data_collator": collate})


def test_documents_in_one_row_are_refused(world2):
    with pytest.raises(RanksError, match="pools a row, and would pool the documents of a packed one together"):
        world2.run(packed_batches, 2)
