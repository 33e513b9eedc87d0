"""`LongContextSFTTrainer`: TRL's `SFTTrainer` on sequences shared by several processes."""

from __future__ import annotations

from ..config.audiences import TRAINERS
from .language_model import LanguageModelMixin


try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("`LongContextSFTTrainer` needs trl: `pip install hf-longctx[trl]`.") from error


class LongContextSFTTrainer(LanguageModelMixin, SFTTrainer):
    """`trl.SFTTrainer` on shared or packed rows.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        indexer ([`IndexerConfig`], *optional*): how the indexers of a sparse model are trained.
        ramp ([`RampConfig`], *optional*): a global batch that grows over the first rows.
        args, kwargs: those of `trl.SFTTrainer`, unchanged: both `loss_type` values, completion-only and assistant-only
            loss, PEFT, packing.
    """

    configs = TRAINERS["LongContextSFTTrainer"]

    @property
    def shifts_labels(self) -> bool:
        return True

    @property
    def uses_model_loss(self) -> bool:
        """SFT scores tokens with its own fused head, which takes shifted labels and the global count."""
        return False
