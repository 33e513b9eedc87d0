"""`LongContextDPOTrainer` and `LongContextKTOTrainer`: TRL's preference losses on rows shared by several processes."""

from __future__ import annotations

from ..config.audiences import TRAINERS
from ..config.pair_rows import PreferenceConfig
from .scored_rows import score_whole_rows
from .whole_rows_mixin import WholeRowsMixin


try:
    from trl import DPOTrainer, KTOTrainer
except ImportError as error:
    raise ImportError("`LongContextDPOTrainer` needs trl: `pip install hf-longctx[trl]`.") from error


class LongContextDPOTrainer(WholeRowsMixin, DPOTrainer):
    """`trl.DPOTrainer` on shared rows.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        preference ([`PreferenceConfig`], *optional*): how the rows of pairs are laid out.
        args, kwargs: those of `trl.DPOTrainer`, unchanged: every `loss_type`, with a reference model, without one,
            with adapters, with reference numbers computed ahead.

    Losses, gradients, metrics and checkpoints equal those of the same run with `sequence_parallel_size` 1 and the same
    number of data-parallel groups. What cannot be equal raises here, before the first step.

    Example:
    ```python
    trainer = LongContextDPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(max_length=131_072),
        train_dataset=pairs,
        processing_class=tokenizer,
        long_context=LongContextConfig(sequence_parallel_size=4),
    )
    trainer.train()
    ```
    """

    configs = TRAINERS["LongContextDPOTrainer"]
    preference: PreferenceConfig
    attach_rows = staticmethod(score_whole_rows)


class LongContextKTOTrainer(WholeRowsMixin, KTOTrainer):
    """`trl.KTOTrainer` on shared rows.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        preference ([`PreferenceConfig`], *optional*): how the rows are laid out.
        args, kwargs: those of `trl.KTOTrainer`, unchanged.
    """

    configs = TRAINERS["LongContextKTOTrainer"]
    preference: PreferenceConfig
    attach_rows = staticmethod(score_whole_rows)
