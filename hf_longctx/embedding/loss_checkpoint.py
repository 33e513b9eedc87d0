"""Weights that a loss learns, such as a temperature: in a checkpoint, next to the optimizer's state for them.

sentence-transformers trains them and saves neither, so a resumed run would start them anew under an optimizer that
knows the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


LOSS_FILE = "loss.safetensors"


def loss_parameters(loss: torch.nn.Module | Mapping[str, torch.nn.Module], model: torch.nn.Module) -> dict:
    """Parameters and buffers of one loss, or of one for each data set, that are not the model's."""
    losses = loss if isinstance(loss, Mapping) else {"loss": loss}
    known = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return {
        f"{name}.{key}": tensor
        for name, module in losses.items()
        for key, tensor in module.state_dict(keep_vars=True).items()
        if id(tensor) not in known
    }


def save_loss(trainer, folder: str) -> None:
    """Write `loss.safetensors` into a checkpoint, if the loss learns anything."""
    tensors = loss_parameters(trainer.loss, trainer.model)
    if tensors and trainer.args.should_save:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, Path(folder, LOSS_FILE))


def load_loss(trainer, folder: str | None) -> None:
    """Put what the loss had learned back.

    Raises:
        ValueError: the checkpoint has none, or those of another loss.
    """
    tensors = loss_parameters(trainer.loss, trainer.model)
    if folder is None or not tensors:
        return
    path = Path(folder, LOSS_FILE)
    try:
        saved = load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` is cut off or damaged ({error}): resume from another checkpoint.") from error
    if set(saved) != set(tensors) or any(saved[name].shape != tensors[name].shape for name in tensors):
        raise ValueError(
            f"`{path}` holds {', '.join(sorted(saved)) or 'nothing'}, and the loss of this run learns "
            f"{', '.join(sorted(tensors))}: resume with the loss that the checkpoint was trained with."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
