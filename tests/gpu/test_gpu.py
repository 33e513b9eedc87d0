"""The same references on a GPU: half precision, flash and flex kernels, two processes on one device, and FSDP2 through
the trainers where there are two GPUs.

Skipped without CUDA; `HF_LONGCTX_TEST_DEVICE=cpu` runs on a CPU what it has kernels for. bf16 keeps 8 bits of mantissa
(4e-3), and a gradient sums many such roundings: 3e-2 of the largest entry.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longctx import SequenceMesh, adapt, assert_no_cross_document, explain_attention, shard_batch

from ..few_bits import lora_gradients, one_by_one, packed_documents, qlora
from ..models import VOCAB, build
from ..unit.test_packed import documents_of, pack, weights_like
from ..world.test_models_exact import make_batch, upstream
from .device import DEVICE, ON_CUDA, marks, needs_flash, only_cuda, to_device


pytestmark = marks
KERNELS = ["sdpa", "eager", "flash_attention_2"]
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}  # flex needs heads of 16 on CUDA


def gradients(model, batch, weights):
    model.zero_grad()
    logits = model(**batch).logits
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agrees_with_eager(kernel: str, name: str, rows: str) -> None:
    """Gradients of a random projection; on a CPU, where flex has no backward, its logits."""
    half = torch.bfloat16 if kernel.startswith("flash") else torch.float32
    stock = build(name, "eager", **WIDE).to(DEVICE, half)
    ours = build(name, "ulysses", **WIDE).to(DEVICE, half)
    full = make_batch(rows, name)
    weights, full = upstream(full, half).to(DEVICE), to_device(full)
    share = shard_batch(full, SequenceMesh.build(), inner_attention=kernel)
    tolerance = 3e-2 if half is torch.bfloat16 else 2e-4  # float32 kernels on a GPU sum in another order, some in TF32
    if kernel == "flex_attention" and not ON_CUDA:
        with torch.no_grad():
            expected, actual = (
                model(**batch, use_cache=False).logits for model, batch in ((stock, full), (ours, share))
            )
        real = weights != 0
        assert (actual - expected)[real].abs().max() / expected.abs().max() < tolerance
        return
    expected, actual = gradients(stock, {**full, "use_cache": False}, weights), gradients(ours, share, weights)
    for name_, gradient in expected[1].items():
        error = (actual[1][name_] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name_}: {error:.1e}"


@pytest.mark.parametrize("rows", ["full", "left", "right", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_eager_on_one_gpu(kernel, name, rows):
    needs_flash(kernel)
    if kernel == "sdpa" and name == "gemma2":
        pytest.skip("refused by name: sdpa has no softcap (tests/unit)")
    agrees_with_eager(kernel, name, rows)


@only_cuda
def test_no_mask_is_allocated_for_a_long_causal_row():
    """16,384 tokens through sdpa: a mask of T x T would be 256 MiB."""
    model = build("llama", "ulysses", max_position_embeddings=16_384).to("cuda", torch.bfloat16)
    ids = torch.randint(3, VOCAB, (1, 16_384), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.model(**shard_batch({"input_ids": ids}, SequenceMesh.build(), inner_attention="sdpa"))
    assert torch.cuda.max_memory_allocated() - before < 128 * 2**20


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_trainer_on_two_gpus(tmp_path, wrapper):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_gpus.py")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([*command, script, str(tmp_path), wrapper], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@only_cuda
@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_variable_length_kernel_of_torch_equals_documents_alone(name):
    """bf16 on one GPU: the planner takes `torch.nn.attention.varlen`, forward and backward."""
    model = build(name, "packed", **wide(name)).to(DEVICE, torch.bfloat16)
    batch = to_device(pack(documents_of((9, 1, 13, 400, 2, 9), name), name))
    plans = explain_attention(model, {k: v for k, v in batch.items() if k != "use_cache"}).plans
    assert all("variable-length flash kernel" in plan.method for plan in plans), plans
    equals_documents_alone(name, True, (9, 1, 13, 400, 2, 9))


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_documents_do_not_leak_on_a_gpu(kernel):
    needs_flash(kernel)
    keeps_documents_apart(kernel)


def keeps_documents_apart(kernel: str) -> None:
    half = torch.bfloat16 if kernel.startswith("flash") else torch.float32
    batch = to_device(pack(documents_of((90, 1, 130))))
    batch.pop("use_cache")
    model = build("llama", "packed", **WIDE).to(DEVICE, half)
    assert_no_cross_document(model, batch, SequenceMesh.build(), inner_attention=kernel)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("half", [False, True])
def test_packed_embeddings_equal_padded_ones_on_a_gpu(name, half):
    pytest.importorskip("sentence_transformers", minversion="6.2")
    from hf_longctx import pack_embeddings

    from ..embedding import embedder, texts

    dtype = torch.bfloat16 if half else torch.float32
    inputs = texts((5, 1, 40, 12))
    padded, packed = (embedder(name, way, dtype=dtype).to(DEVICE) for way in ("sdpa", "packed"))
    pack_embeddings(packed)
    expected, actual = (model.encode(inputs, convert_to_tensor=True).float() for model in (padded, packed))
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < (3e-2 if half else 2e-4)


def logits_and_gradients(model, rows: list[dict], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a random projection; rows one after another."""
    model.eval()
    logits = torch.cat([model(**row).logits for row in rows], dim=1)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}


