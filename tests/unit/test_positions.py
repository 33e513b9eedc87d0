"""Decoders that number their tokens themselves: the positions they get, what they keep, and what is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, BartForConditionalGeneration, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx import assert_no_cross_document, explain_attention
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.positions import follow_positions
from hf_longctx.attention.cache_names import CACHE_LENGTH_NAMES, OUTPUT_NAME, find_cache
from hf_longctx.attention.implicit_positions import local_positions, longest_document
from hf_longctx.families import COUNTS_POSITIONS
from hf_longctx.parallel.shard import cut_batch
from hf_longctx.proof.tiny import shrink

from ..models import VOCAB, build, config_of


LENGTHS = (9, 1, 13)
NAMES = ("bart", "marian")  # a learned table with an offset, and one of sines without


def documents(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (1, length), generator=generator) for length in lengths]


def packed(pieces) -> dict[str, object]:
    """One row; its documents are shown by positions that restart."""
    positions = torch.cat([torch.arange(piece.shape[1]) for piece in pieces])[None]
    return {"input_ids": torch.cat(pieces, dim=1), "position_ids": positions, "use_cache": False}


def one_by_one(model, pieces) -> torch.Tensor:
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], dim=1)


# Which positions


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_positions_of_the_shares_are_those_of_the_documents(size):
    batch = {**packed(documents()), "labels": torch.zeros(1, 23, dtype=torch.long)}
    batch.pop("use_cache")
    shares = [cut_batch(batch, size, rank)["sequence_shard"] for rank in range(size)]
    whole = torch.cat([local_positions(shard) for shard in shares], dim=1)
    assert whole[:, :23].equal(batch["position_ids"]) and not whole[:, 23:].any()
    assert {longest_document(shard) for shard in shares} == {13}
    row = {"input_ids": batch["input_ids"]}
    counted = [local_positions(cut_batch(row, size, rank)["sequence_shard"]) for rank in range(size)]
    if size == 1:
        assert counted == [None]  # transformers' own counting is left alone
    else:
        assert torch.cat(counted)[:23].equal(torch.arange(23)) and not torch.cat(counted)[23:].any()


@pytest.mark.parametrize("size", [1, 2])
def test_padded_rows_are_counted_from_their_first_place_as_the_host_does(size):
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    batch = {"input_ids": torch.ones(2, 10, dtype=torch.long), "attention_mask": mask}
    counted = [local_positions(cut_batch(batch, size, rank)["sequence_shard"]) for rank in range(size)]
    assert counted == [None] if size == 1 else torch.cat(counted).equal(torch.arange(10))


# Packed rows on one process


@pytest.mark.parametrize("kind", sorted(COUNTS_POSITIONS))
def test_packed_documents_are_those_that_stand_alone_and_gradients_follow(kind):
    """Every type of the table looks positions up as we patch it; float64, where only transformers' casts round."""
    config = shrink(CONFIG_MAPPING[kind]())
    pieces, found = documents(), []
    for attention in ("eager", "packed"):  # transformers has no other kernel for one of them
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
        assert follow_positions(model).modules
        attach_adapters(model)  # some have an attention of their own, too
        outputs = one_by_one(model, pieces) if attention == "eager" else model(**packed(pieces)).logits
        upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=outputs.dtype)
        (outputs * upstream).sum().backward()
        found.append((outputs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, ours) = found
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert ours.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())  # a key's bias cancels to nothing
    for name, gradient in gradients.items():
        error = float((ours[name] - gradient).abs().max())
        assert error <= 1e-6 * largest, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_other_ways_to_tell_documents_and_what_reads_them(name):
    model, pieces = build(name, "packed").eval(), documents()
    follow_positions(model)
    expected, batch = one_by_one(model, pieces), packed(pieces)
    del batch["position_ids"]
    bounds = torch.tensor([0, 9, 10, 23], dtype=torch.int32)
    index = torch.tensor([0] * 9 + [1] + [2] * 13)[None]
    for told in ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}, {"seq_idx": index}):
        torch.testing.assert_close(model(**batch, **told).logits, expected, rtol=1e-5, atol=1e-5)
    row = {key: value for key, value in packed(pieces).items() if key != "use_cache"}
    assert_no_cross_document(model, row)
    assert "3 segments of 1 to 13 tokens" in str(explain_attention(model, row))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_recompute_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build("bart", "packed").train()
        follow_positions(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**packed(documents())).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "model.decoder.embed_positions.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_compiled():
    model, pieces = build("bart", "packed").eval(), documents()
    follow_positions(model)
    with torch.no_grad():
        expected, compiled = one_by_one(model, pieces), torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**packed(pieces)).logits, expected, rtol=1e-5, atol=1e-5)


# Adapters and copies


@pytest.mark.parametrize("first", ["adapter", "cover"])
def test_adapters_that_replace_the_table_before_or_after(first):
    from peft import LoraConfig, get_peft_model

    model, pieces = build("bart", "packed"), documents()
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_positions"], init_lora_weights=False)
    if first == "cover":
        follow_positions(model)
    adapted = get_peft_model(model, settings).eval()
    if first == "adapter":
        assert follow_positions(adapted).modules
    torch.testing.assert_close(adapted(**packed(pieces)).logits, one_by_one(adapted, pieces), rtol=1e-5, atol=1e-5)


