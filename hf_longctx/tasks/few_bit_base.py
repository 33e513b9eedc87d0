"""Recipes on a base model of 4 or 8 bits (QLoRA): which keys go together, and what is done to it before training."""

from __future__ import annotations

import importlib.util
from typing import Any

from trl import ModelConfig, get_quantization_config


def read_quantization(
    model_args: ModelConfig, gguf_file: str | None = None, from_scratch: bool = False
) -> dict[str, Any]:
    """The option of `from_pretrained` that `load_in_4bit` or `load_in_8bit` asks for; nothing without them.

    Raises:
        ValueError: another key of the recipe would make it mean nothing, or nothing would train.
        ImportError: bitsandbytes is missing.
    """
    key = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)), None)
    if key is None:
        return {}
    if from_scratch:
        raise ValueError(
            f"`{key}` (True) freezes weights, and `from_scratch` (True) has none that are worth keeping: drop one."
        )
    if gguf_file:
        raise ValueError(
            f"`{key}` (True) cannot be applied to `gguf_file` ({gguf_file}), which is read into whole weights: drop "
            f"`{key}`, or load the model's own checkpoint."
        )
    if not model_args.use_peft:
        raise ValueError(
            f"`{key}` (True) freezes the base model, so nothing would train: set `use_peft: true`, with `lora_r` and "
            "`lora_target_modules`, or drop it."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"`{key}` (True) needs bitsandbytes: `pip install hf-longctx[qlora]`.")
    return {"quantization_config": get_quantization_config(model_args)}


def prepare_few_bits(model: Any, *, raise_to_float32: bool, checkpointing: bool) -> None:
    """Freeze the base model and, if asked, do what PEFT's `prepare_model_for_kbit_training` does.

    Args:
        model (`PreTrainedModel`): in 4 or 8 bits, before it has adapters.
        raise_to_float32 (`bool`): whether norms, embeddings and the head become float32; hidden states do then too.
        checkpointing (`bool`): whether activations are recomputed, for which the input must ask for a gradient.
    """
    model.requires_grad_(False)
    if raise_to_float32:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.enable_input_require_grads()
