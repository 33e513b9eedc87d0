"""A model without memory: its own code and shapes on fake tensors, with as many layers as a simulation needs.

A stack of layers repeats itself. Its first layers may differ and then a group of them comes again and again, so two
short stacks tell what every further group adds. Which layers are alike is read from the modules: class, shapes and
settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..attention.registry import known_to_transformers
from .fake_attention import SHAPE_ONLY, SHAPE_ONLY_ATTENTION
from .settings import Settings


# Differ between layers that hold the same memory: numbers, and masks and positions, which attention does not keep.
_NOT_A_SETTING = {"layer_idx", "layer_id", "training", "attention_type", "layer_type", "sliding_window", "is_sliding"}
# A step of a few layers takes some thousand; a loop over tokens takes more than anyone would wait for.
_MOST_OPERATIONS = 300_000


@dataclass(frozen=True)
class Stack:
    """The layers of a model: how many, and how they repeat.

    Args:
        name (`str`): of the module list in the model.
        num_layers (`int`): of the whole model.
        start (`int`): layers before the repetition.
        period (`int`): layers of one repetition.
    """

    name: str
    num_layers: int
    start: int
    period: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of the stacks to simulate: two that end like the whole one, or the whole one if it is short."""
        rest = (self.num_layers - self.start) % self.period
        fewer = self.start + rest + 2 * self.period
        if fewer + self.period >= self.num_layers:
            return (self.num_layers,)
        return fewer, fewer + self.period


def model_on_meta(config: PretrainedConfig, scores_rows: bool = False) -> torch.nn.Module:
    """The model of a configuration, without memory, on the attention that plans; a reward model if it scores rows."""
    config, auto = copy.deepcopy(config), AutoModelForCausalLM
    if scores_rows:
        config.num_labels, config.pad_token_id, auto = 1, 0, AutoModelForSequenceClassification
    with known_to_transformers(SHAPE_ONLY_ATTENTION), torch.device("meta"):
        return auto.from_config(config, attn_implementation=SHAPE_ONLY).train()


def find_stack(model: torch.nn.Module) -> Stack | None:
    """The largest module list of transformers' layers, or `None`."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and any(isinstance(m, GradientCheckpointingLayer) for m in module)
    ]
    if not lists:
        return None
    name, layers = max(lists, key=lambda item: len(item[1]))
    kinds = [_signature(layer) for layer in layers]
    for unit in range(1, len(kinds) + 1):  # the shortest start and repetition together
        for start in range(unit):
            period = unit - start
            if all(kinds[i] == kinds[i - period] for i in range(start + period, len(kinds))):
                return Stack(name, len(kinds), start, period)
    raise AssertionError("a stack repeats itself at its own length")


def _signature(layer: torch.nn.Module) -> tuple:
    """What two layers share that hold the same memory."""
    facts = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and key not in _NOT_A_SETTING
        )
        shapes = tuple((key, p.shape, p.requires_grad) for key, p in module._parameters.items() if p is not None)
        facts.append((name, type(module), settings, shapes))
    return tuple(facts)


def fake_copy(
    model: torch.nn.Module, dtype_of: Callable[[torch.nn.Parameter], torch.dtype], stack: Stack | None, num_layers: int
) -> torch.nn.Module:
    """A copy on fake tensors, to be made and used under one fake mode.

    Args:
        model (`torch.nn.Module`): on any device, the meta device included; not changed.
        dtype_of (`Callable`): the precision of a parameter in the copy.
        stack ([`Stack`], *optional*): the layers of `model`; `None` copies all.
        num_layers (`int`): how many of them to keep, from the first.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor, dtype_of)
    if stack is not None:
        for layer in model.get_submodule(stack.name)[num_layers:]:
            memo[id(layer)] = torch.nn.Identity()
    fake = copy.deepcopy(model, memo)
    if stack is not None:
        layers = fake.get_submodule(stack.name)
        del layers[num_layers:]
    return fake


def dtype_in_compute(settings: Settings, parameter: torch.nn.Parameter) -> torch.dtype:
    """The precision of a parameter while the model runs."""
    return settings.compute_dtype if settings.wrapper == "fsdp2" else settings.weights_dtype


