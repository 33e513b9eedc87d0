"""Recipes, started as a user starts them: `torchrun`, a YAML file, a folder of documents."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
)
from trl import TrlParser

from hf_longctx import LongContextConfig, LongContextSFTTrainer
from hf_longctx.data.documents import load_documents, split_into_rows
from hf_longctx.tasks import pretrain, sft
from hf_longctx.tasks.document_places import read_functions

from ..cards import check_card


ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TEXT = "The exchange trades heads for tokens, and every token keeps its place in the row. "


def start(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([sys.executable, *arguments], **options)


def start_two_nodes(*arguments: str) -> list[subprocess.CompletedProcess]:
    """One process on each of two launchers, which find each other by address and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    node = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda rank: start(*node, "--master_port", port, "--node_rank", rank, *arguments), "01"))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[EOS]"], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", pad_token="[EOS]")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A tiny Llama with its tokenizer, and a folder of documents."""
    folder = tmp_path_factory.mktemp("recipe")
    documents = folder / "documents"
    documents.mkdir()
    texts = [TEXT * count for count in (40, 3, 25, 60)]
    for index, text in enumerate(texts):
        (documents / f"chapter_{index}.md").write_text(text)
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"folder": folder, "model": str(folder / "model"), "documents": str(documents)}


def write_config(path: Path, inputs: dict, **changes) -> str:
    settings = {
        "model_name_or_path": inputs["model"],
        "dataset_name": inputs["documents"],
        "output_dir": str(path.parent / "run"),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1.0e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_pretrain_on_two_processes_leaves_a_model_with_its_report(inputs, tmp_path):
    changes = {"row_tokens": 64, "num_eval_documents": 1, "eval_strategy": "steps", "eval_steps": 3}
    config = write_config(tmp_path / "run.yaml", inputs, sequence_parallel_size=2, **changes)
    done = start(*TORCHRUN, "recipes/pretrain.py", "--config", config, "--max_steps", "2", "--eval_steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"

    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["sequence_parallel_size"], metrics["data_parallel_size"]) == (2, 2, 1)
    assert [entry["step"] for entry in metrics["history"]] == [1, 2]  # the command line overrides the YAML file
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in metrics["history"])
    assert all(entry["tokens_per_second"] > 0 for entry in metrics["history"])
    assert metrics["train"]["num_input_tokens_seen"] == 2 * 64  # one row a step, shared, not counted twice
    assert [entry["step"] for entry in metrics["eval_history"]] == [2]
    assert [peak["rank"] for peak in metrics["peak_memory"]] == [0, 1]

    assert (run / "loss_and_throughput.png").read_bytes().startswith(b"\x89PNG")
    assert check_card(run)["pipeline_tag"] == "text-generation"
    card = ModelCard.load(run / "README.md")
    assert {"hf_longctx", "long-context", "sequence-parallel"} <= set(card.data.tags)
    assert "torchrun --standalone --nproc_per_node 2 recipes/pretrain.py --config" in card.text
    assert "| Context length, tokens per row | 64 |" in card.text
    assert "| Sequence-parallel size | 2 |" in card.text
    assert "![Loss and throughput](loss_and_throughput.png)" in card.text
    assert f"Model card: {run / 'README.md'}" in done.stdout

    model = AutoModelForCausalLM.from_pretrained(run)  # an ordinary model again
    assert model.config._attn_implementation == "sdpa"


def test_sft_on_one_process_trains_whole_documents_with_lora(inputs, tmp_path):
    changes = {"max_length": 48, "use_peft": True, "bf16": False, "gradient_checkpointing": False}
    config = write_config(tmp_path / "run.yaml", inputs, **changes, num_train_epochs=1, max_steps=-1)
    done = start("-m", "hf_longctx", "sft", "--config", config, "--per_device_train_batch_size", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["model"])
    rows = split_into_rows(load_documents(inputs["documents"]), tokenizer, 48)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert metrics["train"]["num_input_tokens_seen"] == tokens  # a whole epoch: nothing was truncated away
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    metadata = check_card(tmp_path / "run")
    assert metadata["pipeline_tag"] == "text-generation" and "base_model" not in metadata and "licence" not in metadata
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert "hf_longctx" in card.data.tags
    assert inputs["model"] not in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture(scope="module")
def pairs(inputs) -> dict[str, object]:
    """Prompts and completions of very different lengths, and the file they are in."""
    words = TEXT.split()
    counts = [(1 + index % 4, 1 + index * index % 9) for index in range(40)]
    rows = [
        {"prompt": " ".join(words[:prompt]), "completion": " " + " ".join(words[prompt : prompt + completion])}
        for prompt, completion in counts
    ]
    file = inputs["folder"] / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"file": str(file), "rows": rows}


def write_packed_config(folder: Path, inputs: dict, pairs: dict) -> str:
    """The packed recipe as it is, but for a tiny model, these pairs, and one epoch of short rows."""
    settings = yaml.safe_load((ROOT / "recipes" / "sft_packed_stdlib.yaml").read_text())
    for name in ("model_name_or_path", "gguf_file", "base_model", "output_dir"):
        del settings[name]
    changes = {"dataset_name": pairs["file"], "max_length": 64, "num_train_epochs": 1, "max_steps": -1}
    return write_config(folder / "run.yaml", inputs, **{**settings, **changes})


def documents_of(pairs: dict, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each pair in tokens, the latter closed by the end-of-sequence token."""
    documents = []
    for row in pairs["rows"]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert ids[: len(prompt)] == prompt
        documents.append((prompt, ids[len(prompt) :]))
    return documents


