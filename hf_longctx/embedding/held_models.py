"""What a loss holds besides the trained model: guides, teachers and copies, on flat rows and several processes.

sentence-transformers gives the wrapped model to an attribute named `model` only, and gives features of the trained
model to every model that a loss holds. Here every attribute that is the model gets the wrapper, and every other model
gets its texts padded, as it would have had them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from sentence_transformers.base.model import BaseModel

from ..adapters.instance_forward import InstancePatch, PatchHandle, put_on
from .flat_rows import MODULE_OUTPUTS, drop_outputs, pad_flat
from .packed_model import is_packed


PADDED = "padded texts for a model of a loss"
# What losses ask of the model itself, and a wrapper does not have.
_ASKED = (
    "preprocess",
    "tokenize",
    "tokenizer",
    "get_embedding_dimension",
    "get_sentence_embedding_dimension",
    "device",
)

Losses: TypeAlias = torch.nn.Module | Mapping[str, torch.nn.Module]


def each_loss(losses: Losses) -> list[torch.nn.Module]:
    """One loss, or one for each data set, as a list; those that are not built yet are left out."""
    found = list(losses.values()) if isinstance(losses, Mapping) else [losses]
    return [loss for loss in found if isinstance(loss, torch.nn.Module)]


def bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of wrappers."""
    while not isinstance(model, BaseModel):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            return model
        model = inner
    return model


def is_model(value: object, model: torch.nn.Module) -> bool:
    """Whether `value` is `model` or a wrapper of it."""
    return isinstance(value, torch.nn.Module) and (value is model or bare_model(value) is model)


