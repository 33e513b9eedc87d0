"""Evaluators of a sharded run: every rank runs them, on the same texts in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def evaluate_everywhere(trainer, library_loop: Callable, *args, metric_key_prefix: str = "eval", **kwargs):
    """sentence-transformers' evaluation loop, with its evaluator run on every rank.

    It distributes the texts of an evaluator to single processes, which would give the ranks of one group different
    texts. Here each group embeds all of them; only the first rank writes files, and its scores count for all.

    Communication: that of the forwards, and a broadcast of the scores.
    """
    evaluator, trainer.evaluator = trainer.evaluator, None
    try:
        output = library_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
    finally:
        trainer.evaluator = evaluator
    if trainer.is_in_train and isinstance(trainer.eval_dataset, dict) and metric_key_prefix.startswith("eval_"):
        # Of several evaluation sets the first brings the evaluator's scores, as in sentence-transformers.
        if metric_key_prefix[5:] != next(iter(trainer.eval_dataset)):
            return output
        metric_key_prefix = "eval"
    folder = None
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir, "eval")
        folder.mkdir(parents=True, exist_ok=True)
    scores = evaluator(
        trainer.model,
        output_path=None if folder is None else str(folder),
        epoch=trainer.state.epoch,
        steps=trainer.state.global_step,
    )
    scores = [scores if isinstance(scores, dict) else {"evaluator": scores}]
    dist.broadcast_object_list(scores)
    prefix = f"{metric_key_prefix}_"
    output.metrics.update({key if key.startswith(prefix) else prefix + key: value for key, value in scores[0].items()})
    return output
