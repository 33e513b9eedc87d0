"""What LSH attention keeps between calls: buckets of cached keys, and whether keys are queries."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_longctx.attention import lsh, lsh_cache, lsh_hashing, lsh_kept, lsh_tied
from hf_longctx.attention.cache_names import OUTPUT_NAME

from ..hashed import build_hashed, random_tokens, relative


LAYERS, PROMPT, NEW = 2, 17, 5


@pytest.fixture
def hashed(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of every computation of buckets."""
    counts: list[tuple[int, int]] = []

    def counting(query, rotations):
        counts.append((query.shape[0], query.shape[2]))
        return lsh_hashing.hash_tokens(query, rotations)

    for module in (lsh, lsh_cache):
        monkeypatch.setattr(module, "hash_tokens", counting)
    return counts


def per_forward(counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    assert counts[::LAYERS] == counts[1::LAYERS]
    return counts[::LAYERS]


SETTINGS = (
    {},
    {"cache_implementation": "static"},
    {"num_beams": 3},
    {"num_beams": 2, "cache_implementation": "static"},
)


@pytest.mark.parametrize("attention", ["lsh", "packed"])
def test_generation_hashes_each_token_once(attention, hashed, tmp_path):
    model, ids = build_hashed(), random_tokens(2, PROMPT)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float64)
    for settings in SETTINGS:
        outputs = []
        for use_cache in (False, True):
            hashed.clear()
            how = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
            cache = settings if use_cache else {k: v for k, v in settings.items() if k == "num_beams"}
            outputs.append(model.generate(ids, use_cache=use_cache, **how, **cache))
        rows = 2 * settings.get("num_beams", 1)
        assert per_forward(hashed) == [(rows, PROMPT)] + [(rows, 1)] * (NEW - 1), settings
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert relative(torch.stack(outputs[1].scores), torch.stack(outputs[0].scores)) <= 1e-12


def logits_after(model, cache, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=True, **{OUTPUT_NAME: cache}).logits


def filled(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True)[OUTPUT_NAME]


def test_buckets_move_with_the_rows_and_places_of_a_cache(hashed):
    model, ids = build_hashed().eval(), random_tokens(2, PROMPT)
    with torch.no_grad():
        swapped, repeated = ids.flip(0), ids.repeat_interleave(2, 0)
        expected = {"swapped": model(swapped).logits, "repeated": model(repeated).logits, "plain": model(ids).logits}
    cache = filled(model, ids[:, :9])
    logits_after(model, cache, ids[:, 9:12])
    hashed.clear()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert relative(logits_after(model, cache, swapped[:, 12:14]), expected["swapped"][:, 12:14]) <= 1e-12
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert relative(logits_after(model, cache, ids[:, 14:15]), expected["plain"][:, 14:15]) <= 1e-12
    cache.crop(-2)
    assert relative(logits_after(model, cache, ids[:, 13:15]), expected["plain"][:, 13:15]) <= 1e-12
    cache.batch_repeat_interleave(2)
    assert relative(logits_after(model, cache, repeated[:, 15:]), expected["repeated"][:, 15:]) <= 1e-12
    assert per_forward(hashed) == [(2, 2), (2, 1), (2, 2), (4, 2)]


def test_places_that_a_static_cache_writes_again_are_hashed_again(hashed):
    model, ids, others = build_hashed().eval(), random_tokens(1, PROMPT), random_tokens(1, PROMPT).flip(1)
    with torch.no_grad():
        expected = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=PROMPT + 3)
    logits_after(model, cache, ids[:, :9])
    logits_after(model, cache, others[:, 9:13])
    for layer in cache.layers:
        layer.cumulative_length.sub_(4)  # as `crop` does since transformers 5.24
    hashed.clear()
    assert relative(logits_after(model, cache, ids[:, 9:]), expected[:, 9:]) <= 1e-12
    assert per_forward(hashed) == [(1, PROMPT - 9)]


