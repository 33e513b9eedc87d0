"""Sources of the embedding recipe: which are here, which are not and what that costs, and rows of every form."""

from __future__ import annotations

import ast
import gzip
import json
import random

import pytest
import torch
from datasets import Dataset

from hf_longctx import SourcesConfig
from hf_longctx.tasks import docstrings, embed, embed_files, embed_model, embed_sources

from ..embedding import embedder


@pytest.fixture
def folder(tmp_path):
    """Two of the three sources of a `data_config.json`, as files."""
    entries = [("a/one.jsonl.gz", 3, 2), ("b.jsonl", 2, 1), ("reddit/2015.jsonl.gz", 95, 1)]
    config = [{"name": name, "lines": lines, "weight": weight} for name, lines, weight in entries]
    (tmp_path / "data_config.json").write_text(json.dumps(config))
    (tmp_path / "a").mkdir()
    rows = [[f"question {i}", f"answer {i}"] for i in range(3)]
    with gzip.open(tmp_path / "a" / "one.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    rows = [{"query": f"q {i}", "pos": ["yes"], "neg": ["no"]} for i in range(2)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(folder, **changes):
    settings = {"sources_config": str(folder / "data_config.json"), "sources_folder": str(folder), "num_texts": 2}
    return embed_sources.SourceArguments(**{**settings, "sources_at": {"reddit/": ""}, **changes})


def test_what_is_missing_is_counted_in_sources_rows_and_weight(folder):
    args = arguments(folder)
    config = SourcesConfig()
    present, held_out, config, facts = embed.read_sources(args, config, seed=0)
    assert held_out is None
    assert {name: rows.column_names for name, rows in present.items()} == {
        "a/one.jsonl.gz": ["anchor", "positive"],
        "b.jsonl": ["anchor", "positive"],  # the negative is left out, so that both can share a batch
    }
    assert present["a/one.jsonl.gz"][2] == {"anchor": "question 2", "positive": "answer 2"}
    assert config.source_weights == {"a/one.jsonl.gz": 2.0, "b.jsonl": 1.0}
    assert facts["present"] == {"a/one.jsonl.gz": 3, "b.jsonl": 2}
    assert facts["absent"] == {"reddit/2015.jsonl.gz": "published nowhere in this form"}
    assert (facts["num_sources"], facts["num_absent"], facts["absent_rows"]) == (3, 1, 95)
    assert facts["absent_weight_share"] == 0.25


def test_streams_yield_the_same_rows(folder):

    args = arguments(folder, streaming=True)
    present, _ = embed_sources.open_sources(embed_sources.list_sources(args), args)
    assert list(present["a/one.jsonl.gz"])[0] == {"anchor": "question 0", "positive": "answer 0"}


def test_a_run_without_any_source_is_refused(folder):

    args = embed_sources.SourceArguments(sources={"gone": str(folder / "gone.jsonl")})
    with pytest.raises(ValueError, match="none of the 1 sources is here.*there is no .*gone.jsonl"):
        embed_sources.open_sources(embed_sources.list_sources(args), args)
    with pytest.raises(ValueError, match="`sources` is missing"):
        embed_sources.list_sources(embed_sources.SourceArguments())


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (["a", "b"], {"anchor": "a", "positive": "b"}),
        (["a", "b", "c"], {"anchor": "a", "positive": "b", "negative": "c"}),
        ({"texts": ["a", "b"], "tags": []}, {"anchor": "a", "positive": "b"}),
        ({"query": "a", "pos": ["b"], "neg": ["c"]}, {"anchor": "a", "positive": "b", "negative": "c"}),
        ({"query": "a", "pos": ["b"]}, {"anchor": "a", "positive": "b"}),
        ({"set": ["a"]}, None),
        ({"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": "b"}),
    ],
    ids=["pair", "triplet", "texts", "query triplet", "query pair", "lone set", "columns"],
)
def test_every_form_of_line_becomes_a_row(line, row):
    assert embed_files.read_line(line, random.Random(0)) == row


def test_a_set_gives_two_different_texts():
    row = embed_files.read_line({"set": ["a", "b", "c"]}, random.Random(0))
    assert len({row["anchor"], row["positive"]}) == 2


def test_rows_for_evaluation_leave_the_training_data():

    rows = Dataset.from_list([{"anchor": f"q {i}", "positive": f"a {i}"} for i in range(20)])
    present = {"pairs": rows}
    held_out = embed.hold_out(present, embed_sources.SourceArguments(eval_source="pairs", num_eval_rows=5), seed=0)
    assert len(held_out) == 5 and len(present["pairs"]) == 15
    assert not {row["anchor"] for row in held_out} & set(present["pairs"]["anchor"])
    with pytest.raises(ValueError, match="`eval_source`.*is a stream"):
        embed.hold_out(present, embed_sources.SourceArguments(eval_source="pairs", streaming=True), seed=0)


def test_a_text_that_answers_two_queries_is_one_document():
    rows = [{"anchor": "q 0", "positive": "a"}, {"anchor": "q 1", "positive": "a"}, {"anchor": "q 1", "positive": "b"}]
    evaluator = embed.build_evaluator(rows, batch_size=2)
    assert sorted(evaluator.corpus) == ["a", "b"]
    assert evaluator.relevant_docs == {"q 0": {"0"}, "q 1": {"0", "1"}}


def test_mined_functions_lack_their_docstring_and_packages_can_be_left_out():
    rows = list(docstrings.mine_functions("joblib"))
    assert len(rows) > 50 and len({row["positive"] for row in rows}) == len(rows)
    for row in rows[:50]:
        (function,) = ast.parse(row["positive"]).body
        assert ast.get_docstring(function) is None and row["anchor"] not in row["positive"]
    assert "joblib" not in docstrings.packages_of("-joblib") and "torch" in docstrings.packages_of("-joblib")
    with pytest.raises(ValueError, match="`nowhere` in `-nowhere` is no installed package"):
        docstrings.packages_of("-nowhere")


def test_stretched_positions_keep_both_ends_and_let_texts_be_longer():
    model = embedder("bert", "packed")
    before = model[0].model.embeddings.position_embeddings.weight.detach().clone()
    embed_model.stretch_positions(model, 2 * len(before) - 1)
    after = model[0].model.embeddings.position_embeddings.weight
    torch.testing.assert_close(after[::2], before, rtol=1e-6, atol=1e-7)  # interpolated in single precision
    text = " ".join(["alpha"] * (len(before) + 20))
    assert model.preprocess([text])["input_ids"].numel() > len(before)
    assert model.encode(text).shape == (48,)
    with pytest.raises(ValueError, match="`stretch_positions` .* needs a learned table"):
        embed_model.stretch_positions(embedder("llama", "packed"), 4096)
