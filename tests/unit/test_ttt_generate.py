"""`generate()` of models with fast weights: turns of a conversation, batches that end, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StoppingCriteria

from hf_longctx import TTTCache
from hf_longctx.attention.cache_names import OUTPUT_NAME, find_cache
from tests.fast_weights import tiny_ttt, tokens


GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny_ttt(torch.float32)


def close(one: TTTCache, other: TTTCache) -> bool:
    pairs = zip(one.fast, other.fast, strict=True)
    return one.seen == other.seen and all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("saved", [False, True])
def test_a_second_turn_goes_on_from_all_that_was_written(model, rows, saved, tmp_path):
    first, second = tokens(rows, 9), tokens(rows, 5, seed=8)
    memory = model.make_cache()
    talk = model.generate(first, cache=memory, max_new_tokens=7, **GREEDY)
    assert memory.seen == 15 and torch.equal(memory.unread, talk[:, -1:])
    if saved:
        memory.save(tmp_path / "memory")
        memory = TTTCache.load(tmp_path / "memory")
    read = model.read(second, memory.copy())
    whole = torch.cat((talk, second), 1)
    assert read.unread is None and close(read, model.read(whole))
    with torch.no_grad():
        logits = model(second, **{OUTPUT_NAME: memory.copy()}, position_ids=torch.arange(16, 21)[None]).logits
        assert (logits - model(whole).logits[:, 16:]).abs().max() <= 1e-5
    answer = model.generate(second, cache=memory, max_new_tokens=8, **GREEDY)
    assert torch.equal(answer[:, 5:], model.generate(whole, max_new_tokens=8, **GREEDY)[:, 21:])
    assert torch.equal(memory.repeat(2).unread, answer[:, -1:].repeat_interleave(2, 0))


def test_a_prompt_that_holds_the_conversation_again(model):
    memory, prompt = model.make_cache(), tokens(1, 9)
    talk = model.generate(prompt, cache=memory, max_new_tokens=7, **GREEDY)
    for again in (talk, torch.cat((talk, tokens(1, 4)), 1)):
        with pytest.raises(
            ValueError, match=r"begin with the 15 tokens .* so the 16 that it knows would be read again"
        ):
            model.generate(again, cache=memory, max_new_tokens=2)
    short, other = model.read(prompt), talk.clone()
    other[:, 8] += 1
    with pytest.raises(ValueError, match="begin with the 9 tokens"):
        model.generate(prompt, cache=short)
    for fine in (other, prompt[:, :8]):
        model.generate(fine, cache=short.copy(), max_new_tokens=1)
    assert model.read(prompt, short).seen == 18


class AfterTokens(StoppingCriteria):
    """Ends row 0 after a number of tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length] + [False] * (len(input_ids) - 1))


def test_a_batch_in_which_a_row_ends_before_others_spoils_its_cache(model):
    prompt = tokens(2, 9)
    written = model.generate(prompt, max_new_tokens=8, **GREEDY)[:, 9:]
    # a token that ends one row only, and not in its last place
    ends = [
        int(t) for place, t in enumerate(written[0, :6]) if place and t not in written[1] and t not in written[0, :1]
    ]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": ends[0], "pad_token_id": 0}
    for learn in (None, False):
        memory = model.make_cache()
        model.generate(prompt, cache=memory, learn=learn, **options)
        with pytest.raises(
            RuntimeError, match=r"since its rows \[0\] ended before others in one `generate\(\)` and read"
        ):
            model.generate(tokens(2, 3), cache=memory)
    never = {**options, "eos_token_id": next(token for token in range(3, 97) if token not in written)}
    stops = {"return_dict_in_generate": True, "stopping_criteria": [AfterTokens(12)]}
    assert "[0] ended before others" in find_cache(model.generate(prompt, **stops, **never)).damage
    # The row ends one token before the other, and its last one is padding that also ends texts.
    late = {**never, "pad_token_id": never["eos_token_id"], "max_new_tokens": 4}
    stops = {"return_dict_in_generate": True, "stopping_criteria": [AfterTokens(12)]}
    assert "[0] ended before others" in find_cache(model.generate(prompt, **stops, **late)).damage
    memory = model.make_cache()
    assert model.generate(prompt, cache=memory, **never).shape == (2, 17) and memory.damage is None
    alone = model.make_cache()
    model.generate(prompt[:1], cache=alone, **options)
    assert alone.damage is None and int(alone.unread) == ends[0]


def test_beams_leave_no_memory_of_what_was_returned(model):
    memory = model.read(tokens(1, 20)).repeat(3)
    model.generate(tokens(1, 3), cache=memory, num_beams=3, max_new_tokens=3, **GREEDY)
    with pytest.raises(RuntimeError, match=r"since `num_beams` \(3\) left beams in it"):
        model.read(tokens(3, 3), memory)


def test_writing_that_was_interrupted_spoils_its_cache_and_a_typo_does_not(model):
    class Stop(StoppingCriteria):
        def __call__(self, *args, **kwargs):
            raise KeyboardInterrupt

    memory = model.read(tokens(1, 9))
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate(tokens(1, 3), cache=memory, max_new_token=3)
    assert memory.damage is None
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 3), cache=memory, stopping_criteria=[Stop()], max_new_tokens=3)
    with pytest.raises(RuntimeError, match=r"since `generate\(\)` ended in `KeyboardInterrupt`"):
        model.generate(tokens(1, 3), cache=memory)


