"""Why a check on a tiny batch failed, where sharding is not the cause: asked of one process first.

A model that one process cannot run, or whose numbers are not finite there, is not one whose layers mix tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..adapters.wrapped import runs_our_attention
from ..losses.token_mean import token_mean


# TRL's trainers that have one of ours, whose losses get whole rows.
WHOLE_ROW_TRAINERS = ("DPOTrainer", "KTOTrainer", "RewardTrainer")


def refuse_nonfinite_outputs(model: torch.nn.Module, name: str, outputs: torch.Tensor) -> None:
    """Refuse a model whose outputs are not finite in one process.

    Args:
        model: wrapped or not.
        name (`str`): of its class.
        outputs (`torch.Tensor`): of real tokens, computed in one process.

    Raises:
        ValueError: they are not; the first parameter that is not finite is named.
    """
    if bool(torch.isfinite(outputs).all()):
        return
    for place, parameter in model.named_parameters():
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"`{name}` gives numbers that are not finite in one process too: its parameter `{place}` holds "
                f"{_first_nonfinite(values)}; load the weights anew, or check the checkpoint that they came from."
            )
    raise ValueError(
        f"`{name}` gives numbers that are not finite in one process too, while its parameters are finite: its "
        f"activations overflow or divide by zero in {outputs.dtype}; load it in bfloat16 or float32, and check that "
        "`model(input_ids)` is finite."
    )


def refuse_broken_model(model: torch.nn.Module, name: str, batch: dict[str, Any]) -> None:
    """Refuse a model that raises in one process too; return if it runs there.

    Args:
        model: not wrapped by what needs all ranks in every forward, else nothing is asked.
        name (`str`): of its class.
        batch (`dict`): whole rows.

    Raises:
        ValueError: what it raised, and parameters of unlike precision where there are some.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    try:
        model(**batch)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`{name}` cannot run in one process either ({type(error).__name__}: {reason}), so sharding is not the "
            f"cause: {_mixed_precision(model) or 'make `model(input_ids, attention_mask)` run first'}."
        ) from error


def check_loss_of_trainer(trainer: type, size: int, model: Any) -> None:
    """Refuse a library's trainer whose batches are not rows of tokens, each with its label.

    Args:
        trainer (`type`): the class that is being built; the libraries' classes are read from its bases.
        size (`int`): processes that share a row.
        model (*optional*): without sharding, refused only where it runs an attention of ours, which cuts batches.

    Raises:
        NotImplementedError: it is one of TRL's or sentence-transformers' trainers, other than `SFTTrainer`.
    """
    if size == 1 and not (isinstance(model, torch.nn.Module) and runs_our_attention(model)):
        return
    for base in trainer.__mro__:
        library = base.__module__.partition(".")[0]
        is_trainer = base.__name__.endswith("Trainer") and not base.__name__.startswith(("_", "Base"))
        if library in ("trl", "sentence_transformers") and is_trainer and base.__name__ != "SFTTrainer":
            if base.__name__ in WHOLE_ROW_TRAINERS:
                raise NotImplementedError(
                    f"`{base.__name__}` does not train on rows of tokens that have a label each: its loss looks at "
                    f"whole rows; use `LongContext{base.__name__}`, which gives them to it."
                )
            raise NotImplementedError(
                f"`{base.__name__}` does not train on rows of tokens that have a label each (its loss compares whole "
                "rows, or scores them), so shares of rows cannot add up to it: put `SequenceParallelMixin` in front "
                "of `Trainer` or `SFTTrainer`, or use this one without it."
            )


def refuse_sampling(trainer: type, size: int) -> None:
    """Refuse a TRL trainer that samples its completions (GRPO, RLOO, distillation, ...) under sharding.

    Args:
        trainer (`type`): the class that is being built; TRL's are read from its bases.
        size (`int`): processes that share a row; with 1 nothing is refused.

    Raises:
        NotImplementedError: it is one.
    """
    for base in trainer.__mro__ if size > 1 else ():
        samples = any(name.startswith(("_generate", "generate_on_policy")) for name in vars(base))
        if samples and base.__module__.partition(".")[0] == "trl":
            raise NotImplementedError(
                f"`{base.__name__}` samples completions while it trains, and `sequence_parallel_size` ({size}) "
                "processes can score the rows that they share, but not generate them yet: set it to 1, or sample "
                "first and train on pairs with `LongContextDPOTrainer`."
            )


def validate_labels(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse labels that are no whole numbers where `compute_loss` is the library's, a cross entropy of classes.

    Raises:
        ValueError: they are floats.
    """
    labels = inputs.get("labels")
    own_loss = trainer.compute_loss_func in (None, token_mean) and trainer.label_smoother is None
    if own_loss and isinstance(labels, torch.Tensor) and labels.is_floating_point():
        raise ValueError(
            f"`labels` have type {str(labels.dtype).removeprefix('torch.')}, but the loss compares tokens with "
            "classes, which are whole numbers: return `labels.long()` from the collator, or pass a "
            "`compute_loss_func`."
        )


def _first_nonfinite(values: torch.Tensor) -> float:
    return float(values.detach().flatten()[~torch.isfinite(values.detach().flatten())][0])


def _mixed_precision(model: torch.nn.Module) -> str:
    found: dict[torch.dtype, str] = {}
    for place, parameter in _floating(model):
        found.setdefault(parameter.dtype, place)
    if len(found) < 2:
        return ""
    places = ", ".join(f"`{place}` is {str(dtype).removeprefix('torch.')}" for dtype, place in found.items())
    return f"{places}; give all parameters one precision, `model.to(dtype)`"


def _floating(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point())