def test_a_copy_follows_with_its_own_weights():
    model, pieces = build("bart", "packed").eval(), documents()
    follow_positions(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.decoder.embed_positions.weight.add_(1.0)
        assert not torch.equal(other(**packed(pieces)).logits, model(**packed(pieces)).logits)
        torch.testing.assert_close(other(**packed(pieces)).logits, one_by_one(other, pieces), rtol=1e-5, atol=1e-5)


# What stays transformers'


@pytest.mark.parametrize("name", NAMES)
def test_generation_and_plain_rows_are_unchanged_and_nothing_is_kept(name):
    model, rows = build(name, "packed").eval(), torch.cat(documents((9, 9)))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model(input_ids=rows).logits, model.generate(rows, **settings)
    follow_positions(model)
    model(**packed(documents()))
    assert torch.equal(model(input_ids=rows).logits, before[0])
    assert torch.equal(model.generate(rows, **settings), before[1])
    table = model.model.decoder.embed_positions
    assert not any(isinstance(value, torch.Tensor) for value in vars(table).values())


def test_remove_restores_everything_and_covering_twice_is_once():
    model = build("bart", "packed").eval()
    decoder = model.model.decoder
    decoder.forward = decoder.forward  # somebody's own, which is kept below
    modules = (decoder, decoder.embed_positions)
    before = [dict(vars(module)) for module in modules]
    follow_positions(model)
    handle = follow_positions(model)
    assert model(**packed(documents())).logits.shape == (1, 23, VOCAB)
    above = decoder.forward
    decoder.forward = lambda *args, **kwargs: above(*args, **kwargs)
    handle.remove()
    with pytest.raises(ValueError, match="has an `attention_mask`"):  # ours is below another, and steps aside
        model(**packed(documents()))
    decoder.forward = above
    handle.remove()
    assert [{k: v for k, v in vars(m).items() if not k.startswith("_pos")} for m in modules] == before


def test_other_models_are_left_alone():
    for model in (build("llama", "packed"), BartForConditionalGeneration(config_of("bart", encoder_layers=1))):
        assert not follow_positions(model).modules
        assert not any("forward" in vars(module) for module in model.modules())


# Refusals


def test_without_it_packed_rows_and_shares_are_refused():
    model = build("bart", "packed")
    share = cut_batch({"input_ids": torch.cat(documents((24,)))}, 2, 0)
    whole = cut_batch({key: value for key, value in packed(documents()).items() if key != "use_cache"}, 1, 0)
    with pytest.raises(NotImplementedError, match="numbers its tokens itself.*follow_positions"):
        model(**whole)
    model.set_attn_implementation("ulysses")
    with pytest.raises(NotImplementedError, match="`bart` numbers its tokens itself"):
        model(**share)
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCAB)  # which needs nothing


def test_documents_longer_than_the_table_are_refused_on_every_rank():
    model = build("bart", "ulysses", max_position_embeddings=12)
    follow_positions(model)
    row = {"input_ids": torch.ones(1, 23, dtype=torch.long)}
    for rank in range(2):
        with pytest.raises(ValueError, match="has 23 tokens, but `BartDecoder` has positions for 12"):
            model(**cut_batch(row, 2, rank))
    with pytest.raises(ValueError, match="has 13 tokens"):
        model(**packed(documents()))


def test_a_cache_beside_documents_is_refused():
    model = build("bart", "packed")
    follow_positions(model)
    with pytest.raises(ValueError, match="`use_cache` is on"):
        model(**{**packed(documents()), "use_cache": True})
    cache, decoder, row = DynamicCache(config=model.config), model.get_decoder(), packed(documents())
    for name in {OUTPUT_NAME, "past_key_values"}:  # what the installed transformers calls it, and what it still takes
        with pytest.raises(ValueError, match="`use_cache` is on"):
            model(**{**row, name: cache})
        with pytest.raises(ValueError, match="`use_cache` is on"):
            decoder(**{**row, name: cache})
    place = list(inspect.signature(type(decoder).forward).parameters)[1:].index(OUTPUT_NAME)
    with pytest.raises(ValueError, match="`use_cache` is on"):
        decoder(row.pop("input_ids"), *[None] * (place - 1), cache, **row)
    assert find_cache({"cache": None, "past_key_values": 1, "cache_params": None}) == 1
    assert find_cache({"cache": 2, "position_ids": 1}) == 2 and find_cache({"use_cache": True}) is None


@pytest.mark.parametrize("name", NAMES)
def test_arguments_given_by_place_are_seen(name):
    """A decoder called by hand: its documents, or the mask that hides them, need no keyword."""
    model = build(name, "packed").eval()
    follow_positions(model)
    decoder, row = model.get_decoder(), packed(documents())
    alone = [decoder(piece, use_cache=False)[0] for piece in documents()]
    together = decoder(row["input_ids"], position_ids=row["position_ids"], use_cache=False)[0]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)  # fp32, other row lengths
    mask = torch.ones_like(row["input_ids"])
    with pytest.raises(ValueError, match="attention_mask"):
        decoder(row["input_ids"], mask, position_ids=row["position_ids"], use_cache=False)
    (table,) = [module for module in decoder.modules() if module is not decoder and "forward" in vars(module)]
    of = {length: torch.zeros(1, length) if name == "bart" else torch.Size((1, length)) for length in (3, 5)}
    whole, positions = table(of[5], 0).view(5, -1), torch.tensor([4, 2, 0])
    assert torch.equal(table(of[3], 0, positions).view(3, -1), whole[positions])
    assert torch.equal(table(of[3], position_ids=positions).view(3, -1), whole[positions])
    (length_name,) = set(CACHE_LENGTH_NAMES) & set(inspect.signature(type(table).forward).parameters)
    assert torch.equal(table(of[3], **{length_name: 2}).view(3, -1), whole[2:])


def test_a_host_that_looks_up_positions_otherwise_is_refused():
    model = build("bart", "packed")
    model.model.decoder.embed_positions = torch.nn.Embedding(258, 48)
    with pytest.raises(NotImplementedError, match="`BartForCausalLM` has no decoder that looks up its positions"):
        follow_positions(model)
