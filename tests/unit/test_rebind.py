"""A forward whose module-level functions are replaced for one call, below every other patch."""

import copy
import functools
import pickle

import pytest
import torch

from hf_longctx.adapters.instance_forward import InstancePatch, PatchHandle, put_on, take_off
from hf_longctx.adapters.rebind import RebindPatch, called_names, rebind


def scale(x, by=2.0):
    return x * by


def _decorated(function):
    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        return function(self, *args, **kwargs) + 100.0

    return wrapped


def _opaque(function):
    table = [function]

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        return table[0](self, *args, **kwargs)

    return wrapped


class Layer(torch.nn.Module):
    def forward(self, x, *, extra: float = 1.0):
        return scale(x) + extra


class Decorated(torch.nn.Module):
    @_decorated
    @_decorated
    def forward(self, x):
        return scale(x)


class Opaque(torch.nn.Module):
    @_opaque
    def forward(self, x):
        return scale(x)


class Branching(torch.nn.Module):
    def forward(self, x):
        return scale(x) if float(x.sum()) > 0 else x


class Tripled(RebindPatch):
    name = "tripled"

    def call(self, module, own, *args, **kwargs):
        return self.run(module, own, {"scale": lambda x: 3.0 * x}, args, kwargs)


class PlusTen(InstancePatch):
    name = "plus ten"

    def call(self, module, own, *args, **kwargs):
        return own(*args, **kwargs) + 10.0


X = torch.ones(2)


def test_only_the_named_functions_of_one_function_change():
    replaced = rebind(Layer.forward, {"scale": lambda x: 5.0 * x})
    layer = Layer()
    assert replaced(layer, X).tolist() == [6.0, 6.0]
    assert replaced(layer, X, extra=2.0).tolist() == [7.0, 7.0]
    assert layer(X).tolist() == [3.0, 3.0] and scale(X).tolist() == [2.0, 2.0]
    assert replaced.__code__ is Layer.forward.__code__


def test_decorators_run_around_it():
    assert rebind(Decorated.forward, {"scale": lambda x: 0.0 * x})(Decorated(), X).tolist() == [200.0, 200.0]
    assert Decorated()(X).tolist() == [202.0, 202.0]
    assert called_names(Decorated.forward) == {"scale"}


def test_what_cannot_be_replaced_is_refused_by_its_cause():
    with pytest.raises(NotImplementedError, match="does not call `missing`"):
        rebind(Layer.forward, {"missing": scale})
    with pytest.raises(NotImplementedError, match="decorator of `Opaque.forward`"):
        rebind(Opaque.forward, {"scale": scale})
    with pytest.raises(NotImplementedError, match="`partial` here and no function"):
        rebind(functools.partial(scale), {"scale": scale})


@pytest.mark.parametrize("first", [Tripled, PlusTen])
def test_it_lies_below_other_patches_in_any_order(first):
    layer, second = Layer(), PlusTen if first is Tripled else Tripled
    put_on(layer, first())
    put_on(layer, second())
    assert layer(X).tolist() == [14.0, 14.0]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    take_off(layer, first.name)
    assert layer(X).tolist() == ([13.0, 13.0] if first is Tripled else [4.0, 4.0])
    take_off(layer, second.name)
    assert layer(X).tolist() == [3.0, 3.0] and set(vars(layer)) == set(vars(Layer()))
    assert copied(X).tolist() == [14.0, 14.0]
    PatchHandle(copied, Tripled.name, PlusTen.name).remove()
    assert copied(X).tolist() == [3.0, 3.0]


def test_a_forward_of_another_tool_on_the_instance_is_refused():
    layer = Layer()
    layer.forward = functools.partial(Layer.forward, layer)
    put_on(layer, Tripled())
    with pytest.raises(NotImplementedError, match="attach the adapters before other tools"):
        layer(X)


def test_a_compiler_leaves_the_functions_alone():
    model = torch.nn.Sequential(Branching())
    put_on(model[0], Tripled())
    compiled = torch.compile(model, backend="eager")
    for x in (X, 2 * X, X):  # a function that was compiled before would miss its globals
        assert compiled(x).tolist() == (3 * x).tolist()
    torch.compiler.reset()
