"""The trainers' check of a tiny batch sees faults of gradients, past long thresholds and behind zero weights."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_longctx import SequenceMesh
from hf_longctx.adapters.row_lengths import follow_lengths
from hf_longctx.attention import packed
from hf_longctx.parallel import collectives
from hf_longctx.proof.ranks import RanksError
from hf_longctx.trainer.sanity_check import run_sanity_check

from ..lengths import rope_of
from ..models import _BASE, build, config_of


LONG = 4096


def real_thresholds(name: str, attention: str = "ulysses"):
    """A model whose threshold is as far away as that of a real one."""
    values = {**_BASE, "max_position_embeddings": LONG, "head_dim": 8}
    if name == "llama4":
        config = config_of("llama4", floor_scale=2 * LONG, attn_scale=0.3, no_rope_layers=[1, 0, 1, 0])
    else:
        rope = {**rope_of(name), **({"original_max_position_embeddings": LONG} if name == "longrope" else {})}
        config = tf.LlamaConfig(**values, rope_parameters=rope)
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def check(model, size: int = 2) -> None:
    run_sanity_check(model, SequenceMesh.build(size), "auto", True, check_loss=True)


def state_of(model) -> list:
    rotary = model.model.rotary_emb
    return [int(rotary.max_seq_len_cached), rotary.inv_freq.clone(), *(p.grad for p in model.parameters())]


def check_long(name, adapted):
    model, validate = real_thresholds(name), packed.validate_positions
    if adapted:
        follow_lengths(model)
    before = state_of(model)
    packed.validate_positions = validate if adapted else lambda *args: None
    try:
        check(model)
    finally:
        packed.validate_positions = validate
    for one, two in zip(before, state_of(model), strict=True):  # as if nothing had run
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    return [module.floor_scale for module in model.modules() if hasattr(module, "floor_scale")]


@pytest.mark.parametrize("name", ["dynamic", "longrope", "llama4"])
def test_a_threshold_of_thousands_of_tokens_is_crossed_by_a_tiny_batch(world2, name):
    for steps in world2.run(check_long, name, True):
        assert set(steps) <= {2 * LONG}
    where = "of a row" if name == "llama4" else "at positions from .*4,0.. on, around a length at which it changes"
    with pytest.raises(RanksError, match=f"gives other (outputs|gradients).*{where}"):
        world2.run(check_long, name, False)


def check_with_a_broken_backward():
    right = collectives._HeadsToSequence.backward
    collectives._HeadsToSequence.backward = staticmethod(lambda ctx, grad: right(ctx, grad * ctx.rank))
    try:
        check(build("llama", "ulysses"))
    finally:
        collectives._HeadsToSequence.backward = staticmethod(right)


def test_a_fault_of_the_backward_pass_alone_is_refused(world2):
    with pytest.raises(RanksError, match="gives other gradients.*set `sequence_parallel_size` to 1"):
        world2.run(check_with_a_broken_backward)


class _MixingTokens(torch.nn.Module):
    """An adapter's first half, which adds to every token the mean of those it is given."""

    def __init__(self, own) -> None:
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x) + self.own(x.mean(dim=1, keepdim=True))

    @property
    def weight(self):
        return self.own.weight


def check_adapter(mixes):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(build("llama", "ulysses"), config)
    if mixes:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"] = _MixingTokens(module.lora_A["default"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    check(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_an_adapter_does_shows_behind_its_zeros(world2):
    pytest.importorskip("peft")
    world2.run(check_adapter, False)
    with pytest.raises(RanksError, match="gives other outputs"):
        world2.run(check_adapter, True)


def check_half(name):
    model = build(name, "ulysses", torch.bfloat16)
    check(model)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_half_precision_is_not_taken_for_a_fault(world2, name):
    world2.run(check_half, name)
