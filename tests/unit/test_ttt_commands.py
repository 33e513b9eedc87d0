"""`hf-longctx ttt convert | eval | train`: what they write and print, and what they refuse before loading a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_longctx import LSHConfig, TTTForCausalLM, use_lsh
from hf_longctx.cli.command_line import main
from hf_longctx.tasks import needle_rows, ttt_eval
from tests.fast_weights import tiny_base, tiny_ttt, tokens
from tests.tokenizer import digits_tokenizer, tiny_tokenizer, words


pytest.importorskip("trl")
SIZES = "--window 8 --chunk_tokens 6 --suffix_layers 1 --fast_intermediate_size 8"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders by the names that command lines have for them here."""
    root = tmp_path_factory.mktemp("places")
    found = {
        name: root / name for name in "BASE DEEP LSH TTT HOT BARE WORDS LOST EMPTY ADAPTER GGUF VIT TORN DOCS".split()
    }
    base, tokenizer = tiny_base(dtype=torch.float32), digits_tokenizer()
    base.save_pretrained(found["BASE"])
    tiny_base(dtype=torch.float32, layers=4).save_pretrained(found["DEEP"])
    hashed = tiny_base(dtype=torch.float32, attention="packed", num_key_value_heads=6)
    use_lsh(hashed, LSHConfig(num_hashes=2, window=8, num_buckets=4, hash_seed=0))
    hashed.save_pretrained(found["LSH"])
    base.config._name_or_path = str(found["BASE"])
    tiny_ttt(torch.float32, base=base).save_pretrained(found["BARE"])
    for name, own in (("TTT", tokenizer), ("WORDS", tiny_tokenizer()), ("LOST", tokenizer), ("HOT", tokenizer)):
        shutil.copytree(found["BARE"], found[name])
        own.save_pretrained(found[name])
    for name, change in (
        ("LOST", {"base_name": str(root / "gone"), "max_position_embeddings": 50}),
        ("HOT", {"inner_learning_rate": 3e38}),
    ):
        config = json.loads((found[name] / "config.json").read_text())
        config.update(change) if name == "LOST" else config["ttt"].update(change)
        (found[name] / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(found["BASE"])
    tokenizer.save_pretrained(found["EMPTY"])
    found["ADAPTER"].mkdir()
    (found["ADAPTER"] / "adapter_config.json").write_text("{}")
    found["GGUF"].mkdir()
    (found["GGUF"] / "small.gguf").write_bytes(b"GGUF")
    found["VIT"].mkdir()
    (found["VIT"] / "config.json").write_text('{"model_type": "vit"}')
    shutil.copytree(found["BARE"], found["TORN"])
    (found["TORN"] / "tokenizer.json").write_text("{")
    found["DOCS"].mkdir()
    for index in range(4):
        (found["DOCS"] / f"{index}.txt").write_text(words(60, seed=index))
    return found


def call(places, new, line: str) -> int:
    """Run a command line with the names of folders in it; `NEW` is one that is not there."""
    named = {**places, "NEW": new / "new", "FILE": places["BASE"] / "config.json"}
    return main(["ttt", *(str(named.get(word, word)) for word in line.split(" ") if word)])


def test_convert_and_eval(places, tmp_path, capsys):
    assert call(places, tmp_path, f"convert BASE --output NEW {SIZES}") == 0
    assert "window 8, chunks of 6, fast weights in the last 1 of 3 layers" in capsys.readouterr().out
    model = TTTForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.base_name == str(places["BASE"]) and not model.primes.prime_layers[0].prime_down.any()
    line = f"eval NEW --dataset_name DOCS --row_tokens 60 --num_rows 1 --json {tmp_path / 'numbers.json'}"
    assert call(places, tmp_path, line) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    arms = {ttt_eval.FULL, ttt_eval.WINDOW, ttt_eval.TTT, ttt_eval.UNTRAINED}
    assert set(found["position"]) == set(found["arms"]) == arms and set(found["needle"]) == arms | {"distances"}
    assert len(found["position"][ttt_eval.TTT]) == 10
    # Not trained yet, and what fast weights start from is the same in every run.
    assert found["position"][ttt_eval.TTT] == pytest.approx(found["position"][ttt_eval.UNTRAINED], abs=1e-6)
    shown = capsys.readouterr()
    assert "For verbatim recall beyond the window use full attention." in shown.out
    assert f"full attention: the base model, {places['BASE']}, which attends to the whole row" in shown.out
    assert "measuring ..." in shown.err


def test_a_base_without_a_tokenizer_is_converted_with_a_word_about_it(places, tmp_path, capsys):
    assert call(places, tmp_path, f"convert DEEP --output NEW {SIZES}") == 0
    assert "has no tokenizer, so none is written" in capsys.readouterr().out


def test_names_of_measures_may_have_spaces_and_the_base_may_be_left_out(places, tmp_path, capsys):
    line = ["ttt", "eval", str(places["LOST"]), "--dataset_name", str(places["DOCS"] / "0.txt"), "--base", "none"]
    assert main([*line, "--row_tokens", "90", "--num_rows", "2", "--by", " position ,needle"]) == 0
    shown = capsys.readouterr().out
    assert "Without a base model (`--base`)" in shown and "beyond it" in shown
    assert "90 tokens go beyond the 50 positions that the base model knows" in shown
    assert "The documents fill 1 row, and `--num_rows` asks for 2." in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert BASE --output NEW", "such as `--window 2048`"),
        (f"convert BASE --output BASE {SIZES}", "is not empty: name a new folder"),
        (f"convert BASE --output FILE {SIZES}", "is a file: name a new folder"),
        (f"convert BASE --output= {SIZES}", "`--output` is empty"),
        (f"convert BASE --output /dev/null/x {SIZES}", "cannot be made in `/dev/null`"),
        (f"convert LSH --output NEW {SIZES}", "`llama` runs LSH attention, which knows no window"),
        (f"convert TTT --output NEW {SIZES}", "has fast weights already"),
        (f"convert EMPTY --output NEW {SIZES}", "has no `config.json`, it holds `tokenizer.json`"),
        (f"convert GGUF --output NEW {SIZES}", "name its file, `--gguf_file small.gguf`"),
        (f"convert BASE --output NEW --gguf_file no.gguf {SIZES}", "`gguf_file` (`no.gguf`) is not in"),
        (f"convert FILE --output NEW {SIZES}", "is a file: name the folder that holds it"),
        (f"convert /no/such/folder --output NEW {SIZES}", "`model` (/no/such/folder) is not there"),
        (f"convert VIT --output NEW {SIZES}", "is of type `vit`, which is no causal language model"),
        (f"convert owner/name --output NEW {SIZES}", "it is no folder here, and the Hub did not give it (no network)"),
        (f"convert package: --output NEW {SIZES}", "`package:` names no installed package"),
        ("eval TTT --by place", "`--by` names 'place', which is nothing that is measured: name position or needle"),
        ("eval TTT --by needles", "did you mean needle?"),
        ("eval TTT --by position,,needle", "has an empty name"),
        ("eval TTT --num_rows 0", "`--num_rows` (0) must be a whole number of rows, at least 1"),
        ("eval TTT --num_rows -1", "`--num_rows` (-1) must be"),
        ("eval TTT --row_tokens 8", "must be above the window (8)"),
        ("eval TTT --row_tokens 26", "no room for a needle of 12 tokens that is asked for beyond the window (8)"),
        ("eval WORDS --row_tokens 90", "comes back as '[PAD]'"),
        ("eval BARE --row_tokens 90", "holds no tokenizer: save that of the base model there"),
        ("eval TORN --row_tokens 90", "the tokenizer of `model` ("),
        ("eval BASE", "is of type `llama`, and has no fast weights"),
        ("eval ADAPTER", "holds an adapter without its model"),
        ("eval LOST", "the base model that the configuration names cannot be used: it ("),
        ("eval TTT --base DEEP", "has `num_hidden_layers` 4, and the model was made of one with 3"),
        ("eval TTT --base TTT", "has fast weights itself: name the model without them"),
        ("eval TTT --base=", "`--base` is missing"),
        ("eval TTT --row_tokens 90000 --dataset_name DOCS", "a row has 90000"),
        ("eval TTT --dataset_name=", "`--dataset_name` is empty"),
    ],
)
def test_commands_refuse_in_a_sentence_before_a_model_is_loaded(places, tmp_path, capsys, monkeypatch, line, message):
    for kind in (TTTForCausalLM, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    real = PreTrainedConfig.get_config_dict
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name, **keys: _without_network(real, name, keys))
    assert call(places, tmp_path, line) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def _without_network(real, name, keys):
    if not Path(name).exists():
        raise OSError("no network")
    return real(name, **keys)


