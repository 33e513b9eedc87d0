"""Recurrent layers between those of a plain decoder: nothing changes at first, and then it can sleep."""

from __future__ import annotations

import pytest
import torch

from hf_longctx import SleepConfig, hybridize, sleep_generate, sleep_loss
from hf_longctx.sleep.sleepers import recurrent_parameters
from hf_longctx.tasks.sleep_rows import Rule110Rows

from ..models import build
from ..sleepers import build_sleeper, logits_of, tokens_of


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
