"""Layers that read a row's length or count positions for a scale: packed documents get what they would get alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForMaskedLM, EsmConfig

from hf_longctx.adapters.instance_forward import patch_on
from hf_longctx.adapters.rotary_lengths import ROTARY, depends_on_length
from hf_longctx.adapters.row_lengths import follow_lengths
from hf_longctx.attention.implicit_positions import local_lengths
from hf_longctx.parallel.shard import cut_batch

from ..lengths import LENGTH_MODELS, build_with_lengths
from ..models import _BASE, VOCAB, build


LENGTHS = (9, 1, 17, 13)  # on both sides of the threshold
BOUNDS = torch.tensor([0, 9, 10, 27, 40], dtype=torch.int32)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (1, length), generator=generator) for length in LENGTHS]


def packed(pieces, start: int = 0) -> dict[str, object]:
    positions = torch.cat([torch.arange(piece.shape[1]) + start for piece in pieces])[None]
    return {"input_ids": torch.cat(pieces, dim=1), "position_ids": positions, "use_cache": False}


def alone(model, pieces, start: int = 0) -> torch.Tensor:
    """Every document in a process of its own, whose rotary embedding remembers no other."""
    outputs = []
    for piece in pieces:
        positions = torch.arange(piece.shape[1])[None] + start
        fresh = copy.deepcopy(model)
        for parameter, own in zip(fresh.parameters(), model.parameters()):
            parameter.data = own.data
        outputs.append((fresh, fresh(input_ids=piece, position_ids=positions, use_cache=False).logits))
    upstream = weights(torch.cat([output for _, output in outputs], dim=1))
    (torch.cat([output for _, output in outputs], dim=1) * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        found = [fresh.get_parameter(name).grad for fresh, _ in outputs]
        parameter.grad = sum(gradient for gradient in found if gradient is not None)
    return torch.cat([output for _, output in outputs], dim=1).detach()


def weights(outputs: torch.Tensor) -> torch.Tensor:
    return torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=outputs.dtype)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if isinstance(p.grad, torch.Tensor)}


def assert_same(ours, theirs, actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).abs().max())
        assert error <= 1e-6 * largest, f"{name}: {error / largest:.1e}"


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("name,rope", LENGTH_MODELS)
def test_packed_documents_are_those_that_stand_alone(name, rope, start):
    reference = build_with_lengths(name, rope, "sdpa")
    expected = alone(reference, documents(), start)
    model = build_with_lengths(name, rope, "packed")
    assert follow_lengths(model).modules
    for _ in range(2):  # nothing is remembered
        model.zero_grad()
        outputs = model(**packed(documents(), start)).logits
        (outputs * weights(outputs)).sum().backward()
    assert_same(gradients(model), gradients(reference), outputs.detach(), expected)


SOME = [case for case in LENGTH_MODELS if case[0] in ("llama", "phimoe", "moshi", "llama4")]


@pytest.mark.parametrize("name,rope", SOME)
def test_what_was_not_adapted_is_refused_by_its_attention(name, rope):
    model = build_with_lengths(name, rope, "packed")
    with pytest.raises(NotImplementedError, match=r"hf_longctx.adapt\(model, mesh\)"):
        model(**packed(documents()))
    short = [piece[:, :4] for piece in documents()]  # below every threshold nothing is wrong
    assert model(**packed(short if rope else short[:1])).logits.isfinite().all()
    row = {"input_ids": documents()[2], "use_cache": False}
    assert model(**row).logits.isfinite().all()  # one document, on one process, is transformers' own
    handle = follow_lengths(model)
    assert handle.modules
    model(**packed(documents()))
    handle.remove()
    assert not handle.modules
    with pytest.raises(NotImplementedError, match="adapt"):
        model(**packed(documents()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name,rope", [case for case in LENGTH_MODELS if case[0] in ("qwen3", "moshi", "llama4")])
def test_checkpointed_layers_recompute_the_same_gradients(name, rope, reentrant):
    """Also where the rotary embedding is inside the layer, and runs again in the backward pass."""
    found = []
    for checkpointing in (False, True):
        model = build_with_lengths(name, rope, "packed").train()
        follow_lengths(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**packed(documents())).logits.square().mean().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_documents_told_by_their_bounds_are_the_same():
    model = build_with_lengths("llama", "dynamic", "packed")
    follow_lengths(model)
    batch = packed(documents())
    expected = model(**batch).logits
    del batch["position_ids"]
    actual = model(**batch, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_what_depends_on_the_length_is_found_by_what_it_does():
    assert depends_on_length(build_with_lengths("llama", "longrope", "packed").model.rotary_emb)
    assert not depends_on_length(build("llama", "packed").model.rotary_emb)

    class OwnRotaryEmbedding(torch.nn.Module):
        def forward(self, x, position_ids):
            angle = position_ids[..., None] / position_ids.max().clamp(min=1)
            return angle.cos(), angle.sin()

    assert depends_on_length(OwnRotaryEmbedding())


@pytest.mark.parametrize("size", [1, 2])
def test_a_scale_by_the_masked_tokens_of_a_row_is_refused_where_there_are_any(size):
    config = EsmConfig(
        **_BASE, token_dropout=True, mask_token_id=VOCAB - 1, use_cache=False, position_embedding_type="rotary"
    )
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="ulysses").eval()
    batch = {key: value for key, value in packed([piece.clamp(max=90) for piece in documents()]).items()}
    batch.pop("use_cache")
    share = cut_batch(batch, size, 0)
    with pytest.raises(NotImplementedError, match=r"`token_dropout` .True. scales.*hf_longctx.adapt\(model, mesh\)"):
        model(**share)
    follow_lengths(model)
    share["input_ids"] = share["input_ids"].clone()
    share["input_ids"][0, 2] = VOCAB - 1
    with pytest.raises(NotImplementedError, match="train masked rows unpacked"):
        model(**share)
    if size == 1:
        alone = torch.cat([model(input_ids=piece.clamp(max=90)).logits for piece in documents()], dim=1)
        together = model(**batch, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS).logits
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        model(input_ids=share["input_ids"])  # a row of one document is transformers' own


@pytest.mark.parametrize("size", [1, 2, 3])
def test_lengths_of_the_shares_are_those_of_the_documents(size):
    batch = {key: value for key, value in packed(documents(), start=2).items() if key != "use_cache"}
    expected = torch.cat([torch.full((length,), length + 2) for length in LENGTHS])
    shares = [cut_batch(batch, size, rank)["sequence_shard"] for rank in range(size)]
    assert torch.cat([local_lengths(shard) for shard in shares], dim=1)[0, :40].equal(expected)
    assert {shard.num_positions for shard in shares} == {19}
    batch["position_ids"] = batch["position_ids"] - 2
    shares = [cut_batch(batch, size, rank)["sequence_shard"] for rank in range(size)]
    assert all(shard.document_lengths is None for shard in shares)  # nothing more travels than before
    assert torch.cat([local_lengths(shard) for shard in shares], dim=1)[0, :40].equal(expected - 2)
    row = {"input_ids": batch["input_ids"], "position_ids": torch.arange(40)[None] + 100}
    shares = [cut_batch(row, size, rank)["sequence_shard"] for rank in range(size)]
    assert all(local_lengths(shard) is None and shard.num_positions == 140 for shard in shares)


def test_a_rotary_module_that_gets_other_positions_than_the_tokens_is_refused():
    model = build_with_lengths(*LENGTH_MODELS[0], "ulysses")
    (rotary,) = [module for module in follow_lengths(model).modules if patch_on(module, ROTARY) is not None]
    patch_on(rotary, ROTARY).shard = cut_batch({"input_ids": torch.arange(12)[None]}, 2, 0)["sequence_shard"]
    with pytest.raises(NotImplementedError, match="rotates 5 positions, but this rank holds 6 tokens"):
        rotary(torch.zeros(1, 5, 8), torch.arange(5)[None])
