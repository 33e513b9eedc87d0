"""Files that commands and recipes read: YAML of a run, JSON of a model or of sources, weights, a README. What is wrong
with one is a sentence with its name."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_longctx.cli import main
from hf_longctx.data.model_files import check_model_files
from hf_longctx.data.sources.plan import load_source_weights
from hf_longctx.embedding.loss_checkpoint import LOSS_FILE, load_loss
from hf_longctx.proof.model_under_test import read_config
from hf_longctx.reporting.model_card import write_model_card
from hf_longctx.reporting.report import RunReport
from hf_longctx.tasks import docstrings
from hf_longctx.tasks.document_places import read_functions
from hf_longctx.tasks.recipe_file import check_recipe_file, parse_recipe


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: 1\nb: [1\n", "run.yaml`, line 3, column 1, is no YAML .*: check the file at that place"),
        (b"\tb: 1\n", "run.yaml`, line 1, column 1, is no YAML"),
        (b"a: \x00\n", "run.yaml`.* is no YAML"),
        (b"", "run.yaml` holds null, and not names with values"),
        (b"- a\n", "run.yaml` holds a list, and not names with values"),
        (b"text\n", "run.yaml` holds a text, and not names with values"),
        (b"1: a\n", "run.yaml` has the name 1, which is no text"),
        (b"a: caf\xe9\n", "run.yaml` is not UTF-8: byte 6 is 0xe9; convert it"),
        (b"[" * 5000, "run.yaml`.* is nested too deeply to be read|is no YAML"),
    ],
    ids=["open", "tab", "zero", "empty", "list", "text", "number", "latin", "deep"],
)
def test_a_recipe_that_cannot_be_read_is_told_by_line(tmp_path, data, words):
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        check_recipe_file(["--seed", "1", "--config", str(tmp_path / "run.yaml")])


def test_a_recipe_that_is_no_file_is_told(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="pipe.yaml` is a named pipe and no regular file"):
        check_recipe_file(["--config", str(tmp_path / "pipe.yaml")])
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(tmp_path / "gone.yaml")])
    with pytest.raises(ValueError, match="gone.yaml` cannot be read .No such file or directory"):
        parse_recipe(())
    with pytest.raises(ValueError, match="`--config` has no value"):
        check_recipe_file(["--config"])
    check_recipe_file(["--seed", "1"])


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(100)}, folder / "model.safetensors")
    return folder


BAD_CONFIGS = [
    (b"[1]", "config.json` holds a list, and not a JSON object"),
    (b"{", "config.json` is no JSON"),
    (b'{"model_type": "caf\xe9"}', "config.json` is not UTF-8: byte 19 is 0xe9"),
    (None, "config.json` is a named pipe and no regular file"),
]


@pytest.mark.parametrize(("data", "words"), BAD_CONFIGS, ids=["list", "cut", "latin", "pipe"])
def test_a_configuration_that_cannot_be_read_is_told(model, capsys, data, words):
    (model / "config.json").unlink()
    if data is None:
        os.mkfifo(model / "config.json")
    else:
        (model / "config.json").write_bytes(data)
    for name in (model, model / "config.json"):
        with pytest.raises(ValueError, match=words):
            read_config(str(name))
    for command in ("check", "plan", "verify"):
        assert main([command, str(model)]) == (3 if command == "verify" else 2)
        assert words.split("`")[1].split(" .")[0].split(":")[0].strip() in " ".join(capsys.readouterr().out.split())


def test_weights_that_are_cut_off_are_named(model):
    check_model_files(model, weights=True)
    check_model_files("owner/name-on-the-hub", weights=True)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-50])
    check_model_files(model)
    with pytest.raises(ValueError, match="model.safetensors` is cut off or damaged .*: load it again"):
        check_model_files(model, weights=True)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="model.safetensors` is a device and no regular file"):
        check_model_files(model)


def test_weights_of_a_loss_that_are_cut_off_are_named(tmp_path):
    loss = torch.nn.Linear(2, 2)
    save_file({f"loss.{name}": tensor.detach() for name, tensor in loss.named_parameters()}, tmp_path / LOSS_FILE)
    trainer = SimpleNamespace(loss=loss, model=torch.nn.Linear(1, 1))
    load_loss(trainer, str(tmp_path))
    (tmp_path / LOSS_FILE).write_bytes((tmp_path / LOSS_FILE).read_bytes()[:-4])
    with pytest.raises(ValueError, match="loss.safetensors` is cut off or damaged .*: resume from another checkpoint"):
        load_loss(trainer, str(tmp_path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "sources.json` is no JSON"),
        (b"7", "sources.json` holds the number 7"),
        (b'[{"name": "caf\xe9"}]', "sources.json` is not UTF-8: byte 14 is 0xe9"),
        (None, "sources.json` cannot be read .No such file"),
    ],
    ids=["cut", "number", "latin", "gone"],
)
def test_a_list_of_sources_that_cannot_be_read_is_told(tmp_path, data, words):
    if data is not None:
        (tmp_path / "sources.json").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        load_source_weights(tmp_path / "sources.json")


@pytest.mark.parametrize("data", [b"caf\xe9\r\n", b"---\n a: [\n---\ntext", b"---\n- 1\n---\n"])
def test_a_readme_of_any_encoding_or_header_is_kept_as_it_is(tmp_path, data):
    (tmp_path / "README.md").write_bytes(data)
    report = RunReport()
    args = SimpleNamespace(output_dir=str(tmp_path))
    report.on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    metrics = {key: None for key in ("base_model", "dataset", "row_tokens", "sequence_parallel_size", "num_steps")}
    metrics |= {"name": "x", "command": "python x", "history": [], "eval_history": [], "train": {}, "peak_memory": []}
    metrics |= {"data_parallel_size": 1, "sequence_parallel_size": 1, "settings": {}, "versions": {}}
    write_model_card(tmp_path, metrics, None, report._earlier_card)
    assert (tmp_path / "README.before_training.md").read_bytes() == data
    assert "# x" in (tmp_path / "README.md").read_text()


def test_sources_of_packages_are_regular_files(tmp_path, monkeypatch):
    package = tmp_path / "odd_package"
    package.mkdir()
    (package / "__init__.py").write_text('def f():\n    """Adds."""\n    return 1\n')
    os.mkfifo(package / "pipe.py")
    (package / "broken.py").symlink_to("nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docstrings.files_of("odd_package") == [package / "__init__.py"]
    (row,) = read_functions(sorted(str(file) for file in package.iterdir()))
    assert json.dumps(row)
