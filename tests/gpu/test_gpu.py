"""The same references on a GPU: half precision, flash and flex kernels, and FSDP2 through the trainers where there are
two GPUs.

Skipped without CUDA. bf16 keeps 8 bits of mantissa (4e-3), and a gradient sums many such roundings: 3e-2 of the
largest entry.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longctx import SequenceMesh, assert_no_cross_document, explain_attention, shard_batch

from ..models import VOCAB, build
from ..unit.test_packed import documents_of, pack, weights_like
from ..world.test_models_exact import make_batch, upstream


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = ["sdpa", "eager", "flex_attention", "flash_attention_2"]


def gradients(model, batch, weights):
    model.zero_grad()
    logits = model(**batch).logits
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", ["full", "left", "right", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_eager_on_one_gpu(kernel, name, rows):
    if kernel.startswith("flash"):
        pytest.importorskip("flash_attn")
    if kernel == "sdpa" and name == "gemma2":
        pytest.skip("refused by name: sdpa has no softcap (tests/unit)")
    wide = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}
    half = torch.bfloat16 if kernel.startswith("flash") else torch.float32
    stock = build(name, "eager", **wide).to("cuda", half)
    ours = build(name, "ulysses", **wide).to("cuda", half)
    full = make_batch(rows, name)
    weights = upstream(full, half).cuda()
    full = {key: value.cuda() for key, value in full.items()}
    expected = gradients(stock, {**full, "use_cache": False}, weights)
    share = shard_batch(full, SequenceMesh.build(), inner_attention=kernel)
    actual = gradients(ours, share, weights)
    tolerance = 3e-2 if half is torch.bfloat16 else 2e-4  # float32 kernels on a GPU sum in another order, some in TF32
    for name_, gradient in expected[1].items():
        error = (actual[1][name_] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name_}: {error:.1e}"


def test_no_mask_is_allocated_for_a_long_causal_row():
    """16,384 tokens through sdpa: a mask of T x T would be 256 MiB."""
    model = build("llama", "ulysses", max_position_embeddings=16_384).to("cuda", torch.bfloat16)
    ids = torch.randint(3, VOCAB, (1, 16_384), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.model(**shard_batch({"input_ids": ids}, SequenceMesh.build(), inner_attention="sdpa"))
    assert torch.cuda.max_memory_allocated() - before < 128 * 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_trainer_on_two_gpus(tmp_path, wrapper):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_gpus.py")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([*command, script, str(tmp_path), wrapper], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_variable_length_kernel_of_torch_equals_documents_alone(name):
    """bf16 on one GPU: the planner takes `torch.nn.attention.varlen`, forward and backward."""
    wide = {"hidden_size": 96, "num_attention_heads": 6} | ({} if name == "modernbert" else {"head_dim": 16})
    documents = documents_of((9, 1, 13, 400, 2, 9), name)
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in pack(documents, name).items()}
    model = build(name, "packed", **wide, max_position_embeddings=512).to("cuda", torch.bfloat16).eval()
    plans = explain_attention(model, {k: v for k, v in batch.items() if k != "use_cache"}).plans
    assert all("variable-length flash kernel" in plan.method for plan in plans), plans
    stock = build(name, "eager", **wide, max_position_embeddings=512).to("cuda", torch.bfloat16).eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    alone = [stock(input_ids=torch.tensor([row["input_ids"]], device="cuda")).logits for row in documents]
    weights = weights_like(logits.cpu(), 7).cuda()
    (logits * weights).sum().backward()
    (torch.cat(alone, dim=1) * weights).sum().backward()
    assert (logits - torch.cat(alone, dim=1)).abs().max() / logits.abs().max() < 3e-2
    expected = dict(stock.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in expected.values())
    for key, parameter in model.named_parameters():
        other = expected[key].grad
        error = (parameter.grad - other).abs().max() / other.abs().max().clamp(min=0.1 * largest)
        assert error < 3e-2, f"{key}: {error:.1e}"


@pytest.mark.parametrize("kernel", ["sdpa", "flex_attention", "flash_attention_2"])
def test_documents_do_not_leak_on_a_gpu(kernel):
    if kernel.startswith("flash"):
        pytest.importorskip("flash_attn")
    half = torch.bfloat16 if kernel.startswith("flash") else torch.float32
    wide = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in pack(documents_of((90, 1, 130))).items()}
    batch.pop("use_cache")
    model = build("llama", "packed", **wide).to("cuda", half)
    assert_no_cross_document(model, batch, SequenceMesh.build(), inner_attention=kernel)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("half", [False, True])
def test_packed_embeddings_equal_padded_ones_on_a_gpu(name, half):
    pytest.importorskip("sentence_transformers")
    from hf_longctx import pack_embeddings

    from ..embedding import embedder, texts

    dtype = torch.bfloat16 if half else torch.float32
    inputs = texts((5, 1, 40, 12))
    padded, packed = embedder(name, "sdpa", dtype=dtype).to("cuda"), embedder(name, "packed", dtype=dtype).to("cuda")
    pack_embeddings(packed)
    expected, actual = (model.encode(inputs, convert_to_tensor=True).float() for model in (padded, packed))
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < (3e-2 if half else 2e-4)
