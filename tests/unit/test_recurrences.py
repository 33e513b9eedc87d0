"""Recurrent layers on one process: packed documents, kernels that return less than PyTorch, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent import layers, mamba1, scan
from hf_longctx.adapters.recurrent.layers import follow_recurrences, unfollowed_layers
from hf_longctx.adapters.recurrent.lightning import linear_attention
from hf_longctx.adapters.recurrent.mamba1 import selective_scan
from hf_longctx.adapters.recurrent.mamba2 import chunk_scan
from hf_longctx.adapters.recurrent.pieces import SharePieces
from hf_longctx.families import query_heads
from hf_longctx.parallel.shard import SequenceShard
from hf_longctx.proof.model_under_test import read_config
from hf_longctx.proof.tiny import shrink

from ..recurrences import DOCUMENTS, build, gradients, on_one_process, rows, upstream, worst


BOUNDS = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
INDEX = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))[None]


@pytest.mark.parametrize(
    "model_type",
    ["mamba", "mamba2", "jamba", "zamba", "zamba2", "granitemoehybrid", "falcon_h1", "minimax", "recurrent_gemma"],
)
def test_packed_documents_are_those_of_each_alone(model_type):
    """Also where transformers raises for bounds without the packages of its kernels, and with recomputed layers."""
    batch = {name: value[:1] for name, value in rows("packed", sum(DOCUMENTS)).items()}
    logits, expected = on_one_process(build(model_type, "eager"), batch)
    model = build(model_type, "packed")
    attach_adapters(model)
    bounds = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "seq_idx": INDEX}
    for given, checkpointed in (({}, False), (bounds, False), (bounds, True)):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = model(**batch, **given, use_cache=False).logits
        (found * upstream(batch)).sum().backward()
        error, name = worst(found.detach(), logits, gradients(model), expected)
        assert error < 5e-6, name


def test_bounds_of_one_document_are_no_reason_to_raise():
    model = build("nemotron_h", "packed")
    attach_adapters(model)
    ids, one = torch.arange(10, 19)[None], torch.tensor([0, 9], dtype=torch.int32)
    whole = model(input_ids=ids, use_cache=False).logits
    bounds = {"cu_seq_lens_q": one, "cu_seq_lens_k": one, "seq_idx": torch.zeros(1, 9, dtype=torch.int32)}
    torch.testing.assert_close(model(input_ids=ids, use_cache=False, **bounds).logits, whole)


# Two ranks by turns, in one process


def on_turns(run, tensors: list[torch.Tensor], bounds: list[int], dim: int, monkeypatch) -> torch.Tensor:
    """What `run(pieces, *tensors)` gives for the shares between `bounds`, whose states are handed on by hand."""
    gathered: list[torch.Tensor] = []

    def gather(local, *_):
        gathered.append(local)
        missing = [torch.zeros_like(local)] * (len(bounds) - 1 - len(gathered))
        return torch.stack([*gathered, *missing])

    monkeypatch.setattr(scan, "gather_shares", gather)
    outputs = []
    for rank, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        shard = SequenceShard(len(bounds) - 1, rank, bounds[-1], stop - start)
        count = tensors[0].shape[0]
        documents = torch.zeros(count, bounds[-1], dtype=torch.int32)
        pieces = SharePieces(shard, documents, ((stop - start,),) * count, (rank > 0,) * count)
        outputs.append(run(pieces, *(tensor.narrow(dim, start, stop - start) for tensor in tensors)))
    return torch.cat(outputs, dim=dim)


def mamba1_inputs(tokens: int) -> tuple[list[torch.Tensor], dict]:
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    tensors = [draw(2, 6, tokens), draw(2, 6, tokens), draw(2, 4, tokens), draw(2, 4, tokens), draw(2, 6, tokens)]
    options = {"D": draw(6), "delta_bias": draw(6) - 2, "delta_softplus": True}
    return [tensor.requires_grad_() for tensor in tensors], options


def detached_state(*args, **kwargs):
    """As `selective_scan_fn` of mamba_ssm: the gradient of the last state is not computed."""
    result = mamba_selective_scan(*args, **kwargs)
    return (result[0], result[1].detach()) if isinstance(result, tuple) else result


@pytest.mark.parametrize("kernel", [mamba_selective_scan, detached_state])
def test_mamba_hands_its_state_on_in_blocks_with_any_kernel(monkeypatch, kernel):
    torch.manual_seed(0)
    monkeypatch.setattr(mamba1, "_BLOCK", 5)
    tensors, options = mamba1_inputs(23)
    A = -torch.rand(6, 4, dtype=torch.float64)
    run = lambda pieces, x, dt, B, C, z: selective_scan(kernel, pieces, x, dt, A, B, C, z=z, **options)
    x, dt, B, C, z = tensors
    expected = mamba_selective_scan(x, dt, A, B, C, z=z, **options)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    found = on_turns(run, tensors, [0, 12, 13, 23], -1, monkeypatch)
    ours = torch.autograd.grad((found * weights).sum(), tensors)
    for mine, other in zip((found, *ours), (expected, *theirs)):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-6)  # transformers casts inputs to float32


@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.05, 0.3)])
def test_mamba2_hands_its_state_on_with_groups_and_limits_of_the_step(monkeypatch, limits):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 23, *shape).requires_grad_() for shape in ((6, 3), (6,), (2, 4), (2, 4))]
    A = -torch.rand(6)
    options = {"D": torch.randn(6), "dt_bias": torch.randn(6), "dt_softplus": True, "dt_limit": limits}
    run = lambda pieces, x, dt, B, C: chunk_scan(
        mamba2_chunk_scan, pieces, x, dt, A, B, C, 8, z=None, initial_states=None, seq_idx=INDEX, **options
    )
    x, dt, B, C = tensors
    expected = mamba2_chunk_scan(x, dt, A, B, C, 8, **options)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    found = on_turns(run, tensors, [0, 12, 13, 23], 1, monkeypatch)
    ours = torch.autograd.grad((found * weights).sum(), tensors)
    for mine, other in zip((found, *ours), (expected, *theirs)):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


def test_lightning_attention_is_that_of_transformers_in_float64(monkeypatch):
    torch.manual_seed(0)
    config = shrink(read_config("minimax"))
    layer = MiniMaxLightningAttention(config, config.layer_types.index("linear_attention")).double()
    layer.block_size = 4
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    hidden = torch.randn(2, 23, config.hidden_size, dtype=torch.float64)
    heads = layer.act_fn(layer.qkv_proj(hidden)).unflatten(-1, (layer.num_attention_heads, -1))
    tensors = list(heads.split(layer.head_dim, dim=-1))
    run = lambda pieces, *shares: linear_attention(pieces, *shares, layer.slope_rate, layer.block_size)
    before = []
    layer.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    layer(hidden, None, None)
    found = on_turns(run, tensors, [0, 12, 13, 23], 1, monkeypatch)
    torch.testing.assert_close(found.flatten(2), before[0], atol=1e-12, rtol=1e-10)


def test_a_state_without_a_gradient_is_refused():
    def kernel(*args, return_final_states, **kwargs):
        outputs, state = mamba2_chunk_scan(*args, return_final_states=True, **kwargs)
        return (outputs, state.detach()) if return_final_states else outputs

    pieces = SharePieces(SequenceShard(2, 0, 6, 3), torch.zeros(1, 6), ((3,),), (False,))
    inputs = [torch.randn(1, 3, *shape, requires_grad=True) for shape in ((2, 4), (2,))]
    states = [torch.randn(1, 3, 1, 4)] * 2
    message = "`kernel` returns a final state without a gradient, which the 2 ranks of a row hand on"
    with pytest.raises(NotImplementedError, match=message):
        chunk_scan(kernel, pieces, *inputs, -torch.rand(2), *states, 4)


# What is followed, and what is not


def mamba_inner_fn(*_):
    """As transformers calls it."""


class FusedMixer(torch.nn.Module):
    def forward(self, hidden_states):
        return mamba_inner_fn(hidden_states)


def test_a_layer_that_only_has_a_fused_kernel_is_refused():
    model = torch.nn.Sequential(FusedMixer())
    with pytest.raises(NotImplementedError, match="`FusedMixer` runs its recurrence in `mamba_inner_fn` only"):
        follow_recurrences(model)


def test_layers_that_loop_by_themselves_are_named():
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8)
    )
    assert unfollowed_layers(model) == ["rwkv"]
    assert unfollowed_layers(build("nemotron_h", "ulysses")) == []


def test_a_layer_under_a_class_of_its_own_is_still_followed():
    """FSDP2 makes a class of a module's own, below that of transformers."""
    config = shrink(read_config("minimax"))
    layer = MiniMaxLightningAttention(config, 1)
    layer.__class__ = type("FSDPMiniMaxLightningAttention", (MiniMaxLightningAttention,), {})
    assert layers.is_followed(layer)


def test_heads_matter_where_there_is_attention():
    named = lambda **fields: SimpleNamespace(get_text_config=lambda: SimpleNamespace(**fields))
    assert query_heads(named(num_attention_heads=3)) == 3
    assert query_heads(named(num_attention_heads=3, layer_types=["linear_attention", "moe"])) is None
    assert query_heads(named(num_attention_heads=3, layer_types=["linear_attention", "hybrid"])) == 3
    assert query_heads(named(layer_types=["linear_attention"])) is None


def test_removing_the_adapters_gives_transformers_layers_back():
    model = build("recurrent_gemma", "packed")
    handle = attach_adapters(model)
    handle.remove()
    assert not any("forward" in vars(module) or "_rnn_scan" in vars(module) for module in model.modules())
