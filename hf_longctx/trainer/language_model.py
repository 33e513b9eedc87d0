"""What the trainers of language models have in common: each system's overridden methods, in the order they are called.

A new system is one mixin and one word here. A mixin calls `super()` in every method that it overrides.
"""

from __future__ import annotations

from .blend_mixin import BlendMixin
from .indexer_mixin import IndexerMixin
from .inner_steps import InnerStepMixin
from .ramp_mixin import RampMixin
from .sleep_mixin import SleepMixin


class LanguageModelMixin(SleepMixin, InnerStepMixin, RampMixin, BlendMixin, IndexerMixin):
    """In front of a library's trainer class; see the mixins for their keyword arguments."""
