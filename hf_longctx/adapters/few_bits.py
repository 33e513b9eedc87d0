"""Frozen weights of 4 or 8 bits under trainable adapters (QLoRA): what bitsandbytes does that a run must not meet.

On a CPU with bfloat16 instructions, a 4-bit layer that runs in evaluation mode without a gradient turns its weights
into another layout, and keeps it: later training steps run a kernel without a backward, so every layer below loses its
gradient in silence. Any evaluation, ours or a trainer's, is enough. Here they keep the layout of training.

8-bit layers compute those columns in half precision that hold a large value of any token of the batch (LLM.int8), so
what they do to a token depends on which others this process holds. Off the CPU, that is.
"""

from __future__ import annotations

from typing import Any

import torch


# bitsandbytes' own switch, on each of its 4-bit layers.
_LAYOUT_SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep 4-bit layers in the layout that has a backward.

    Args:
        model (`torch.nn.Module`): changed in place: one attribute of each 4-bit layer of bitsandbytes.

    Raises:
        RuntimeError: a layer has left it. Its scales were rounded then, so there is no way back.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if getattr(layer, _LAYOUT_SWITCH, False):
            setattr(layer, _LAYOUT_SWITCH, False)
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"`{name}` was evaluated on this CPU before, and bitsandbytes then keeps 4-bit weights in a layout "
                "without a backward: load the model anew, and build the trainer, or call `adapt`, before anything "
                "evaluates it."
            )


def check_outlier_columns(model: torch.nn.Module, way: str, remedy: str) -> None:
    """Refuse 8-bit layers whose columns of half precision are chosen by all tokens that this process holds.

    Args:
        model (`torch.nn.Module`): any.
        way, remedy (`str`): as of [`check_peft`].

    Raises:
        NotImplementedError: it has one.
    """
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if type(module).__name__ != "Linear8bitLt":
            continue
        layer: Any = module
        threshold, device = getattr(layer.state, "threshold", 0.0), layer.weight.device.type
        if threshold and device != "cpu":  # there it computes with the weights as numbers
            raise NotImplementedError(
                f"`{name}` has 8-bit weights with `llm_int8_threshold` ({threshold}), which computes a column in half "
                f"precision if any token held here is large in it, and those would be others {way}: load the model "
                f"with `llm_int8_threshold=0.0` or in 4 bits, or {remedy}."
            )
