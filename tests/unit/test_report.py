"""`RunReport`: numbers, picture and card of a run, without secrets and without overwriting."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_longctx.reporting.launch_command import launch_command, redact
from hf_longctx.reporting.report import RunReport
from tests.cards import METRICS
from tests.models import config_of


class LoggerInBetween(TrainerCallback):
    """Stands for wandb and friends: it sees logs as they pass."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


def train(folder, report: RunReport, *, steps: int = 3, **changes) -> tuple[Trainer, LoggerInBetween]:
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (12, 16))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    settings = {"max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "include_num_input_tokens_seen": "all"}
    args = TrainingArguments(output_dir=str(folder), **settings, **changes)
    model = LlamaForCausalLM(config_of("llama"))
    logger = LoggerInBetween()
    options = {"train_dataset": rows, "eval_dataset": rows[:4], "data_collator": default_data_collator}
    trainer = Trainer(model=model, args=args, callbacks=[logger], **options)
    report.attach(trainer)
    trainer.train()
    return trainer, logger


def test_a_run_leaves_numbers_picture_and_card(tmp_path):
    report = RunReport(row_tokens=16, base_model="owner/base", dataset="owner/data")
    _, logger = train(tmp_path, report, eval_strategy="steps", eval_steps=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == report.metrics
    assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3]
    assert [entry["loss"] for entry in metrics["history"]] == [log["loss"] for log in logger.seen if "loss" in log]
    assert [entry["step"] for entry in metrics["eval_history"]] == [2, 3]
    assert metrics["train"]["num_input_tokens_seen"] == 3 * 2 * 16
    assert metrics["peak_memory"][0]["cpu_bytes"] > 50 * 2**20
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in metrics["versions"]["torch"]
    assert (tmp_path / "loss_and_throughput.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) == {"hf_longctx", "long-context", "sequence-parallel"}
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["owner/data"])
    assert "| Optimizer steps | 3 |" in card.text and "| Tokens seen | 96 |" in card.text
    assert f"{metrics['eval_history'][-1]['eval_loss']:.4f}" in card.text


def test_loggers_see_tokens_per_second(tmp_path):
    report = RunReport()
    _, logger = train(tmp_path, report)
    speeds = [log["tokens_per_second"] for log in logger.seen if "loss" in log]
    assert len(speeds) == 3 and all(speed > 0 for speed in speeds)
    assert [entry["tokens_per_second"] for entry in report.metrics["history"]] == speeds


def test_tokens_per_second_leaves_evaluation_out(tmp_path, monkeypatch):
    """A clock that only evaluation moves: training then takes no time, and no speed can be told."""
    now = [0.0]
    monkeypatch.setattr("hf_longctx.reporting.meter.time.perf_counter", lambda: now[0])
    evaluate = Trainer.evaluate

    def slow_evaluate(self, *args, **kwargs):
        now[0] += 1000.0
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", slow_evaluate)
    report = RunReport()
    train(tmp_path, report, eval_strategy="steps", eval_steps=1)
    assert [entry["tokens_per_second"] for entry in report.metrics["history"]] == [None] * 3


def test_a_readme_of_the_user_is_kept(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My notes\n")
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        train(tmp_path, RunReport(), steps=1)
    assert (tmp_path / "README.before_training.md").read_text() == "# My notes\n"
    assert "kept as `README.before_training.md`" in caplog.text
    assert "hf_longctx" in ModelCard.load(tmp_path / "README.md").data.tags


def test_a_card_of_the_host_is_extended(tmp_path):
    report = RunReport()
    trainer, _ = train(tmp_path, report, steps=1)
    trainer.create_model_card(model_name="tiny", tags="mine", language="en")
    report.write(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"mine", "hf_longctx", "long-context", "sequence-parallel"} <= set(card.data.tags)
    assert card.data.language == ["en"]
    assert "loss_and_throughput.png" in card.text
    assert not (tmp_path / "README.before_training.md").exists()


def test_a_folder_of_this_machine_is_not_published(tmp_path):
    card = f"---\nbase_model: {tmp_path}\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\n"
    report = RunReport()
    train(tmp_path / "run", report, steps=1)
    (tmp_path / "run" / "README.md").write_text(card)
    report.write(tmp_path / "run")
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    assert "lora" in ModelCard.load(tmp_path / "run" / "README.md").data.tags


def test_without_matplotlib_numbers_and_card_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        train(tmp_path, RunReport(), steps=1)
    assert "pip install hf-longctx[demo]" in caplog.text
    assert (tmp_path / "metrics.json").is_file()
    assert "loss_and_throughput.png" not in (tmp_path / "README.md").read_text()


def test_only_rank_zero_writes(tmp_path):
    report = RunReport()
    report.write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--hub_token", "abc"], ["--hub_token", "<redacted>"]),
        (["--hub-token=abc"], ["--hub-token=<redacted>"]),
        (["--wandb_api_key", "abc"], ["--wandb_api_key", "<redacted>"]),
        (["--db_password", "abc"], ["--db_password", "<redacted>"]),
        (["--use_auth_token", "--seed", "1"], ["--use_auth_token", "--seed", "1"]),
        (["--name", "hf_AbCdEfGh1234567890"], ["--name", "<redacted>"]),
        (["--url", "https://me:abc@site/x"], ["--url", "https://<redacted>@site/x"]),
        (["--kwargs", '{"token": "abc", "seed": 1}'], ["--kwargs", '{"token": "<redacted>", "seed": 1}']),
        (["--row_tokens", "64"], ["--row_tokens", "64"]),
        (["--eos_token", "</s>"], ["--eos_token", "</s>"]),
        (["--average_tokens_across_devices", "true"], ["--average_tokens_across_devices", "true"]),
        (["--output_dir", "runs/hf_longctx"], ["--output_dir", "runs/hf_longctx"]),
    ],
)
def test_secrets_are_hidden_and_nothing_else(arguments, shown):
    assert redact(arguments) == shown


