"""`ThroughputMeter`: what it adds to the logs, and that it counts real tokens and documents, each once."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_longctx.parallel.shard import cut_batch
from hf_longctx.reporting.flops import count_flops
from hf_longctx.reporting.meter import ThroughputMeter, document_lengths, known_peak_tflops
from hf_longctx.reporting.report import RunReport

from ..models import build, config_of
from ..training import Rows, pad_right


class Clock:
    """Time that only `tick` moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("hf_longctx.reporting.meter.time.perf_counter", lambda: self.now)


class TwoSecondsAStep(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.clock.now += 2.0


class LoggerInBetween(TrainerCallback):
    """Stands for wandb and friends: it sees logs as they pass."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


def train(folder, callbacks, *, model=None, collator=pad_right, rows=None, meter=None, **changes):
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "remove_unused_columns": False, "seed": 0}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    options = {"train_dataset": rows or Rows(12), "eval_dataset": Rows(4), "data_collator": collator}
    trainer = Trainer(model=model or build("llama", "sdpa"), args=args, callbacks=callbacks, **options)
    meter = (meter or ThroughputMeter(peak_tflops=1e-6)).attach(trainer)
    trainer.train()
    return trainer, meter


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def drawn_lengths(trainer) -> list[list[int]]:
    """Lengths of the documents of every step, in the order in which the trainer drew them."""
    batches = trainer.get_train_dataloader()
    return [batch["attention_mask"].sum(1).tolist() for batch in batches]


# What the logs get


def test_logs_have_speed_arithmetic_and_memory_for_every_logger(tmp_path, monkeypatch):
    clock, logger = Clock(monkeypatch), LoggerInBetween()
    trainer, meter = train(tmp_path, [logger, TwoSecondsAStep(clock)])
    flops = count_flops(config_of("llama"))
    entries = logs_of(trainer)
    assert len(entries) == 3
    for entry, seen, lengths in zip(entries, logger.seen, drawn_lengths(trainer)):
        assert entry["tokens_per_second"] == sum(lengths) / 2
        achieved = flops.step(lengths).model / 2 / 1e12
        assert entry["achieved_tflops"] == pytest.approx(achieved, rel=1e-3)
        assert entry["mfu"] == pytest.approx(achieved / 1e-6, rel=1e-3)
        assert entry["peak_memory_gib"] > 0.05
        assert {key: entry[key] for key in seen} == seen and "mfu" in seen
    assert meter.trained_share == 1.0


def test_accumulated_batches_and_steps_between_logs_are_added_up(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    options = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 2}
    trainer, _ = train(tmp_path, [TwoSecondsAStep(clock)], **options)
    (entry,) = logs_of(trainer)
    lengths = sum(drawn_lengths(trainer)[:4], [])
    assert entry["tokens_per_second"] == sum(lengths) / 4
    assert entry["achieved_tflops"] == pytest.approx(
        count_flops(config_of("llama")).step(lengths).model / 4e12, rel=1e-3
    )


def test_evaluation_is_neither_counted_nor_timed(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    evaluate = Trainer.evaluate

    def slow_evaluate(self, *args, **kwargs):
        clock.now += 1000.0
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", slow_evaluate)
    trainer, _ = train(tmp_path, [TwoSecondsAStep(clock)], eval_strategy="steps", eval_steps=1)
    speeds = [entry["tokens_per_second"] for entry in logs_of(trainer)]
    assert speeds == [sum(lengths) / 2 for lengths in drawn_lengths(trainer)[:3]]


class LooksOnTheSide(TrainerCallback):
    """Runs the model between steps, as sanity checks do: in evaluation mode with gradients, and without them."""

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        model.eval()
        model(**pad_right([Rows(2)[1]])).loss.backward()
        model.zero_grad()
        model.train()
        with torch.no_grad():
            model(**pad_right([Rows(2)[1]]))


def test_forwards_beside_training_are_not_counted(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    trainer, _ = train(tmp_path, [TwoSecondsAStep(clock), LooksOnTheSide()])
    speeds = [entry["tokens_per_second"] for entry in logs_of(trainer)]
    assert speeds == [sum(lengths) / 2 for lengths in drawn_lengths(trainer)[:3]]


def test_checkpointing_adds_no_model_flops(tmp_path, monkeypatch):
    figures = []
    for checkpointing in (False, True):
        clock = Clock(monkeypatch)
        options = {"gradient_checkpointing": checkpointing}
        trainer, _ = train(tmp_path, [TwoSecondsAStep(clock)], **options)
        figures.append([entry["achieved_tflops"] for entry in logs_of(trainer)])
    assert figures[0] == figures[1]


def test_frozen_weights_count_no_gradient_of_their_own(tmp_path, monkeypatch):
    clock, model = Clock(monkeypatch), build("llama", "sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    trainer, meter = train(tmp_path, [TwoSecondsAStep(clock)], model=model)
    assert 0 < meter.trained_share < 0.5
    expected = count_flops(model.config).step(drawn_lengths(trainer)[0], trained_share=meter.trained_share)
    assert logs_of(trainer)[0]["achieved_tflops"] == pytest.approx(expected.model / 2e12, rel=1e-3)


def test_the_peft_model_is_counted_by_its_base(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    clock = Clock(monkeypatch)
    model = peft.get_peft_model(build("llama", "sdpa"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer, meter = train(tmp_path, [TwoSecondsAStep(clock)], model=model)
    assert 0 < meter.trained_share < 0.05
    assert all(entry["achieved_tflops"] > 0 for entry in logs_of(trainer))


def test_a_model_of_unknown_flops_is_timed_only(tmp_path, caplog):
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        trainer, _ = train(tmp_path, [], model=model, max_steps=1)
    assert "the logs will have no `achieved_tflops`: `MambaForCausalLM` has 0 attention modules" in caplog.text
    assert {"tokens_per_second", "peak_memory_gib"} <= set(logs_of(trainer)[0])
    assert not {"achieved_tflops", "mfu"} & set(logs_of(trainer)[0])


def test_without_a_known_peak_there_is_no_utilisation(tmp_path):
    trainer, _ = train(tmp_path, [], meter=ThroughputMeter(), max_steps=1)
    assert "mfu" not in logs_of(trainer)[0] and "achieved_tflops" in logs_of(trainer)[0]


def test_nothing_is_left_on_the_model(tmp_path):
    model = build("llama", "sdpa")
    train(tmp_path, [], model=model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_a_report_brings_a_meter_and_uses_one_that_is_there(tmp_path):
    for before in (True, False):
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        trainer = Trainer(model=LlamaForCausalLM(config_of("llama")), args=args)
        if before:
            ThroughputMeter().attach(trainer)
        RunReport().attach(trainer)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert kinds.count(ThroughputMeter) == 1 and RunReport in kinds[:2] and ThroughputMeter in kinds[:2]


@pytest.mark.parametrize("peak", [0, -1.0])
def test_bad_peaks_are_refused(peak):
    with pytest.raises(ValueError, match="`peak_tflops` .* must be positive"):
        ThroughputMeter(peak_tflops=peak)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak_tflops(torch.device("cuda")) == peak
    assert known_peak_tflops(torch.device("cpu")) is None


# What a batch holds

IDS = torch.arange(3, 27).reshape(2, 12)
RIGHT = torch.ones(2, 12, dtype=torch.long)
RIGHT[1, 9:] = 0
RESTARTS = torch.tensor([[*range(5), *range(7)], [*range(12)]])
BATCHES = {
    "whole_rows": ({"input_ids": IDS}, [12, 12]),
    "embeddings": ({"inputs_embeds": torch.zeros(2, 12, 4)}, [12, 12]),
    "right_padding": ({"input_ids": IDS, "attention_mask": RIGHT}, [12, 9]),
    "left_padding": ({"input_ids": IDS, "attention_mask": RIGHT.flip(1)}, [12, 9]),
    "positions": ({"input_ids": IDS, "position_ids": RESTARTS}, [5, 7, 12]),
    "bounds": (
        {"input_ids": IDS.reshape(1, -1), "cu_seq_lens_q": torch.tensor([0, 1, 20, 24], dtype=torch.int32)},
        [1, 4, 19],
    ),
    "index": ({"input_ids": IDS, "seq_idx": torch.tensor([[0] * 3 + [1] * 9, [0] * 12])}, [3, 9, 12]),
}


def lengths_in(batch: dict) -> list[int]:
    return sorted(length for length in document_lengths(batch).tolist() if length)


@pytest.mark.parametrize("case", BATCHES)
def test_documents_are_found_in_whatever_the_batch_brings(case):
    batch, lengths = BATCHES[case]
    assert lengths_in(batch) == sorted(lengths)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("case", BATCHES)
def test_ranks_that_share_rows_count_each_document_once(case, size):
    batch, lengths = BATCHES[case]
    if case == "bounds":
        batch = {**batch, "cu_seq_lens_k": batch["cu_seq_lens_q"]}
    shares = [cut_batch(batch, size, rank) for rank in range(size)]
    assert sorted(sum((lengths_in(share) for share in shares), [])) == sorted(lengths)


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.zeros(3, 2, 12, dtype=torch.long)},  # of images
        {"attention_mask": torch.zeros(2, 1, 12, 12)},
        {"attention_mask": RIGHT.bool(), "position_ids": RESTARTS},  # transformers would ignore the positions
        {"cu_seq_lens_q": torch.tensor([0, 5])},
    ],
)
def test_a_batch_that_says_something_odd_is_counted_by_its_rows(extra):
    expected = [9, 12] if "position_ids" in extra and "attention_mask" in extra else [12, 12]
    assert lengths_in({"input_ids": IDS, **extra}) == expected


def test_a_batch_without_tokens_is_left_out():
    assert document_lengths({"pixel_values": torch.zeros(2, 3)}) is None
