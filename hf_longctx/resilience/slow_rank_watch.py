"""`SlowRankWatch`: names the node and device of a rank that keeps all others waiting.

One device that has lost a few percent of its clock slows every step of every rank by as much, and no rank's own speed
shows which it is: all of them wait. BLOOM's run found one by training on halves of its nodes, 149 to 140 TFLOP/s.
Price: two clock reads or events a forward, a backward and an optimizer step, and 8 bytes a rank once in `every` steps.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..adapters.wrapped import unwrap
from ..config.values import validate_count, validate_positive
from ..families import query_heads
from ..parallel.heads import split_heads
from .own_seconds import OwnSeconds
from .slow_ranks import SlowRanks
from .watch import Watch


logger = logging.getLogger(__name__)


class SlowRankWatch(Watch):
    """Compare the seconds that ranks compute, without their waits, and name a rank that is slow window after window.

    Args:
        every (`int`, *optional*, defaults to 50): optimizer steps of a window.
        windows (`int`, *optional*, defaults to 3): a rank is named when it was slow in so many in a row.
        tolerance (`float`, *optional*, defaults to 0.03): share above the median of its peers that is slow.
        clock (`Callable`, *optional*): seconds, in place of the device's own events or of a CPU's clock.

    What counts: forward and backward, less the exchanges of shared rows, and the optimizer. FSDP2 and DeepSpeed
    exchange weights and gradients in all of these: there the forward counts alone, under FSDP2 inside the layers.
    Data, losses outside of the model, clipping and saving never count.

    Peers are the ranks that hold as many heads. The logs get `slowest_rank`, the slowest rank's seconds as a multiple
    of its peers' median in the last window.

    Raises:
        ValueError: an argument has a value that no run could use.

    Communication: one all-gather of 8 bytes a rank a window; one of names when a run begins.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        windows: int = 3,
        tolerance: float = 0.03,
        clock: Callable[[], float] | None = None,
    ) -> None:
        validate_count("every", every, "steps")
        validate_count("windows", windows, "windows")
        validate_positive("tolerance", tolerance, "a share of the median")
        self.every, self.windows, self.tolerance, self.clock = every, windows, tolerance, clock
        self.named: list[str] = []
        self._heads, self._is_replicated = 0, False
        self._own: OwnSeconds | None = None
        self._ranks: SlowRanks | None = None
        self._places: list[str] = []
        self._steps = 0

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("every", "windows", "tolerance")}

    def figures(self) -> dict[str, float]:
        if self._ranks is None or self._ranks.slowest == 1.0:
            return {}
        return {"slowest_rank": float(f"{self._ranks.slowest:.4g}")}

    def refuse(self, trainer: Any) -> None:
        mesh, heads = trainer.mesh, None
        self._is_replicated = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        config = getattr(unwrap(trainer.model), "config", None)
        if mesh.sequence_parallel_size > 1 and config is not None:
            heads = query_heads(config)
        if heads is not None:
            self._heads = split_heads(heads, heads, mesh.sequence_parallel_size).query_count(
                mesh.sequence_parallel_rank
            )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.named, self._steps = [], 0
        self._forget()
        if args.world_size == 1:
            return
        device = f"{args.device}"
        if args.device.type == "cuda":
            device += f", {torch.cuda.get_device_name(args.device)}"
        places: list[Any] = [None] * args.world_size
        dist.all_gather_object(places, (f"{socket.gethostname()}, {device}", self._heads))
        self._places = [place for place, _ in places]
        self._ranks = SlowRanks(self.windows, self.tolerance, [heads for _, heads in places])
        alone = self._ranks.without_peers
        if alone and state.is_world_process_zero:
            logger.warning(
                f"`SlowRankWatch` compares ranks that hold as many heads, and of ranks {', '.join(map(str, alone))} "
                "each is the only one: it says nothing about them; more groups, or heads that divide evenly, help"
            )
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds torch's
        times_all = self._is_replicated and isinstance(optimizer, torch.optim.Optimizer)
        self._own = OwnSeconds(model, args.device, self.clock, optimizer if times_all else None)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._own is None or self._ranks is None:
            return
        self._steps += 1
        if self._steps < self.every:
            return
        own = torch.tensor([self._own.take() / self._steps], dtype=torch.float64, device=args.device)
        self._steps = 0
        everyone = [torch.empty_like(own) for _ in self._places]
        dist.all_gather(everyone, own)
        for rank, seconds, median in self._ranks.add(torch.cat(everyone).tolist()):
            message = (
                f"rank {rank} ({self._places[rank]}) computes {seconds / median - 1:.0%} longer than its peers, "
                f"{seconds:.3g} s of a step against {median:.3g} s, in {self.windows} windows of {self.every} steps: "
                "every rank waits for it; look at its clock, temperature and other processes, or leave it out"
            )
            self.named.append(message)
            if state.is_world_process_zero:
                logger.warning(message)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._forget()

    def _forget(self) -> None:
        if self._own is not None:
            self._own.remove()
        self._own = self._ranks = None