def test_the_command_is_the_one_that_was_typed():
    arguments = ["recipes/sft.py", "--config", "my run.yaml", "--hub_token", "abc"]
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}
    typed = "recipes/sft.py --config 'my run.yaml' --hub_token <redacted>"
    assert launch_command(arguments, {}) == f"python {typed}"
    assert launch_command(arguments, torchrun) == f"torchrun --standalone --nproc_per_node 2 {typed}"
    command = ["hf-longctx sft", "--config", "run.yaml"]
    assert launch_command(command, {}) == "hf-longctx sft --config run.yaml"
    started = "torchrun --standalone --nproc_per_node 2 -m hf_longctx sft --config run.yaml"
    assert launch_command(command, torchrun) == started
    many = {**torchrun, "GROUP_WORLD_SIZE": "4"}
    assert launch_command(arguments, many) == f"torchrun --nnodes 4 --nproc_per_node 2 {typed}"
    fsdp = {**many, "WORLD_SIZE": "8", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_USE_FSDP": "true"}
    launcher = "accelerate launch --num_processes 8 --num_machines 4 --use_fsdp --fsdp_version 2"
    assert launch_command(arguments, {**fsdp, "FSDP_VERSION": "2"}) == f"{launcher} {typed}"


def test_a_card_of_fast_weights_says_how_to_load_them(tmp_path):
    metrics = {**METRICS, "fast_weights": {"window": 8, "chunk_tokens": 4}}
    from hf_longctx.reporting.model_card import write_model_card

    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    card = write_model_card(tmp_path, metrics, None).read_text()
    assert "To run, the saved model needs `hf_longctx`." in card and "TTTForCausalLM.from_pretrained" in card
    assert "| Chunk tokens | 4 |" in card and "for that use full attention" in card
    plain = write_model_card(tmp_path, {**metrics, "fast_weights": None}, None).read_text()
    assert "needs only `transformers`." in plain and "TTTForCausalLM" not in plain
