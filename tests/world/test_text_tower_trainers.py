"""Both trainers on text alone with a whole multimodal model equal the stock trainers in one process."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMultimodalLM, BatchFeature, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx import PackingCollator
from hf_longctx.proof.tiny import shrink

from ..tokenizer import tiny_tokenizer
from ..training import assert_same_trajectory, pad_right, train
from . import test_sft


def tower(name: str, attention: str):
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(shrink(CONFIG_MAPPING[name]()), attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.float()


def with_planes(rows: list[dict]) -> dict[str, torch.Tensor]:
    """As a processor makes them: a plane for time, height and width."""
    batch = pad_right(rows)
    positions = batch["attention_mask"].cumsum(1).sub(1).masked_fill(batch["attention_mask"] == 0, 0)
    return {**batch, "position_ids": positions.expand(3, *positions.shape)}


def with_marks(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = pad_right(rows)
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


def fit(size: int, name: str, collator, attention: str, **changes):
    model = tower(name, attention)
    if changes.get("gradient_accumulation_steps"):
        model.accepts_loss_kwargs = True  # or transformers averages the means of micro-batches
    return train(size, model=model, trainer_options={"data_collator": collator}, **changes)


@pytest.mark.parametrize(
    ("name", "collator"), [("qwen2_vl", with_planes), ("qwen3_vl", pad_right), ("gemma3", with_marks)]
)
def test_a_run_on_text_equals_one_process(world2, name, collator):
    expected = fit(0, name, collator, "sdpa")
    for actual in world2.run(fit, 2, name, collator, "ulysses"):
        assert_same_trajectory(actual, expected)


def test_a_class_that_takes_no_count_gets_that_of_the_whole_step(world2):
    assert type(tower("qwen2_5_vl", "sdpa")).accepts_loss_kwargs is False
    expected = fit(0, "qwen2_5_vl", pad_right, "sdpa", gradient_accumulation_steps=2)
    for actual in world2.run(fit_accumulated):
        assert_same_trajectory(actual, expected)


def fit_accumulated():
    options = {"data_collator": pad_right}
    return train(2, model=tower("qwen2_5_vl", "ulysses"), trainer_options=options, gradient_accumulation_steps=2)


@pytest.mark.parametrize("attention", ["packed", "ulysses"])
def test_packed_rows_train_like_padded_ones(world2, attention):
    expected = fit(0, "qwen2_vl", pad_right, "sdpa")
    if attention == "packed":
        results = [fit(1, "qwen2_vl", PackingCollator(), "packed")]
    else:
        results = world2.run(fit, 2, "qwen2_vl", PackingCollator(), "ulysses")
    for actual in results:
        assert_same_trajectory(actual, expected)


class TextProcessor(ProcessorMixin):
    """A processor as TRL takes it, of which text needs the tokenizer only."""

    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer):
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)

    def __call__(self, images=None, text=None, **kwargs):
        encoded = self.tokenizer([text] if isinstance(text, str) else text)
        marks = [[0] * len(ids) for ids in encoded["input_ids"]]
        return BatchFeature({**encoded, "mm_token_type_ids": marks})


def sft(size: int, whole: bool, **options):
    """TRL's own trainer (`size` 0) or ours, on a multimodal model with its processor."""
    build, tokenizer = test_sft.build, test_sft.tiny_tokenizer
    test_sft.build = lambda _, attention: tower("qwen3_vl", attention)
    test_sft.tiny_tokenizer = (lambda: TextProcessor(tiny_tokenizer())) if whole else tiny_tokenizer
    try:
        return test_sft.fit(size, **options)
    finally:
        test_sft.build, test_sft.tiny_tokenizer = build, tokenizer


@pytest.mark.parametrize(("whole", "kind"), [(True, "text"), (True, "completion"), (False, "text")])
def test_sft_on_text_with_a_processor_or_its_tokenizer(world2, whole, kind):
    expected = sft(0, whole, kind=kind)
    for actual in world2.run(run_sft, whole, kind):
        assert_same_trajectory(actual, expected, 2e-5)


def run_sft(whole: bool, kind: str):
    return sft(2, whole, kind=kind)
