"""All adapters through all rules of patching an instance, and the mechanism alone."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch

from hf_longctx.adapters.instance_forward import InstancePatch, PatchHandle, patch_on, put_on, take_off

from ..adapters import ADAPTERS
from ..models import build


NAMES = list(ADAPTERS)
# Numbers with and without an adapter differ by the order of sums, in fp32; embeddings here are fp64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=NAMES)
def adapter(request):
    if request.param == "packed embeddings":
        pytest.importorskip("sentence_transformers")
    return ADAPTERS[request.param]


def leftovers(model: torch.nn.Module) -> list[str]:
    """What any patch has left in the `__dict__` of a module."""
    words = ("forward", "encode", "_hf_longctx_layers")
    return [f"{name}.{word}" for name, module in model.named_modules() for word in words if word in vars(module)]


def wrap(module: torch.nn.Module, factor: float = 1.0) -> list[int]:
    """A forward of somebody else over the instance's, which notes its calls; tensors it returns are scaled."""
    inner, calls = module.forward, []

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        calls.append(1)
        output = inner(*args, **kwargs)
        return output * factor if isinstance(output, torch.Tensor) else output

    module.forward = forward
    return calls


def test_attaching_acts_and_removing_restores_everything(adapter):
    model = adapter.build()
    signature, expected = inspect.signature(adapter.target(model).forward), adapter.run(model)
    assert not adapter.acts(model) and leftovers(model) == []
    handle = adapter.attach(model)
    assert adapter.acts(model)
    assert inspect.signature(adapter.target(model).forward) == signature
    torch.testing.assert_close(adapter.run(model), expected, **CLOSE)
    handle.remove()
    handle.remove()
    assert not adapter.acts(model) and leftovers(model) == []
    assert torch.equal(adapter.run(model), expected)


def test_attaching_twice_is_once(adapter):
    model = adapter.build()
    adapter.attach(model)
    handle = adapter.attach(model)
    assert adapter.acts(model)
    handle.remove()
    assert not adapter.acts(model) and leftovers(model) == []


def test_a_forward_that_was_there_before_is_kept_called_and_given_back(adapter):
    model = adapter.build()
    target = adapter.target(model)
    calls = wrap(target)
    theirs = target.forward
    handle = adapter.attach(model)
    if target is not model:  # a tiled loss calls the backbone instead of the whole
        adapter.run(model)
        assert calls
    assert adapter.acts(model)
    calls.clear()
    handle.remove()
    assert target.forward is theirs and leftovers(model) == [f"{name_of(model, target)}.forward"]
    adapter.run(model)
    assert calls


def name_of(model: torch.nn.Module, target: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is target)


def test_what_comes_on_top_is_kept_and_ours_becomes_a_no_op(adapter):
    model = adapter.build()
    expected, target = adapter.run(model), adapter.target(model)
    handle = adapter.attach(model)
    ours = target.forward
    calls = wrap(target)
    theirs = target.forward
    assert adapter.acts(model) and calls
    handle.remove()
    calls.clear()
    assert not adapter.acts(model)
    assert torch.equal(adapter.run(model), expected) and calls and target.forward is theirs
    target.forward = ours  # they go away
    assert not adapter.acts(model) and torch.equal(adapter.run(model), expected)
    handle.remove()
    assert leftovers(model) == []
    adapter.attach(model)
    assert adapter.acts(model)


def test_attaching_again_under_what_came_on_top_acts_again(adapter):
    model = adapter.build()
    handle = adapter.attach(model)
    calls = wrap(adapter.target(model))
    handle.remove()
    adapter.attach(model)
    calls.clear()
    assert adapter.acts(model) and calls


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_is_patched_with_its_own_weights_and_by_itself(adapter, way):
    model = adapter.build()
    handle, expected = adapter.attach(model), adapter.run(model)
    other = way(model)
    assert adapter.acts(other)
    torch.testing.assert_close(adapter.run(other), expected, rtol=1e-6, atol=1e-6)  # the same kernels, other addresses
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(adapter.run(model), expected)
    assert not torch.allclose(adapter.run(other), expected)
    handle.remove()
    assert adapter.acts(other) and not adapter.acts(model)


@pytest.mark.parametrize("first", ["ours", "peft"])
def test_peft_before_and_after(adapter, first):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    embeds = adapter is ADAPTERS["packed embeddings"]

    def adapt(model):
        torch.manual_seed(0)
        if embeds:
            model[0].model = peft.get_peft_model(model[0].model, settings).eval()
            return model
        return peft.get_peft_model(model, settings).eval()

    expected = adapter.run(adapt(adapter.build()))
    model = adapter.build()
    if first == "ours":
        adapter.attach(model)
        model = adapt(model)
    else:
        model = adapt(model)
        adapter.attach(model)
    assert adapter.acts(model)
    torch.testing.assert_close(adapter.run(model), expected, **CLOSE)


