"""Model cards: metadata that the Hub accepts whatever the model came from, and code that runs."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import hf_longctx
from hf_longctx.reporting import origin
from hf_longctx.reporting.card_rules import LICENSES, card_problems
from hf_longctx.reporting.curves import draw_curves
from hf_longctx.reporting.model_card import merge_metadata, write_model_card
from hf_longctx.reporting.origin import base_model_of, check_license, hub_datasets, license_of
from hf_longctx.reporting.proven import proof_of
from hf_longctx.reporting.report import RunReport
from hf_longctx.reporting.usage import kind_of
from tests.cards import METRICS, check_card
from tests.hashed import build_with_norms
from tests.models import build, config_of
from tests.tokenizer import tiny_tokenizer


RESULT = {"task": {"type": "text-generation"}, "dataset": {"type": "o/d", "name": "D"}, "metrics": []}


# What the Hub takes


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("license", ["mit", ["mit", "apache-2.0"], "llama3.1"], ["MIT", "Apache 2.0", "my-own", ["mit", "x"], 3]),
        ("license_link", ["LICENSE", "https://site.org/x"], ["/models/LICENSE", "see below"]),
        (
            "base_model",
            ["owner/name", "gpt2", ["o/a", "o/b"]],
            ["/models/x", "./x", "a/b/c", "Kokoro 82M", "o/a--b", 1],
        ),
        ("new_version", ["owner/name"], ["two words", ["o/a"]]),
        ("base_model_relation", ["adapter"], ["child"]),
        ("datasets", [["owner/name", "imdb"], "imdb"], [["/data/x"], ["my data"], ["a/b/c"]]),
        ("pipeline_tag", ["text-generation", "sentence-similarity"], ["causal-lm", ["text-generation"]]),
        ("library_name", ["peft"], [["peft"], ""]),
        ("language", ["en", ["en", "deu"], "multilingual", "zh-TW"], ["English", ["en", "German"], "EN"]),
        ("tags", [["a", "b c"]], ["a", [1], ["two\nlines"], [""]]),
        ("metrics", [["accuracy"]], ["accuracy"]),
        ("widget", [[{"text": "x"}]], [{"text": "x"}, ["x"]]),
        ("thumbnail", ["https://site.org/x.png"], ["x.png"]),
        (
            "model-index",
            [[{"name": "x", "results": []}], [{"name": "x", "results": [RESULT]}]],
            [{"name": "x"}, [{"results": []}], [{"name": "x", "results": [{**RESULT, "metrics": [{"type": "wer"}]}]}]],
        ),
        ("anything_else", [1, "x", ["/x"]], []),
    ],
)
def test_rules_of_the_hub(key, good, bad):
    for value in good:
        assert card_problems({key: value}) == {}
    for value in bad:
        assert list(card_problems({key: value})) == [key]
    assert list(card_problems({"license": "mit", "license_name": "mine"})) == ["license_name"]
    assert card_problems({"license": "other", "license_name": "my-own-1.0"}) == {}


def test_what_the_hub_refuses_is_left_out_and_said(caplog):
    there = {"language": "English", "licence": "license", "pipeline_tag": "causal-lm", "thumbnail": "x.png", "own": 1}
    there |= {"tags": ["mine", 3], "datasets": ["/data/x", "owner/data"], "base_model": "/models/x"}
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        merged = merge_metadata(there, METRICS)
    assert card_problems(merged) == {}
    assert merged["datasets"] == ["owner/data"] and merged["own"] == 1 and "mine" in merged["tags"]
    assert not {"language", "licence", "pipeline_tag", "thumbnail", "base_model"} & set(merged)
    assert "`language` of the model card has 'English'" in caplog.text and "`thumbnail`" in caplog.text


def test_a_licence_that_the_hub_does_not_know_is_refused_with_the_nearest():
    check_license("apache-2.0")
    check_license(None)
    with pytest.raises(ValueError, match=r"`license` \(Apache2\) is no identifier .*: did you mean `apache-2.0`\?"):
        RunReport(license="Apache2")
    with pytest.raises(ValueError, match=r"`license` \(qqqq\) .*: take `other` for one of your own."):
        check_license("qqqq")


# Where a model comes from


def folder_of(path: Path, **files) -> str:
    path.mkdir(parents=True)
    for name, content in files.items():
        name = {"card": "README.md"}.get(name, f"{name}.json")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_folder_is_named_only_by_what_its_files_say(tmp_path, monkeypatch):
    snapshot = folder_of(tmp_path / "hub" / "models--owner--some-model" / "snapshots" / "0a1b", config={})
    assert base_model_of(snapshot) == "owner/some-model"
    assert base_model_of(folder_of(tmp_path / "hub" / "models--gpt2" / "snapshots" / "0a1b", config={})) == "gpt2"
    (tmp_path / "link").symlink_to(snapshot)
    assert base_model_of(str(tmp_path / "link")) == "owner/some-model"
    card = "---\nbase_model: owner/base\nlicense: mit\n---\n# x\n"
    assert base_model_of(folder_of(tmp_path / "a", card=card)) == "owner/base"
    assert base_model_of(folder_of(tmp_path / "b", config={"_name_or_path": "owner/base"})) == "owner/base"
    adapter = {"base_model_name_or_path": "owner/base"}
    assert base_model_of(folder_of(tmp_path / "c", adapter_config=adapter)) == "owner/base"
    for number, files in enumerate(({}, {"config": {"_name_or_path": str(tmp_path)}}, {"card": "---\nx: [\n---\n"})):
        assert base_model_of(folder_of(tmp_path / f"none{number}", **files)) is None
    (tmp_path / "none0" / "config.json").write_text("no json")
    assert base_model_of(str(tmp_path / "none0")) is None
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner/base")
    assert base_model_of("owner/base") is None and base_model_of("owner/other") == "owner/other"
    assert base_model_of("gpt2") is None  # no word is a name of the Hub that was not loaded from there
    assert base_model_of(None) is None and base_model_of("two words/x") is None


def test_the_licence_is_that_of_the_base_model(tmp_path, monkeypatch):
    def found(card: str, base: str | None = None) -> dict:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        return license_of(str(tmp_path), base)

    assert found("license: mit") == {"license": "mit"} and found("license: [mit]") == {"license": "mit"}
    own = "license: other\nlicense_name: own\nlicense_link: LICENSE"
    kept = {"license": "other", "license_name": "own"}
    assert found(own) == kept
    assert found(own, "o/n") == {**kept, "license_link": "https://huggingface.co/o/n/blob/main/LICENSE"}
    assert found("license: My Licence 2") == {"license": "other", "license_name": "my-licence-2"}
    assert found("tags: [x]") == {} and license_of(None, None) == {}
    for card in ("license: mit", own, "license: My Licence 2", "license: llama4"):
        assert card_problems(found(card, "o/n")) == {}

    class Hub:
        def model_info(self, name, timeout):
            raise ConnectionError(name)

    monkeypatch.setattr(origin, "HfApi", Hub)
    monkeypatch.setattr(origin.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert license_of("o/n", "o/n") == {}  # asked, and not answered
    monkeypatch.setattr(Hub, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert license_of(str(tmp_path), "o/n") == {"license": "llama4"}
    (tmp_path / "README.md").unlink()
    assert license_of(str(tmp_path), "o/n") == {}  # a model in a folder: its name is sent nowhere
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert license_of("o/n", "o/n") == {}


def test_data_sets_are_names_on_the_hub_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").touch()
    places = ["owner/name", "owner/name:config", "hf://datasets/a/b@main/x.parquet", "data/rows", "data/gone.jsonl"]
    places += ["stdlib:", "s3://bucket/x", "/data/x", "a/b/c", "data/*.txt", None]
    assert hub_datasets(places) == ["owner/name", "a/b"]


# Cards of runs


def run(folder: Path, model, *, tokenizer=None, save: bool = True, report: RunReport | None = None, **row) -> Path:
    ids = torch.randint(5, 97, (4, 16))
    rows = [{"input_ids": one.tolist(), "labels": one.tolist(), **row} for one in ids]
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    options = {"train_dataset": rows, "data_collator": default_data_collator, "processing_class": tokenizer}
    trainer = Trainer(model=model, args=args, **options)
    report = (report or RunReport()).attach(trainer)
    trainer.train()
    if save:
        trainer.save_model()
    report.write(folder)
    return folder


def test_a_card_of_a_model_from_a_folder(tmp_path):
    source = tmp_path / "my_models" / "base"
    build("llama", "sdpa").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n")
    model = type(build("llama", "sdpa")).from_pretrained(source)
    folder = run(tmp_path / "run", model, tokenizer=tiny_tokenizer(), report=RunReport(dataset=str(source)))
    metadata = check_card(folder)
    assert (metadata["base_model"], metadata["license"]) == ("owner/base", "apache-2.0")
    assert metadata["pipeline_tag"] == "text-generation" and "datasets" not in metadata
    text = (folder / "README.md").read_text()
    assert "my_models" not in text and " on base with `hf_longctx`" in text
    assert "apply_chat_template" in text  # this tokenizer has one


def test_what_the_author_wrote_before_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\n---\n# Mine\n")
    metadata = check_card(run(tmp_path / "run", build("llama", "sdpa")))
    assert (metadata["license"], metadata["language"]) == ("mit", ["de"])
    asked = run(tmp_path / "other", build("llama", "sdpa"), report=RunReport(license="llama3.2"))
    assert check_card(asked)["license"] == "llama3.2" and "llama3.2" in LICENSES


def test_a_card_of_a_classifier(tmp_path):
    config = config_of("llama")
    config.num_labels, config.pad_token_id = 2, 0
    tokenizer = tiny_tokenizer()
    folder = run(tmp_path / "run", LlamaForSequenceClassification(config), tokenizer=tokenizer, labels=1)
    assert check_card(folder)["pipeline_tag"] == "text-classification"
    assert "Training loss, nats per row" in (folder / "README.md").read_text()


@pytest.mark.parametrize("what", ["alibi", "lsh", "norm"])
def test_a_card_of_a_model_that_needs_this_package(tmp_path, what):
    new = {"lsh": lambda: build_with_norms("lsh"), "norm": lambda: LlamaForCausalLM(config_of("llama"))}
    model = new[what]() if what in new else build("llama", "packed")
    put = {"alibi": hf_longctx.use_alibi, "lsh": lambda _: None, "norm": hf_longctx.add_embedding_norm}
    put[what](model)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metrics = {**METRICS, "name": "run", **kind_of(model)}
    write_model_card(folder, metrics, None)
    assert check_card(folder)["library_name"] == "hf_longctx"
    assert "needs `hf_longctx`." in (folder / "README.md").read_text()


def test_a_card_says_what_was_proven_of_the_type(tmp_path):
    kinds = {
        ("llama", "text-generation"): ("packed", "exact"),
        ("bert", "sentence-similarity"): ("packed", "exact"),
        ("t5", "text-generation"): None,
    }
    for (kind, task), row in kinds.items():
        text = proof_of({"model_type": kind, "pipeline_tag": task})
        assert f"`hf-longctx verify {kind}`" in text
        assert ("not in the table" in text) if row is None else ("with transformers " in text)
        assert row is None or f"| {row[0]} | {row[1]} |" in text
    assert proof_of({"model_type": None}) is None and proof_of({"model_type": "x", "own_settings": ["y"]}) is None
    write_model_card(tmp_path, {**METRICS, "model_type": "llama", "pipeline_tag": "text-generation"}, None)
    assert "## Exactness" in (tmp_path / "README.md").read_text()


def test_without_a_saved_model_there_is_no_code(tmp_path):
    folder = run(tmp_path / "run", build("llama", "sdpa"), save=False)
    assert "How to use" not in (folder / "README.md").read_text()
    check_card(folder, runs=False)


# The picture


def test_nothing_of_the_picture_is_cut_off(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    history = [{"step": step, "loss": 4.0 - step, "tokens_per_second": 100.0 * step} for step in range(1, 4)]
    metrics = {**METRICS, "history": history, "base_model": "owner/base"}
    for name, points in (("evaluation", [(1, 9.0), (3, 2.0)]), ("held out mrr@10", [(1, 0.1), (3, 0.9)]), ("x", [])):
        assert draw_curves(metrics, tmp_path / "x.png", "loss (nats per token)", name, points)
        figure = figures.pop()
        lines = [line for panel in figure.axes for line in panel.lines]
        assert len(lines) == (3 if points else 2) and not any(line.get_clip_on() for line in lines)
        for panel in figure.axes:
            for line in panel.lines:
                low, high = panel.get_ylim()
                assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high
        legends = [panel.get_legend() for panel in figure.axes if panel.get_legend()]
        assert [[text.get_text() for text in one.get_texts()] for one in legends] == [["training", name]] * bool(
            points
        )
        assert not figure.legends and figure.get_suptitle().startswith("x, from owner/base, 8 tokens per row")
