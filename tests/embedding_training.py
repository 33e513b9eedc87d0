"""One embedding run described by plain values, so that it can be sent to any world and compared with one process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from hf_longctx import (
    LongContextConfig,
    LongContextSentenceTransformerTrainer,
    SourcesConfig,
    SpanRankingLoss,
    TextsConfig,
    TiledMultipleNegativesRankingLoss,
)

from .embedding import embedder, texts
from .training import DEFAULTS, reset_state


def pairs(count: int = 24, seed: int = 0, negatives: int = 0) -> Dataset:
    lengths = [2 + (7 * index + seed) % 19 for index in range(count)]
    columns = {"anchor": texts(tuple(lengths), seed), "positive": texts(tuple(reversed(lengths)), seed + 500)}
    for index in range(negatives):
        columns[f"negative_{index}"] = texts(tuple(lengths), seed + 1000 * (index + 1))
    return Dataset.from_dict(columns)


def data_of(name: str):
    if name == "pairs":
        return pairs()
    if name == "triplets":
        return pairs(negatives=1)
    if name == "spans":
        rows = pairs()
        documents = rows["positive"]
        spans = [[(0, 2), (3, len(text))] if len(text) > 4 else [(0, len(text))] for text in documents]
        return Dataset.from_dict(
            {
                "query": rows["anchor"],
                "document": documents,
                "document_spans": spans,
                "label": [len(each) - 1 for each in spans],
            }
        )
    if name == "stream":
        return pairs().to_iterable_dataset()
    sources = {"short": pairs(12, 1), "long": pairs(30, 2)}
    if name == "streams":
        return {key: rows.to_iterable_dataset() for key, rows in sources.items()}
    return sources


def loss_of(name: str, model):
    kinds = {
        "tiled": lambda: TiledMultipleNegativesRankingLoss(model, mini_batch_size=None, loss_tile_size=3),
        "tiled cached": lambda: TiledMultipleNegativesRankingLoss(model, mini_batch_num_tokens=30, loss_tile_size=3),
        "tiled ring": lambda: TiledMultipleNegativesRankingLoss(model, mini_batch_size=2, negatives="ring"),
        "learnable": lambda: TiledMultipleNegativesRankingLoss(model, mini_batch_size=2, learnable_scale=True),
        "matryoshka": lambda: losses.MatryoshkaLoss(
            model, TiledMultipleNegativesRankingLoss(model, mini_batch_size=2), matryoshka_dims=[48, 16]
        ),
        "spans": lambda: SpanRankingLoss(model, mini_batch_size=3),
        "mnrl": lambda: losses.MultipleNegativesRankingLoss(model),
        "gathering": lambda: losses.MultipleNegativesRankingLoss(model, gather_across_devices=True),
    }
    return kinds[name]()


def arguments(folder: str, **changes) -> SentenceTransformerTrainingArguments:
    defaults = {**DEFAULTS, "max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    defaults["output_dir"] = folder
    return SentenceTransformerTrainingArguments(**{**defaults, **changes})


def evaluator() -> EmbeddingSimilarityEvaluator:
    scores = [0.1, 0.9, 0.3, 0.5, 0.7]
    return EmbeddingSimilarityEvaluator(texts((5, 9, 3, 7, 30)), texts((6, 2, 8, 4, 20), 50), scores)


def build_trainer(model="bert", data="pairs", loss="tiled", config=None, pooling="mean", evaluates=False, **changes):
    """A trainer; `sources` and `texts` are fields of those configs, `config` those of `LongContextConfig`."""
    reset_state()
    folder = changes.pop("folder", None) or tempfile.mkdtemp()
    attention = changes.pop("attention", "ulysses")
    sources, texts_ = changes.pop("sources", {}), changes.pop("texts", {})
    encoder = embedder(model, attention, pooling)
    return LongContextSentenceTransformerTrainer(
        model=encoder,
        args=arguments(folder, **changes),
        train_dataset=data_of(data),
        eval_dataset=pairs(8, 9) if evaluates else None,
        evaluator=evaluator() if evaluates else None,
        loss=loss_of(loss, encoder),
        long_context=LongContextConfig(**(config or {})),
        sources=SourcesConfig(**sources),
        texts=TextsConfig(**texts_),
    )


def run(resume=None, **settings):
    """Losses, gradient norms, final weights and scores of a run."""
    evaluates_first = settings.pop("evaluates_first", False)
    trainer = build_trainer(**settings)
    if evaluates_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "weights": weights,
        "scores": trainer.evaluate() if settings.get("evaluates") else {},
        "folder": str(Path(trainer.args.output_dir)),
    }


def assert_same_run(expected: dict, actual: dict, tolerance: float) -> None:
    # Sentence-transformers sums logged losses in single precision.
    for key, allowed in (("losses", max(tolerance, 1e-6)), ("norms", tolerance)):
        difference = torch.tensor(expected[key], dtype=torch.float64) - torch.tensor(actual[key], dtype=torch.float64)
        assert float(difference.abs().max()) <= allowed * max(map(abs, expected[key])), key
    for name, value in expected["weights"].items():
        assert float((actual["weights"][name] - value).abs().max()) <= tolerance * max(float(value.abs().max()), 1), (
            name
        )
