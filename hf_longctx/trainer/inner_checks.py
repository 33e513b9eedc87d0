"""What a run with fast weights (TTT-E2E) does not take: refused by name, before the first step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..adapters.wrapped import unwrap
from ..config.run import LongContextConfig
from ..config.test_time import FAST_WEIGHTS
from ..data.packing.collator import fills_rows
from ..parallel.segments import DOCUMENT_BOUND_KEYS
from ..ttt.fast_model import TTTForCausalLM


_ONE_DOCUMENT = "fast weights would pass from one document into the next"


def has_fast_weights(model: Any) -> bool:
    """Whether the transformers model inside is a [`TTTForCausalLM`]."""
    return model is not None and not isinstance(model, str) and isinstance(unwrap(model), TTTForCausalLM)


def refuse_shared(model: Any, config: LongContextConfig) -> None:
    """Raise `NotImplementedError` where several processes would share rows of a model with fast weights."""
    size = config.sequence_parallel_size
    if size > 1 and has_fast_weights(model):
        raise NotImplementedError(
            f"`{type(unwrap(model)).__name__}` reads the chunks of a row one after the other, so its rows cannot be "
            f"shared, with `sequence_parallel_size` ({size}): set it to 1 and use data parallelism."
        )


def check_given(given: dict[str, Any], config: LongContextConfig, memory: Any) -> None:
    """Refuse what a trainer's constructor gets, by name, next to a model with fast weights."""
    if has_fast_weights(given.get("model")):
        refuse_shared(given["model"], config)
        refuse_arguments(given.get("args"), memory)


def refuse_arguments(args: Any, memory: Any) -> None:
    """Raise `NotImplementedError` for arguments of a run that no second gradient goes through, or that pack rows."""
    tiled = next((name for name in ("loss_tile_size", "mlp_tile_size") if getattr(memory, name) is not None), None)
    name = "memory" if memory.memory != "off" else tiled
    if name is not None:
        raise NotImplementedError(
            f"`{name}` ({getattr(memory, name)!r}) tiles losses or MLPs, whose backward cannot be differentiated "
            "again in layers with fast weights: leave it out and set `gradient_checkpointing=True`; layers before the "
            "suffix can be tiled by hand."
        )
    reasons = {
        "deepspeed": "it gathers weights while a layer runs; use DDP, or FSDP2 with the model as one unit",
        "torch_compile": "the inner gradient is not traced; leave it off",
        "use_liger_kernel": "it replaces layers by ones whose backward cannot be differentiated again; leave it off",
    }
    for name, reason in reasons.items():
        if getattr(args, name, None):
            raise NotImplementedError(f"`{name}` ({getattr(args, name)!r}) cannot train fast weights: {reason}.")
    refuse_packing(args)


def refuse_packing(args: Any) -> None:
    """Raise `NotImplementedError` for arguments by which TRL packs documents, some without a trace in the batch."""
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name, None):
            raise NotImplementedError(
                f"`{name}` ({getattr(args, name)!r}) packs documents, and {_ONE_DOCUMENT}: set it to False."
            )


def refuse_by_name(model: Any) -> None:
    """Raise `ValueError` for the name of a model with fast weights, which trainers would load with `AutoModel`."""
    if not isinstance(model, (str, os.PathLike)):
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return  # the library says why
    if config.get("model_type") == FAST_WEIGHTS:
        raise ValueError(
            f"`model` ({str(model)!r}) has fast weights, which `AutoModel` does not know: pass "
            f"`TTTForCausalLM.from_pretrained({str(model)!r})` instead of its name."
        )


def refuse_lost_reference(trainer: type, given: dict[str, Any]) -> None:
    """Raise `ValueError` where TRL would load a reference model by the name of one with fast weights.

    Args:
        trainer (`type`): the class that is being built; TRL's are read from its bases.
        given (`dict`): what its constructor gets, by name.
    """
    model, args = given.get("model"), given.get("args")
    adapts = given.get("peft_config") is not None or hasattr(model, "peft_config")
    if not has_fast_weights(model) or adapts or given.get("ref_model") is not None:
        return
    ahead = "precompute_ref_log_probs"
    for base in trainer.__mro__:
        if base.__module__.partition(".")[0] != "trl" or "__init__" not in vars(base):
            continue
        takes_one = "ref_model" in inspect.signature(vars(base)["__init__"]).parameters
        if takes_one and not getattr(args, ahead, False):
            raise ValueError(
                f"`ref_model` is unset, and `{base.__name__}` would load it by name with `AutoModel`, which does not "
                f"know `{type(model).__name__}`: pass `ref_model=copy.deepcopy(model)`, set `{ahead}=True`, or train "
                "an adapter (`peft_config`)."
            )
        beta = getattr(args, "beta", None)
        if hasattr(base, "_generate") and beta:
            raise ValueError(
                f"`beta` ({beta!r}) compares with a reference, which `{base.__name__}` would load by name with "
                f"`AutoModel`, which does not know `{type(model).__name__}`: set it to 0, or train an adapter "
                "(`peft_config`)."
            )


def refuse_built(trainer: Any) -> None:
    """Raise `NotImplementedError` for a built trainer of a model with fast weights that packs rows, or that DeepSpeed
    runs."""
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "DeepSpeed is configured for a model with fast weights, and it gathers weights while a layer runs: use "
            "DDP, or FSDP2 with the whole model as one unit."
        )
    if fills_rows(trainer.data_collator) or getattr(trainer.data_collator, "padding_free", False):
        raise NotImplementedError(
            f"`data_collator` ({type(trainer.data_collator).__name__}) packs documents, and {_ONE_DOCUMENT}: give one "
            "document a row."
        )
    for name in ("train_dataset", "eval_dataset"):
        column = next((key for key in DOCUMENT_BOUND_KEYS if key in _columns(getattr(trainer, name, None))), None)
        if column is not None:
            raise NotImplementedError(
                f"`{name}` has a column `{column}`, so its rows are packed documents, and {_ONE_DOCUMENT}: give one "
                "document a row, without this column."
            )


def _columns(dataset: Any) -> list[str]:
    """Names of the columns of a data set, of several by name, or of a list of rows."""
    if isinstance(dataset, dict):
        return [column for part in dataset.values() for column in _columns(part)]
    if isinstance(dataset, list):
        return list(dataset[0]) if dataset and isinstance(dataset[0], Mapping) else []
    return list(getattr(dataset, "column_names", None) or ())
