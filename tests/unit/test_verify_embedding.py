"""`verify(task="embedding")` in one process: exact models, defects, refusals, arguments."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as tf


pytest.importorskip("sentence_transformers")

from hf_longctx.attention import packed
from hf_longctx.cli import main
from hf_longctx.parallel.pooling import POOLING_MODES
from hf_longctx.proof import compare, embedding_pair
from hf_longctx.proof.embedder import LENGTHS, build_embedder, texts_of_group
from hf_longctx.proof.model_under_test import EMBEDDING_KINDS, ModelUnderTest, Setting, read_config
from hf_longctx.proof.result import EXACT, REFUSED, UNBUILDABLE, WRONG
from hf_longctx.proof.verification import _config_and_weights, verify

from ..conformance.embeddings import DECODERS
from ..embedding import _folder, embedder


def prove(config, kinds=("packed",), weights=None):
    return compare.prove(ModelUnderTest.of(config, "embedding", 1, weights), Setting(1, kinds=kinds))


def both_ways(config):
    config.is_causal = False
    return config


@pytest.mark.parametrize(
    "config", [tf.RobertaConfig(), both_ways(tf.Qwen3Config())], ids=lambda config: config.model_type
)
def test_packed_and_shared_embeddings_are_exact_and_a_leak_would_show(config):
    results = prove(config, EMBEDDING_KINDS)
    assert [(rows.rows, rows.outcome) for rows in results] == [(kind, EXACT) for kind in EMBEDDING_KINDS], results
    for rows in results:
        assert 0 < rows.errors.worst <= rows.tolerance < rows.baseline / 100


def test_the_tiny_model_pools_in_all_ways_and_reads_one_word_a_token():
    model = build_embedder(ModelUnderTest.of(tf.RobertaConfig(), "embedding", 2), None, torch.float32)
    assert model[1].pooling_mode == POOLING_MODES
    assert model[0].config._attn_implementation == "sdpa" and not model[0].can_flatten_inputs
    for texts, lengths in zip(texts_of_group(1), LENGTHS):
        features = model.preprocess(texts)
        assert tuple(features["attention_mask"].sum(1).tolist()) == lengths
        assert (features["input_ids"][features["attention_mask"] == 0] == 1).all()  # RoBERTa's padding
        assert features["input_ids"][features["attention_mask"] == 1].min() >= 10
    assert texts_of_group(0) != texts_of_group(1)


def test_a_backward_that_loses_a_gradient_is_wrong(monkeypatch):
    """Forward, and so the proof of `pack_embeddings`, is right."""
    right = packed.attend_rows

    def lose(*arguments):
        output = right(*arguments)
        return 0.9 * output + 0.1 * output.detach()

    monkeypatch.setattr(packed, "attend_rows", lose)
    (rows,) = prove(tf.BertConfig())
    assert rows.outcome == WRONG and rows.dtype == "float64"
    assert rows.errors.gradient > 1e-3 > rows.errors.logits
    assert "in packed rows the gradient of `0.model." in rows.message


def test_a_model_without_our_attention_is_refused_with_the_sentence_of_packing():
    for rows in prove(tf.MPNetConfig(), EMBEDDING_KINDS):
        assert rows.outcome == REFUSED
        assert "`MPNetModel` does not call transformers' attention interface" in rows.message


def test_a_model_whose_attention_does_nothing_proves_nothing(monkeypatch):
    def without_values(*arguments):
        model = build_embedder(*arguments)
        for name, parameter in model.named_parameters():
            if ".attention.output.dense." in name:
                parameter.data.zero_()
        return model

    monkeypatch.setattr(embedding_pair, "build_embedder", without_values)
    (rows,) = prove(tf.BertConfig())
    assert rows.outcome == UNBUILDABLE
    assert "texts that see each other differ by " in rows.message


def test_a_host_that_stays_causal_has_nothing_bidirectional_to_prove(monkeypatch):
    for config, sees in ((tf.Qwen3Config(), False), (both_ways(tf.Qwen3Config()), True)):
        model = build_embedder(ModelUnderTest.of(config, "embedding", 1), None, torch.float32)
        assert embedding_pair.sees_later_tokens(model, "w11", "w12", "w13") == sees
    monkeypatch.setattr(embedding_pair, "sees_later_tokens", lambda *_: False)
    (rows,) = prove(both_ways(tf.Qwen3Config()))
    assert rows.outcome == UNBUILDABLE and "keeps its causal mask even with `is_causal` False" in rows.message


def test_a_checkpoint_is_taken_as_it_is_but_without_dropout(tmp_path):
    given = embedder("bert", pooling="cls", dtype=torch.float32)
    given[0].config.hidden_dropout_prob = 0.1
    with _config_and_weights(given, full=True) as (config, weights):
        tested = ModelUnderTest.of(config, "embedding", 1, weights)
        model = build_embedder(tested, "packed", torch.float32)
        (rows,) = prove(config, weights=weights)
    assert model[1].pooling_mode == "cls" and model[0].config._attn_implementation == "packed"
    assert torch.equal(
        model[0].model.embeddings.word_embeddings.weight, given[0].model.embeddings.word_embeddings.weight
    )
    assert given[0].config.hidden_dropout_prob == 0.1 and model[0].config.hidden_dropout_prob == 0.0
    assert rows.outcome == EXACT, rows


def test_the_transformer_of_a_sentence_transformer_may_be_a_folder_below(tmp_path):
    (tmp_path / "0_Transformer").symlink_to(_folder("bert"))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "0_Transformer"}, {"path": "1_Pooling"}]))
    assert read_config(str(tmp_path)).model_type == "bert"
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="has no config.json"):
        read_config(str(tmp_path))


# Arguments


def test_bidirectional_is_for_embeddings(capsys):
    with pytest.raises(ValueError, match=r"`bidirectional` \(True\) lets a decoder see later tokens"):
        verify("qwen3", bidirectional=True)
    assert main(["verify", "qwen3", "--bidirectional"]) == 2
    assert "set `task` to 'embedding', or drop `bidirectional`" in capsys.readouterr().out


def test_embeddings_need_sentence_transformers(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "sentence_transformers" else find(name)
    )
    with pytest.raises(ImportError, match=r"`task` \('embedding'\) needs sentence-transformers: `pip install"):
        verify("bert", task="embedding")
    assert main(["verify", "bert", "--task", "embedding"]) == 2
    assert "hf-longctx[embedding]" in capsys.readouterr().out


# The page


def test_the_committed_page_has_nothing_wrong_and_every_refusal_has_a_sentence():
    page = (Path(__file__).parents[2] / "docs" / "conformance_embeddings.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    decoders = {f"`{name}`" + ", no causal mask" * both for name in DECODERS for both in (False, True)}
    assert decoders | {"`bert`", "`modernbert`", "`xlm-roberta`"} <= {cells[0] for cells in rows}
    assert not {cells[1] for cells in rows} - {"exact", "refused", "not buildable"}
    assert all(cells[3] for cells in rows if cells[1] != "exact" or cells[2] != "exact")
    exact = sum(cells[1] == cells[2] == "exact" for cells in rows)
    assert exact >= 35 and f"{exact} of {len(rows)} are exact in both ways." in page
