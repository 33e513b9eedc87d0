"""What was proven is what runs: compared when a run starts, on its first batch and on every batch.

A trainer proves its model, attention and loss once. Until `train()`, and during it, a user may replace any of them, or
override what brings batches to the loss. When a run starts, what changed is prepared and proven again. Later it is
refused, since loaders and counts of the run were made for what was there.
Price: a few comparisons of objects for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..adapters.wrapped import unwrap
from ..attention.registry import name_that_shards
from ..families import skips_layers
from .trial import is_library


# Methods between the loader and the optimizer. One that is replaced later is proven again.
_METHODS = ("compute_loss", "training_step", "prediction_step", "_prepare_inputs", "_get_num_items_in_batch")


def facts_of_run(trainer: Any, every_module: bool = True) -> dict[str, Any]:
    """What a proof is about, by the name under which a user changes it; compared by identity."""
    model = _bare(trainer, trainer.model)
    text = unwrap(model).config.get_text_config()
    facts = {"model": model, "model.config._attn_implementation": text._attn_implementation}
    facts["output_router_logits"] = bool(getattr(text, "output_router_logits", False))
    facts |= {name: getattr(trainer, name) for name in ("compute_loss_func", "label_smoother", "data_collator")}
    facts |= {"long_context": trainer.long_context, "memory": trainer.memory}
    if every_module:
        facts["modules"] = _modules(model)
    for name in _METHODS:
        facts[name] = vars(trainer).get(name, getattr(type(trainer), name))
    return facts


def _bare(trainer: Any, model: torch.nn.Module) -> torch.nn.Module:
    """The model without its wrapper. Mixed precision stays on it, which accelerate would take off for good."""
    model = trainer.accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def changed_facts(trainer: Any, proven: Mapping[str, Any]) -> list[str]:
    """The names of what is not what was proven."""
    return [name for name, value in facts_of_run(trainer).items() if not _is_same(value, proven[name])]


def _is_same(value: Any, proven: Any) -> bool:
    return value == proven if isinstance(value, (str, tuple)) else value is proven


def _modules(model: torch.nn.Module) -> tuple:
    """Which modules a model has, and what lies on their `forward`."""
    return tuple(
        (
            id(module),
            id(vars(module).get("forward")),
            *_hooks(module._forward_hooks),
            *_hooks(module._forward_pre_hooks),
        )
        for module in model.modules()
    )


def _hooks(hooks: Mapping[int, Any]) -> Iterator[int]:
    """Those of the user: activation checkpointing and wrappers put theirs on when a run starts."""
    return (key for key, hook in hooks.items() if not is_library(hook))


def refuse_changes(trainer: Any, proven: Mapping[str, Any]) -> None:
    """Raise `RuntimeError` if something was replaced while a run goes on."""
    # A collator is used by loaders that are made later; wrappers put hooks on modules.
    found = facts_of_run(trainer, every_module=False)
    changed = [name for name in found if name != "data_collator" and not _is_same(found[name], proven[name])]
    if trainer.mesh.sequence_parallel_size == 1:  # the loss of whole rows may be anything
        changed = [name for name in changed if name.startswith("model")]
    if changed:
        name = changed[0]
        seen = found[name]
        value = repr(seen) if isinstance(seen, str) else f"a `{getattr(seen, '__name__', type(seen).__name__)}`"
        raise RuntimeError(
            f"`{name}` was changed to {value} after this run had started, and what was proven is another: set it "
            "before `train()` or `evaluate()`, which prove it again."
        )


def refuse_uncut(trainer: Any) -> None:
    """Raise `ValueError` for a batch that no loader of ours has cut."""
    raise ValueError(
        "a batch carries no `sequence_shard` with `sequence_parallel_size` "
        f"({trainer.mesh.sequence_parallel_size}), so every rank would train whole rows of its own: "
        "let the overridden `get_train_dataloader` or `get_eval_dataloader` return that of `super()`, and change "
        "`train_dataset`, `data_collator` or `_get_train_sampler` instead."
    )


def validate_replaceable(trainer: Any, proven: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what a trainer reads once, when it is built: configs, and the class of the model."""
    for name in ("long_context", "memory"):
        if getattr(trainer, name) is not proven[name]:
            raise ValueError(
                f"`{name}` was replaced after the trainer was built, which has laid out its processes and its memory "
                "by the first: build a new trainer with it."
            )
    old, new = (type(unwrap(model)) for model in (proven["model"], facts_of_run(trainer)["model"]))
    if old.__name__.removeprefix("FSDP") != new.__name__.removeprefix("FSDP"):
        raise ValueError(
            f"`model` was a `{old.__name__}` when the trainer was built and is a `{new.__name__}` now: whether its "
            "labels are shifted and counted was read from the first; build a new trainer for it."
        )