def test_what_may_have_changed_is_hashed_again(hashed):
    model, ids, others = build_hashed().eval(), random_tokens(1, PROMPT), random_tokens(1, PROMPT).flip(1)
    with torch.no_grad():
        expected = model(ids).logits[:, 12:]
    wrong, right = filled(model, others[:, :12]), filled(model, ids[:, :12])
    for old, new in zip(wrong.layers, right.layers):  # in place
        old.keys.copy_(new.keys)
        old.values.copy_(new.values)
    hashed.clear()
    assert relative(logits_after(model, wrong, ids[:, 12:]), expected) <= 1e-12
    assert per_forward(hashed) == [(1, PROMPT)]
    # Two caches in turns, a copy, a pickle, and settings that change.
    caches = [filled(model, ids[:, :12]), filled(model, others[:, :12])]
    other = logits_after(model, caches[1], others[:, 12:])
    copied, stored = copy.deepcopy(caches[0]), pickle.loads(pickle.dumps(caches[0]))
    hashed.clear()
    for cache in (caches[0], copied, stored):
        assert relative(logits_after(model, cache, ids[:, 12:]), expected) <= 1e-12
    assert per_forward(hashed)[0] == (1, PROMPT - 12)
    with torch.no_grad():
        assert relative(model(others).logits[:, 12:], other) <= 1e-12
    cache = filled(model, ids[:, :12])
    model.config.hf_longctx_lsh["hash_seed"] = 3
    hashed.clear()
    logits_after(model, cache, ids[:, 12:])
    assert per_forward(hashed) == [(1, PROMPT)]


def test_inference_tensors_are_hashed_again(hashed):
    model, ids = build_hashed().eval(), random_tokens(1, PROMPT)
    with torch.no_grad():
        expected = model(ids).logits[:, 12:]
    with torch.inference_mode():
        hashed.clear()
        cache = model(ids[:, :12], use_cache=True)[OUTPUT_NAME]
        logits = model(ids[:, 12:], use_cache=True, **{OUTPUT_NAME: cache}).logits
    assert relative(logits, expected) <= 1e-12
    assert per_forward(hashed) == [(1, 12), (1, PROMPT)]


def test_nothing_is_kept_without_a_cache_or_in_training():
    model, ids = build_hashed(), random_tokens(1, PROMPT)
    model(ids).logits.sum().backward()
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(lsh_kept._KEPT) == 0
    cache = filled(model, ids)
    assert isinstance(cache, DynamicCache) and len(lsh_kept._KEPT) == LAYERS
    assert {kept.buckets.dtype for kept in lsh_kept._KEPT.values()} == {torch.int16}
    del cache
    assert len(lsh_kept._KEPT) == 0


class Waits(TorchDispatchMode):
    """How often a whole tensor is compared at once, as `torch.equal` does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.equal.default
        return func(*args, **(kwargs or {}))


def waits_of(run) -> int:
    with Waits() as waits:
        run()
    return waits.count


def test_a_device_is_waited_for_once_a_layer(monkeypatch):
    monkeypatch.setattr(lsh_tied, "_READ_AT_ONCE", ())
    model, ids = build_hashed(), random_tokens(1, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        model(ids, use_cache=False).logits.square().mean().backward()
        optimizer.step()

    assert [waits_of(step) for _ in range(3)] == [LAYERS, 0, 0]
    layer = model.model.layers[0].self_attn
    forward, factor = layer.q_proj.forward, [1.0]
    layer.q_proj.forward = lambda x: forward(x) * factor[0]
    step()
    factor[0] = 1.5  # what it does to one of both is seen at its next call, at the latest
    step()
    with pytest.raises(NotImplementedError, match="changes one of both afterwards"):
        step()
    with pytest.raises(NotImplementedError, match="changes one of both afterwards"):
        copy.deepcopy(model)(ids, use_cache=False)  # a first call


def test_equal_weights_of_an_evaluation_are_compared_again_once_they_change(monkeypatch):
    monkeypatch.setattr(lsh_tied, "_READ_AT_ONCE", ())
    model, ids = build_hashed(ties=False), random_tokens(1, 12)
    layers = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad():
        for layer in layers:
            layer.k_proj.weight.copy_(layer.q_proj.weight)
        assert [waits_of(lambda: model(ids, use_cache=False)) for _ in range(2)] == [LAYERS, 0]
        layers[0].k_proj.weight.mul_(2)
        with pytest.raises(ValueError, match="keys of `LlamaAttention` are not its queries"):
            model(ids, use_cache=False)


def test_numbers_that_are_none_are_no_untied_keys():
    model, ids = build_hashed(), random_tokens(1, 12)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(ids[0, 3])] = torch.nan
    assert model(ids, use_cache=False).logits.isnan().any()
