"""What a model draws at random outside attention: jitter is a warning, and noise that is scaled by rows is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_longctx import LongContextConfig, LongContextTrainer
from hf_longctx.data.packing.collator import PackingCollator
from hf_longctx.trainer.random_draws import warn_about_draws

from ..models import _BASE, build
from ..training import Rows, arguments, pad_right, reset_state


_EXPERTS = {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DBRX = {"d_model": 48, "n_heads": 6, "n_layers": 1, "vocab_size": 97}
JITTER = {
    "jitter_noise": tf.MixtralConfig(**_EXPERTS, router_jitter_noise=0.1),
    "input_jitter_noise": tf.PhimoeConfig(**_EXPERTS, input_jitter_noise=0.1),
    "moe_jitter_eps": tf.DbrxConfig(
        **_DBRX,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1, "moe_jitter_eps": 0.1},
    ),
}


def own(caplog) -> list[str]:
    """What the package logged; other tests may have made transformers talk as well."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_longctx")]


@pytest.mark.parametrize("field", JITTER)
def test_jitter_of_a_router_is_told_as_dropout_is(field, caplog):
    model = tf.AutoModelForCausalLM.from_config(JITTER[field])
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        warn_about_draws(model, 1)
        assert not own(caplog)
        warn_about_draws(model, 2)
    assert f"`{field}` (0.1) of `model." in caplog.text or f"`{field}` (0.1) of `transformer." in caplog.text


def test_a_model_without_random_draws_is_told_nothing(caplog):
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**_EXPERTS))
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        warn_about_draws(model, 2)
    assert not own(caplog)


def start(tmp_path, model=None, collator=pad_right, size=1, **changes):
    reset_state()
    return LongContextTrainer(
        model=build("llama", "packed" if size == 1 else "ulysses") if model is None else model,
        args=arguments(str(tmp_path), **changes),
        train_dataset=Rows(4),
        data_collator=collator,
        long_context=LongContextConfig(sequence_parallel_size=size),
    )


def with_hook():
    model = build("llama", "ulysses")
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
    return model


def test_noise_that_is_scaled_by_packed_rows_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match=r"`neftune_noise_alpha` \(5.0\).*packed rows.*of each document"):
        start(tmp_path, collator=PackingCollator(), neftune_noise_alpha=5.0)
    with pytest.raises(NotImplementedError, match=r"`neftune_noise_alpha` \(5.0\).*`sequence_parallel_size` \(2\)"):
        start(tmp_path, model=with_hook(), size=2)
    start(tmp_path, collator=PackingCollator())


def test_rows_that_another_collator_packed_are_found_on_the_first_of_them(tmp_path):
    def flatten(rows):
        return dict(PackingCollator()(rows))

    with pytest.raises(NotImplementedError, match="a batch that packs several documents in a row"):
        start(tmp_path, collator=flatten, neftune_noise_alpha=5.0).train()


def test_padded_rows_keep_their_noise(tmp_path):
    trainer = start(tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
