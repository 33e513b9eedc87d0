"""The device that these tests run on: CUDA, or with `HF_LONGCTX_TEST_DEVICE=cpu` the CPU as a stand-in, on which what
only CUDA has is skipped."""

from __future__ import annotations

import os

import pytest
import torch


DEVICE = os.environ.get("HF_LONGCTX_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="only CUDA has the kernel or the counter that is tested")


def to_device(batch: dict) -> dict:
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def needs_flash(kernel: str) -> None:
    """Skip a flash kernel that is not installed, or has no device."""
    if kernel.startswith("flash"):
        pytest.importorskip("flash_attn")
        if not ON_CUDA:
            pytest.skip("flash-attn runs on CUDA only")