def test_a_memory_that_wrote_without_learning_says_why_it_cannot_learn(tmp_path):
    model, memory = tiny_ttt(torch.float32, learn_while_generating=False), None
    memory = model.make_cache()
    model.generate(tokens(1, 9), cache=memory, max_new_tokens=4, **GREEDY)
    memory.save(tmp_path / "memory")
    for kept in (memory, TTTCache.load(tmp_path / "memory")):
        for turn in (model.generate, model.read):
            with pytest.raises(
                RuntimeError, match="has read tokens with `learn_while_generating=False`, .*`learn=False`"
            ):
                turn(tokens(1, 3), cache=kept)
        assert model.generate(tokens(1, 3), cache=kept, learn=False, max_new_tokens=2, **GREEDY).shape == (1, 5)
    with pytest.raises(ValueError, match=r"`use_cache` \(False\) reads the whole row again"):
        model.generate(tokens(1, 9), use_cache=False, max_new_tokens=4)
    for learn in (True, False):
        options = {"learn": learn, "max_new_tokens": 9, **GREEDY}
        found = model.generate(tokens(1, 9), use_cache=False, **options)
        assert torch.equal(found, model.generate(tokens(1, 9), **options))


LEFT, RIGHT = tokens(2, 8), tokens(2, 8)
LEFT[0, :3], RIGHT[0, 5:] = 0, 0
STARTS = tokens(2, 8)
STARTS[:, 0] = 1


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (LEFT, {}),
        (RIGHT, {}),
        (LEFT, {"pad_token_id": 0, "eos_token_id": 0}),
        (RIGHT, {"pad_token_id": 0, "eos_token_id": [5, 0]}),
        (LEFT.masked_fill(LEFT == 0, 2), {"pad_token_id": None}),
        (LEFT, {"cache": None}),
    ],
)
def test_prompts_that_hold_padding(model, prompts, options):
    with pytest.raises(
        NotImplementedError, match=r"row 0 of the prompts has padding \(`pad_token_id` [02]\), and rows"
    ):
        model.generate(prompts, max_new_tokens=2, **options)


@pytest.mark.parametrize("options", [{"pad_token_id": 1}, {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 2}])
def test_one_token_that_begins_a_text_is_no_padding(model, options):
    prompts = STARTS.masked_fill(STARTS == 1, options["pad_token_id"])
    assert model.generate(prompts, max_new_tokens=2, **options).shape == (2, 10)
    ones = torch.ones_like(LEFT)
    assert model.generate(LEFT, attention_mask=ones, max_new_tokens=1).shape == (2, 9)


def changed(settings, **values):
    settings = copy.deepcopy(settings)
    for name, value in values.items():
        setattr(settings, name, value)
    return settings


@pytest.mark.parametrize("place", ["argument", "configuration", "position", "model"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_lookup_num_tokens", 3, "takes back tokens"),
        ("assistant_early_exit", 1, "takes back tokens"),
        ("cache_implementation", "static", "`cache_implementation` \\('static'\\) has no place"),
        ("prefill_chunk_size", 4, "cuts prompts"),
        ("guidance_scale", 1.5, r"`guidance_scale` \(1.5\) reads rows of its own"),
        ("output_hidden_states", True, "`output_hidden_states` is not collected"),
    ],
)
def test_settings_are_found_wherever_they_stand(model, monkeypatch, place, name, value, message):
    settings, args, kwargs = changed(model.generation_config, **{name: value}), (), {}
    if place == "argument":
        kwargs = {name: value}
    elif place == "configuration":
        kwargs = {"generation_config": settings}
    elif place == "position":
        args = (settings,)
    else:
        monkeypatch.setattr(model, "generation_config", settings)
    with pytest.raises(NotImplementedError, match=message):
        model.generate(tokens(1, 8), *args, max_new_tokens=2, **kwargs)


def test_continuations_that_the_models_own_settings_ask_for(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", changed(model.generation_config, num_beams=3))
    with pytest.raises(ValueError, match="1 rows, but 1 prompts with 3"):
        model.generate(tokens(1, 3), cache=model.read(tokens(1, 9)))


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"inputs": [[3, 4]]}, ValueError, r"`input_ids` \(list\) must be a tensor"),
        ({"inputs": tokens(1, 8)[0]}, ValueError, r"`input_ids` \(\(8,\)\) must be"),
        ({"inputs": torch.ones(1, 8)}, ValueError, "holds torch.float32"),
        ({"attention_mask": torch.ones(1, 7)}, ValueError, r"`attention_mask` has shape \(1, 7\)"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, NotImplementedError, "has 4 dimensions"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3] * 2])}, NotImplementedError, "do not count up from 0"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3] * 2]), "use_cache": False}, NotImplementedError, "do not count"),
        ({"learn": 0}, ValueError, r"`learn` \(0\) must be"),
        ({"synced_gpus": True}, NotImplementedError, r"`synced_gpus` \(True\)"),
    ],
)
def test_prompts_of_another_kind(model, inputs, kind, message):
    with pytest.raises(kind, match=message):
        model.generate(**{"inputs": tokens(1, 8), "max_new_tokens": 2, **inputs})


def test_int32_prompts_and_continuous_batches(model):
    prompt, options = tokens(1, 8), {"max_new_tokens": 9, **GREEDY}
    assert torch.equal(model.generate(prompt.int(), **options), model.generate(prompt, **options))
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(NotImplementedError, match="continuous batching keeps pages"):
            getattr(model, name)([[3, 4]])
