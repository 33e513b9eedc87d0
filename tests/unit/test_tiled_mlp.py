"""`tile_mlp`: the numbers of the untiled model, one gradient a parameter, two runs a tile, and a way back."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_longctx.adapters.dense_mlps import find_dense_mlps
from hf_longctx.adapters.tiled_mlp import tile_mlp

from ..models import VOCAB, build


CASES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "modernbert", "deepseek_v3")
TOKENS = 21


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.flip(1).clone()
    labels[0, 3:9] = -100
    return {"input_ids": ids, "labels": labels}


def run(model) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual, expected, tolerance: float = 1e-6) -> None:
    assert abs(actual[0] - expected[0]) <= tolerance * abs(expected[0])
    assert actual[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


def lora(model, *targets: str, **options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # one of the two is zero at the start, which would hide half of the gradients
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


class Layer(GradientCheckpointingLayer):
    """A layer of nothing but an MLP."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states):
        return hidden_states + self.mlp(hidden_states)


def llama_layer(width: int = 16, wide: int = 64) -> Layer:
    torch.manual_seed(0)
    return Layer(LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=wide, num_attention_heads=2)))


def gpt2_layer(dropout: float) -> Layer:
    torch.manual_seed(0)
    return Layer(GPT2MLP(64, GPT2Config(n_embd=16, resid_pdrop=dropout)))


def count_runs(model) -> list[torch.dtype]:
    """Gets an entry whenever the last linear layer of an MLP runs: the type of its input."""
    runs: list[torch.dtype] = []
    for module in model.modules():
        if hasattr(module, "down_proj"):
            module.down_proj.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0].dtype))
    return runs


# The same numbers


# The untiled gradients themselves are 6e-7 to 4e-6 away from those in double precision; tiles of one token go through
# other kernels and differ by as much, so those are compared in double precision below.
@pytest.mark.parametrize("tile_size", [2, 5, 7, 100], ids=lambda size: f"tile{size}")
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_untiled_model(name, tile_size):
    model = build(name, "eager")
    expected = run(model)
    handle = tile_mlp(model, tile_size)
    assert len(handle.tiled) == model.config.num_hidden_layers and handle.skipped == {}
    assert_equal(run(model), expected)


@pytest.mark.parametrize("tile_size", [1, 4], ids=lambda size: f"tile{size}")
@pytest.mark.parametrize("name", CASES)
def test_nothing_but_rounding_is_left_in_double_precision(name, tile_size):
    model = build(name, "eager", dtype=torch.float64)
    expected = run(model)
    tile_mlp(model, tile_size)
    assert_equal(run(model), expected, 1e-13)


@pytest.mark.parametrize("first", ["tiles", "lora"])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"), ("q_proj", "down_proj"), ("q_proj",)])
def test_lora(targets, first):
    expected = run(lora(build("llama", "sdpa"), *targets))
    model = build("llama", "sdpa")
    if first == "tiles":
        tile_mlp(model, 5)
    model = lora(model, *targets)
    if first == "lora":
        tile_mlp(model, 5)
    assert_equal(run(model), expected)
    assert all("lora_" in name for name in expected[1])


def test_lora_with_trained_copies_of_whole_mlps():
    options = {"modules_to_save": ["mlp"]}
    expected = run(lora(build("llama", "sdpa"), "q_proj", **options))
    model = lora(build("llama", "sdpa"), "q_proj", **options)
    tile_mlp(model, 5)
    assert_equal(run(model), expected)
    assert any("modules_to_save" in name for name in expected[1])


def test_first_mlp_alone_learns_so_its_input_has_no_gradient():
    model = build("llama", "sdpa").requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    expected = run(model)
    tile_mlp(model, 5)
    assert_equal(run(model), expected)
    assert len(expected[1]) == 3


def test_one_mlp_in_two_layers():
    model = build("llama", "sdpa")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    expected = run(model)
    tile_mlp(model, 5)
    assert_equal(run(model), expected)


def test_two_forwards_before_two_backwards():
    model = build("llama", "sdpa")
    expected = run(model)
    tile_mlp(model, 5)
    model.zero_grad()
    losses = [model(**batch()).loss for _ in range(2)]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert_equal((losses[0].item(), gradients), expected)