def adopt_model(trainer: Any) -> None:
    """Let the trainer wrap and optimise the model that it has now, not the one that it was built with."""
    bare = _bare(trainer, trainer.model_wrapped)
    model = _bare(trainer, trainer.model)
    if bare is model:
        return
    trainer.model = trainer.model_wrapped = model
    if trainer.place_model_on_device:
        trainer._move_model_to_device(model, trainer.args.device)
    known = {id(parameter) for parameter in model.parameters()}
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    if not any(id(parameter) in known for group in groups for parameter in group["params"]):
        trainer.optimizer, trainer.lr_scheduler = None, None


class ShareWatch(TrainerCallback):
    """Sees to it that every batch went through the trainer's own path, and that every attention layer read its shard.

    Looked at after the forward of an evaluation batch, and before an optimizer step.
    """

    def __init__(self) -> None:
        self.forget()

    def attach(self, trainer: Any) -> None:
        """Let `trainer` call this watch; a second call does nothing."""
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def forget(self) -> None:
        """Expect nothing from batches so far."""
        self._readers: list[set[int]] = []
        self._wrapper_ran: bool | None = None

    def expect(self, trainer: Any, shard: Any) -> None:
        """Remember a batch that goes to the model next. Its sets of layers are kept, not the batch."""
        self._readers.append(shard.readers)
        wrapped = trainer.model_wrapped
        if self._wrapper_ran is None and isinstance(wrapped, DistributedDataParallel) and trainer.is_in_train:
            self._wrapper_ran = False
            self._hook = wrapped.register_forward_pre_hook(self._note_wrapper)

    def _note_wrapper(self, *call: object) -> None:
        self._wrapper_ran = True
        self._hook.remove()

    def validate(self) -> None:
        """Raise unless every layer that read the shard of the sanity check has read those of these batches.

        Raises:
            RuntimeError: after a forward, and before the optimizer's step.
        """
        trainer, seen, self._readers = self.trainer, self._readers, []
        if trainer.mesh.sequence_parallel_size == 1:  # whole rows may go to the model in any way
            return
        model = _bare(trainer, trainer.model)
        missing = set().union(*(trainer.proven_readers - readers for readers in seen))
        if not missing or skips_layers(unwrap(model).config):
            return
        names = [name for name, module in model.named_modules() if id(module) in missing] or ["a layer"]
        raise RuntimeError(
            f"{len(missing)} of {len(trainer.proven_readers)} attention layers (first: `{names[0]}`) did not read the "
            "`sequence_shard` of a batch, so they saw this rank's tokens only: give all of `inputs` to the model, and "
            f"leave every layer on attn_implementation={name_that_shards()!r}."
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        if not self._readers and trainer.mesh.sequence_parallel_size > 1:
            raise RuntimeError(
                f"no batch of step {state.global_step + 1} went through `_prepare_inputs` of "
                f"`{type(trainer).__name__}`, so none was bound to its group or checked: call `super()` in the "
                "overridden `training_step` or `_prepare_inputs`."
            )
        if self._wrapper_ran is False and trainer.mesh.sequence_parallel_size > 1:
            raise RuntimeError(
                f"the loss of step {state.global_step + 1} did not run the wrapped model that it was given, so "
                "gradients are not averaged over ranks: call `model(...)` in `compute_loss`, not `self.model(...)`."
            )
        self.validate()