def test_mixed_precision_of_accelerate_before_and_after_and_taken_off_again(adapter):
    """accelerate wraps the function of a bound forward, and later binds what it finds inside to the module again."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        for first in ("ours", "accelerate"):
            model = adapter.build().float()
            handle = adapter.attach(model) if first == "ours" else None
            prepared = accelerator.prepare_model(model)
            handle = handle or adapter.attach(model)
            assert adapter.acts(prepared)
            inside = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            assert inside is model and adapter.acts(model)
            handle.remove()
            assert not adapter.acts(model)
            adapter.run(model)
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("removed", [0, 1])
def test_two_adapters_in_either_order_and_removed_in_either(first, removed):
    both = [ADAPTERS["tiled loss"], ADAPTERS["tiled MLP"]]
    model = both[0].build()
    expected = both[0].run(model)
    handles = [None, None]
    for index in (first, 1 - first):
        handles[index] = both[index].attach(model)
    assert both[0].acts(model) and _tiles_of_mlp(model) == 5
    torch.testing.assert_close(both[0].run(model), expected, **CLOSE)
    handles[removed].remove()
    assert both[0].acts(model) == (removed != 0) and (_tiles_of_mlp(model) == 5) == (removed != 1)
    handles[1 - removed].remove()
    assert leftovers(model) == [] and torch.equal(both[0].run(model), expected)


def _tiles_of_mlp(model) -> int:
    from ..adapters import _largest_tile

    return _largest_tile(model)


# The mechanism alone


class Scale(InstancePatch):
    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    def call(self, module, own, *args, **kwargs):
        return own(*args, **kwargs) * self.factor


def scaled() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    return linear, x, linear(x).detach()


@pytest.mark.parametrize(
    "order", [("a", "b", "c"), ("a", "c", "b"), ("b", "a", "c"), ("b", "c", "a"), ("c", "a", "b")]
)
def test_three_patches_of_one_module_come_off_in_any_order(order):
    linear, x, plain = scaled()
    factors = {"a": 2.0, "b": 3.0, "c": 5.0}
    for name, factor in factors.items():
        put_on(linear, Scale(name, factor))
    torch.testing.assert_close(linear(x), plain * 30)
    left = dict(factors)
    for name in order:
        take_off(linear, name)
        del left[name]
        product = torch.tensor(list(left.values())).prod()
        torch.testing.assert_close(linear(x), plain * product)
    assert leftovers(linear) == []


def test_patches_under_and_over_a_foreign_wrapper():
    linear, x, plain = scaled()
    put_on(linear, Scale("under", 2.0))
    wrap(linear, 3.0)
    put_on(linear, Scale("over", 5.0))
    torch.testing.assert_close(linear(x), plain * 30)
    take_off(linear, "under")
    torch.testing.assert_close(linear(x), plain * 15)
    assert patch_on(linear, "under") is None and patch_on(linear, "over").factor == 5.0
    put_on(linear, Scale("under", 7.0))  # in its old place
    torch.testing.assert_close(linear(x), plain * 105)
    take_off(linear, "over")
    torch.testing.assert_close(linear(x), plain * 21)


def test_putting_on_again_replaces_the_settings():
    linear, x, plain = scaled()
    put_on(linear, Scale("a", 2.0))
    put_on(linear, Scale("b", 3.0))
    put_on(linear, Scale("a", 7.0))
    torch.testing.assert_close(linear(x), plain * 21)
    assert PatchHandle(linear, "a").modules == [linear] and PatchHandle(linear, "c").modules == []
    PatchHandle(linear, "a", "b").remove()
    assert leftovers(linear) == []


def test_a_callable_that_outlives_its_patch_is_the_method_of_the_class():
    linear, x, plain = scaled()
    put_on(linear, Scale("a", 2.0))
    kept = linear.forward
    take_off(linear, "a")
    assert torch.equal(kept(x), plain)
    take_off(linear, "a")  # nothing is there
    assert torch.equal(linear(x), plain)


def test_other_methods_are_patched_alike():
    model = build("llama", "sdpa")

    class Shout(InstancePatch):
        name = "shout"

        def call(self, module, own, *args, **kwargs):
            return f"{own(*args, **kwargs)}!"

    put_on(model, Shout(), "extra_repr")
    assert model.extra_repr().endswith("!") and patch_on(model, "shout") is None
    take_off(model, "shout", "extra_repr")
    assert "extra_repr" not in vars(model)


def test_hooks_and_gradients_pass_a_patch():
    linear, x, plain = scaled()
    put_on(linear, Scale("a", 2.0))
    seen = []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    linear(x).sum().backward()
    torch.testing.assert_close(seen[0], plain * 2)
    torch.testing.assert_close(linear.weight.grad, torch.full((2, 2), 2.0))
