"""`verify` puts lengths at which a layer changes inside its tiny rows: adapted models are exact, others show."""

from __future__ import annotations

import pytest
import transformers as tf

from hf_longctx.adapters import attach
from hf_longctx.adapters.row_lengths import follow_lengths
from hf_longctx.attention import packed
from hf_longctx.proof import compare
from hf_longctx.proof.model_under_test import KINDS, ModelUnderTest, Setting
from hf_longctx.proof.tiny import shrink
from hf_longctx.proof.verification import merge
from hf_longctx.trainer import adaptation
from hf_longctx.trainer.sanity_check import SanityResult


def longrope(pairs: int, **more) -> dict[str, object]:
    factors = {"short_factor": [1.0] * pairs, "long_factor": [2.0 + pair for pair in range(pairs)]}
    return {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 32.0, **factors, **more}


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
CONFIGS = {
    "llama dynamic": lambda: tf.LlamaConfig(rope_parameters=DYNAMIC),
    "llama longrope": lambda: tf.LlamaConfig(rope_parameters=longrope(64)),
    "qwen3 dynamic": lambda: tf.Qwen3Config(rope_parameters=DYNAMIC),
    "qwen3 longrope": lambda: tf.Qwen3Config(rope_parameters=longrope(64)),
    "phi3 longrope": lambda: tf.Phi3Config(rope_parameters=longrope(48)),
    "phimoe longrope": lambda: tf.PhimoeConfig(rope_parameters=longrope(64, short_mscale=1.2, long_mscale=1.4)),
    "llama4": tf.Llama4TextConfig,
    "ministral3": tf.Ministral3Config,
}


def prove(world, config, function=compare.prove):
    return {rows.rows: rows for rows in merge(world.run(function, ModelUnderTest.of(config, None, 2), SETTING))}


SETTING = Setting(2, kinds=KINDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_read_lengths_are_exact_on_every_kind_of_rows(world2, name):
    results = prove(world2, CONFIGS[name]())
    assert {kind: rows.outcome for kind, rows in results.items()} == dict.fromkeys(KINDS, "exact"), results


def prove_without_the_adapter(tested, setting):
    """Nothing tells the length, and no check looks for it but the numbers."""
    saved = attach._ADAPTERS, packed.validate_positions, adaptation.run_sanity_check
    attach._ADAPTERS = tuple(follow for follow in saved[0] if follow is not follow_lengths)
    packed.validate_positions = lambda *args: None
    adaptation.run_sanity_check = lambda *args, **kwargs: SanityResult()
    try:
        return compare.prove(tested, setting)
    finally:
        attach._ADAPTERS, packed.validate_positions, adaptation.run_sanity_check = saved


@pytest.mark.parametrize("name", ["llama dynamic", "qwen3 longrope", "phimoe longrope", "llama4"])
def test_the_same_models_are_wrong_without_the_adapter_and_the_proof_sees_it(world2, name):
    results = prove(world2, CONFIGS[name](), prove_without_the_adapter)
    assert {rows.outcome for rows in results.values()} == {"wrong"}, results


@pytest.mark.parametrize("name", CONFIGS)
def test_thresholds_of_tiny_models_are_inside_their_rows(name):
    tiny = shrink(CONFIGS[name]())
    rope = tiny.rope_parameters
    if name == "llama4":
        assert tiny.floor_scale == 5
    elif rope["rope_type"] == "dynamic":
        assert tiny.max_position_embeddings == 12
    else:
        assert rope["original_max_position_embeddings"] == 12
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert shrink(tf.LlamaConfig(rope_parameters=yarn)).rope_parameters["original_max_position_embeddings"] == 4096