def test_other_data_and_other_tokenizers_are_refused(places, tmp_path, capsys, monkeypatch):
    from hf_longctx.tasks import document_places

    monkeypatch.setattr(document_places, "read_functions", lambda files: [{"prompt": "a", "completion": "b"}])
    assert call(places, tmp_path, "eval TTT --dataset_name stdlib_functions:") == 2
    assert "has no column `text`, only prompt, completion" in capsys.readouterr().out
    config = json.loads((places["TTT"] / "config.json").read_text())
    shutil.copytree(places["TTT"], tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    line = f"eval {tmp_path / 'small'} --row_tokens 90 --dataset_name DOCS --by position"
    assert call(places, tmp_path, line) == 2
    assert "and the model has 5 of them" in capsys.readouterr().out


def test_a_step_that_is_not_finite_ends_in_a_sentence(places, tmp_path, capsys):
    assert call(places, tmp_path, "eval HOT --row_tokens 60 --dataset_name DOCS --by position --num_rows 1") == 2
    assert "the model cannot be measured: the inner step is not finite at layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--row_tokens 900", "is more than any document to train on has (the longest has"),
        ("--row_tokens 70 --num_eval_rows -1", "`num_eval_rows` (-1) must be a whole number of held-out rows"),
        ("--row_tokens 70 --warmup_start 2", "`start` (2.0) of `InnerLearningRateWarmup`"),
    ],
)
def test_training_is_refused_before_the_model_is_loaded(places, tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    whole = f"train --model_name_or_path BASE --dataset_name DOCS --output_dir NEW --report_to none {SIZES} {line}"
    assert call(places, tmp_path, whole) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_rows_without_a_step_are_not_trained_on(places, tmp_path, capsys):
    whole = f"train --model_name_or_path BASE --dataset_name DOCS --output_dir NEW --report_to none {SIZES}"
    assert call(places, tmp_path, f"{whole} --row_tokens 6") == 2
    assert "`row_tokens` (6) must be above `chunk_tokens` (6)" in capsys.readouterr().err
    assert call(places, tmp_path, "train --toy markov --symbols 1") == 2
    assert "`symbols` (1) must be" in capsys.readouterr().err


@pytest.mark.parametrize("arms", [2, 4])
def test_tables_by_position_fit_a_terminal_and_say_which_tokens_they_mean(arms):
    from rich.console import Console

    names = (ttt_eval.FULL, ttt_eval.WINDOW, ttt_eval.TTT, ttt_eval.UNTRAINED)[:arms]
    losses = [float(part) for part in range(100)]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(ttt_eval.position_table(dict.fromkeys(names, losses), 1024, 99 * 1024 + 11))
    lines = [line for line in shown.get().splitlines() if " to " in line or "all" in line]
    assert max(map(len, shown.get().splitlines())) <= 80
    assert "1 to 7,168" in lines[0] and lines[0].split()[3:] == ["3.000"] * arms
    # The last line has two parts, one of ten tokens, as a mean over tokens.
    assert "100,353 to 101,386" in lines[14] and lines[14].split()[-1] == f"{(98 * 1024 + 99 * 10) / 1034:.3f}"
    assert lines[15].split()[0] == "all" and len(lines) == 16


class Letters:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_needle_stands_as_far_back_as_it_says():
    haystack = torch.full((500,), ord("."))
    row, answer = needle_rows.needle_row(Letters(), haystack, 300, 150, seed=3)
    text = "".join(map(chr, row[0].tolist()))
    key = text[-answer:].strip()
    assert len(key) == needle_rows.DIGITS and text.index(key) == 300 - 150 - len(f"{key}. Remember it.\n")
    assert len(text) == 300 and math.isclose(len(text) - answer, text.rindex(" " + key), abs_tol=0)


def test_distances_fit_the_question_and_the_row():
    assert needle_rows.needle_distances(Letters(), 128, 64, 600, 3) == [64, 256, 562]
    assert needle_rows.needle_distances(Letters(), 16, 8, 120, 3) == [44, 82]
    for distance in (43, 83):
        with pytest.raises(ValueError, match=rf"`distance` \({distance}\) must be from 44, .* to 82, .* 120 tokens"):
            needle_rows.needle_row(Letters(), torch.full((500,), 46), 120, distance, seed=0)


def test_recall_counts_whole_numbers():
    def arm(ids):
        logits = torch.nn.functional.one_hot(ids[:, 1:], 100).float()
        yield logits, ids[:, 1:]

    def nearly(ids):
        logits = torch.nn.functional.one_hot(ids[:, 1:], 100).float()
        logits[:, -1] = -logits[:, -1]
        yield logits, ids[:, 1:]

    row = tokens(1, 9)
    assert needle_rows.repeats(arm, row, 5) and not needle_rows.repeats(nearly, row, 5)
