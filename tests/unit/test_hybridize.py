"""Recurrent layers between those of a plain decoder: nothing changes at first, and then it can sleep."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from hf_longctx import LongContextTrainer, PackingCollator, SleepConfig, hybridize, sleep_generate, sleep_loss
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.sleep.hybridize import real_tokens
from hf_longctx.sleep.sleepers import recurrent_parameters
from hf_longctx.tasks.sleep_rows import Rule110Rows

from ..models import build
from ..sleepers import build_sleeper, logits_of, randomize, tokens_of
from ..training import arguments, reset_state


@pytest.mark.parametrize("every", [1, 2])
def test_step_0_is_the_decoder_to_the_bit(every):
    model, batch = build("llama", "sdpa"), tokens_of()
    layers = len(model.model.layers)
    expected = model(batch["input_ids"]).logits
    assert hybridize(model, every=every, head_size=16) is model
    assert torch.equal(model(batch["input_ids"]).logits, expected)
    assert len(model.model.layers) == layers + layers // every == model.config.num_hidden_layers
    made = model.generate(
        batch["input_ids"][:, :13],
        custom_generate=sleep_generate,
        sleep=SleepConfig(window=8, passes=2),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    labels = made.sequences.clone()
    labels[:, :13] = -100
    forced = logits_of(model, {"input_ids": made.sequences, "labels": labels}, SleepConfig(window=8, passes=2))
    assert torch.allclose(torch.stack(made.logits, dim=1), forced[:, 12:-1], atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
@torch.no_grad()
def test_padding_on_the_left_is_not_in_the_state(attention):
    model, ids = hybridize(build("llama", attention), every=1, head_size=16), tokens_of(tokens=12)["input_ids"]
    randomize(model)
    padded = torch.nn.functional.pad(ids, (5, 0), value=3)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    alone = model(ids[:1]).logits[0], model(padded[1:]).logits[0]
    together = model(padded, attention_mask=mask).logits
    assert torch.allclose(together[0, 5:], alone[0], atol=1e-5) and torch.allclose(together[1], alone[1], atol=1e-5)
    assert torch.allclose(model(padded[:1], attention_mask=mask[:1]).logits[0, 5:], alone[0], atol=1e-5)
    if attention == "sdpa":
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = model.generate(padded, attention_mask=mask, **options)[0, 17:]
        assert torch.equal(written, model.generate(ids[:1], **options)[0, 12:])


@torch.no_grad()
def test_padding_is_found_in_masks_of_blocks_and_of_static_caches():
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    sees = lambda row, head, query, key: real[row, key] & (query + 4 >= key)
    blocks = create_block_mask(sees, 2, None, 8, 12, device="cpu", BLOCK_SIZE=4)
    assert torch.equal(real_tokens(blocks, torch.zeros(2, 8, 3)), real[:, 4:])
    model = hybridize(build("llama", "sdpa"), every=1, head_size=16)
    randomize(model)
    ids, logits = tokens_of(tokens=12)["input_ids"], []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        inputs = [{"input_ids": ids[:, :9], "attention_mask": real[:, :9].long()}]
        inputs.append({"input_ids": ids[:, 9:], "attention_mask": real.long()})
        parts = [model(**part, use_cache=True, **{OUTPUT_NAME: cache}).logits for part in inputs]
        logits.append(torch.cat(parts, dim=1)[real])
    alone = model(ids[:1, 5:]).logits[0]
    assert torch.allclose(logits[0][:7], alone, atol=1e-5) and torch.allclose(*logits, atol=1e-5)


def test_a_decoder_on_packed_rows_and_one_that_is_loaded_again(tmp_path):
    model, ids = hybridize(build("llama", "packed"), every=1, head_size=16), tokens_of(tokens=12)["input_ids"]
    randomize(model)
    reset_state()
    trainer = LongContextTrainer(
        model=model,
        args=arguments(str(tmp_path), max_steps=1, learning_rate=0.0),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids.tolist()],
        data_collator=PackingCollator(max_tokens=64),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)
    trainer.save_model(str(tmp_path))
    reset_state()
    again = hybridize(build("llama", "packed"), every=1, head_size=16)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)


def test_thirty_steps_of_what_was_forgotten_lower_its_loss():
    torch.manual_seed(0)
    model = hybridize(build("llama", "sdpa"), every=1, head_size=16).train()
    rows = Rule110Rows(24, 8, 0, 0)  # the bits of a window that was forgotten, as they were
    batch = {"input_ids": rows.input_ids, "labels": rows.labels, "chunk_size": 8}
    trained = recurrent_parameters(model)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = sleep_loss(model, batch, SleepConfig(window=8, passes=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 < losses[0] and trained  # 0.69 is a guess
    model.eval()


def test_decoders_that_cannot_be_taken_apart_are_left_as_they_were():
    batch = tokens_of()
    for model in (build("qwen3", "sdpa"), build_sleeper("qwen3_next"), build("gpt2", "sdpa")):
        expected = model(batch["input_ids"]).logits
        with pytest.raises(NotImplementedError, match="take a decoder such as Llama"):
            hybridize(model, every=1)
        assert torch.equal(model(batch["input_ids"]).logits, expected)
    for every in (0, 9, True, "all"):
        with pytest.raises(ValueError, match="`every` .* must be 1 up to the"):
            hybridize(build("llama", "sdpa"), every=every)
    for size in (0, "16", True):
        with pytest.raises(ValueError, match="`head_size` .* must be a number of keys of a state"):
            hybridize(build("llama", "sdpa"), head_size=size)
    with pytest.raises(ValueError, match="`Linear` is no model of transformers"):
        hybridize(torch.nn.Linear(2, 2))
