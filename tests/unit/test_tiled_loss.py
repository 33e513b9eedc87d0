"""A model whose loss is tiled is the model: loss and every gradient equal the stock forward's, and nothing else moved.

In fp64 errors are relative to the largest entry of a tensor, or to a hundredth of the model's largest gradient where
that is more; what is left is under 1e-6, transformers' own casts of norms and of its loss to fp32. In fp32 they are
relative to the model's largest gradient, since the stock gradients of queries, keys and routers, which are small
differences of large sums, are themselves 1e-6 to 3e-6 of their largest entry away from those of fp64.
"""

from __future__ import annotations

import copy
import inspect
import logging

import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.adapters.tiled_loss_check import prove_tiled_loss
from hf_longctx.attention.cache_names import find_cache
from hf_longctx.losses.logits_transform import read_logits_transform

from ..models import _BASE, VOCAB, build


TOLERANCE, WIDTH = 1e-6, 48
MODELS = ("llama", "gpt2", "gemma2", "qwen3", "deepseek_v3", "gpt_oss", "llama4")
MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
OTHERS = {
    "granite": (tf.GraniteConfig, {**_BASE, **MULTIPLIERS, "logits_scaling": 3.0}),
    "granite moe": (
        tf.GraniteMoeConfig,
        {**_BASE, **MULTIPLIERS, "logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "cohere": (tf.CohereConfig, {**_BASE, "logit_scale": 0.3}),
    "cohere2": (tf.Cohere2Config, {**_BASE, "logit_scale": 0.3, "head_dim": 8, "sliding_window": 5}),
    "llama, tied": (tf.LlamaConfig, {**_BASE, "tie_word_embeddings": True}),
    "phi, biased head": (tf.PhiConfig, {**_BASE, "num_key_value_heads": 6}),
    "gpt_neox": (tf.GPTNeoXConfig, {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    "opt": (
        tf.OPTConfig,
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "word_embed_proj_dim": 24,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
            "dropout": 0.0,
        },
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes):
    """A model of `tests/models.py`, or of the table above, with the same kind of weights."""
    if name not in OTHERS:
        return build(name, "eager", dtype, **changes)
    kind, values = OTHERS[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**{**values, **changes}), attn_implementation="eager").to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1)
    return model


def batch_of(tokens: int = 13, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, VOCAB, (2, rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def shifted(batch: dict, **extras) -> dict:
    """The batch with targets that are not the model's own shift, as a share of a longer row has them."""
    return {**batch, "shift_labels": batch["labels"].flip(1), "num_items_in_batch": torch.tensor(21.5), **extras}


def loss_and_gradients(model, batch: dict, factor: float = 1.7):
    model.zero_grad()
    loss = model(**batch).loss
    (factor * loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_same(actual, expected, tolerance: float = TOLERANCE) -> None:
    assert actual[0].dtype == expected[0].dtype
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert actual[1].keys() == expected[1].keys() and len(expected[1]) > 0
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, theirs in expected[1].items():
        floor = largest if theirs.dtype == torch.float32 else 0.01 * largest
        error = (actual[1][name] - theirs).abs().max() / max(theirs.abs().max(), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


def state_of(model) -> dict:
    """Everything that stands in the dictionaries of a model's modules."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


class LargestLogits(TorchDispatchMode):
    """How many tokens the largest matmul had that made logits."""

    def __enter__(self):
        self.rows = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = function.overloadpacket.__name__ in ("mm", "addmm", "bmm") and result.shape[-1] == VOCAB
        if made and result.shape[0] != WIDTH:  # the gradient of a transposed weight
            self.rows = max(self.rows, result.shape[:-1].numel())
        return result


# The loss is the model's own


@pytest.mark.parametrize("tile_size", [4, None])
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_loss_and_gradients_are_the_models_own(name, tile_size):
    model = tiny(name)
    batches = [batch_of(), {**batch_of(seed=1), "num_items_in_batch": 17}, shifted(batch_of(seed=2))]
    expected = [loss_and_gradients(model, batch) for batch in batches]
    handle = tile_loss(model, tile_size)
    for batch, theirs in zip(batches, expected):
        assert_same(loss_and_gradients(model, batch), theirs)
    prove_tiled_loss(model)
    handle.remove()
    prove_tiled_loss(model)


@pytest.mark.parametrize("name", [name for name in (*MODELS, *OTHERS) if name not in ("gpt_oss", "granite moe")])
def test_in_fp64(name):
    model = tiny(name, torch.float64)
    batch = shifted(batch_of())
    expected = loss_and_gradients(model, batch)
    tile_loss(model, 5)
    actual = loss_and_gradients(model, batch)
    # Transformers rounds logits to fp32 for its loss; ours stays wide.
    assert_same((actual[0].float(), actual[1]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "granite"])
def test_in_half_precision(name, dtype):
    """Transformers rounds logits and their gradient to half precision, we only the logits on this device; both within
    the 8 or 11 bits of a sum over some ten roundings."""
    model, batch = tiny(name, dtype), batch_of()
    exact = loss_and_gradients(copy.deepcopy(model).float(), batch)
    stock = loss_and_gradients(model, batch)
    tile_loss(model, 5)
    tiled = loss_and_gradients(model, batch)
    prove_tiled_loss(model)

    def distance(run):
        return max(((g.float() - exact[1][n]).norm() / exact[1][n].norm()).item() for n, g in run[1].items())

    assert tiled[0].dtype == torch.float32 and {g.dtype for g in tiled[1].values()} == {dtype}
    assert tiled[0].item() == pytest.approx(exact[0].item(), rel=2e-2)
    assert distance(tiled) < max(1.2 * distance(stock), 1e-2)


def test_under_autocast():
    model, batch = tiny("llama"), shifted(batch_of())
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, batch)
        tile_loss(model, 5)
        actual = loss_and_gradients(model, batch)
        prove_tiled_loss(model)
    assert_same(actual, expected, 3e-2)  # bf16 keeps 8 bits, and transformers also rounds the gradient of the logits


def test_gradient_accumulation_adds_up_to_one_batch():
    model, batch = tiny("llama"), {**batch_of(rows=4), "num_items_in_batch": 30}
    expected = loss_and_gradients(model, batch, 1.0)
    tile_loss(model, 5)
    for part in (slice(0, 1), slice(1, 4)):
        model(**{k: v[part] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}).loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((expected[0], actual), expected)


def test_a_batch_without_targets_is_a_differentiable_zero():
    model = tiny("llama")
    tile_loss(model)
    batch = batch_of()
    loss, found = loss_and_gradients(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0 and len(found) == len(list(model.parameters()))
    assert all(gradient.eq(0).all() for gradient in found.values())


@pytest.mark.parametrize("checkpointing", [True, False], ids=["reentrant", "not reentrant"])
def test_with_activation_checkpointing(checkpointing):
    model, batch = tiny("llama").train(), batch_of()
    expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.enable_input_require_grads()
    tile_loss(model, 5)
    assert_same(loss_and_gradients(model, batch), expected)


def test_compiled():
    model, batch = tiny("llama"), batch_of()
    expected = loss_and_gradients(model, batch)
    tile_loss(model, 5)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        loss = compiled(**batch).loss
        (1.7 * loss).backward()
        assert_same((loss.detach(), {n: p.grad for n, p in model.named_parameters()}), expected)


def test_no_logits_are_made_and_each_parameter_hears_once():
    model, batch, calls = tiny("llama, tied"), batch_of(), []
    tile_loss(model, 4)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    with LargestLogits() as seen:
        outputs = model(**batch)
        outputs.loss.backward()
    assert outputs.logits is None and seen.rows == 4
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())
    with LargestLogits() as seen:
        model(input_ids=batch["input_ids"])
    assert seen.rows == batch["input_ids"].numel()


# Nothing else changed


def test_generate_and_logits_are_unchanged():
    model, batch = tiny("gemma2").eval(), batch_of()
    ids = batch["input_ids"]

    def run():
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        return tokens, model(ids).logits, model(ids, logits_to_keep=2).logits, inspect.signature(model.forward)

    expected = run()
    handle = tile_loss(model)
    for _ in range(2):
        actual = run()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[:3], expected[:3]))
        assert actual[3] == expected[3]
        handle.remove()


def test_outputs_are_those_of_the_host_without_logits():
    model, batch = tiny("llama").eval(), {**batch_of(), "use_cache": True, "output_hidden_states": True}
    expected = model(**batch)
    tile_loss(model)
    actual = model(**batch)
    assert isinstance(actual, CausalLMOutputWithPast) and actual.logits is None
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
    assert find_cache(actual).get_seq_length() == find_cache(expected).get_seq_length() == 13
    as_tuple = model(**{**batch, "use_cache": False, "output_hidden_states": False}, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert as_tuple[0].item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_an_output_without_a_cache_is_not_asked_for_one_by_an_older_name(monkeypatch):
    """transformers would warn of the name, in every run and every plan."""
    warned = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *rest, **more: warned.append(message))
    model = tiny("llama")
    tile_loss(model)
    for use_cache in (False, True):
        outputs = model(**{**batch_of(), "use_cache": use_cache})
        assert (find_cache(outputs) is not None) == use_cache
    assert warned == []


def test_arguments_may_be_positional_and_inputs_embedded():
    model, batch = tiny("llama"), batch_of()
    names = list(inspect.signature(model.forward).parameters)
    position = names.index("labels")
    values = [batch["input_ids"], *[None] * (position - 1), batch["labels"]]
    expected = model(*values).loss
    tile_loss(model)
    outputs = model(*values)
    assert outputs.logits is None and outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    embedded = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), labels=batch["labels"]).loss
    assert embedded.item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_with_kept_logits_go_to_the_models_own_forward():
    model, batch = tiny("llama"), batch_of()
    batch = {**batch, "labels": batch["labels"][:, -3:], "logits_to_keep": 3}
    expected = model(**batch)
    tile_loss(model)
    actual = model(**batch)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)


def test_remove_restores_everything():
    model, batch = tiny("llama"), batch_of()
    before, expected = state_of(model), loss_and_gradients(model, batch)
    handle = tile_loss(model)
    assert state_of(model).keys() == before.keys() and state_of(model) != before
    loss_and_gradients(model, batch)
    handle.remove()
    handle.remove()
    after = state_of(model)
    for name, entries in before.items():
        assert entries.keys() == after[name].keys()
        assert all(value is after[name][key] for key, value in entries.items() if "forward" in key)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    outputs = model(**batch)
    assert outputs.logits is not None and torch.equal(outputs.loss.detach(), expected[0])
    tile_loss(model).remove()


def test_a_forward_that_the_object_had_of_its_own_is_kept():
    model, batch, calls = tiny("llama"), batch_of(), []
    own, head = model.forward, model.lm_head
    model.forward = lambda *args, **kwargs: calls.append("model") or own(*args, **kwargs)
    head.forward = lambda inputs: calls.append("head") or 2 * torch.nn.Linear.forward(head, inputs)
    mine, heads = model.forward, head.forward
    expected = loss_and_gradients(model, batch)
    handle = tile_loss(model, 64)
    assert_same(loss_and_gradients(model, batch), expected)
    calls.clear()
    model(batch["input_ids"])
    assert calls == ["model", "head"]
    handle.remove()
    assert model.forward is mine and head.forward is heads


def test_a_forward_that_was_covered_again_steps_aside():
    model, batch = tiny("llama"), batch_of()
    handle = tile_loss(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    for _ in range(2):
        assert model(**batch).logits is None
        prove_tiled_loss(model)
        handle.remove()
        assert model(**batch).logits is not None
        prove_tiled_loss(model)
        assert model(**batch).logits is not None
        handle = tile_loss(model, 3)
    with handle.paused():
        assert model(**batch).logits is not None
    assert model(**batch).logits is None


def test_a_copy_is_a_model_of_its_own():
    model, batch = tiny("llama"), batch_of()
    tile_loss(model, 5)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    ours, theirs = model(**batch).loss, copied(**batch).loss
    assert abs(ours - theirs) > 1e-3
    theirs.backward()
    assert model.lm_head.weight.grad is None and copied.lm_head.weight.grad is not None


# Adapters


@pytest.mark.parametrize("order", ["adapters first", "adapters last"])
@pytest.mark.parametrize("targets", ["layers", "layers and head", "saved head"])
def test_peft_models(targets, order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "lm_head"] if targets == "layers and head" else ["q_proj"],
        modules_to_save=["lm_head"] if targets == "saved head" else None,
        init_lora_weights=False,
    )

    def adapted(model):
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    batch = shifted(batch_of())
    expected = loss_and_gradients(adapted(tiny("llama")), batch)
    base = tiny("llama")
    if order == "adapters first":
        model = adapted(base)
        handle = tile_loss(model, 5)
    else:
        handle = tile_loss(base, 5)
        model = adapted(base)
    with LargestLogits() as seen:
        assert_same(loss_and_gradients(model, batch), expected)
    assert seen.rows < batch["labels"].numel() / 2
    prove_tiled_loss(model)
    handle.remove()
    assert model(**batch).logits is not None


def test_prompt_learning():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    model, batch = peft.get_peft_model(tiny("llama"), config), batch_of()
    expected = loss_and_gradients(model, batch)
    tile_loss(model, 5)
    assert_same(loss_and_gradients(model, batch), expected)


# What is refused


def refused(model, *words: str, **batch) -> None:
    with pytest.raises(NotImplementedError) as error:
        model(**batch) if batch else tile_loss(model)
    for word in (*words, "train it without a tiled loss"):
        assert word in str(error.value)


def test_models_whose_loss_is_another_are_refused_by_name():
    refused(build("bert", "eager"), "`BertForMaskedLM`", "`ForMaskedLMLoss`")
    refused(build("llama", "eager").model, "`LlamaModel`", "backbone")
    refused(torch.nn.Linear(2, 2), "`Linear`", "not a model of transformers")
    t5 = tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    refused(tf.T5ForConditionalGeneration(t5), "`T5ForConditionalGeneration`", "decoder")
    refused(build("bart", "eager"), "`BartForCausalLM`", "each token with its own label")
    model = tiny("llama")
    model.loss_function = torch.nn.functional.mse_loss
    refused(model, "`LlamaForCausalLM`", "`mse_loss`")


# transformers 5.17 cannot compute Granite's in one process either.
ROUTED = ["gpt_oss"] if Version(tf.__version__) < Version("5.24") else ["gpt_oss", "granite moe"]


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("make", [dict, shifted])
def test_a_router_loss_is_added_to_the_tiled_one(name, make):
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    model, batch = tiny(name, **asked), make(batch_of())
    expected = loss_and_gradients(model, batch)
    without = loss_and_gradients(model, {**batch, "output_router_logits": False})
    assert expected[0] - without[0] > 0.5
    tile_loss(model, 4)
    prove_tiled_loss(model)
    assert_same(loss_and_gradients(model, batch), expected, 1e-5)
    assert_same(loss_and_gradients(model, {**batch, "output_router_logits": False}), without, 1e-5)
    outputs = model(**batch)
    assert outputs.logits is None and outputs.aux_loss > 1 and len(outputs.router_logits) == 2
    assert model(**batch, return_dict=False)[0] == outputs.loss
    with LargestLogits() as largest:
        model(**batch)
    assert largest.rows <= 4
    assert "_loss_function" not in vars(model)


def test_a_router_loss_next_to_logits_that_cannot_be_left_out_is_refused(monkeypatch):
    model = tiny("gpt_oss")
    tile_loss(model)
    forward = type(model).forward

    def all_logits(self, input_ids=None, labels=None, output_router_logits=None, **kwargs):
        return forward(self, input_ids=input_ids, labels=labels, output_router_logits=output_router_logits, **kwargs)

    monkeypatch.setattr(type(model), "forward", all_logits)
    refused(model, "makes all logits to add a router loss", **batch_of(), output_router_logits=True)


def test_a_strangers_hook_on_the_head_is_refused():
    model, batch = tiny("llama"), batch_of()
    tile_loss(model)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    refused(model, "the hook `test_a_strangers_hook", "on its head expects logits", **batch)
    hook.remove()
    assert model(**batch).logits is None


def test_bad_calls():
    model = tiny("llama")
    for tile_size in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="`tile_size`"):
            tile_loss(model, tile_size)
    handle = tile_loss(model, 10**6)  # more tokens than there are: one tile
    with pytest.raises(RuntimeError, match=r"`LlamaForCausalLM` .* call `remove\(\)`"):
        tile_loss(model)
    batch = batch_of()
    with pytest.raises(ValueError, match="`labels` has shape"):
        model(**{**batch, "labels": batch["labels"][:, :-1]})
    handle.remove()
    assert "forward" not in vars(model)


@pytest.mark.parametrize("what", ["scales its logits", "bends its loss"])
def test_the_proof_finds_what_a_configuration_does_not_say(what):
    class Odd(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs.loss = outputs.loss * (1.001 if what == "bends its loss" else 1)
            return outputs

    model = Odd(tiny("llama").config)
    if what == "scales its logits":
        model.model.norm.register_forward_hook(lambda module, inputs, output: output)  # harmless: in the backbone
        prove_tiled_loss(model)
        head, own = model.lm_head, model.lm_head.forward
        head.forward = own
        model.get_output_embeddings = lambda: torch.nn.Linear(48, VOCAB, bias=False)  # not the head that is used
    with pytest.raises(NotImplementedError, match="the tiled loss of `Odd` is not its own: the loss is off by"):
        prove_tiled_loss(model)
    assert "_tiled_loss" not in vars(model)
    if what == "bends its loss":
        assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_the_proof_leaves_the_model_as_it_was():
    model = tiny("llama").train()
    before = state_of(model)
    prove_tiled_loss(model)
    assert {name: entries.keys() for name, entries in state_of(model).items()} == {
        name: entries.keys() for name, entries in before.items()
    }
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


# What a configuration says about logits


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tf.LlamaConfig(), (1.0, None)),
        (tf.Gemma2Config(), (1.0, 30.0)),
        (tf.Gemma2Config(final_logit_softcapping=None), (1.0, None)),
        (tf.GraniteConfig(logits_scaling=8.0), (1 / 8, None)),
        (tf.GraniteMoeConfig(logits_scaling=4.0), (1 / 4, None)),
        (tf.CohereConfig(logit_scale=0.0625), (0.0625, None)),
        (tf.HyperCLOVAXConfig(logits_scaling=0.5), (0.5, None)),
        (tf.FalconH1Config(lm_head_multiplier=0.25), (0.25, None)),
        (tf.RecurrentGemmaConfig(logits_soft_cap=20.0), (1.0, 20.0)),
        (tf.NanoChatConfig(), (1.0, 15.0)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_transform_is_read(config, expected):
    assert read_logits_transform(config) == expected


@pytest.mark.parametrize(
    ("field", "value"), [("logit_scale", 0.5), ("logits_scaling", 2.0), ("logit_bend", 3.0), ("output_scale", 2.0)]
)
def test_a_field_that_is_not_known_for_this_model_is_refused(field, value):
    with pytest.raises(NotImplementedError, match=rf"`llama` has `{field}` \({value}\)"):
        read_logits_transform(tf.LlamaConfig(**{field: value}))
    assert read_logits_transform(tf.LlamaConfig(**{field: None})) == (1.0, None)
