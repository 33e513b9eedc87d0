"""The toy that only learning while reading can solve, and the recipe on documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_longctx import TTTForCausalLM
from hf_longctx.tasks import ttt_toy
from tests.cards import check_card
from tests.fast_weights import tiny_base, tiny_ttt, tokens
from tests.tokenizer import tiny_tokenizer


ROOT = Path(__file__).parents[2]


def test_rows_follow_their_own_table():
    toy = ttt_toy.ToyArguments(row_tokens=2000, symbols=8)
    rows = ttt_toy.MarkovRows(toy, 3, seed=1)
    assert torch.equal(rows.input_ids, ttt_toy.MarkovRows(toy, 3, seed=1).input_ids)
    for table, row in zip(rows.tables, rows.input_ids):
        followed = (table[row[:-1]] == row[1:]).float().mean()
        assert abs(followed - (0.9 + 0.1 / 8)) < 0.03
    assert ttt_toy.ToyArguments().floor == pytest.approx(0.65, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wandb"}, r"`report_to` \('wandb'\) must be none"),
        ({"toy": "xor"}, r"`toy` \('xor'\) must be one of markov"),
        ({"symbols": 1}, r"`symbols` \(1\) must be a whole number of symbols, at least 2"),
        ({"num_eval_rows": 0}, r"`num_eval_rows` \(0\) must be a whole number of rows"),
        ({"seeds": 0}, r"`seeds` \(0\) must be a whole number of repetitions"),
        ({"follow": 1.0}, r"`follow` \(1.0\) must be a probability from 0 to below 1"),
        ({"learning_rate": -1.0}, r"`learning_rate` \(-1.0\) must be a finite number above 0"),
        ({"row_tokens": 16}, r"`row_tokens` \(16\) must be at least 17"),
        ({"row_tokens": 8, "chunk_tokens": 4}, r"`row_tokens` \(8\) must be at least 9"),
        ({"hidden_size": 30}, r"`hidden_size` \(30\) must be a multiple of 4"),
    ],
)
def test_the_toy_refuses_what_has_no_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        ttt_toy.ToyArguments(**changes)


def test_the_toy_separates_learning_while_reading_from_a_window(tmp_path):
    """One seed, 100 steps of half the rows, half as long: losses fall along the row with inner steps only."""
    sizes = {"steps": 100, "num_eval_rows": 32, "window": 16, "chunk_tokens": 16, "batch_size": 8, "row_tokens": 128}
    toy = ttt_toy.ToyArguments(output_dir=str(tmp_path), **sizes)
    rows = ttt_toy.MarkovRows(toy, toy.num_eval_rows, seed=0)
    learns = ttt_toy.losses_by_part(ttt_toy.train(toy, 0, 1.0), rows, 1.0)
    window = ttt_toy.losses_by_part(ttt_toy.train(toy, 0, 0.0), rows, 0.0)
    assert ttt_toy.last_quarter(window) - ttt_toy.last_quarter(learns) >= 1.2
    assert learns[0] - learns[-1] >= 1.0 and max(window[1:]) - min(window[1:]) < 0.3


def test_the_recipe_of_the_toy_writes_every_arm(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from hf_longctx.tasks import ttt

    for name in ("ttt_markov_toy.yaml", "ttt_figure2_toy.yaml"):
        changes = "--row_tokens 24 --window 4 --chunk_tokens 4 --steps 1 --batch_size 2 --num_eval_rows 2 --seeds 1"
        config = str(ROOT / "recipes" / name)
        monkeypatch.setattr(sys, "argv", f"x --config {config} {changes} --output_dir {tmp_path / name}".split())
        ttt.main()
        found = json.loads((tmp_path / name / ttt_toy.NUMBERS_FILE).read_text())
        (seed,) = found["results"]
        assert {len(seed[arm]) for arm in (ttt_toy.E2E, ttt_toy.WINDOW, ttt_toy.NAIVE)} == {8}
        assert len(seed["naive by rate"]) == 5
        assert ttt_toy.last_quarter(seed["naive"]) == min(map(ttt_toy.last_quarter, seed["naive by rate"].values()))


def test_without_attention_no_token_sees_another():
    toy = ttt_toy.ToyArguments(attention=False, row_tokens=20)
    model = ttt_toy.tiny_model(toy, 0, 0.0).eval()
    ids = tokens(1, 20) % 32
    changed = ids.clone()
    changed[:, :-1] = (changed[:, :-1] + 1) % 32
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, -1], model(changed).logits[:, -1])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    base = tiny_base(dtype=torch.float32, vocab_size=max(97, len(tokenizer)))
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    from tests.tokenizer import words

    folder = tmp_path_factory.mktemp("documents")
    for index in range(4):
        (folder / f"{index}.txt").write_text(words(120, seed=index))
    return folder


def test_the_recipe_on_documents_measures_before_and_after(base_folder, documents, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from hf_longctx.tasks import ttt

    words = f"--config {ROOT / 'recipes' / 'ttt_smollm2_stdlib.yaml'} --model_name_or_path {base_folder} "
    words += f"--dataset_name {documents} --num_eval_documents 1 --row_tokens 24 --window 8 --chunk_tokens 8 "
    words += "--suffix_layers 1 --fast_intermediate_size 8 --max_steps 1 --num_eval_rows 2 --gradient_checkpointing "
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", *words.split(), "true", "--output_dir", str(folder)])
    config = tmp_path / "without_gguf.yaml"
    lines = Path(words.split()[1]).read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith(("gguf", "base_model"))))
    sys.argv[2] = str(config)
    seen, measure = [], ttt.measure
    monkeypatch.setattr(ttt, "measure", lambda model, rows: (seen.append(rows), measure(model, rows))[1])
    ttt.main()
    found = json.loads((folder / ttt.CHUNKS_FILE).read_text())
    assert {when: sorted(arms) for when, arms in found.items()} == dict.fromkeys(
        ("before", "after"), ["TTT", "window only"]
    )
    before = found["before"]
    assert len(before["TTT"]) == 3 and before["TTT"][0] == pytest.approx(before["window only"][0], abs=1e-6)
    assert before["TTT"][1] != before["window only"][1]
    assert (folder / "adapter_model.safetensors").is_file()
    assert check_card(folder, runs=False)["library_name"] == "hf_longctx"
    merged = TTTForCausalLM.from_pretrained(folder / ttt.MERGED).eval()
    text = AutoTokenizer.from_pretrained(folder / ttt.MERGED)
    assert merged.settings.window == 8 and text("x")["input_ids"]
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.primes.prime_layers.0.prime_gate"]
    assert torch.equal(merged.primes.prime_layers[0].prime_gate, trained)
    measured = {"after": measure(merged, seen[-1])}
    assert measured["after"]["TTT"] == pytest.approx(found["after"]["TTT"], abs=1e-5)


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("fast"), tiny_tokenizer()
    base = tiny_base(dtype=torch.float32, vocab_size=max(97, len(tokenizer)))
    tiny_ttt(torch.float32, base=base, suffix_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_words(folder, documents, output, *more: str) -> list[str]:
    words = f"--model_name_or_path {folder} --dataset_name {documents} --row_tokens 24 --output_dir {output} "
    words += "--max_steps 1 --use_cpu true --report_to none --per_device_train_batch_size 1 --dtype float32"
    return ["x", *words.split(), *more]


def test_a_converted_folder_is_trained_with_its_own_settings(fast_folder, documents, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from hf_longctx.tasks import ttt

    more = ["--chunk_tokens", "6", "--window_only", "true"]
    monkeypatch.setattr(sys, "argv", recipe_words(fast_folder, documents, tmp_path / "out", *more))
    ttt.main()
    trained, began = (TTTForCausalLM.from_pretrained(place) for place in (tmp_path / "out", fast_folder))
    assert (trained.settings.chunk_tokens, trained.settings.inner_learning_rate) == (6, 0.0)
    gates = [model.primes.prime_layers[0].prime_gate for model in (trained, began)]
    assert torch.allclose(*gates, atol=1e-3) and not torch.equal(*gates)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--chunk_tokens 4", r"`chunk_tokens` \(4\) is 6 in `.*`, which has fast weights already and keeps"),
        ("--window 1024", r"`window` \(1024\) is 8 in "),
        ("--from_scratch true", r"`from_scratch` \(True\) leaves out all weights of "),
        ("--gguf_file x.gguf", r"`gguf_file` \('x.gguf'\) holds a base model"),
    ],
)
def test_settings_beside_a_converted_folder(fast_folder, documents, tmp_path, monkeypatch, more, message):
    pytest.importorskip("trl")
    from hf_longctx.tasks import ttt

    monkeypatch.setattr(sys, "argv", recipe_words(fast_folder, documents, tmp_path, *more.split()))
    with pytest.raises(ValueError, match=message):
        ttt.main()


def test_recipes_of_other_models_name_the_command(fast_folder, documents, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from hf_longctx.tasks import pretrain

    monkeypatch.setattr(sys, "argv", recipe_words(fast_folder, documents, tmp_path))
    with pytest.raises(ValueError, match="already has fast weights .* use `hf-longctx ttt train` or `eval`"):
        pretrain.main()
