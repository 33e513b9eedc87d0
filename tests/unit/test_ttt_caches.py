"""Caches of models with fast weights: what a forward returns, whose they are, and what spoils them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_longctx import TTTCache
from hf_longctx.attention.cache_names import OUTPUT_NAME
from tests.fast_weights import tiny_base, tiny_ttt, tokens
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_ttt(torch.float32)


@pytest.fixture(scope="module")
def expected(model):
    with torch.no_grad():
        return model(tokens()).logits


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(ids, **inputs).logits


def test_use_cache_returns_the_cache_that_a_loop_goes_on_with(model, expected):
    ids = tokens()
    with torch.no_grad():
        output = model(ids[:, :20], attention_mask=torch.ones(2, 20), use_cache=True)
        found, cache = [output.logits], output[OUTPUT_NAME]
        for place in range(20, 29):
            mask, positions = torch.ones(2, place + 1), torch.tensor([[place]])
            inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": True, OUTPUT_NAME: cache}
            output = model(ids[:, place : place + 1], **inputs)
            assert output[OUTPUT_NAME] is cache
            found.append(output.logits)
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5
    for labels in ({"labels": ids}, {"shift_labels": ids}):
        with pytest.raises(ValueError, match="without `cache` and `use_cache` to train"):
            model(ids, use_cache=True, **labels)


@pytest.mark.parametrize("cached", [False, True])
def test_logits_are_kept_as_they_are_asked_for(model, expected, cached):
    ids, places = tokens(), torch.tensor([3, 28])
    assert (logits_of(model, ids, use_cache=cached, logits_to_keep=2) - expected[:, -2:]).abs().max() <= 1e-5
    assert (logits_of(model, ids, use_cache=cached, logits_to_keep=places) - expected[:, places]).abs().max() <= 1e-5
    for wrong in (-1, True, "all"):
        with pytest.raises(ValueError, match=r"`logits_to_keep` \((-1|True|'all')\) must be how many"):
            model(ids, use_cache=cached, logits_to_keep=wrong)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, NotImplementedError, "begins with padding"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, NotImplementedError, "a cache would remember it"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"shape \(2, 4\), but `input_ids` \(2, 3\) after 7 tokens"),
        ({"attention_mask": torch.ones(1, 10)}, ValueError, r"`attention_mask` has shape \(1, 10\)"),
        ({"attention_mask": torch.tensor([[0.0, 0.0, -9.0]] * 2)}, ValueError, "other values than 1 for tokens and 0"),
        ({"attention_mask": [[1, 1, 1]] * 2}, ValueError, "`attention_mask` is a `list`"),
        ({"position_ids": torch.arange(3)[None]}, NotImplementedError, "do not count up from 7"),
        ({"position_ids": torch.arange(7, 9)[None]}, ValueError, r"`position_ids` \(\(1, 2\)\) must be a tensor"),
        ({"position_ids": [7, 8, 9]}, ValueError, r"`position_ids` \(list\) must be a tensor"),
        ({"foo": 1}, ValueError, "`foo` is no argument"),
        ({"return_dict": False}, NotImplementedError, r"`return_dict` \(False\) asks for a tuple"),
        ({"output_attentions": True}, NotImplementedError, "`output_attentions` is not collected"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, NotImplementedError, "packs documents"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 48)}, NotImplementedError, "`inputs_embeds` cannot"),
        ({"shift_labels": tokens(2, 3)}, ValueError, "no loss can be trained"),
        ({"learn": 0}, ValueError, r"`learn` \(0\) must be True or False"),
    ],
)
def test_a_forward_with_a_cache_checks_what_one_without_checks(model, inputs, kind, message):
    with pytest.raises(kind, match=message):
        model(**{"input_ids": tokens(2, 3), OUTPUT_NAME: model.read(tokens(2, 7)), **inputs})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.arange(5)[None]}, r"`position_ids` \(\(1, 5\)\) must be a tensor with one position"),
        ({"labels": tokens(1, 6)[0]}, r"`labels` has shape \(6,\), but `input_ids` \(2, 6\)"),
        ({"labels": [1]}, "`labels` has shape list"),
        ({"labels": torch.ones(2, 6)}, "`labels` holds torch.float32"),
        ({"input_ids": tokens(2, 6)[:0]}, r"`input_ids` \(\(0, 6\)\) must be a tensor of rows, .* one or more"),
        ({"input_ids": torch.ones(2, 6)}, "`input_ids` holds torch.float32, and tokens are integers"),
        ({"input_ids": tokens(2, 6) + 96}, "`input_ids` holds .*, and tokens are from 0 to 96"),
        ({"learn": "no"}, r"`learn` \('no'\) must be True or False"),
        ({"learn": 0}, r"`learn` \(0\) must be True or False"),
    ],
)
def test_rows_labels_and_settings_of_another_kind(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(2, 6), **inputs})


def test_two_caches_of_one_call(model):
    first, ids = model.read(tokens(1, 7)), tokens(1, 3)
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(ids, cache=first, past_key_values=first.copy())
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(ids, cache=first, past_key_values=first.copy())
    assert first.seen == 7
    model(ids, cache=first, past_key_values=first)
    assert first.seen == 10


def test_a_row_is_read_as_a_tokenizer_returns_it(model):
    ids = tokens(1, 9)
    batch = tiny_tokenizer()(["a b c"], return_tensors="pt", return_token_type_ids=True)
    assert model.read(**batch).seen == batch["input_ids"].shape[1]
    with pytest.raises(NotImplementedError, match="`attention_mask` has padding"):
        model.read(ids, attention_mask=torch.tensor([[1] * 8 + [0]]))
    with pytest.raises(ValueError, match="`labels` is no argument"):
        model.read(ids, labels=ids)
    with pytest.raises(ValueError, match="`cache` is a `dict`"):
        model.read(ids, cache={})
    with pytest.raises(ValueError, match=r"`learn` \(1\) must be"):
        model.read(ids, learn=1)
    assert torch.equal(model.read_losses(ids.int()), model.read_losses(ids))
    assert model.read_losses(ids[:, :1]).shape == (1, 0)
    assert torch.equal(logits_of(model, ids.int()), logits_of(model, ids))


def spoiled(model, error):
    """A memory of 7 tokens, a reading of which ended in `error` in its third piece."""
    memory, norm, left = model.read(tokens(1, 7)), model.base.model.norm, [2]

    def stop(module, args, output):
        left[0] -= 1
        if left[0] < 0:
            raise error

    handle = norm.register_forward_hook(stop)
    try:
        with pytest.raises(type(error)):
            model.read(tokens(1, 29), memory)
    finally:
        handle.remove()
    return memory


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=lambda e: type(e).__name__)
def test_a_memory_whose_reading_was_interrupted_refuses_all_use(model, error, tmp_path):
    memory, ids = spoiled(model, error), tokens(1, 3)
    message = rf"cannot be used any more, since reading ended in `{type(error).__name__}`"
    for use in (model.read, model.generate, model):
        with pytest.raises(RuntimeError, match=message):
            use(ids, **{"cache" if use != model else OUTPUT_NAME: memory.copy()})
    with pytest.raises(RuntimeError, match=message):
        memory.save(tmp_path / "memory")


def test_a_step_that_is_not_finite_spoils_its_memory():
    model = tiny_ttt(torch.float32)
    memory = model.make_cache()
    with torch.no_grad():
        for name in ("prime_down", "prime_up"):
            getattr(model.primes.prime_layers[1], name).fill_(1e30)
    with pytest.raises(RuntimeError, match="the inner step is not finite"):
        model.read(tokens(1, 20), memory)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        model.read(tokens(1, 20), memory)


def test_what_is_refused_and_what_is_left_off_spoil_nothing(model):
    memory, ids = model.read(tokens(1, 7)), tokens(1, 20)
    for wrong in (ids + 96, tokens(2, 3), ids[0]):
        with pytest.raises(ValueError, match="tokens are from 0|the cache holds 1 rows|a tensor of rows"):
            model.read(wrong, memory)
    pieces = model.read_logits(ids, memory)
    next(pieces)
    pieces.close()
    whole = torch.cat((tokens(1, 7), ids), 1)
    rest = ids[:, memory.seen - 7 :]
    assert memory.seen < 27 and model.read(rest, memory).seen == 27
    assert torch.allclose(memory.fast[0], model.read(whole).fast[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_learning_rate": 0.5}, "made with `inner_learning_rate` 1.0, but the model has 0.5"),
        ({"inner_max_grad_norm": 0.5}, "made with `inner_max_grad_norm` 1.0, but the model has 0.5"),
        ({"fast_intermediate_size": 8}, "made with `fast_intermediate_size` 16, but the model has 8"),
        ({"base": {"hidden_size": 24}}, "made with `hidden_size` 48, but the model has 24"),
        ({"base": {"num_attention_heads": 2}}, "made with `num_attention_heads` 6, but the model has 2"),
        ({"base": {"num_key_value_heads": 3}}, "made with `num_key_value_heads` 2, but the model has 3"),
        ({"dtype": torch.bfloat16}, "was read by a model in float32, but this one is in bfloat16"),
        ({"seed": 7}, "was read by other weights .* not trained since"),
    ],
)
def test_a_memory_of_another_model(model, change, message):
    memory, change = model.read(tokens(1, 7)), dict(change)
    dtype, seed = change.pop("dtype", torch.float32), change.pop("seed", None)
    other = tiny_ttt(torch.float32, tiny_base(dtype=torch.float32, **change.pop("base", {})), **change).to(dtype)
    if seed:  # one matrix before the suffix
        torch.nn.init.normal_(other.base.model.layers[0].mlp.up_proj.weight)
    assert model.read(tokens(1, 3), memory).seen == 10
    with pytest.raises(ValueError, match=message):
        other.read(tokens(1, 3), memory)


@pytest.mark.parametrize("way", ["in place", "data", "replaced"])
def test_a_model_that_was_trained_since_is_another_model(way):
    model = tiny_ttt(torch.float32)
    memory, layer = model.read(tokens(1, 7)), model.base.model.layers[1].mlp.down_proj
    assert model.read(tokens(1, 3), memory).seen == 10
    with torch.no_grad():
        if way == "in place":
            layer.weight.add_(0.01)
        elif way == "data":
            layer.weight.data.add_(0.01)
        else:
            layer.weight = torch.nn.Parameter(layer.weight + 0.01)
    with pytest.raises(ValueError, match="other weights"):
        model.generate(tokens(1, 3), cache=memory, max_new_tokens=1)


def test_a_model_with_another_adapter_is_another_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_ttt(torch.float32), peft.LoraConfig(target_modules=["q_proj"], r=2))
    ids, inner = tokens(1, 7), model.get_base_model()
    memory = inner.read(ids)
    assert model(ids, **{OUTPUT_NAME: memory}).logits.shape == (1, 7, 97) and memory.seen == 14
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="made with `adapters` default, but the model has none"),
    ):
        inner.read(ids, memory)
    assert model.generate(input_ids=ids[:, :3], cache=memory, max_new_tokens=1, eos_token_id=None).shape == (1, 4)


@pytest.mark.parametrize("begins_cast", [True, False])
def test_a_trainer_leaves_autocast_on_for_forward_alone(model, begins_cast):
    """`read()` runs without it then, and `generate()` with it."""
    memory, expected = model.make_cache(), model.read(tokens(1, 20)).fast
    for index, part in enumerate(tokens(1, 20).split([9, 8, 3], 1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=begins_cast == (index != 1)):
            model.read(part, memory)
    for weight, close in zip(memory.fast, expected, strict=True):
        assert (weight - close).abs().max() < 0.05 * close.abs().max()  # bfloat16 has 8 bits


def test_what_never_runs_is_no_part_of_the_model():
    """PEFT keeps the prime MLPs that were there beside those that it trains."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["primes"])
    model = peft.get_peft_model(tiny_ttt(torch.float32), config).get_base_model()
    memory = model.read(tokens(1, 7))
    with torch.no_grad():
        for matrix in model.primes.original_module.matrices():
            matrix.add_(1)
    assert model.read(tokens(1, 3), memory).seen == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "bos_token_id", 5), "`bos_token_id` 1, but the model has 5"),
        (
            lambda model: setattr(model.parts.config, "rms_norm_eps", 0.1),
            "`rms_norm_eps` 1e-06, but the model has 0.1",
        ),
        (lambda model: model.parts.rotary.inv_freq.mul_(2), "by other weights"),
    ],
)
def test_a_memory_knows_the_configuration(model, change, message):
    other = copy.deepcopy(model)
    change(other)
    with pytest.raises(ValueError, match=message):
        other.read(tokens(1, 3), model.read(tokens(1, 7)))


