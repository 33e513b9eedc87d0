"""`LongContextSFTTrainer`: TRL's `SFTTrainer` on sequences shared by several processes."""

from __future__ import annotations

from .mixin import SequenceParallelMixin


try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("`LongContextSFTTrainer` needs trl: `pip install hf-longctx[trl]`.") from error


class LongContextSFTTrainer(SequenceParallelMixin, SFTTrainer):
    """`trl.SFTTrainer` with one more argument.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        args, kwargs: those of `trl.SFTTrainer`, unchanged: both `loss_type` values, completion-only and assistant-only
            loss, PEFT, packing.
    """

    @property
    def shifts_labels(self) -> bool:
        return True

    @property
    def uses_model_loss(self) -> bool:
        """SFT scores tokens with its own fused head, which takes shifted labels and the global count."""
        return False