def test_half_precision_gradients_are_added_up_in_fp32():
    """One token a tile: added up in bf16, most of a thousand small terms would be lost."""
    tokens = torch.rand(1, 1024, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = llama_layer().bfloat16().double()
    exact(tokens.double()).sum().backward()
    layer = llama_layer().bfloat16()
    tile_mlp(layer, 1)
    layer(tokens).sum().backward()
    for (name, parameter), reference in zip(layer.named_parameters(), exact.parameters()):
        assert parameter.grad.dtype == torch.bfloat16
        assert (parameter.grad - reference.grad).norm() <= 1e-2 * reference.grad.norm(), name


def test_a_compiled_model_runs_its_tiles_uncompiled():
    model = build("llama", "sdpa")
    expected = run(model)
    tile_mlp(model, 5)
    assert_equal(
        run(torch.compile(model, backend="aot_eager")),
        (expected[0], {f"_orig_mod.{name}": gradient for name, gradient in expected[1].items()}),
        1e-5,
    )


def test_a_copy_of_the_model_trains_its_own_weights():
    model = build("llama", "sdpa")
    expected = run(model)
    tile_mlp(model, 5)
    model.zero_grad()
    other = copy.deepcopy(model)
    assert_equal(run(other), expected)
    assert all(p.grad is None for p in model.parameters())


# One gradient a parameter


def test_every_hook_fires_once_a_backward():
    model = build("llama", "sdpa")
    tile_mlp(model, 5)
    calls: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: calls[name].append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls[name].append("accumulated"))
    run(model)
    assert all(seen == ["gradient", "accumulated"] for seen in calls.values()), calls


def test_a_hook_that_changes_the_gradient_changes_it_once():
    model = build("llama", "sdpa")
    expected = run(model)[1]["model.layers.0.mlp.up_proj.weight"]
    tile_mlp(model, 5)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(run(model)[1]["model.layers.0.mlp.up_proj.weight"], 2 * expected)


def test_hooks_of_the_mlp_see_whole_rows_once():
    model, seen = build("llama", "sdpa"), []
    tile_mlp(model, 5)
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    run(model)
    assert seen == [(2, TOKENS, 48)]


# How often a tile runs


@pytest.mark.parametrize(
    ("name", "checkpointing", "runs_a_tile"),
    [
        ("llama", None, 2),
        ("llama", {"use_reentrant": False}, 2),
        ("llama", {"use_reentrant": True}, 3),
        ("gemma2", {"use_reentrant": False}, 3),  # a norm behind the MLP asks for its output
    ],
)
def test_runs_of_every_tile(name, checkpointing, runs_a_tile):
    model = build(name, "eager")
    expected = run(model)
    runs = count_runs(model)
    tile_mlp(model, 5)
    runs.clear()  # of the proof
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    model.train()
    assert_equal(run(model), expected)
    tiles = math.ceil(TOKENS / 5) * model.config.num_hidden_layers
    assert len(runs) == runs_a_tile * tiles


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_without_gradients_every_tile_runs_once(mode):
    model = build("llama", "sdpa")
    getattr(model, mode)()
    with torch.no_grad():
        expected = model(**batch()).logits
        runs = count_runs(model)
        tile_mlp(model, 5)
        runs.clear()
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=1e-5)
    assert len(runs) == 2 * math.ceil(TOKENS / 5)


