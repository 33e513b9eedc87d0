"""Base models that fast weights can be added to, and those that compute more than their parts: refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers.models.llama import modeling_llama as llama

from hf_longctx import TTTConfig, TTTForCausalLM
from tests.fast_weights import tiny_base, tiny_ttt, tokens
from tests.models import VOCAB


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS = TTTConfig(window=5, chunk_tokens=4, suffix_layers=1)


def small_base(name: str, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 32} if name == "gpt2" else SIZES
    config = tf.AutoConfig.for_model(name, **{**sizes, **changes})
    kind = tf.BertForMaskedLM if name == "bert" else tf.AutoModelForCausalLM._model_mapping[type(config)]
    return kind._from_config(config, attn_implementation="eager").to(dtype)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {}, "`GPT2LMHeadModel` has no `embed_tokens` in its decoder"),
        ("bert", {}, "`BertForMaskedLM` is not trained on the next token"),
        ("gemma2", {}, r"`layers.2` \(`Gemma2DecoderLayer`\) .*: take a Llama-like base model"),
        ("gemma3_text", {}, "rotates each kind of layer in its own way"),
        ("olmo2", {}, r"`layers.2` \(`Olmo2DecoderLayer`\) has no `input_layernorm`.*: take a Llama-like base model"),
        ("cohere", {}, r"`layers.2` \(`CohereDecoderLayer`\) has no `post_attention_layernorm`.*: take a Llama-like"),
        ("phi3", {"resid_pdrop": 0.5}, r"`layers.2` \(`Phi3DecoderLayer`\) computes more than its norms"),
        ("granite", {"embedding_multiplier": 1.04}, "what enters `layers.0` and what the parts give differ by"),
        ("granite", {"logits_scaling": 1.04}, "its logits and what the parts give differ by"),
        ("granite", {"residual_multiplier": 1.04}, r"`layers.2` \(`GraniteDecoderLayer`\) computes more"),
        ("mixtral", {"num_local_experts": 2}, r"`layers.2` \(`MixtralDecoderLayer`\) routes tokens to experts"),
        ("mixtral", {"output_router_logits": True}, r"a loss of its routers \(`output_router_logits=True`\)"),
        ("lfm2", {"layer_types": ["full_attention", "conv", "conv"]}, "has no `"),
    ],
)
def test_bases_that_are_not_like_llama(name, changes, message):
    # In bfloat16, where a factor of 1.04 looks like noise.
    base = small_base(name, torch.bfloat16 if name == "granite" else torch.float32, **changes)
    with pytest.raises(NotImplementedError, match=message):
        TTTForCausalLM.from_base(base, SETTINGS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "phi3"])
def test_bases_that_are(name):
    base = small_base(name, torch.bfloat16)
    own = base(tokens(1, 5)).logits
    model = TTTForCausalLM.from_base(base, TTTConfig(window=8, chunk_tokens=8, suffix_layers=2))
    assert torch.equal(model(tokens(1, 5)).logits, own)


def from_changed(change, **changes):
    base = tiny_base(dtype=torch.float32, **changes)
    change(base)
    return TTTForCausalLM.from_base(base, TTTConfig(window=8, chunk_tokens=4, suffix_layers=2))


class Louder(llama.LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return 1.001 * super().forward(*args, **kwargs)


class Unnamed(llama.LlamaAttention):
    """Takes what it attends to by place only, as its layer below gives it."""

    def forward(self, states, /, **kwargs):
        return super().forward(states, **kwargs)


class CallsByPlace(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states + attended))


def test_layers_that_compute_more_than_their_parts():
    def loudly(base, index):
        base.model.layers[index].__class__ = Louder

    def by_place(base):
        base.model.layers[2].__class__, base.model.layers[2].self_attn.__class__ = CallsByPlace, Unnamed

    with pytest.raises(NotImplementedError, match="`layers.2` .* computes more .*: take a Llama-like base model"):
        from_changed(lambda base: loudly(base, 2))
    with pytest.raises(NotImplementedError, match="`layers.1` .* computes more .*: set `suffix_layers` to 1 at most"):
        from_changed(lambda base: loudly(base, 1))
    with pytest.raises(NotImplementedError, match=r"cannot be taken apart \(TypeError"):
        from_changed(by_place)


def test_what_surrounds_the_layers():
    def more(module, args, kwargs):
        return args, {**kwargs, "per_layer_input": torch.ones(1)}

    def turn(base):
        base.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "position_embeddings": [-t for t in kwargs["position_embeddings"]]},
            ),
            with_kwargs=True,
        )

    def turn_round(base):
        base.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}), with_kwargs=True
        )

    with pytest.raises(NotImplementedError, match="what enters `layers.0` and"):
        from_changed(turn_round)
    with pytest.raises(NotImplementedError, match="the rotation of `layers.1` and"):
        from_changed(turn)
    with pytest.raises(NotImplementedError, match="gives `layers.1` a `per_layer_input`"):
        from_changed(lambda base: base.model.layers[1].register_forward_pre_hook(more, with_kwargs=True))
    with pytest.raises(NotImplementedError, match=r"does not run on a few tokens \(ZeroDivisionError"):
        from_changed(lambda base: base.model.register_forward_pre_hook(lambda module, args: 1 / 0))
    with pytest.raises(NotImplementedError, match=r"`model.drop` of `LlamaForCausalLM` drops values .* \(p = 0.5\)"):
        from_changed(lambda base: base.model.add_module("drop", torch.nn.Dropout(0.5)))


def test_layers_that_are_not_what_the_configuration_says():
    class WithoutWindow(llama.LlamaDecoderLayer):
        calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return super().forward(*args, **kwargs) if self.calls < 2 else 1 / 0

    def of_images(base):
        base.config.get_text_config = lambda *args, **kwargs: copy.copy(base.config)

    def count(base):
        base.model.layers = base.model.layers[:2]

    for change, message in (
        (lambda base: setattr(base.model, "rotary_emb", None), "has no `rotary_emb` in its decoder"),
        (of_images, r"reads more than text \(its `LlamaConfig`"),
        (count, r"`suffix_layers` \(2\) must be below the 2 layers that `LlamaForCausalLM` runs"),
        (
            lambda base: delattr(base.model.layers[0], "self_attn"),
            r"`layers.0` \(`LlamaDecoderLayer`\) has no `self_attn`",
        ),
        (
            lambda base: setattr(base.model.layers[0], "__class__", WithoutWindow),
            r"do not run on a few tokens with a window \(ZeroDivisionError",
        ),
    ):
        with pytest.raises(NotImplementedError, match=message):
            from_changed(change)


@pytest.mark.parametrize(
    ("weight", "place"),
    [("model.embed_tokens.weight", "embedding"), ("model.layers.1.mlp.up_proj.weight", "layers.1"), ("", "head")],
)
def test_weights_that_are_not_finite(weight, place):
    def spoil(base):
        weights = base.get_parameter(weight or "lm_head.weight")
        with torch.no_grad():
            weights[:] = torch.nan

    with pytest.raises(ValueError, match=f"what leaves the `{place}` of `LlamaForCausalLM` is not finite"):
        from_changed(spoil, tie_word_embeddings=False)


def test_a_base_that_is_held_is_not_called_by_itself():
    base = tiny_base("mistral", torch.float32)
    model = tiny_ttt(torch.float32, base, window=4, chunk_tokens=4)
    for call in (lambda: base(tokens()), lambda: base.model(tokens()), lambda: model.base.generate(tokens())):
        with pytest.raises(RuntimeError, match="`MistralModel` is held by a model with fast weights"):
            call()
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)


def test_a_base_that_is_held_is_not_held_again():
    model = tiny_ttt(torch.float32)
    for base in (model.base, copy.deepcopy(model.base)):
        with pytest.raises(ValueError, match="`LlamaForCausalLM` is held by a model with fast weights already"):
            TTTForCausalLM.from_base(base, SETTINGS)


def test_hooks_that_would_not_run():
    def device_map(layer):
        layer.forward = type(layer).forward.__get__(layer)

    seen = []
    model = tiny_ttt(torch.float32)
    model.parts.suffix[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    model.parts.prefix[0].register_forward_hook(lambda *args: seen.append(1))
    model(tokens())
    assert len(seen) > 1
    for change in (
        lambda layer: layer.register_forward_hook(lambda *args: None),
        lambda layer: layer.register_forward_pre_hook(lambda *args: None),
        lambda layer: layer.register_full_backward_hook(lambda *args: None),
        device_map,
    ):
        changed = copy.deepcopy(model)
        change(changed.parts.suffix[1])
        with pytest.raises(NotImplementedError, match=r"`layers.2` \(`LlamaDecoderLayer`\) has a .* would not run"):
            changed(tokens())
    model.base.register_forward_hook(lambda *args: None)
    with pytest.raises(NotImplementedError, match=r"`base` \(`LlamaForCausalLM`\) has a hook, which would not run"):
        model(tokens())


def test_attention_without_a_configuration():
    with pytest.raises(NotImplementedError, match="has no `config` that names its kernel"):
        from_changed(lambda base: setattr(base.model.layers[2].self_attn, "config", None))


def test_quantised_suffix_weights():
    def quantise(base):
        weight = base.model.layers[2].mlp.up_proj.weight
        base.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)

    with pytest.raises(NotImplementedError, match=r"`layers.2.mlp.up_proj.weight` is quantised \(int8\)"):
        from_changed(quantise)


def test_rotations_that_depend_on_the_length_of_a_row():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(NotImplementedError, match="`rope_type` 'dynamic'"):
        from_changed(lambda base: None, rope_parameters=rope)