def worst_error(actual: dict, expected: dict) -> float:
    """Relative to the largest entry, or to a tenth of the largest of all where that is more."""
    floor = 0.1 * max(float(x.abs().max()) for name, x in expected.items() if name != "logits")
    return max(float((actual[n] - x).abs().max() / x.abs().max().clamp(min=floor)) for n, x in expected.items())


def wide(name: str) -> dict[str, int]:
    """Heads of 16, as kernels want them, and positions for the longest document."""
    size = {"hidden_size": 96, "num_attention_heads": 6, "max_position_embeddings": 512}
    return size if name == "modernbert" else {**size, "head_dim": 16}


def equals_documents_alone(name: str, half: bool, lengths: tuple[int, ...]) -> None:
    """In float32 equal to eager, one document at a time. In bf16 both are compared with float32 on the same weights,
    and ours may be off by twice what eager is off: two ways to round, and nothing else."""
    documents = documents_of(lengths, name)
    row = {key: value for key, value in to_device(pack(documents, name)).items() if key != "labels"}
    alone = [{"input_ids": torch.tensor([document["input_ids"]], device=DEVICE)} for document in documents]
    weights = weights_like(torch.empty(1, sum(lengths), VOCAB), 7).to(DEVICE)
    dtype = torch.bfloat16 if half else torch.float32
    ours, stock, exact = (build(name, way, **wide(name)).to(DEVICE, dtype) for way in ("packed", "eager", "eager"))
    expected = logits_and_gradients(exact.float(), alone, weights)
    allowed = 2 * worst_error(logits_and_gradients(stock, alone, weights), expected) if half else 2e-4
    error = worst_error(logits_and_gradients(ours, [row], weights), expected)
    assert error < allowed, f"{error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("half", [False, True])
def test_packed_rows_equal_documents_alone(name, half):
    """Windows, softcap and sinks, forward and backward, on the kernel that `"auto"` takes."""
    equals_documents_alone(name, half, (9, 1, 13, 40, 2, 9))


@pytest.mark.parametrize("half", [False, True])
def test_two_processes_on_one_device_exchange_and_train_as_one(half):
    """Over gloo, since NCCL takes one process a device: what `hf_longctx/parallel` does with tensors of the device."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("one_device.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    words = [script, DEVICE, "bfloat16" if half else "float32"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_adapters_on_four_bits_get_the_gradients_of_packed_documents_alone():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    loss, expected = one_by_one(DEVICE)
    model = qlora(build("llama", "sdpa").to(DEVICE), "packed").to(DEVICE).train()
    adapt(model, SequenceMesh.build())
    batch = to_device(packed_documents())
    ours = model(**batch, use_cache=False).loss
    ours.backward()
    assert float(ours.detach()) == pytest.approx(loss, rel=2e-4)
    for name, gradient in lora_gradients(model).items():
        error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 2e-4, f"{name}: {error:.1e}"  # float32, in another order of sums


# Last, since each shape is compiled.


@pytest.mark.parametrize("rows", ["packed", "full", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flex_agrees_with_eager(name, rows):
    agrees_with_eager("flex_attention", name, rows)


@only_cuda
def test_documents_do_not_leak_through_flex():
    keeps_documents_apart("flex_attention")
