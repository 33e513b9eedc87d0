"""`verify(task="embedding")` on ranks: exact under every wrapper, wrong where an exchange loses a gradient."""

from __future__ import annotations

import pytest
import transformers as tf


pytest.importorskip("sentence_transformers")

from hf_longctx.parallel import collectives
from hf_longctx.proof import compare
from hf_longctx.proof.model_under_test import EMBEDDING_KINDS, ModelUnderTest, Setting
from hf_longctx.proof.result import EXACT, REFUSED, WRONG
from hf_longctx.proof.verification import merge

from ..lengths import rope_of


def outcomes(world, config, setting, function=compare.prove):
    return merge(world.run(function, ModelUnderTest.of(config, "embedding", setting.sequence_parallel_size), setting))


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (tf.ModernBertConfig, Setting(2, kinds=EMBEDDING_KINDS)),
        (tf.BertConfig, Setting(2, kinds=("shared",), wrapper="fsdp2")),
        (tf.LlamaConfig, Setting(2, 2, kinds=("shared",), wrapper="ddp")),  # two batches, one set of negatives
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_embeddings_loss_and_gradients_of_ranks_are_those_of_the_padded_model(worlds, config, setting):
    results = outcomes(worlds(setting.world_size), config(), setting)
    assert [(rows.rows, rows.outcome) for rows in results] == [(kind, EXACT) for kind in setting.kinds], results
    for rows in results:
        assert 0 < rows.errors.worst <= rows.tolerance < rows.baseline / 100


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_reads_the_length_gets_that_of_each_text(world2, rope):
    """Texts on both sides of its threshold; the reference embeds them one by one, without padding."""
    config = tf.Qwen3Config(rope_parameters=rope_of(rope, pairs=64), max_position_embeddings=4096)
    results = outcomes(world2, config, Setting(2, kinds=EMBEDDING_KINDS))
    assert [(rows.rows, rows.outcome) for rows in results] == [(kind, EXACT) for kind in EMBEDDING_KINDS], results


def prove_without_the_gradient_of_others(tested, setting):
    """Pooling's sum over the ranks; forward, and so the proof of `pack_embeddings`, is right."""
    right = collectives._SumOverSequence.backward
    collectives._SumOverSequence.backward = staticmethod(lambda ctx, grad: (grad, None))
    try:
        return compare.prove(tested, setting)
    finally:
        collectives._SumOverSequence.backward = staticmethod(right)


def test_a_pooling_that_loses_the_gradient_of_other_ranks_is_wrong(world2):
    setting = Setting(2, kinds=("shared",))
    (rows,) = outcomes(world2, tf.BertConfig(), setting, prove_without_the_gradient_of_others)
    assert rows.outcome == WRONG and rows.dtype == "float64"
    assert rows.errors.gradient > 1e-2 > rows.errors.logits and rows.errors.parameter in rows.message


def test_a_kernel_that_is_not_there_is_refused_for_shared_rows_only(world2):
    results = outcomes(world2, tf.BertConfig(), Setting(2, inner_attention="flash_attention_2", kinds=EMBEDDING_KINDS))
    assert [rows.outcome for rows in results] == [EXACT, REFUSED]
    assert "flash_attention_2" in results[1].message
