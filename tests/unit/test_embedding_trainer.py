"""The embedding trainer on one process: sentence-transformers' run without padding, resumed, and its refusals."""

from __future__ import annotations

import logging
import re

import pytest
import torch


pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import _create_minibatch, _minibatch_ranges
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.sentence_transformer import losses

from hf_longctx import TextsConfig, pack_embeddings
from hf_longctx.embedding import packed_model
from hf_longctx.embedding.text_collator import refuse_empty_texts
from hf_longctx.losses.contrastive import contrastive_loss
from hf_longctx.resilience.checkpoint_weights import check_weights

from ..embedding import columns, embedder, gradients_of
from ..embedding_training import arguments, assert_same_run, build_trainer, evaluator, loss_of, pairs, run
from ..training import reset_state
from .test_embedding import assert_same_gradients


TOLERANCE = 1e-8  # float64 throughout


def host_run(folder: str) -> dict:
    """The stock trainer, padded, with the stock loss."""
    reset_state()
    model = embedder("bert", "sdpa")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(folder),
        train_dataset=pairs(),
        eval_dataset=pairs(8, 9),
        evaluator=evaluator(),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    scores = trainer.evaluate()
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "weights": weights,
        "scores": scores,
    }


def test_a_run_equals_the_hosts_padded_one_with_its_evaluation(tmp_path):
    expected = host_run(str(tmp_path))
    actual = run(loss="tiled", attention="packed", evaluates=True)
    assert_same_run(expected, actual, TOLERANCE)
    names = [name for name in expected["scores"] if "cosine" in name or name == "eval_loss"]
    assert len(names) >= 3
    assert {name: actual["scores"][name] for name in names} == pytest.approx(
        {name: expected["scores"][name] for name in names}, rel=1e-6
    )


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("pairs", {}),
        ("sources", {"swap_probability": 0.5}),
        ("streams", {"source_weights": {"short": 1, "long": 2}}),
        ("stream", {}),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path, data, sources):
    settings = {"data": data, "loss": "learnable", "sources": sources, "attention": "packed", "optim": "adamw_torch"}
    expected = run(**settings, max_steps=4, learning_rate=1e-3)
    first = run(**settings, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2, folder=str(tmp_path))
    resumed = run(**settings, max_steps=4, learning_rate=1e-3, folder=str(tmp_path), resume=f"{tmp_path}/checkpoint-2")
    assert first["losses"] == expected["losses"]
    assert resumed["losses"][-2:] == expected["losses"][-2:]
    for name, value in expected["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def test_resuming_with_another_loss_or_other_modules_is_refused(tmp_path):
    settings = {"attention": "packed", "max_steps": 1}
    run(**settings, save_strategy="steps", save_steps=1, folder=str(tmp_path))
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="holds nothing, and the loss of this run learns loss.log_scale: resume with"):
        run(**settings, loss="learnable", resume=str(folder))
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text("[]")
    with pytest.raises(
        ValueError, match="lists 0 modules, and this run trains 2: resume from a checkpoint of the same"
    ):
        check_weights(embedder("bert"), folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json` cannot be read"):
        check_weights(embedder("bert"), folder)
    (folder / "modules.json").write_text(modules)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is missing, cut off or damaged"):
        check_weights(embedder("bert"), folder)


def test_mixed_precision_accumulation_and_checkpointing_run():
    common = {"attention": "packed", "loss": "tiled cached", "max_steps": 2, "gradient_accumulation_steps": 2}
    plain = run(**common)
    recomputed = run(**common, gradient_checkpointing=True)
    assert_same_run(plain, recomputed, TOLERANCE)
    half = run(**common, bf16=True)
    assert half["losses"] == pytest.approx(plain["losses"], rel=0.1)  # 8 bits of mantissa


def test_a_vanilla_model_comes_out(tmp_path):
    from sentence_transformers import SentenceTransformer

    trainer = build_trainer(attention="packed", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    expected = trainer.model.encode(["w1 w2", "w3"], convert_to_tensor=True)
    assert torch.allclose(again.encode(["w1 w2", "w3"], convert_to_tensor=True), expected, atol=TOLERANCE)
    assert "hf_longctx" not in (tmp_path / "modules.json").read_text()


def test_texts_that_would_be_cut_off_are_counted_before_training(caplog, tmp_path):
    def build(policy: str):
        reset_state()
        model = embedder("bert", "packed")
        model.max_seq_length = 10
        return build_from(model, policy)

    def build_from(model, policy):
        from hf_longctx import LongContextSentenceTransformerTrainer

        return LongContextSentenceTransformerTrainer(
            model=model,
            args=arguments(str(tmp_path)),
            train_dataset=Dataset.from_dict({"a": ["w1 " * 30, "w1"], "b": ["w2", "w3 w4"]}),
            loss=loss_of("tiled", model),
            texts=TextsConfig(overlong_texts=policy),
        )

    with caplog.at_level(logging.WARNING, "hf_longctx"):
        build("truncate")
        assert not [record for record in caplog.records if "cut off" in record.message]
        build("warn")
    message = next(record.message for record in caplog.records if "cut off" in record.message)
    assert "1 of 4 texts looked at are longer than `model.max_seq_length` (10), and 58.8% of all tokens" in message
    with pytest.raises(ValueError, match="split the texts, or set `overlong_texts` to 'truncate'"):
        build("error")


def test_an_empty_text_is_refused_by_row_and_column():
    rows = [{"a": "w1", "b": "w2"}, {"a": "w3 w4", "b": "  "}]
    with pytest.raises(
        ValueError, match="the text of column `b` in row 1 of a batch of 2 is empty .next to it: 'w3 w4'"
    ):
        refuse_empty_texts(rows)


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize("column", ["anchor", "positive", "label"])
def test_nothing_in_a_column_is_refused_by_row_and_column(column, nothing):
    rows = [{"anchor": "w1", "positive": "w2", "label": 1.0}, {"anchor": "w3", "positive": "w4", "label": 0.0}]
    rows[1][column] = nothing
    with pytest.raises(ValueError, match=f"column `{column}` in row 1 of a batch of 2 is {nothing}: remove such rows"):
        refuse_empty_texts(rows)


REFUSED = {
    "`source_temperature` (2.0) speaks of sources by name, but `train_dataset` is one `Dataset`": (
        ValueError,
        {"sources": {"source_temperature": 2.0}},
    ),
    "would let the texts of a flat row see each other": (ValueError, {"attention": "sdpa"}),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items())
def test_runs_that_cannot_be_are_refused_before_they_start(message, case):
    error, settings = case
    with pytest.raises(error, match=re.escape(message)):
        build_trainer(**settings)


@pytest.mark.parametrize("check", [True, False])
def test_the_proof_of_packing_is_made_unless_it_is_left_out(monkeypatch, check):
    proofs = []
    monkeypatch.setattr(packed_model, "prove_packing", lambda *args, **kwargs: proofs.append(1))
    build_trainer(attention="packed", config={"check_packing": check})
    assert len(proofs) == check


def test_an_unknown_policy_for_long_texts_is_refused():
    with pytest.raises(ValueError, match=re.escape("`overlong_texts` ('cut') must be one of warn, error, truncate")):
        TextsConfig(overlong_texts="cut")


def test_an_order_of_the_host_is_kept_on_one_group():
    trainer = build_trainer(data="sources", attention="packed", batch_sampler=BatchSamplers.NO_DUPLICATES)
    samplers = trainer.get_train_dataloader().batch_sampler.batch_samplers
    assert [type(sampler) for sampler in samplers] == [NoDuplicatesBatchSampler] * 2
    trainer.train()


def test_gradient_caching_replays_dropout_exactly():
    """The same mini-batches with their graphs kept, and with them replayed from their random states."""
    results = []
    for cached in (False, True):
        model = pack_embeddings(embedder("bert", "packed"))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        model.train()
        features = columns(model, (5, 1, 9, 3, 2, 8), (17, 4, 2, 30, 6, 1))
        torch.manual_seed(3)
        loss_function = loss_of("tiled cached", model)
        if cached:
            loss = loss_function(features, None)
        else:
            parts = [_minibatch_ranges(column, 0, 30) for column in features]
            kept = [
                torch.cat([model(_create_minibatch(column, *part))["sentence_embedding"] for part in ranges])
                for column, ranges in zip(features, parts)
            ]
            assert min(map(len, parts)) >= 1 and max(map(len, parts)) >= 2
            loss = contrastive_loss(kept)
        loss.backward()
        results.append((loss.detach(), gradients_of(model)))
    (expected_loss, expected), (loss, actual) = results
    assert torch.allclose(loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


def test_a_step_that_is_not_finite_is_skipped_or_refused_with_its_rows(monkeypatch):
    def poisoned(policy: str):
        trainer = build_trainer(attention="packed", config={"on_nonfinite": policy}, loss="tiled cached")
        own, calls = type(trainer.model).forward, []

        def forward(features, **kwargs):
            output = own(trainer.model, features, **kwargs)
            calls.append(1)
            if len(calls) == 1:
                output["sentence_embedding"] = output["sentence_embedding"] * torch.nan
            return output

        monkeypatch.setattr(trainer.model, "forward", forward)
        trainer.train()
        return trainer.state.log_history

    with pytest.raises(ValueError, match=re.escape("the embeddings of column 0 (queries) are not finite in")):
        poisoned("raise")
    history = poisoned("skip")
    assert [entry.get("skipped_steps") for entry in history if "loss" in entry] == [1, 1, 1]


def test_a_token_budget_makes_batches_of_one_data_set():
    trainer = build_trainer(attention="packed", sources={"tokens_per_rank": 60, "deduplicate": True})
    lengths = []
    for batch in list(zip(range(4), trainer.get_train_dataloader())):
        lengths.append(sum(batch[1][f"{column}_input_ids"].numel() for column in ("anchor", "positive")))
    assert len(lengths) == 4
    assert max(lengths) <= 60
    assert min(lengths) > 60 - 2 * 21  # the longest pair would not have fit any more
