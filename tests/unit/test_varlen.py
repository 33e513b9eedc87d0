"""Torch's variable-length kernel without a GPU: what is handed to it, around a stand-in written in plain torch."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.attention import kernels, varlen
from hf_longctx.attention.masks import AttentionRule, KernelPlan
from hf_longctx.attention.packed import PACKED
from hf_longctx.attention.reference import reference_attention
from hf_longctx.attention.varlen import VarlenBounds, fits


def stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`varlen_attn` as its documentation says: `(T, heads, size)`, and a window on either side."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right in (0, left), "causal, or as far ahead as behind"
    causal = right == 0
    window = None if left < 0 else left + 1 if causal else left
    outputs = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist()):
        piece = [tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value)]
        outputs.append(reference_attention(*piece, causal=causal, window=window, scaling=scale)[0])
    return torch.cat(outputs)


@pytest.fixture
def on_cuda(monkeypatch):
    """Pretend that the kernel fits every call."""
    monkeypatch.setattr(kernels, "fits", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)


SEGMENTS = [[-1] * 3 + [0] * 5 + [1], [0] * 1 + [1] * 7 + [-1]]


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize(
    "rule",
    [
        AttentionRule(causal=True, window=3),
        AttentionRule(causal=True, window=1),
        AttentionRule(window=2),
        AttentionRule(causal=True),
        AttentionRule(),
    ],
)
def test_kernel_gets_the_rule_and_the_documents(on_cuda, rule, key_heads, segments):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, key_heads, key_heads))
    plan = KernelPlan(rule, None if segments is None else torch.tensor(segments, dtype=torch.int32))
    call = PACKED.call(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    prepared = kernels.plan_for_kernel(plan, "sdpa", call)
    assert isinstance(prepared, VarlenBounds) or plan.is_plain
    plan = KernelPlan(plan.rule, plan.segments, prepared)
    output = kernels.run_planned("sdpa", call, plan)
    expected = reference_attention(
        query, key, value, causal=rule.causal, window=rule.window, segments=segments, scaling=0.3
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_interrupted_document_goes_through_a_mask(on_cuda):
    call = PACKED.call(torch.nn.Identity(), *[torch.zeros(1, 2, 4, 8)] * 3, None)
    plan = KernelPlan(AttentionRule(causal=True), torch.tensor([[0, 0, -1, 0]], dtype=torch.int32))
    assert kernels.plan_for_kernel(plan, "sdpa", call).shape == (1, 1, 4, 4)


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def tensor_of(size: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(1, 2, 4, size, dtype=dtype).as_subclass(OnDevice)


def test_kernel_is_chosen_where_it_fits(one_gpu, monkeypatch):
    query = tensor_of()
    assert fits(query, query, query, 0.0)
    assert not fits(query, query, query, 0.1), "dropout"
    assert not fits(query, query, tensor_of(32), 0.0), "another value size"
    for tensor in (tensor_of(dtype=torch.float32), tensor_of(320), tensor_of(4)):
        assert not fits(tensor, tensor, tensor, 0.0)
    on_cpu = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16)
    assert not fits(on_cpu, on_cpu, on_cpu, 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not fits(query, query, query, 0.0), "a GPU without flash attention"


def test_first_releases_of_the_kernel_are_left_alone(one_gpu, monkeypatch):
    """They had no window, and so could not say causal in the way this one does."""
    query = tensor_of()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, *, is_causal=False: None)
    varlen._is_available.cache_clear()
    try:
        assert not fits(query, query, query, 0.0)
    finally:
        varlen._is_available.cache_clear()
