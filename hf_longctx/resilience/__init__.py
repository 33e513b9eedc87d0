"""Fault tolerance of the trainers: non-finite steps, checkpoints, signals, hangs, replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .checkpoint_advisor import CheckpointAdvisor as CheckpointAdvisor
    from .kill_switch import KillSwitch as KillSwitch
    from .replicas import ReplicaGuard as ReplicaGuard
    from .slow_rank_watch import SlowRankWatch as SlowRankWatch
    from .spike_guard import LossSpikeGuard as LossSpikeGuard

_EXPORTS = {
    "checkpoint_advisor": ("CheckpointAdvisor",),
    "kill_switch": ("KillSwitch",),
    "replicas": ("ReplicaGuard",),
    "slow_rank_watch": ("SlowRankWatch",),
    "spike_guard": ("LossSpikeGuard",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
