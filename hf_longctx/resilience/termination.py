"""SIGTERM: a checkpoint after the running step, on all ranks alike, then an exit that a scheduler understands.

transformers has this too (`enable_jit_checkpoint`), but each rank acts when its own signal arrives: one saves and
leaves while the others begin the next step and wait for it. Here its argument is the switch, and the decision is
reduced over the ranks together with that about finite numbers.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


EXIT_CODE = 128 + signal.SIGTERM


class Termination(TrainerCallback):
    """Remembers a SIGTERM, and once all ranks know of it makes the trainer save and stop.

    Args:
        is_on (`bool`): otherwise signals are left alone.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.is_asked = self.is_agreed = False
        self._handler_before: Any = None

    def __enter__(self) -> Termination:
        self.is_asked = self.is_agreed = False
        if self.is_on and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)
            self._handler_before = None

    def _remember(self, number: int, frame) -> None:
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.is_agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a scheduler gives seconds, not minutes

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.is_agreed:
            control.should_save = control.should_evaluate = False  # saved at the end of its last step


def take_over_sigterm(trainer) -> Termination:
    """Replace transformers' callback with ours, which has already set its handler."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, JITCheckpointCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)  # gives the signal back
            trainer.remove_callback(callback)
    termination = Termination(trainer.args.enable_jit_checkpoint)
    trainer.add_callback(termination)  # last, so that no callback asks for an evaluation after it
    return termination
