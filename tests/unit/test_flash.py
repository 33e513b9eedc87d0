"""The flash path without a GPU: transformers' own helper around a flash function written in plain torch.

What is under test is what we hand to the kernel: bounds, windows, sinks, and zeros where transformers' unpadding gives
zeros.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from transformers import masking_utils, modeling_flash_attention_utils

from hf_longctx.attention import kernels
from hf_longctx.attention.deferred import DeferredMask
from hf_longctx.attention.reference import reference_attention
from hf_longctx.attention.ulysses import ulysses_attention
from hf_longctx.parallel.shard import cut_batch


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, **options):
    """Flash attention's variable-length function, one document at a time. Tensors are `(tokens, heads, size)`."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    pieces = []
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        piece = dense(*(x[None, start:stop] for x in (q, k, v)), causal, softmax_scale, **options)
        pieces.append(piece[0])
    return torch.cat(pieces)


def dense(q, k, v, causal, softmax_scale, window_size=(-1, -1), softcap=0.0, s_aux=None, **_):
    """Flash attention's dense function on `(rows, tokens, heads, size)`; `window_size` is inclusive on both sides."""
    left, right = window_size
    window = None if left < 0 else (left + 1 if causal else left)
    assert causal or left == right
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"scaling": softmax_scale, "softcap": softcap or None, "sinks": s_aux}
    return reference_attention(q, k, v, causal=causal, window=window, **options)


@pytest.fixture
def flash(monkeypatch):
    """Pretend that flash-attn is installed, with every feature unless told otherwise."""

    def install(**missing):
        supports = dict.fromkeys(
            ("dropout_p", "window_size", "deterministic", "softcap", "s_aux", "max_seqlen_q", "max_seqlen_k"), True
        )
        supports.update({"learnable_sink": False, "block_table": False, "page_table": False, "cache_seqlens": False})
        supports.update(missing)
        process = functools.partial(
            modeling_flash_attention_utils._process_flash_attention_kwargs, supports_mapping=supports
        )
        paged = "process_paged_kwargs_fn" in inspect.getsource(modeling_flash_attention_utils._flash_attention_forward)
        functions = ((dense, varlen, None, None, None), (process, None) if paged else process)
        for module in (modeling_flash_attention_utils, kernels):
            monkeypatch.setattr(module, "lazy_import_flash_attention", lambda *_: functions)

    return install


LAYOUTS = {
    "whole": None,
    "left": [[-1] * 3 + [0] * 6, [0] * 9],
    "packed": [[0] * 4 + [1] * 5, [0] * 1 + [1] * 8],
}
RULES = {
    "causal": (masking_utils.causal_mask_function, {"causal": True}),
    "both": (masking_utils.bidirectional_mask_function, {"causal": False}),
    "window": (masking_utils.sliding_window_causal_mask_function(3), {"causal": True, "window": 3}),
    "window_both": (masking_utils.sliding_window_bidirectional_mask_function(2), {"causal": False, "window": 2}),
    "chunk": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long()), {"causal": True, "chunk": 4}),
}


def call(rule, layout, size_of_value=8, **extras):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 9, size, generator=generator) for heads, size in ((4, 8), (2, 8), (2, size_of_value))
    )
    batch = {"input_ids": torch.zeros(2, 9, dtype=torch.long)}
    if layout == "packed":
        batch["position_ids"] = torch.tensor(
            [[row[:i].count(d) for i, d in enumerate(row)] for row in LAYOUTS[layout]]
        )
    elif layout == "left":
        batch["attention_mask"] = (torch.tensor(LAYOUTS[layout]) >= 0).long()
    shard = cut_batch(batch, 1, 0, inner_attention="flash_attention_2")["sequence_shard"]
    module = torch.nn.Module()
    module.q_proj = torch.nn.Linear(1, 1)  # transformers reads its precision
    mask = DeferredMask({"mask_function": RULES[rule][0], "batch_size": 2})
    output, _ = ulysses_attention(module, query, key, value, mask, sequence_shard=shard, **extras)
    return output, (query, key, value)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("rule", list(RULES))
def test_flash_gets_the_rule_and_the_documents(flash, rule, layout):
    flash()
    output, tensors = call(rule, layout)
    expected = reference_attention(*tensors, **RULES[rule][1], segments=LAYOUTS[layout])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_flash_with_another_value_size_softcap_and_sinks(flash):
    flash()
    output, tensors = call("window", "packed", size_of_value=5, softcap=1.5, s_aux=torch.linspace(-1, 1, 4))
    expected = reference_attention(
        *tensors, causal=True, window=3, segments=LAYOUTS["packed"], softcap=1.5, sinks=torch.linspace(-1, 1, 4)
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("missing", "rule", "extras", "message"),
    [
        ("window_size", "window", {}, "sliding window of 3 tokens"),
        ("dropout_p", "causal", {"dropout": 0.1}, "attention dropout"),
        ("s_aux", "causal", {"s_aux": torch.zeros(4)}, "attention sinks"),
        ("softcap", "causal", {"softcap": 1.5}, "caps its attention scores"),
    ],
)
def test_what_this_flash_version_would_drop_in_silence_is_refused(flash, missing, rule, extras, message):
    flash(**{missing: False})
    with pytest.raises(NotImplementedError, match=message):
        call(rule, "whole", **extras)


def test_a_window_the_mask_does_not_have_is_refused(flash):
    flash()
    with pytest.raises(NotImplementedError, match="sliding window of 3 tokens that its mask does not"):
        call("causal", "whole", sliding_window=3)
