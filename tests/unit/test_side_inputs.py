"""Inputs of attention that a kernel would drop in silence are refused by name: plain, packed and shared rows."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.masking_utils import create_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx.attention.registry import find_attention
from hf_longctx.parallel.shard import SequenceShard
from hf_longctx.proof.tiny import shrink


NAMES = ("packed", "ulysses")
ROWS, HEADS, TOKENS = 2, 2, 8


class Layer(torch.nn.Module):
    """An attention layer that passes one more input, as sparse layers do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = tf.LlamaConfig(hidden_size=8, num_attention_heads=HEADS)
        self.config._attn_implementation = name
        self.num_key_value_groups, self.is_causal = 1, True

    def forward(self, x, value, shard=None, **kwargs):
        mask = create_causal_mask(self.config, x.transpose(1, 2).flatten(2), None, None)
        function = find_attention(self.config._attn_implementation).function
        return function(self, x, x, x, mask, chosen_keys=value, sequence_shard=shard, **kwargs)


INPUTS = {
    "one entry a token and block": torch.zeros(ROWS, TOKENS, 2, dtype=torch.long),
    "a choice a token": torch.ones(ROWS, TOKENS, dtype=torch.bool),
    "kept tokens": torch.arange(4),
    "a list of tensors": [torch.zeros(ROWS, TOKENS, 2, dtype=torch.int32)],
    "a function of indices": lambda row, head, query, key: query > key,
}


def rows() -> torch.Tensor:
    return torch.randn(ROWS, HEADS, TOKENS, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", INPUTS)
def test_what_a_layer_chose_is_not_dropped(kind, name):
    with pytest.raises(NotImplementedError, match="`Layer` passes `chosen_keys` to its attention, and .*'sdpa' here"):
        Layer(name)(rows(), INPUTS[kind])
    documents = torch.arange(TOKENS)[None].expand(ROWS, -1) % 4
    with pytest.raises(NotImplementedError, match="`Layer` passes `chosen_keys`.*cannot be split by heads"):
        Layer(name)(rows(), INPUTS[kind], position_ids=documents)


def test_under_a_shard_too():
    shard = SequenceShard(size=2, rank=0, num_tokens=2 * TOKENS, local_len=TOKENS)
    with pytest.raises(NotImplementedError, match="`Layer` passes `chosen_keys`.*cannot be split by heads"):
        Layer("ulysses")(rows(), INPUTS["a choice a token"], shard)


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_the_batch_pass_through(name):
    columns = {"shift_labels": torch.zeros(ROWS, TOKENS, dtype=torch.long), "row_id": torch.arange(ROWS)}
    plain, _ = Layer(name)(rows(), None)
    output, _ = Layer(name)(rows(), None, **columns, source=torch.ones(ROWS, TOKENS, dtype=torch.long), rate=0.5)
    assert torch.equal(output, plain)


def forward(kind: str, name: str, packed: bool, **changes):
    config = shrink(CONFIG_MAPPING[kind]().get_text_config())
    for field, value in changes.items():
        setattr(config, field, value)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    positions = torch.arange(24)[None] % (12 if packed else 24)
    return model(torch.arange(10, 34)[None], position_ids=positions, use_cache=False)


SPARSE = {
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_topk_blocks": 2},
    "deepseek_v4": {},
    "deepseek_v32": {},
    "inkling2": {},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in SPARSE if kind in CONFIG_MAPPING])
def test_models_that_choose_keys_or_add_some_end_in_a_sentence(kind, packed, name):
    with pytest.raises(
        NotImplementedError, match="run dense|ignore it|split by heads|rest its own|edits its atten|do not pack"
    ):
        forward(kind, name, packed, **SPARSE[kind])


@pytest.mark.skipif("inkling_text" not in CONFIG_MAPPING, reason="a model type of newer transformers")
def test_a_bias_that_the_kernel_reads_stays():
    ours, theirs = (forward("inkling_text", name, packed=False) for name in ("packed", "sdpa"))
    assert ours.logits.shape == theirs.logits.shape
