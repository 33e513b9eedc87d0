"""The toys that recall: what their rows ask, what is measured, and that both recipes run as they are started."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_longctx import IndexerConfig, LongContextConfig, MemoryConfig
from hf_longctx.tasks import indexer_warmup, recall_sparse
from hf_longctx.tasks.recall_rows import RecallRows, copy_model


ROOT = Path(__file__).parents[2]
TOY = indexer_warmup.IndexerWarmupArguments(row_tokens=24, num_keys=5, num_values=3, index_topk=3, num_eval_rows=4)


def test_the_answer_of_a_question_stands_where_the_distance_says():
    rows = TOY.rows(9, seed=1)
    for row, (tokens, answers) in enumerate(zip(rows.input_ids.tolist(), rows.answers.tolist())):
        labels = rows[row]["labels"].tolist()
        bound = [token for token in tokens if token >= 5]
        assert sorted((token - 5) // 3 for token in bound) == list(range(5)) and labels == [-100, *answers[:-1]]
        for place, (token, answer) in enumerate(zip(tokens, answers)):
            back = int(rows.distances[row, place])
            assert (back == 0) == (token >= 5) == (answer == -100)
            if back:
                assert tokens[place - back] == 5 + token * 3 + answer
    assert int(rows.input_ids.max()) < RecallRows.vocab_size(5, 3)


def test_more_keys_than_the_first_half_of_a_row_holds_are_refused():
    with pytest.raises(ValueError, match=r"`num_keys` \(13\) are bound in the first half of 24 tokens"):
        replace(TOY, num_keys=13).rows(1, seed=0)


def test_measured_attention_is_that_of_the_picks():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(indexer_warmup.tiny_config(TOY), attn_implementation="packed")
    rows = TOY.rows(4, seed=2)
    found = indexer_warmup.measure(model, rows, 3)
    with torch.no_grad():
        dense = copy_model(model, "eager")(rows.input_ids, output_attentions=True, use_cache=False).attentions
        sparse = copy_model(model, "eager", index_topk=3)
        seen = sparse(rows.input_ids, output_attentions=True, use_cache=False).attentions[0].mean(1) > 0
    # The first layer of a sparse model attends to the picks and to nothing else; a later one has other inputs.
    (attention, picks), *_ = indexer_warmup.attention_and_picks(copy_model(model, "eager"), rows)
    assert torch.allclose(attention.gather(2, picks[..., :3]).sum(-1), (dense[0].mean(1) * seen).sum(-1), atol=1e-6)
    best = torch.stack([layer.mean(1).topk(3).values.sum(-1)[:, 3:].mean() for layer in dense])
    assert found["best"] == pytest.approx(best.mean().item(), abs=1e-6)
    assert 0 < found["recall"] < found["best"] < 1 and found["share"] == found["recall"] / found["best"]


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({}, 4, r"`dense_steps` \(4\) must be 1 or more and below `max_steps` \(4\)"),
        ({"index_topk": 24}, 2, r"`index_topk` \(24\) must be 1 or more and below `row_tokens` \(24\)"),
    ],
)
def test_stages_with_nothing_to_show_are_refused(changes, steps, message, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to="none")
    configs = LongContextConfig(), MemoryConfig(), IndexerConfig(loss="dense", dense_steps=steps)
    with pytest.raises(ValueError, match=message):
        indexer_warmup.run_stages(replace(TOY, **changes), args, *configs)


def test_the_warmup_recipe_measures_every_stage(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    changes = (
        "--row_tokens 24 --num_keys 5 --index_topk 3 --base_steps 2 --num_eval_rows 4 --dense_steps 2 --max_steps 4"
    )
    config = str(ROOT / "recipes" / "indexer_warmup_tiny.yaml")
    changes += " --dense_steps 2 --max_steps 4 --logging_steps 1 --per_device_train_batch_size 2"
    monkeypatch.setattr(sys, "argv", f"x --config {config} {changes} --output_dir {tmp_path}".split())
    indexer_warmup.main()
    found = json.loads((tmp_path / indexer_warmup.STAGES_FILE).read_text())
    assert [row["stage"] for row in found["stages"]] == [
        "dense model, untrained indexers",
        "indexers warmed up",
        "sparse model",
    ]
    # The warm-up changes nothing of the dense model.
    assert len({row["dense_accuracy"] for row in found["stages"][:2]}) == 1
    assert len({row["best"] for row in found["stages"][:2]}) == 1
    log = [entry for entry in found["log"] if "loss" in entry]
    assert len(log) == 4 and all(entry["indexer_kl"] > 0 and 0 < entry["indexer_recall"] <= 1 for entry in log)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_recall_recipe_draws_a_curve_for_every_kind(tmp_path):
    words = (
        "--row_tokens 24 --num_keys 5 --window 2 --index_topk 2 --steps 2 --dense_steps 1 --sparse_steps 1 --every 1"
    )
    recall_sparse.main([*words.split(), "--batch_size", "2", "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / recall_sparse.NUMBERS_FILE).read_text())
    steps = {name: [point["step"] for point in curve] for name, curve in found["curves"].items()}
    assert steps == {**dict.fromkeys(recall_sparse.KINDS, [1, 2]), recall_sparse.PICKED: [2, 3, 4]}