def test_packed_sft_fills_rows_trains_and_saves(inputs, pairs, tmp_path):
    done = start("recipes/sft.py", "--config", write_packed_config(tmp_path, inputs, pairs))
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["model"])
    tokens = sum(len(prompt) + len(completion) for prompt, completion in documents_of(pairs, tokenizer))
    assert metrics["train"]["num_input_tokens_seen"] == tokens  # one epoch: every document once, and no padding
    assert metrics["num_steps"] == -(-tokens // 64)  # as few rows as can be
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in metrics["history"])
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_hybrid_recipe_trains_shared_packed_rows(inputs, pairs, tmp_path):
    """As it is, but for a tiny model, these pairs, and what needs GPUs."""
    settings = yaml.safe_load((ROOT / "recipes" / "sft_hybrid.yaml").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["model"])
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        layer_types=["linear_attention", "full_attention"],
        linear_value_head_dim=12,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("output_dir", "warmup_steps"):
        del settings[name]
    changes = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": pairs["file"], "max_length": 64}
    changes |= {"bf16": False, "max_steps": 2, "num_train_epochs": 1, "save_strategy": "no"}
    config = write_config(tmp_path / "run.yaml", inputs, **{**settings, **changes})
    for done in start_two_nodes("recipes/sft.py", "--config", config):
        assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["sequence_parallel_size"], metrics["num_steps"]) == (2, 2)
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in metrics["history"])
    assert "linear_attention" in AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.layer_types


def test_packed_rows_keep_prompts_out_of_the_loss(inputs, pairs, tmp_path):
    config = write_packed_config(tmp_path, inputs, pairs)
    recipe, args, model_args, long_context, *_ = TrlParser(sft.ARGUMENTS).parse_args_and_config(["--config", config])
    model, tokenizer = sft.load_model(recipe, args, model_args, long_context)
    assert model.config._attn_implementation == "packed"
    shared, _ = sft.load_model(recipe, args, model_args, LongContextConfig(sequence_parallel_size=2))
    assert shared.config._attn_implementation == "ulysses"

    documents, _ = sft.read_documents(recipe, args, text_field=None)
    rows = sft.make_rows(documents, tokenizer, args, recipe.join_documents)
    options = {"processing_class": tokenizer, "long_context": long_context}
    packed = LongContextSFTTrainer(model=model, args=args, train_dataset=rows, **options).train_dataset
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (row[key][start : start + length] for key in ("input_ids", "labels"))
            prompt_len = sum(label == -100 for label in labels)
            assert labels == [-100] * prompt_len + ids[prompt_len:]
            found.append((ids[:prompt_len], ids[prompt_len:]))
            start += length
        assert start == len(row["input_ids"])
    assert sorted(found) == sorted(documents_of(pairs, tokenizer))


def test_functions_are_cut_behind_their_docstring():
    functions = list(read_functions([textwrap.__file__]))
    assert len(functions) > 5
    for row in functions:
        assert row["prompt"].endswith(('"""', "'''")) and row["completion"].startswith("\n")
        (whole,) = ast.parse(row["prompt"] + row["completion"]).body
        (head,) = ast.parse(row["prompt"]).body
        assert len(head.body) == 1 and ast.get_docstring(head) == ast.get_docstring(whole)
        assert len(whole.body) > 1


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_understood_by_its_script(file, tmp_path):
    (script,) = set(re.findall(r"(?:recipes/(?=\w+\.py)|hf-longctx )(\w+)", file.read_text()))
    task, words = importlib.import_module(f"hf_longctx.tasks.{script}"), ["--config", str(file)]
    arguments = task.arguments_of(words) if hasattr(task, "arguments_of") else task.ARGUMENTS
    known = {field.name for kind in arguments for field in fields(kind)}
    here = {"output_dir": str(tmp_path), "use_cpu": "true", "bf16": "false"}
    words += [word for name, value in here.items() if name in known for word in (f"--{name}", value)]
    parsed = TrlParser(arguments).parse_args_and_config(words)
    assert any(isinstance(part, LongContextConfig) for part in parsed) or LongContextConfig not in arguments


@pytest.fixture
def run_pretrain(monkeypatch):
    """The pre-training script with these arguments, in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["recipes/pretrain.py", *arguments])
        pretrain.main()

    return run


def test_a_ramp_and_watches_come_from_a_file_and_the_command_line(inputs, tmp_path, run_pretrain, caplog):
    watches = {"kill_switch": str(tmp_path / "STOP"), "spike_action": "skip", "spike_window": 4, "slow_rank_every": 2}
    watches |= {"advise_checkpoints": True, "start": 1, "increment": 1, "max_steps": 6, "row_tokens": 64}
    saving = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 3}
    config = write_config(tmp_path / "run.yaml", inputs, **watches, **saving)
    run_pretrain("--config", config, "--ramp_rows", "6", "--hours_between_failures", "1")
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())["history"]
    record = json.loads((tmp_path / "run" / "checkpoint-6" / "hf_longctx.json").read_text())
    assert record["ramp"] == [1, 1, 6] and len(history) == 6
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["LossSpikeGuard"]["args"]["action"] == "skip"
    assert state["log_history"][4]["advised_save_steps"] > 0
    (tmp_path / "STOP").touch()
    with pytest.raises(ValueError, match="the file of `KillSwitch`"):
        run_pretrain("--config", config, "--rows", "6", "--overwrite_output_dir")


def test_unknown_key_is_named(inputs, tmp_path, run_pretrain):
    config = write_config(tmp_path / "run.yaml", inputs, sequence_paralel_size=2)
    with pytest.raises(ValueError, match="sequence_paralel_size"):
        run_pretrain("--config", config)
    assert not (tmp_path / "run").exists()


def test_a_full_output_folder_is_left_alone(inputs, tmp_path, run_pretrain):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir`.*--overwrite_output_dir"):
        run_pretrain("--config", write_config(tmp_path / "run.yaml", inputs))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["notes.txt"]