def test_generation_runs_on():
    model = build("llama", "sdpa").eval()
    ids = batch()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    tile_mlp(model, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_autocast_is_in_force_when_tiles_run_again():
    model = build("llama", "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    tile_mlp(model, 5)
    model.zero_grad()
    runs = count_runs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model(**batch()).loss
    again.backward()
    assert set(runs) == {torch.bfloat16} and len(runs) == 2 * 2 * math.ceil(TOKENS / 5)
    assert_equal((again.item(), {name: p.grad for name, p in model.named_parameters()}), (loss.item(), expected), 2e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


class FullPrecision(torch.nn.Module):
    """An MLP that does not let autocast in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, tokens):
        with torch.autocast("cpu", enabled=False):
            return self.down(self.up(tokens.float()).relu())


def test_gradients_of_tiles_are_not_computed_under_autocast():
    torch.manual_seed(0)
    layer, tokens = Layer(FullPrecision()), torch.randn(1, 32, 16)
    gradients = []
    for tile_size in (None, 5):
        if tile_size is not None:
            tile_mlp(layer, tile_size)
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(tokens).square().sum()
        loss.backward()
        gradients.append((loss.item(), {name: p.grad.clone() for name, p in layer.named_parameters()}))
    assert_equal(gradients[1], gradients[0])


def test_casts_of_one_backward_are_shared_by_its_tiles():
    layer, tokens = llama_layer(), torch.randn(1, 32, 16)
    tile_mlp(layer, 4)

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            cast = func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16
            Casts.count += cast and args[0].dim() == 2  # weights; tokens have three dimensions
            return func(*args, **(kwargs or {}))

    with Casts():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(tokens).sum()
        loss.backward()
    assert Casts.count == 3 + 3  # forward and backward


# Random numbers


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_dropout_is_the_same_when_tiles_run_again(checkpointing):
    """The reference keeps the graph of every tile, so it draws each number once."""
    layer, tokens = gpt2_layer(dropout=0.5), torch.randn(2, 12, 16, requires_grad=True)
    reference = copy.deepcopy(layer)
    torch.manual_seed(4)
    expected = tokens + torch.cat([reference.mlp(piece.contiguous()) for piece in tokens.split(5, dim=1)], dim=1)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), [tokens, *reference.parameters()])
    tile_mlp(layer, 5)
    if checkpointing:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *args: torch.utils.checkpoint.checkpoint(
            *args, use_reentrant=False
        )
    torch.manual_seed(4)
    output = layer(tokens)
    torch.testing.assert_close(output, expected)
    torch.rand(7)
    before = torch.get_rng_state()
    actual = torch.autograd.grad((output * weights).sum(), [tokens, *layer.parameters()])
    assert torch.equal(torch.get_rng_state(), before), "backward moved the random numbers of the run"
    for mine, other in zip(actual, gradients):
        torch.testing.assert_close(mine, other)


def test_tiling_draws_no_random_numbers():
    model, before = build("gpt2", "eager"), torch.get_rng_state()
    tile_mlp(model, 5)
    assert torch.equal(torch.get_rng_state(), before)


# The way back


def test_remove_restores_exactly():
    model = build("llama", "sdpa")
    expected = run(model)
    before = [dict(vars(module)) for module in model.modules()]
    handle = tile_mlp(model, 5)
    assert handle.tiled == ("model.layers.0.mlp", "model.layers.1.mlp")
    run(model)
    handle.remove()
    for module, attributes in zip(model.modules(), before):
        assert vars(module).keys() == attributes.keys()
    assert_equal(run(model), expected, 0.0)
    assert handle.tiled == ()
    handle.remove()
    tile_mlp(model, 7).remove()


def test_a_forward_that_a_host_had_put_on_the_instance_is_used_and_given_back():
    layer = llama_layer()
    layer.mlp.forward = lambda tokens: 2 * LlamaMLP.forward(layer.mlp, tokens)
    forward, tokens = layer.mlp.forward, torch.randn(1, 9, 16)
    expected = layer(tokens)
    handle = tile_mlp(layer, 4)
    torch.testing.assert_close(layer(tokens), expected)
    handle.remove()
    assert layer.mlp.forward is forward


def test_tiling_twice_is_once_and_in_other_tiles_is_refused():
    model = build("llama", "sdpa")
    tile_mlp(model, 5)
    assert tile_mlp(model, 5).tiled == ("model.layers.0.mlp", "model.layers.1.mlp")
    with pytest.raises(RuntimeError, match="already run in tiles of 5 tokens: call `remove\\(\\)` of that handle"):
        tile_mlp(model, 7)


# Refusals


@pytest.mark.parametrize("tile_size", [0, -3, 2.5, True, "4096", None])
def test_bad_tile_sizes_are_refused(tile_size):
    with pytest.raises(ValueError, match="`tile_size` .* must be a positive integer"):
        tile_mlp(build("llama", "sdpa"), tile_size)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt_oss", {}, "`GptOssForCausalLM` .* because `GptOssMLP` routes tokens to experts; leave it untiled"),
        ("llama4", {"interleave_moe_layer_step": 1}, "because `Llama4TextMoe` routes tokens to experts"),
        ("deepseek_v3", {"first_k_dense_replace": 0}, "`model.layers.0.mlp` and 1 more .* `DeepseekV3MoE` routes"),
        ("bert", {}, "`BertForMaskedLM` \\(`BertLayer`\\) .* no module in them has two linear layers"),
    ],
)
def test_models_without_a_dense_mlp_are_refused_by_name(name, changes, said):
    with pytest.raises(NotImplementedError, match=said):
        tile_mlp(build(name, "eager", **changes), 5)


def test_dense_layers_beside_experts_are_tiled_and_the_rest_is_named(caplog):
    model = build("deepseek_v3", "sdpa", first_k_dense_replace=1)
    expected = run(model)
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        handle = tile_mlp(model, 5)
    assert handle.tiled == ("model.layers.0.mlp",)
    assert handle.skipped == {"model.layers.1.mlp": "`DeepseekV3MoE` routes tokens to experts"}
    assert "1 MLPs run in tiles and 1 blocks do not, such as `model.layers.1.mlp`" in caplog.text
    assert_equal(run(model), expected)


class Blend(torch.nn.Module):
    """Looks like an MLP, but lets its tokens see each other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), how

    def forward(self, tokens):
        if self.how == "mean":
            return self.down(self.up(tokens - tokens.mean(dim=-2, keepdim=True)))
        if self.how == "pairs":
            partner = (torch.arange(tokens.shape[-2]) ^ 1).clamp(max=tokens.shape[-2] - 1)
            return self.down(self.up(tokens + tokens[..., partner, :]))
        if self.how == "position":
            return self.down(self.up(tokens) * torch.arange(1.0, tokens.shape[-2] + 1)[:, None])
        return self.up(tokens)


@pytest.mark.parametrize(
    ("how", "said"),
    [("mean", "mixes"), ("pairs", "mixes"), ("position", "mixes"), ("wide", r"with \(2, 5, 32\)")],
)
def test_modules_that_only_look_like_mlps_are_refused(how, said):
    with pytest.raises(NotImplementedError, match=f"`Blend` .*{said}"):
        tile_mlp(Layer(Blend(how)), 5)


class Remembering(torch.nn.Module):
    """Has the weights of an MLP, and an argument for what it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)


class WithCache(Remembering):
    def forward(self, tokens, cache=None):
        return self.down(self.up(tokens))


class WithOlderCache(Remembering):
    def forward(self, tokens, past_key_values=None):
        return self.down(self.up(tokens))


class WithState(Remembering):
    def forward(self, tokens, cache_params=None):
        return self.down(self.up(tokens))


@pytest.mark.parametrize("kind", [WithCache, WithOlderCache, WithState])
def test_modules_that_take_a_cache_are_no_mlps(kind):
    found, _ = find_dense_mlps(Layer(kind()))
    assert not any(isinstance(module, kind) for module in found.values())


def test_modules_without_weights_are_proved_at_their_first_call():
    with torch.device("meta"):
        layers = [Layer(Blend("mean")), llama_layer()]
    for layer in layers:
        tile_mlp(layer, 4)
        layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    layers[1](torch.randn(1, 9, 16))
    with pytest.raises(NotImplementedError, match="`mlp` cannot run in tiles: `Blend` mixes tokens"):
        layers[0](torch.randn(1, 9, 16))


def test_calls_and_wrappers_that_tiles_would_get_wrong_are_refused():
    layer, tokens = llama_layer(), torch.randn(1, 9, 16)
    tile_mlp(layer, 4)
    with pytest.raises(NotImplementedError, match="`mlp` \\(`LlamaMLP`\\) was called with 1 arguments in addition"):
        layer.mlp(tokens, residual=tokens)
    weight = layer.mlp.up_proj._parameters.pop("weight")
    layer.mlp.up_proj.weight = weight.view_as(weight)  # as FSDP1 does
    with pytest.raises(NotImplementedError, match="keeps the parameters of `mlp` .* use DDP or FSDP2"):
        layer(tokens)


def test_weights_changed_before_backward_are_noticed():
    layer = llama_layer()
    tile_mlp(layer, 4)
    loss = layer(torch.randn(1, 9, 16)).sum()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="a parameter of `mlp` was changed in place between forward and backward"):
        loss.backward()


# Memory


class LargestTensor(TorchDispatchMode):
    """The largest result of any operation that is as wide as the MLP inside, in bytes."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.wide, self.bytes = wide, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] == self.wide:
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_of_a_long_row_shrinks_eight_times(kind):
    tokens, width, wide = 32 * 1024, 16, 64
    figures = []
    for tile_size in (None, tokens // 16):
        layer = llama_layer(width, wide) if kind == "llama" else gpt2_layer(0.0)
        if tile_size is not None:
            tile_mlp(layer, tile_size)
        hidden_states, saved = torch.randn(1, tokens, width, requires_grad=True), {}
        weights = {p.data_ptr() for p in layer.parameters()}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with LargestTensor(wide) as largest:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = layer.mlp(hidden_states)
            output.sum().backward()
        figures.append((largest.bytes, sum(saved.values())))
    (largest, saved), (tiled_largest, tiled_saved) = figures
    assert largest == tokens * wide * 4
    assert largest == 16 * tiled_largest
    assert tiled_saved == tokens * width * 4
    assert saved >= 8 * tiled_saved, f"{saved / tiled_saved:.1f} times"