def _fake(tensor: torch.Tensor, dtype_of: Callable) -> torch.Tensor:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    dtype = dtype_of(tensor) if is_parameter and tensor.is_floating_point() else tensor.dtype
    fake = torch.empty(tensor.shape, dtype=dtype)
    return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


class Adapter(torch.nn.Module):
    """A linear layer with an update of low rank, operation for operation what PEFT runs."""

    def __init__(self, base_layer: torch.nn.Module, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        inputs, outputs = _features(base_layer)
        self.lora_a = torch.nn.Linear(inputs, rank, bias=False)
        self.lora_b = torch.nn.Linear(rank, outputs, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(inputs)
        dtype = result.dtype
        result = result + self.lora_b(self.lora_a(inputs.to(self.lora_a.weight.dtype))) * 2.0
        return result.to(dtype)


def add_adapters(model: torch.nn.Module, stack: Stack | None, rank: int) -> None:
    """Freeze `model` and give every linear layer of its stack an adapter."""
    model.requires_grad_(False)
    for parent, name, child in _linears(model, stack):
        setattr(parent, name, Adapter(child, rank))


def count_adapters(model: torch.nn.Module, stack: Stack | None, rank: int) -> int:
    """How many numbers these adapters hold."""
    return sum(rank * sum(_features(child)) for _, _, child in _linears(model, stack))


def _linears(model: torch.nn.Module, stack: Stack | None) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    layers = model if stack is None else model.get_submodule(stack.name)
    named = [(parent, *item) for parent in layers.modules() for item in parent.named_children()]
    return [item for item in named if type(item[2]) in (torch.nn.Linear, Conv1D)]


def _features(linear: torch.nn.Module) -> tuple[int, ...]:
    """Of its inputs and outputs."""
    shape = tuple(linear.weight.shape)
    return shape if isinstance(linear, Conv1D) else shape[::-1]


class FakeAnswers(TorchDispatchMode):
    """What operations on fake tensors return where they need numbers or could be spared.

    A comparison holds, a number is 0, and of the tokens that are valid there are `valid_tokens` (a tiled loss is the
    same for every tile; one tile and one token more show all of it). An operation in place changes nothing.

    Args:
        valid_tokens (`int`): at most so many indices are found by `nonzero`.
    """

    def __init__(self, valid_tokens: int) -> None:
        super().__init__()
        self.valid_tokens, self.operations = valid_tokens, 0
        self._in_place: dict[torch._ops.OpOverload, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if self.operations > _MOST_OPERATIONS:
            raise NotImplementedError(
                f"the model ran more than {_MOST_OPERATIONS:,} operations for a few layers, so it loops over its "
                "tokens and cannot be planned: measure a short run instead."
            )
        if self._is_in_place(func):
            return args[0]
        if func is torch.ops.aten.nonzero.default:
            places = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
            return places[: self.valid_tokens]
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_product(*args[:3])  # torch's own version for fake tensors supports bf16 only
        return func(*args, **(kwargs or {}))

    def _is_in_place(self, func: torch._ops.OpOverload) -> bool:
        """Whether all that `func` does is to write into its first argument, which it returns."""
        if func not in self._in_place:
            schema = func._schema
            first = schema.arguments[0].alias_info if schema.arguments else None
            returned = schema.returns[0].alias_info if len(schema.returns) == 1 else None
            writes = first is not None and first.is_write and returned is not None and returned.is_write
            others = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments[1:])
            self._in_place[func] = writes and not others and torch.Tag.inplace_view not in func.tags
        return self._in_place[func]


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
    """What experts compute, without numbers: one matrix product for each group of tokens."""
    if left.dim() == 3 and right.dim() == 3:
        return left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    if ends is not None and left.dim() == right.dim() == 2:  # groups along the inner dimension: gradient of weights
        return left.new_empty((ends.shape[0], left.shape[0], right.shape[1]))
    return left.new_empty((left.shape[-2], right.shape[-1]))


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)
