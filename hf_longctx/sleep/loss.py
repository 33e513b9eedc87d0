"""`sleep_loss`: the loss of rows whose windows sleep, for a loop of one's own and for the trainer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..adapters.instance_forward import InstancePatch, put_on, take_off
from ..adapters.wrapped import unwrap
from ..config.sleep import SleepConfig
from .batch_checks import check_batch
from .cache import SleepCache
from .row_windows import read_rows, windows_asleep
from .sleepers import check_sleeper, sleeper_of
from .window_passes import Sleeper


logger = logging.getLogger(__name__)

# In `vars(model)`: the passes that it was last trained with, to warn where others are used.
TRAINED_PASSES = "_hf_longctx_trained_passes"


class SleepingForward(InstancePatch):
    """A model's forward that reads rows window by window and returns their loss.

    Args:
        config ([`SleepConfig`]): how; without a warm-up.
        keeps_logits (`bool`): whether the output holds logits of all tokens; zeros where none were computed.
    """

    name = "sleeping_forward"

    def __init__(self, config: SleepConfig, keeps_logits: bool = False) -> None:
        self.config, self.keeps_logits = config, keeps_logits
        self.peak_keys = 0

    def call(self, module, own, *args, **kwargs):
        batch = {**dict(zip(_names_of(module), args)), **kwargs}
        if batch.get("labels") is None:
            return own(*args, **kwargs)
        output, cache = forward_rows(sleeper_of(module, own), batch, self.config, self.keeps_logits)
        self.peak_keys = max(self.peak_keys, cache.peak_keys)
        return output.to_tuple() if batch.get("return_dict") is False else output


def sleep_loss(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    config: SleepConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss of a batch whose windows without labels sleep: a mean over its labels.

    Args:
        model (`torch.nn.Module`): a hybrid of transformers, bare, with LoRA, or in DDP.
        batch (`Mapping`): `input_ids` and `labels` of whole rows, of shape `(B, T)`, padded on the right if at all;
            `sleep_windows` (`(B, number of windows)`, *optional*) says which windows sleep.
        config ([`SleepConfig`]): the window and its passes.
        num_items_in_batch (`int`, *optional*): divide by it instead of by the labels of this batch, as transformers
            does where gradients are accumulated.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: the model has nothing to consolidate into, or the batch holds what sleep does not take.
        NotImplementedError: see [`check_sleeper`][hf_longctx.sleep.sleepers].

    Relations: with `passes=1` and rows of one window, it is the model's own loss to the bit. With `passes=1` and more
    windows, it is that of the model with its own cache, whose keys and values are dropped at each border.
    Gradient: through all passes and windows.
    """
    sleeper = check_sleeper(model, config)
    config = replace(config, warmup=None)
    check_batch(batch)
    arguments = {**batch, "return_dict": True}
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, (bool, str)) or not num_items_in_batch > 0:
            raise ValueError(
                f"`num_items_in_batch` ({num_items_in_batch!r}) must be the number of labels of a step, 1 or more."
            )
        arguments["num_items_in_batch"] = num_items_in_batch
    if isinstance(model, DistributedDataParallel):  # its backward must know of the forward
        put_on(sleeper.model, SleepingForward(config))
        try:
            return model(**arguments).loss
        finally:
            take_off(sleeper.model, SleepingForward.name)
    return forward_rows(sleeper, arguments, config)[0].loss


def forward_rows(
    sleeper: Sleeper, batch: Mapping[str, Any], config: SleepConfig, keeps_logits: bool = False
) -> tuple[CausalLMOutputWithPast, SleepCache]:
    """The loss of a batch, its logits where they are wanted, and the cache for its peak."""
    tokens, labels, arguments = check_batch(batch)
    if sleeper.model.training and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "`torch.inference_mode` records nothing for a backward, and the model is in training mode: call "
            "`model.eval()`, or leave the block."
        )
    _note_passes(sleeper.model, config)
    asleep = windows_asleep(labels, config, batch.get("sleep_windows"))
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    is_target, count = targets != -100, batch.get("num_items_in_batch")
    cache, losses, logits = SleepCache(sleeper.model.config), [], None
    loss_of: Callable = sleeper.model.loss_function
    is_whole = not asleep.any() and asleep.shape[1] == 1
    total = count if count is not None or is_whole else is_target.sum()
    for part in read_rows(sleeper, tokens, asleep, config, arguments, is_target, cache):
        stop = part.start + part.logits.shape[1]
        vocabulary = part.logits.shape[-1]
        mine = targets[part.rows, part.start : stop]
        if bool((mine != -100).any()):
            # transformers shifts labels inside; these are shifted already, over whole rows
            losses.append(loss_of(part.logits, None, vocabulary, num_items_in_batch=total, shift_labels=mine))
        if keeps_logits:
            if logits is None:
                logits = part.logits.new_zeros(*tokens.shape, vocabulary)
            logits[part.rows, part.start : stop] = part.logits.detach()
    loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
    return CausalLMOutputWithPast(loss=loss, logits=logits), cache


def warn_other_passes(model: torch.nn.Module, config: SleepConfig) -> None:
    """Warn, once, where a model sleeps other passes than it was trained with."""
    trained = vars(model).get(TRAINED_PASSES)
    if trained is None or trained[0] == config.passes or config.passes in trained[1]:
        return
    trained[1].append(config.passes)
    logger.warning(
        "`passes` is %d, and `%s` was trained with %d: its layers have not seen hidden states of other passes.",
        config.passes,
        type(model).__name__,
        trained[0],
    )


def _note_passes(model: torch.nn.Module, config: SleepConfig) -> None:
    if model.training and torch.is_grad_enabled():
        vars(model)[TRAINED_PASSES] = (config.passes, [])
    else:
        warn_other_passes(model, config)


def _names_of(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(type(unwrap(module)).forward).parameters)[1:]