def _parts(losses: Losses, model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """The modules of losses with their names, less those inside of the trained model, a wrapper or another model."""
    queue = [(loss, type(loss).__name__) for loss in each_loss(losses)]
    seen = set()
    while queue:
        module, name = queue.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module, name
        if not isinstance(module, BaseModel) and not is_model(module, model):
            queue += [(child, f"{name}.{key}") for key, child in module.named_children()]
            queue += [(child, f"{name}.{key}") for key, child in _kept_aside(module)]


def _kept_aside(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Models in plain attributes, lists and dictionaries, where torch does not register them."""
    for key, value in vars(module).items():
        if key not in _TORCHS_OWN:
            yield from ((key, each) for each in _inside(value) if isinstance(each, torch.nn.Module))


def _inside(value: object) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


_TORCHS_OWN = set(vars(torch.nn.Module()))


def put_wrapper(losses: Losses, model: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    """Every attribute of losses that is `model`, or a wrapper of it, becomes `wrapper`, whatever its name."""
    for name in _ASKED:
        if not hasattr(wrapper, name) and hasattr(model, name):
            setattr(wrapper, name, getattr(model, name))

    def swap(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return wrapper if is_model(value, model) else value
        if type(value) in (list, tuple):
            return type(value)(map(swap, value))
        return {key: swap(each) for key, each in value.items()} if type(value) is dict else value

    for module, _ in list(_parts(losses, model)):
        if isinstance(module, BaseModel) or is_model(module, model):
            continue
        for key, child in list(module._modules.items()):
            if child is not None and child is not wrapper and is_model(child, model):
                module._modules[key] = wrapper
        for key, value in list(vars(module).items()):
            if key not in _TORCHS_OWN and any(is_model(each, model) for each in _inside(value)):
                vars(module)[key] = swap(value)


def holds_model(losses: Losses, model: torch.nn.Module) -> bool:
    """Whether an attribute of losses is `model` or a wrapper of it."""
    return any(is_model(part, model) for part, _ in _parts(losses, model))


def held_models(losses: Losses, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The sentence-transformers that losses hold besides `model`, by where they are."""
    return {
        name: part for part, name in _parts(losses, model) if isinstance(part, BaseModel) and not is_model(part, model)
    }


def pad_for_held_models(losses: Losses, model: torch.nn.Module) -> None:
    """Give every model that losses hold besides `model` its texts as it reads them; see [`PatchHandle`] to undo it."""
    for held in held_models(losses, model).values():
        put_on(held, _HeldPatch())


def unpad_for_held_models(losses: Losses, model: torch.nn.Module) -> None:
    """Undo [`pad_for_held_models`]."""
    for held in held_models(losses, model).values():
        PatchHandle(held, PADDED).remove()


class _HeldPatch(InstancePatch):
    """On a model that a loss holds: a flat row of another model becomes padded texts, or a flat row of its own."""

    name = PADDED

    def call(self, module: torch.nn.Module, own: Callable, *args: Any, **kwargs: Any) -> Any:
        features, *rest = args or (kwargs.pop("input"),)
        if "cu_seq_lens_q" not in features:
            return own(features, *rest, **kwargs)
        if is_packed(module):
            mine = drop_outputs(features)
        else:
            mine = pad_flat(features, getattr(module, "tokenizer", None))
        output = own(mine, *rest, **kwargs)
        if isinstance(output, Mapping) and "sentence_embedding" in output:
            features["sentence_embedding"] = output["sentence_embedding"]
            features[MODULE_OUTPUTS] = (*features.get(MODULE_OUTPUTS, ()), "sentence_embedding")
        return output


@contextlib.contextmanager
def refuse_direct_calls(wrapper: torch.nn.Module, model: torch.nn.Module) -> Iterator[None]:
    """A block in which `model` may be trained through `wrapper` only, which averages its gradients over ranks.

    Raises:
        NotImplementedError: something calls the bare model with gradients.
    """
    if wrapper is model:
        yield
        return
    inside = []

    def enter(*_):
        inside.append(True)

    def leave(*_):
        inside.pop()

    def look(*_):
        if not inside and torch.is_grad_enabled():
            raise NotImplementedError(
                f"the loss calls the bare `{type(model).__name__}` and not its `{type(wrapper).__name__}`, so every "
                "rank would train a model of its own: keep the model in an attribute of the loss, not in a closure."
            )

    handles = [
        wrapper.register_forward_pre_hook(enter, prepend=True),
        wrapper.register_forward_hook(leave, always_call=True),
        model.register_forward_pre_hook(look, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_trained_copies(losses: Losses, model: torch.nn.Module) -> None:
    """After a backward on several processes: raise if a model that losses hold besides `model` got a gradient.

    Raises:
        NotImplementedError: one did; no wrapper shards it or averages its gradients.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for name, held in held_models(losses, model).items():
        if any(p.grad is not None and id(p) not in own for p in held.parameters()):
            raise NotImplementedError(
                f"`{name}` is trained next to the model, but no wrapper shards it or averages its gradients over "
                f"{dist.get_world_size()} processes: train with this loss on one process, or freeze that model."
            )


def own_parameters(losses: Losses, model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What losses train that is not the model's: a classifier, a temperature, a projection; in the same order."""
    known = {id(parameter) for parameter in model.parameters()}
    for held in held_models(losses, model).values():
        known |= {id(parameter) for parameter in held.parameters()}
    found: dict[int, torch.nn.Parameter] = {}
    for loss in each_loss(losses):
        found |= {id(p): p for p in loss.parameters() if p.requires_grad and id(p) not in known}
    return list(found.values())


def same_parameters(losses: Losses, model: torch.nn.Module) -> None:
    """Give all ranks the first rank's values of what losses train themselves, as a wrapper does for the model."""
    for parameter in own_parameters(losses, model):
        dist.broadcast(parameter.data, 0)


def average_gradients(losses: Losses, model: torch.nn.Module) -> None:
    """Average the gradients of what losses train themselves over all ranks, as a wrapper does for the model.

    Communication: one all-reduce of a flag a parameter, and one of each gradient; nothing without such parameters.
    """
    parameters = own_parameters(losses, model)
    if not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    for parameter, used in zip(parameters, has.tolist()):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


_READS_ROWS = (
    "reads rows of tokens (`input_ids` and `attention_mask` of all texts side by side), which packed texts do not have"
)
_PAD_INSTEAD = "train with it on sentence-transformers' own trainer, with a model that pads"


def refuse_losses_of_rows(losses: Losses, model: torch.nn.Module) -> None:
    """Raise `NotImplementedError` for a loss of sentence-transformers that always reads rows of tokens."""
    for part, name in _parts(losses, model):
        if _is_a(part, "DenoisingAutoEncoderLoss"):
            raise NotImplementedError(f"`{name}` {_READS_ROWS}: {_PAD_INSTEAD}.")


@contextlib.contextmanager
def named_row_readers(losses: Losses, model: torch.nn.Module, has_labels: bool) -> Iterator[None]:
    """A block in which a loss that asks for rows of tokens is refused by name."""
    names = ", ".join(name for part, name in _parts(losses, model) if not has_labels and _is_a(part, _COMPARES))
    if names:
        raise NotImplementedError(
            f"`{names}` without labels {_READS_ROWS}: add a column `label`, 1 where both texts are the same and 0 "
            "where they are not."
        )
    try:
        yield
    except KeyError as error:
        if error.args != ("attention_mask",):
            raise
        names = ", ".join(f"`{type(loss).__name__}`" for loss in each_loss(losses))
        raise NotImplementedError(f"{names} {_READS_ROWS}: {_PAD_INSTEAD}.") from error


_COMPARES = "ContrastiveTensionLoss"


def _is_a(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is of a class of this name; it may have been imported from an older place."""
    return any(base.__name__ == name for base in type(module).__mro__)
