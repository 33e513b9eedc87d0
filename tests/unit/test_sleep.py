"""Sleep is exact: against the unmodified model, transformers' own cache, finite differences, and itself otherwise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from hf_longctx import SleepConfig, sleep_generate, sleep_loss
from hf_longctx.adapters.instance_forward import put_on
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.sleep.cache import SleepCache
from hf_longctx.sleep.loss import SleepingForward
from hf_longctx.sleep.sleepers import check_sleeper
from hf_longctx.sleep.window_passes import Window, sleep_window

from ..hybrids import HYBRIDS, gradients
from ..sleepers import MAMBAS, build_sleeper, in_float64, logits_of, randomize, tokens_of, with_own_cache


ALL = [*HYBRIDS, *MAMBAS]


@pytest.mark.parametrize("name", ALL)
def test_one_pass_is_the_unmodified_model_to_the_bit(name):
    model, batch = build_sleeper(name), tokens_of()
    theirs = model(**batch, use_cache=False).loss
    assert torch.equal(sleep_loss(model, batch, SleepConfig(window=32)), theirs)  # one window
    ours, window = logits_of(model, batch, SleepConfig(window=8)), with_own_cache(model, batch["input_ids"], 8)
    assert torch.equal(ours[:, 16:], window[:, 16:])  # four windows, of which two sleep
    # The label behind a border comes from one vector through the head: a product of another shape.
    assert torch.allclose(ours[:, 15], window[:, 15], atol=1e-6)
    assert not torch.allclose(model(batch["input_ids"]).logits[:, 16:], window[:, 16:], atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_assigned_states_are_those_of_the_cache_that_copies(name):
    model, ids = build_sleeper(name), tokens_of()["input_ids"]
    ours, theirs = SleepCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in ((0, 2), (2, 12), (12, 13), (13, 14), (14, 26)):  # shorter than a kernel, single tokens
            found = [
                model(
                    input_ids=ids[:, start:stop],
                    position_ids=torch.arange(start, stop)[None],
                    use_cache=True,
                    **{OUTPUT_NAME: cache},
                ).logits
                for cache in (ours, theirs)
            ]
            assert torch.equal(*found)
    states = 0
    for mine, other in zip(ours.layers, theirs.layers):
        for kind in ("conv_states", "recurrent_states"):
            for index, state in getattr(mine, kind, {}).items():
                assert state is None or torch.equal(state, getattr(other, kind)[index])
                states += state is not None
    assert states >= 2


@pytest.mark.parametrize("changes", [{}, {"loop_layers": (1, 2), "eviction": "sliding", "answers_sleep": True}])
def test_gradients_through_passes_and_windows_are_finite_differences(changes):
    model = build_sleeper("qwen3_5_text", dtype=torch.float64, layer_types=["full_attention", "linear_attention"])
    randomize(model)
    batch, config = tokens_of(tokens=22, labelled=6), SleepConfig(window=8, passes=3, **changes)
    if "answers_sleep" in changes:
        batch["labels"][0, 3] = 7
    batch["chunk_size"] = 8  # goes on to the layers: no window is padded to 64 tokens
    with in_float64():
        sleep_loss(model, batch, config).backward()
        generator, found = torch.Generator().manual_seed(0), gradients(model)
        for name, parameter in model.named_parameters():
            way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            way /= way.norm()
            expected = float((found[name] * way).sum())
            assert abs(expected) > 1e-7, name
            # The looped map is sharp: the best of three steps.
            assert any(
                abs(slope(lambda: sleep_loss(model, batch, config), parameter, way, step) / expected - 1) <= 1e-5
                for step in (3e-5, 3e-6, 3e-4)
            ), name


@torch.no_grad()
def slope(loss, parameter: torch.Tensor, way: torch.Tensor, step: float) -> float:
    """The central difference of a loss along a way."""
    losses = []
    for side in (step, -2 * step):
        parameter.add_(way, alpha=side)
        losses.append(float(loss()))
    parameter.add_(way, alpha=step)
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_reaches_the_tokens_of_a_forgotten_window(name):
    model, batch = build_sleeper(name), tokens_of()
    randomize(model)
    for passes in (1, 3):
        table = model.get_input_embeddings().weight
        early = batch["input_ids"][:, :8].unique()
        late = batch["input_ids"][:, 8:].unique()
        only = early[~torch.isin(early, late)]
        sleep_loss(model, batch, SleepConfig(window=8, passes=passes)).backward()
        assert float(table.grad[only].abs().max()) > 1e-12
        model.zero_grad()


def test_rows_do_not_know_of_each_other_and_some_sleep_while_others_are_awake():
    model, config = build_sleeper("qwen3_5_text", dtype=torch.float64), SleepConfig(window=8, passes=3)
    randomize(model)
    batch = tokens_of(rows=3)
    batch["labels"][1, 3] = 5  # this row is awake over its first window
    batch["labels"][2, 8:16] = batch["input_ids"][2, 8:16]
    together = logits_of(model, batch, config)
    for row in range(3):
        alone = logits_of(model, {name: value[row : row + 1] for name, value in batch.items()}, config)
        labelled = batch["labels"][row, 1:] != -100
        assert torch.allclose(together[row, :-1][labelled], alone[0, :-1][labelled], atol=1e-12, rtol=0)
    asked = torch.tensor([[True, True, False, False], [False, True, False, False], [True, False, False, False]])
    batch["sleep_windows"] = asked
    assert torch.equal(logits_of(model, batch, config), together)
    batch["sleep_windows"] = asked.tolist()
    assert torch.equal(logits_of(model, batch, config), together)
    batch["sleep_windows"] = torch.zeros_like(asked)
    assert not torch.allclose(logits_of(model, batch, config), together)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_sliding_is_attention_to_a_band_of_the_whole_row(name):
    model, batch = build_sleeper(name), tokens_of()
    randomize(model)
    ago = torch.arange(26)[:, None] - torch.arange(26)
    band = ((ago >= 0) & (ago < 8))[None, None].expand(2, 1, -1, -1)
    expected = model(input_ids=batch["input_ids"], attention_mask=band, use_cache=False).logits[:, 16:]
    found = logits_of(model, batch, SleepConfig(window=8, eviction="sliding"))[:, 16:]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, model(batch["input_ids"]).logits[:, 16:], atol=1e-3)


def test_a_batch_that_asks_for_a_tuple():
    model, batch, config = build_sleeper("qwen3_5_text"), tokens_of(), SleepConfig(window=8, passes=2)
    expected = sleep_loss(model, batch, config)
    assert torch.equal(sleep_loss(model, {**batch, "return_dict": False}, config), expected)
    put_on(model, SleepingForward(config, keeps_logits=True))
    whole, parts = model(**batch), model(**batch, return_dict=False)
    assert torch.equal(parts[0], expected) and torch.equal(parts[1], whole.logits) and len(parts) == 2


def test_padding_on_the_right_changes_nothing():
    model, config = build_sleeper("qwen3_5_text", dtype=torch.float64), SleepConfig(window=8, passes=2)
    batch = tokens_of()
    expected = sleep_loss(model, batch, config)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=3),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 9), value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 9)),
    }
    assert abs(float((sleep_loss(model, padded, config) - expected).detach())) < 1e-6  # the loss casts to float32


@pytest.mark.parametrize("name", ["qwen3_5_text", "nemotron_h"])
def test_recomputation_changes_nothing(name):
    model, batch = build_sleeper(name, dtype=torch.float64).train(), tokens_of()
    randomize(model)
    config = SleepConfig(window=8, passes=3, loop_layers=(0, 2))
    sleep_loss(model, batch, config).backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    sleep_loss(model, batch, config).backward()
    found = gradients(model)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, atol=1e-12, rtol=0), parameter
    assert all(layer.gradient_checkpointing for layer in model.model.layers)  # as it was set


@pytest.mark.parametrize("changes", [{}, {"answers_sleep": True}, {"eviction": "sliding"}, {"loop_layers": (0, 1)}])
@pytest.mark.parametrize("prompt", [21, 16, 5])
def test_generated_token_by_token_is_one_teacher_forced_forward(changes, prompt):
    model, config = build_sleeper("qwen3_next"), SleepConfig(window=8, passes=3, **changes)
    randomize(model)
    ids = tokens_of(tokens=prompt)["input_ids"]
    made = generate(model, ids, config, max_new_tokens=20)
    labels = made.sequences.clone()
    labels[:, :prompt] = -100
    batch = {"input_ids": made.sequences, "labels": labels}
    forced = logits_of(model, batch, config)[:, prompt - 1 : -1]
    assert torch.allclose(torch.stack(made.logits, dim=1), forced, atol=1e-5)
    scores = torch.stack(made.logits, dim=1).log_softmax(-1).gather(-1, made.sequences[:, prompt:, None])
    assert abs(float(-scores.mean() - sleep_loss(model, batch, config).detach())) < 1e-5
    if config.eviction == "hard":
        assert made.cache.peak_keys == 8 if hasattr(made, "cache") else True


def generate(model, ids, config, **changes):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    return model.generate(ids, custom_generate=sleep_generate, sleep=config, **{**options, **changes})


@pytest.mark.parametrize("name", ALL)
def test_every_hybrid_generates_as_it_is_trained(name):
    model, config = build_sleeper(name), SleepConfig(window=8, passes=2)
    ids = tokens_of(tokens=13)["input_ids"]
    made = generate(model, ids, config, max_new_tokens=8)
    labels = made.sequences.clone()
    labels[:, :13] = -100
    forced = logits_of(model, {"input_ids": made.sequences, "labels": labels}, config)[:, 12:-1]
    assert torch.allclose(torch.stack(made.logits, dim=1), forced, atol=1e-5)


def test_more_passes_are_another_model_and_answers_sleep_where_they_are_told_to():
    model, ids = build_sleeper("qwen3_next"), tokens_of(tokens=5)["input_ids"]
    randomize(model)
    made = lambda **changes: torch.stack(
        generate(model, ids, SleepConfig(window=8, **changes), max_new_tokens=12, output_logits=True).logits, dim=1
    )
    # What a window of the output leaves is what a single pass left, unless answers sleep, too.
    assert torch.equal(made(passes=1), made(passes=3))
    assert not torch.allclose(made(passes=3)[:, 4:], made(passes=3, answers_sleep=True)[:, 4:], atol=1e-4)


def test_tokens_and_states_stay_as_small_as_a_window():
    model, config = build_sleeper("qwen3_5_text"), SleepConfig(window=8, passes=4)
    sizes = []
    for prompt in (9, 41):
        cache = generate(model, tokens_of(tokens=prompt)["input_ids"], config, max_new_tokens=20)[OUTPUT_NAME]
        assert cache.peak_keys == 8
        sizes.append(
            [state.numel() for layer in cache.layers for state in getattr(layer, "recurrent_states", {}).values()]
        )
    assert sizes[0] == sizes[1]
    sliding = SleepConfig(window=8, eviction="sliding")
    assert generate(model, tokens_of(tokens=5)["input_ids"], sliding, max_new_tokens=20)[OUTPUT_NAME].peak_keys == 8


def count_layers(model, run) -> int:
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


def test_passes_are_paid_in_sleep_and_not_awake():
    model, ids = build_sleeper("qwen3_5_text"), tokens_of(tokens=19)["input_ids"]
    for passes in (1, 4):
        config = SleepConfig(window=8, passes=passes)
        check_sleeper(model, config)  # which tries a model once
        runs = [count_layers(model, partial(generate, model, ids, config, max_new_tokens=new)) for new in (1, 9)]
        assert runs == [2 * passes + 1, 2 * passes + 1 + 8]  # two windows asleep, the rest of the prompt, the output


def test_every_pass_sees_the_left_context_that_the_first_saw():
    """The convolution of a later pass neither starts from nothing nor from the end of its own window."""
    model = build_sleeper("qwen3_5_text", layer_types=["linear_attention", "full_attention"])
    config = SleepConfig(window=8, passes=2)
    sleeper, ids = check_sleeper(model, config), tokens_of(tokens=16)["input_ids"]
    seen = []
    layer = model.model.layers[0].linear_attn
    handle = (
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs[OUTPUT_NAME].layers[0].conv_states[0]), with_kwargs=True
        )
        if OUTPUT_NAME == "cache"
        else None
    )
    with torch.no_grad():
        _, first = sleep_window(sleeper, SleepCache(model.config), Window(ids[:, :8], 0, {}), config)
        sleep_window(sleeper, first, Window(ids[:, 8:], 8, {}), config)
    if handle is None:  # the layers call their cache by another name there
        return
    handle.remove()
    assert seen[0] is None and not seen[1].any()
    assert torch.equal(seen[2], first.layers[0].conv_states[0]) and torch.equal(seen[3], seen[2]) and seen[2].any()


def test_a_pass_begins_with_what_the_last_layer_left_and_not_with_its_norm():
    model = build_sleeper("qwen3_5_text")
    sleeper, ids = check_sleeper(model, SleepConfig(window=8)), tokens_of(tokens=8)["input_ids"]
    randomize(model)
    entered, left = [], []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda module, args, output: left.append(output))
    with torch.no_grad():
        sleep_window(sleeper, SleepCache(model.config), Window(ids, 0, {}), SleepConfig(window=8, passes=3))
    assert len(entered) == len(left) == 3
    assert torch.equal(entered[1], left[0]) and torch.equal(entered[2], left[1])


def test_a_model_that_scales_its_inputs_does_not_scale_hidden_states():
    model = build_sleeper("granitemoehybrid")
    assert model.config.embedding_multiplier == 12
    sleeper, ids = check_sleeper(model, SleepConfig(window=8)), tokens_of(tokens=8)["input_ids"]
    entered, left = [], []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda module, args, output: left.append(output))
    with torch.no_grad():
        sleep_window(sleeper, SleepCache(model.config), Window(ids, 0, {}), SleepConfig(window=8, passes=3))
    assert torch.equal(entered[0], model.get_input_embeddings()(ids) * 12)
    assert torch.equal(entered[1], left[0]) and torch.equal(entered[2], left[1])


@torch.no_grad()
def test_a_layer_before_the_loop_leaves_its_keys_where_they_slide():
    model, ids = (
        build_sleeper("qwen3_5_text", layer_types=["full_attention", "linear_attention"]),
        tokens_of(tokens=8)["input_ids"],
    )
    sleeper, kept = check_sleeper(model, SleepConfig(window=8)), []
    for passes in (1, 3):
        config = SleepConfig(window=8, passes=passes, eviction="sliding", loop_layers=(1, 2))
        _, cache = sleep_window(sleeper, SleepCache(model.config), Window(ids, 0, {}), config)
        kept.append(cache.layers[0].keys)
    assert kept[0].shape[-2] == 8 and torch.equal(*kept)


def test_a_layer_outside_the_loop_runs_once():
    model, batch = (
        build_sleeper(
            "qwen3_next",
            num_hidden_layers=3,
            layer_types=["full_attention", "linear_attention"] * 1 + ["linear_attention"],
        ),
        tokens_of(),
    )
    config = SleepConfig(window=8, passes=3, loop_layers=(1, 2))
    check_sleeper(model, config)  # which tries a model once
    calls = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        own = layer.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        assert own
    sleep_loss(model, batch, config)
    assert calls == [4, 8, 4]
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_the_checkpoint_of_a_model_that_sleeps_is_vanilla(tmp_path):
    model, batch, config = build_sleeper("qwen3_next"), tokens_of(), SleepConfig(window=8, passes=3)
    keys = list(model.state_dict())
    sleep_loss(model.train(), batch, config).backward()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert list(model.state_dict()) == keys == list(again.state_dict()) and type(again) is type(model)
    assert "sleep" not in (tmp_path / "config.json").read_text()
    assert torch.equal(again(batch["input_ids"]).logits, model.eval()(batch["input_ids"]).logits)
