"""What a few decoders of transformers need before they train on shares of rows, or on packed ones."""

from __future__ import annotations

from ..adapters.positions import follow_positions
from ..adapters.wrapped import runs_our_attention, unwrap
from ..families import expects_unshifted_labels


def adapt_model(trainer) -> bool:
    """Let the trainer's model follow the positions of the shard, and leave labels as they are where its loss does.

    Returns:
        `bool`: whether the model runs an attention of ours; of any other nothing is changed.
    """
    if not runs_our_attention(trainer.model):
        return False
    follow_positions(trainer.model)
    own_loss = trainer.uses_model_loss and trainer.compute_loss_func is None and trainer.label_smoother is None
    if own_loss and expects_unshifted_labels(unwrap(trainer.model).config):
        trainer._loss_shifts_labels = False  # transformers looks at the loss's name, which these models do not call
    return True
