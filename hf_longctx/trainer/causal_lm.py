"""`LongContextTrainer`: transformers' `Trainer` on sequences shared by several processes."""

from __future__ import annotations

from transformers import Trainer

from .row_classifiers import RowClassifierMixin


class LongContextTrainer(RowClassifierMixin, Trainer):
    """`transformers.Trainer` on shared or packed rows.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        indexer ([`IndexerConfig`], *optional*): how the indexers of a sparse model are trained.
        ramp ([`RampConfig`], *optional*): a global batch that grows over the first rows.
        sleep ([`SleepConfig`], *optional*): how a hybrid thinks over the windows that it forgets.
        args, kwargs: those of `transformers.Trainer`, unchanged.

    Losses, gradients, metrics and checkpoints equal those of the same run with `sequence_parallel_size` 1 and the same
    number of data-parallel groups. What cannot be equal raises here, before the first step.

    Example:
    ```python
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="ulysses")
    trainer = LongContextTrainer(
        model=model, args=args, train_dataset=rows, long_context=LongContextConfig(sequence_parallel_size=4)
    )
    trainer.train()
    ```
    """