def test_reading_in_training_mode_with_recomputation_keeps_windows():
    model = tiny_ttt(torch.float32)
    expected = model.read_losses(tokens(1, 29))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert torch.equal(model.read_losses(tokens(1, 29)), expected)
    assert model.parts.prefix[0].gradient_checkpointing


def test_precision_device_and_copies(model):
    memory = model.read(tokens(1, 7))
    with pytest.raises(ValueError, match=r"by a model in float32, but this one is in bfloat16: read and ask in one"):
        copy.deepcopy(model).to(torch.bfloat16).read(tokens(1, 3), memory)
    with pytest.raises(ValueError, match=r"the cache is on meta, .* pass `memory.to\('cpu'\)`"):
        model.read(tokens(1, 3), memory.to("meta"))
    with pytest.raises(TypeError, match=r"`device` \(torch.bfloat16\) is no device"):
        memory.to(torch.bfloat16)
    for times in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"`times` \(.*\) must be a positive integer"):
            memory.repeat(times)


def test_what_inference_mode_made_works_outside(model):
    with torch.inference_mode():
        ids = tokens(1, 20)
        frozen, question = model.read(ids, learn=False), tokens(1, 3)
    plain = model.read(tokens(1, 20), learn=False)
    for memory in (frozen.copy(), frozen):
        assert torch.equal(
            logits_of(model, question, learn=False, **{OUTPUT_NAME: memory}),
            logits_of(model, tokens(1, 3), learn=False, **{OUTPUT_NAME: plain.copy()}),
        )
    assert torch.equal(model.read(ids).fast[0], model.read(tokens(1, 20)).fast[0])
    loss = model(ids, labels=ids).loss
    assert loss.requires_grad


def test_files_that_hold_no_whole_memory(model, tmp_path):
    memory, path = model.read(tokens(1, 20)), tmp_path / "memory"
    memory.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"garbage" * 99, whole[: len(whole) // 2], whole[:30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="`.*memory` cannot be read .* cut short or no safetensors file"):
            TTTCache.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path, metadata={"ttt_cache": json.dumps({"format": 2, "window": 8})})
    with pytest.raises(ValueError, match="lacks a part of a `TTTCache` .*, as files of other versions"):
        TTTCache.load(path)
    for place in (tmp_path / "none" / "memory", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no place for a file"):
            memory.save(place)
