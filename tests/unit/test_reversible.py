"""`make_reversible`: loss and every gradient of plain autograd on two streams, to the bit, and what it refuses."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import transformers as tf

from hf_longctx import LSHConfig, MemoryConfig, SequenceMesh, adapt, make_reversible, tie_query_key, use_lsh
from hf_longctx.adapters import reversible
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.adapters.tiled_mlp import tile_mlp
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.proof.tiny import shrink

from ..models import VOCAB, build
from .test_tiled_mlp import lora


# By model type: the children of each half-layer.
HALVES = {
    "llama": (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    "gpt2": (("ln_1", "attn"), ("ln_2", "mlp")),
    "gemma2": (
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
}


def batch(rows: int = 2, tokens: int = 13) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def two_streams_by_hand(model, halves):
    """Plain autograd over two float64 streams, the reference. Layers are called child by child."""

    def half(names, layer, tokens, args, kwargs):
        for name in names:
            child = getattr(layer, name)
            if "attn" in name:
                key = "cache" if "cache" in kwargs else "past_key_values"
                tokens = child(tokens, **{k: v for k, v in kwargs.items() if k not in (key, "use_cache")})[0]
            else:
                tokens = child(tokens)
        return tokens

    backbone = model.base_model
    layers = backbone.h if hasattr(backbone, "h") else backbone.layers
    streams = []
    for index, layer in enumerate(layers):

        def forward(hidden_states, *args, _index=index, _layer=layer, **kwargs):
            if args:  # GPT-2 passes its cache and mask by position
                kwargs = {"attention_mask": args[1], **kwargs}
                kwargs = {k: v for k, v in kwargs.items() if not k.startswith("encoder_")}
            one, two = streams if _index else [hidden_states.double()] * 2
            one = one + half(halves[0], _layer, two.to(hidden_states.dtype), args, kwargs).double()
            two = two + half(halves[1], _layer, one.to(hidden_states.dtype), args, kwargs).double()
            streams[:] = one, two
            return hidden_states if _index < len(layers) - 1 else ((one + two) * 0.5).to(hidden_states.dtype)

        layer.forward = forward
    return model


def gradients(model, inputs, autocast: bool = False, use_cache: dict | None = None):
    """Loss and every gradient, and where the random generator stands after it."""
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, **({"use_cache": False} if use_cache is None else use_cache)).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, torch.get_rng_state()


def assert_bits(actual, expected) -> None:
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys() != set()
    unequal = [name for name, gradient in expected[1].items() if not torch.equal(actual[1][name], gradient)]
    assert not unequal
    assert torch.equal(actual[2], expected[2])


def dropping(name: str, **changes):
    if name == "gpt2":
        changes = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, **changes}
    else:
        changes = {"attention_dropout": 0.1, **changes}
    return build(name, "eager" if name == "gemma2" else "sdpa", **changes).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "depth"), [("gpt2", 8), ("gpt2", 32), ("llama", 8), ("gemma2", 4)])
def test_loss_and_all_gradients_are_plain_autograds_to_the_bit(name, depth, dtype):
    changes = {"n_layer": depth} if name == "gpt2" else {"num_hidden_layers": depth}
    model = dropping(name, **changes).to(dtype)
    expected = gradients(two_streams_by_hand(copy.deepcopy(model), HALVES[name]), batch())
    make_reversible(model)
    assert_bits(gradients(model, batch()), expected)
    assert len(expected[1]) == len(list(model.parameters()))


def by_halves(calls, hidden_states):
    """Plain autograd over two streams with the halves that were found, for any model."""
    one = two = hidden_states.double()
    for call in calls:
        given = call.args, call.kwargs
        one = one + call.halves.run(0, call.layer, call.own, two.to(hidden_states.dtype), *given).double()
        two = two + call.halves.run(1, call.layer, call.own, one.to(hidden_states.dtype), *given).double()
    return ((one + two) * 0.5).to(hidden_states.dtype)


def both(model, monkeypatch, run=gradients):
    """What `run` gives for a reversible model with plain autograd, and in two streams."""
    with monkeypatch.context() as patch:
        patch.setattr(reversible, "run_two_streams", by_halves)
        expected = run(model, batch())
    return run(model, batch()), expected


# Experts, a state along the sequence, a multiplier, norms behind, layers of two kinds, a bidirectional encoder.
OTHERS = ("deepseek_v3", "gpt_oss", "llama4", "lfm2", "modernbert", "mistral", "qwen3")


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, monkeypatch):
    model = build(name, "eager").train()
    make_reversible(model)
    assert_bits(*both(model, monkeypatch, run=functools.partial(gradients, use_cache={})))


@pytest.mark.parametrize("kind", ["granite", "qwen3_next", "olmo2"])
def test_other_types(kind, monkeypatch):
    model = tf.AutoModelForCausalLM.from_config(shrink(tf.AutoConfig.for_model(kind))).train()
    make_reversible(model)
    assert_bits(*both(model, monkeypatch))


def test_together_with_tiled_mlps_lora_a_tiled_loss_and_autocast(monkeypatch):
    for name, targets in (("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])):
        model = build(name, "packed").train()
        tile_mlp(model, 5)
        make_reversible(model)
        model = lora(model, *targets, lora_dropout=0.1)
        tile_loss(model, 7)
        for autocast in (False, True):
            actual, expected = both(model, monkeypatch, run=functools.partial(gradients, autocast=autocast))
            assert_bits(actual, expected)
            assert all("lora_" in name for name in actual[1])


def test_tiled_mlps_on_top_of_reversible_layers(monkeypatch):
    model = build("llama", "sdpa").train()
    make_reversible(model)
    tile_mlp(model, 5)
    assert_bits(*both(model, monkeypatch))


def test_packed_rows(monkeypatch):
    model = build("llama", "packed").train()
    make_reversible(model)
    inputs = {**batch(1), "position_ids": torch.tensor([[*range(5), *range(8)]])}
    assert_bits(*both(model, monkeypatch, run=lambda model, _: gradients(model, inputs)))


def test_lsh_attention_with_dropout_in_packed_rows(monkeypatch):
    model = build("llama", "lsh", num_key_value_heads=6, attention_dropout=0.2).train()
    tie_query_key(model)
    use_lsh(model, LSHConfig(num_hashes=3, window=4, num_buckets=4))
    tile_mlp(model, 5)
    make_reversible(model)
    inputs = {**batch(1), "position_ids": torch.tensor([[*range(5), *range(8)]])}
    actual, expected = both(model, monkeypatch, run=lambda model, _: gradients(model, inputs))
    assert_bits(actual, expected)
    assert any("q_proj" in name for name in actual[1])


def test_gradients_add_up_and_hooks_of_parameters_run_once(monkeypatch):
    model = dropping("gpt2")
    make_reversible(model)
    ran: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: ran.append(name))
    gradients(model, batch())
    assert sorted(ran) == sorted(name for name, _ in model.named_parameters())

    def twice(model, inputs):
        model.zero_grad()
        torch.manual_seed(3)
        for _ in range(2):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, torch.get_rng_state()

    assert_bits(*both(model, monkeypatch, run=twice))


def test_a_frozen_layer_and_an_argument_with_a_gradient(monkeypatch):
    model = build("llama", "sdpa").train()
    make_reversible(model)
    model.model.layers[0].requires_grad_(False)
    bias = torch.zeros(2, 1, 13, 13, requires_grad=True)

    def run(model, inputs):
        bias.grad = None
        loss, found, state = gradients(model, {**inputs, "attention_mask": bias + 0.0})
        return loss, {**found, "bias": bias.grad.clone()}, state

    actual, expected = both(model, monkeypatch, run=run)
    assert_bits(actual, expected)
    assert actual[1]["bias"].any() and not any(".0." in name for name in actual[1])


def test_bytes_between_forward_and_backward_do_not_grow_with_depth():
    def held(depth: int) -> int:
        model = build("llama", "sdpa", num_hidden_layers=depth).train()
        make_reversible(model)
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch()).loss
        loss.backward()
        return sum(size for place, size in sizes.items() if place not in own)

    assert held(2) == held(9)


def test_it_leaves_the_random_generator_modes_and_outputs_alone():
    model = dropping("gpt2").eval()
    plain = model(**batch()).logits
    torch.manual_seed(5)
    state = torch.get_rng_state()
    handle = make_reversible(model)
    assert torch.equal(torch.get_rng_state(), state) and not any(m.training for m in model.modules())
    assert not torch.equal(model(**batch()).logits, plain)
    make_reversible(model)  # a second call changes nothing
    handle.remove()
    assert torch.equal(model(**batch()).logits, plain)
    assert "reversible" not in model.config.to_json_string() and not handle.modules


def test_generate_with_a_cache_is_the_forward_of_the_whole_row():
    for name in ("llama", "gpt2", "lfm2"):
        model = build(name, "sdpa", torch.float64).eval()
        make_reversible(model)
        ids = batch()["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answer = model.generate(ids, **options, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            whole = model(answer.sequences).logits[:, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(answer.logits, dim=1), whole.float(), rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_run_alike(tmp_path):
    model = dropping("gpt2")
    make_reversible(model)
    expected = gradients(model, batch())
    assert_bits(gradients(copy.deepcopy(model), batch()), expected)
    assert_bits(gradients(pickle.loads(pickle.dumps(model)), batch()), expected)


def test_a_saved_model_has_the_models_keys_and_is_reversible_again(tmp_path):
    model = build("llama", "packed").eval()
    plain = model.state_dict().keys()
    make_reversible(model)
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packed")
    assert loaded.state_dict().keys() == plain
    with pytest.raises(ValueError, match="runs in one stream, which is another model: call"):
        loaded(**batch())
    make_reversible(loaded)
    assert torch.equal(loaded(**batch()).logits, expected)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packed")
    handle = adapt(loaded, SequenceMesh.build())
    assert torch.equal(loaded(**batch()).logits, expected)
    handle.remove()
    assert torch.equal(loaded(**batch()).logits, expected)  # that is what the model is
    loaded.config.hf_longctx_reversible = 3
    with pytest.raises(ValueError, match="is 3, and this version of hf_longctx knows True only"):
        make_reversible(tf.AutoModelForCausalLM.from_config(loaded.config))


def test_a_trained_model_is_refused_or_converted_with_both_losses(tmp_path, caplog):
    build("llama", "sdpa").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained in one stream, and two streams are another model"):
        make_reversible(model)
    before = float(model(**batch()).loss)
    with caplog.at_level("WARNING", "hf_longctx"):
        make_reversible(model, convert=batch())
    after = float(model(**batch()).loss)
    assert f"its loss went from {before:.4f} to {after:.4f}" in caplog.text and before != after
    make_reversible(tf.AutoModelForCausalLM.from_pretrained(tmp_path), convert=True)
    with pytest.raises(ValueError, match="has no loss that could tell what `convert` changes"):
        make_reversible(tf.AutoModel.from_pretrained(tmp_path), convert=True)


class Changing(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    """A layer that does something behind the back of its halves."""

    def forward(self, hidden_states, *args, memory=None, **kwargs):
        if memory is not None:
            memory["last"] = hidden_states
        if hasattr(self, "count"):
            self.count += 1
        if hasattr(self, "noise"):
            hidden_states = hidden_states + 0
            self.mlp.gate_proj.weight.data += 1e-3
        return super().forward(hidden_states, *args, **kwargs)


def changing(**facts):
    model = build("llama", "sdpa").train()
    for layer in model.model.layers:
        layer.__class__ = Changing
        for name, value in facts.items():
            layer.register_buffer(name, value)
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "is not `x \\+ f\\(x\\)` followed by `y \\+ g\\(y\\)`"),
        ("bart", "is not `x \\+ f\\(x\\)` followed by"),
    ],
)
def test_layers_without_two_halves_are_refused(name, message):
    model = build(name, "eager")
    with pytest.raises(NotImplementedError, match=message):
        make_reversible(model)
    model(**{k: v for k, v in batch().items()})  # and nothing is left on the model
    assert "reversible" not in model.config.to_json_string()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt_neox", "its parts run side by side"),
        ("bloom", "returns more tensors than its tokens"),
        ("mamba", "runs `norm`, `mixer`"),
        ("ctrl", "has no list of transformers' layers"),
        ("doge", "learns `input_residual`, `post_attention_residual` outside of its parts"),
    ],
)
def test_types_without_two_halves_are_refused(kind, message):
    model = tf.AutoModelForCausalLM.from_config(shrink(tf.AutoConfig.for_model(kind)))
    with pytest.raises(NotImplementedError, match=message):
        make_reversible(model)


def test_dropout_outside_of_the_parts_of_a_layer_is_refused():
    config = shrink(tf.AutoConfig.for_model("opt"))
    config.dropout, config.do_layer_norm_before = 0.1, True
    with pytest.raises(NotImplementedError, match="two half-layers|sum of its halves"):
        make_reversible(tf.AutoModelForCausalLM.from_config(config))


def test_two_stacks_are_refused():
    model = tf.AutoModelForSeq2SeqLM.from_config(shrink(tf.AutoConfig.for_model("t5")))
    with pytest.raises(NotImplementedError, match="lists of layers"):
        make_reversible(model)


class Listed(torch.nn.ModuleList):
    """Layers that a model gets in another way when it asks for a part of them."""

    def __getitem__(self, index):
        return self.change([*self]) if isinstance(index, slice) else super().__getitem__(index)


def listed_as(model, change) -> None:
    model.model.layers = Listed(model.model.layers)
    model.model.layers.change = change


def refused_when_called(change, message, error=NotImplementedError, **inputs):
    model = build("llama", "sdpa").train()
    make_reversible(model)
    change(model)
    with pytest.raises(error, match=message):
        model(**batch(), **inputs)


def test_what_single_layers_would_do_is_refused_at_the_call():
    nothing = lambda model: None
    refused_when_called(nothing, "`output_hidden_states` asks for what single layers", output_hidden_states=True)
    refused_when_called(nothing, "`output_attentions` asks", output_attentions=True)
    refused_when_called(nothing, "given a cache with gradients on", **{OUTPUT_NAME: tf.DynamicCache()})
    refused_when_called(lambda m: setattr(m.config, "output_hidden_states", True), "`output_hidden_states` asks")
    refused_when_called(lambda m: m.gradient_checkpointing_enable(), "has activation checkpointing")
    hook = lambda m: m.model.layers[1].register_forward_hook(lambda *args: None)
    refused_when_called(hook, "`LlamaDecoderLayer` 1 has a hook")
    backwards = lambda layers: [*reversed(layers)]
    refused_when_called(lambda m: listed_as(m, backwards), "in another order")
    between = lambda layers: [layers[0], lambda tokens, **kwargs: layers[1](tokens + 1, **kwargs)]
    refused_when_called(lambda m: listed_as(m, between), "changes the hidden states between two layers")
    refused_when_called(lambda m: setattr(m.config, "num_hidden_layers", 1), "ran 1 of its 2 layers")


def test_routers_with_a_loss_are_refused():
    config = shrink(tf.AutoConfig.for_model("mixtral"))
    config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="`output_router_logits` adds the loss of routers"):
        make_reversible(tf.AutoModelForCausalLM.from_config(config))


def test_wrappers_and_devices_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("llama", "sdpa").train()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    with pytest.raises(NotImplementedError, match="has activation checkpointing"):
        make_reversible(model)
    model = build("llama", "sdpa")
    model.model.layers[1].to("meta")
    with pytest.raises(RuntimeError, match="placeholders on the meta device"):
        make_reversible(model)
    model = build("llama", "sdpa")
    next(model.model.layers.parameters()).ds_id = 1
    with pytest.raises(NotImplementedError, match="keeps the parameters of"):
        make_reversible(model)


def test_a_layer_that_changes_something_is_refused():
    model = changing(count=torch.zeros(()))
    make_reversible(model)
    with pytest.raises(NotImplementedError, match="changes one of its buffers while it runs"):
        model(**batch())
    model = changing()
    make_reversible(model)
    with pytest.raises(NotImplementedError, match="hands something to later layers"):
        model(**batch(), memory={})
    model = changing()
    make_reversible(model)
    model.model.layers[0].noise = True
    with pytest.raises(RuntimeError, match="other numbers in backward than in forward"):
        model(**batch()).loss.backward()


def test_settings_that_exclude_each_other_are_refused():
    for memory in ("checkpoint", "max", "auto"):
        with pytest.raises(ValueError, match="checkpoints layers, or might, and `reversible_layers` keep nothing"):
            MemoryConfig(memory=memory, reversible_layers=True)
    with pytest.raises(ValueError, match="`reversible_layers` \\(3\\) must be True or False"):
        MemoryConfig(reversible_layers=3)


def test_wrong_order_is_refused():
    model = build("llama", "sdpa").train()
    make_reversible(model)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again instead of setting `retain_graph`"):
        loss.backward()
    loss = model(**batch()).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="called outside of a forward of its model"):
        model.model.layers[0](torch.zeros(1, 2, 48))


def test_an_overflow_gives_what_plain_autograd_gives():
    model = build("llama", "sdpa").train()
    make_reversible(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e38)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e38)
    loss = model(**batch()).loss
    loss.backward()
    assert not loss.isfinite()
