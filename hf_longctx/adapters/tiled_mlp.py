"""Every MLP in tiles of the sequence: its wide activations exist for one tile at a time, forward and backward.

How: forward runs tile after tile without a graph and keeps nothing but the MLP's input. Backward runs each tile again,
this time with a graph, and adds up the gradients of the parameters, so that each parameter gets one gradient a
backward and the hooks of DDP and FSDP2 fire once.
Price: one more forward of every MLP. Beside non-reentrant activation checkpointing of the layers none, because torch
stops recomputing a layer once the MLP's input is back. Where something behind the MLP needs its output (a norm, as in
Gemma 2; dropout; a second layer in the same checkpoint; reentrant checkpointing), the layer's recomputation runs the
MLP as well, which is one more forward.
"""

from __future__ import annotations

import logging

import torch
from torch.distributed.fsdp import FSDPModule

from .dense_mlps import find_dense_mlps, find_mixing, has_weights, kind_of, layer_classes
from .recompute import Tiles, run_and_recompute


logger = logging.getLogger(__name__)


def tile_mlp(model: torch.nn.Module, tile_size: int) -> TiledMLPHandle:
    """Run every dense MLP of `model` in tiles of `tile_size` tokens, in place and until it is undone.

    Args:
        model (`torch.nn.Module`): a transformers model, before or after adapters, DDP or FSDP2 are put around it.
        tile_size (`int`): tokens of a row in one tile, which holds `B x tile_size` tokens. A row that is shorter is
            one tile. The size changes rounding only, except under dropout inside the MLP, which draws tile by tile.

    Returns:
        [`TiledMLPHandle`]: which modules run in tiles, which were left alone and why, and `remove()`.

    Raises:
        ValueError: `tile_size` is no positive integer.
        NotImplementedError: no MLP of the model can run in tiles; the message names what is there instead.
        RuntimeError: the model runs in tiles already.

    Communication: none. Parameters must be whole while an MLP runs, as they are when FSDP2 shards layers or MLPs.
    Gradient: that of the MLP.
    Memory: saves `B x T x D` instead of all activations of an MLP. While it runs, it takes the activations of one
        tile, and in backward one more gradient of its trained parameters, in fp32.
    Source: Arctic Long Sequence Training, https://huggingface.co/papers/2506.13996, section 3.
    """
    if not isinstance(tile_size, int) or isinstance(tile_size, bool) or tile_size < 1:
        raise ValueError(
            f"`tile_size` ({tile_size!r}) must be a positive integer: it is the number of tokens that an MLP works on "
            "at once; 4096 is a good start."
        )
    if any(isinstance(module.__dict__.get("forward"), TiledForward) for module in model.modules()):
        raise RuntimeError(
            f"the MLPs of `{type(model).__name__}` already run in tiles: call `remove()` of the first handle before "
            f"asking for tiles of {tile_size} tokens."
        )
    found, skipped = find_dense_mlps(model)
    proofs: dict[tuple[str, ...], _Proof] = {}
    forwards: dict[str, TiledForward] = {}
    for name, mlp in found.items():
        proof = proofs.setdefault(kind_of(mlp), _Proof())
        forward = TiledForward(name, mlp, tile_size, proof)
        if not proof.done and has_weights(mlp):
            proof.run(mlp, forward.run_whole)
        if proof.reason is None:
            forwards[name] = forward
        else:
            skipped[name] = proof.reason
    if not forwards:
        _refuse(model, skipped)
    if skipped:
        name, reason = next(iter(skipped.items()))
        logger.warning(
            f"{len(forwards)} MLPs run in tiles and {len(skipped)} blocks do not, such as `{name}`: {reason}, so its "
            "activations stay whole"
        )
    return TiledMLPHandle(tile_size, forwards, skipped)


def _refuse(model: torch.nn.Module, skipped: dict[str, str]) -> None:
    layers = ", ".join(f"`{name}`" for name in layer_classes(model)) or "no layers that transformers knows"
    if skipped:
        name, reason = next(iter(skipped.items()))
        seen = f"`{name}` and {len(skipped) - 1} more are left out, because {reason}"
    else:
        seen = "no module in them has two linear layers and turns one tensor of tokens into another of its shape"
    raise NotImplementedError(
        f"`{type(model).__name__}` ({layers}) has no MLP that can run in tiles: {seen}; leave it untiled and use "
        "activation checkpointing, which frees activations between layers."
    )


class TiledMLPHandle:
    """What [`tile_mlp`] did to a model, and the way back.

    Args:
        tile_size (`int`): tokens of a row in one tile.
        forwards (`dict`): the new forward of each module, by its name in the model.
        skipped (`dict`): modules that were left alone, by name, with a reason each.
    """

    def __init__(self, tile_size: int, forwards: dict[str, TiledForward], skipped: dict[str, str]) -> None:
        self.tile_size, self.skipped = tile_size, dict(skipped)
        self._forwards = dict(forwards)
        for forward in self._forwards.values():
            forward.module.forward = forward

    @property
    def tiled(self) -> tuple[str, ...]:
        """The names of the modules that run in tiles; none after `remove()`."""
        return tuple(self._forwards)

    def remove(self) -> None:
        """Give every module its own forward back; a second call does nothing.

        Raises:
            RuntimeError: something else has replaced a forward since; no module is changed.
        """
        for name, forward in self._forwards.items():
            if forward.module.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"`{name}.forward` was replaced after the MLPs were tiled, so it cannot be given back: undo that "
                    "change first, then call `remove()`."
                )
        for forward in self._forwards.values():
            del forward.module.forward
            if forward.previous is not None:
                forward.module.forward = forward.previous
        self._forwards = {}


class TiledForward:
    """What stands in an MLP's `forward`. A copy of the model gets its own, bound to the copied module."""

    def __init__(self, name: str, module: torch.nn.Module, tile_size: int, proof: _Proof) -> None:
        self.name, self.module, self.tile_size, self.proof = name, module, tile_size, proof
        self.previous = module.__dict__.get("forward")  # of a host that patched this instance before us
        self._door = _Door(self)

    @torch.compiler.disable
    def __call__(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self._validate((*args, *kwargs.values()))
        if not self.proof.done and hidden_states.shape[-2] > 1:
            self.proof.run(self.module, self.run_whole, hidden_states)
        if self.proof.reason is not None:
            raise NotImplementedError(
                f"`{self.name}` cannot run in tiles: {self.proof.reason}; leave the MLPs of this model untiled."
            )
        tiles = Tiles(self.name, self.run_with, self.tile_size)
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if torch.is_grad_enabled() and (hidden_states.requires_grad or parameters):
            return run_and_recompute(tiles, hidden_states, parameters)
        return tiles.run(hidden_states, {})

    def run_whole(self, tokens: torch.Tensor) -> torch.Tensor:
        """The module's own forward, past the tiles and past the hooks that stand in front of both."""
        if self.previous is not None:
            return self.previous(tokens)
        return type(self.module).forward(self.module, tokens)

    def run_with(self, tokens: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """The module's own forward, with these tensors in place of its parameters."""
        if not parameters:
            return self.run_whole(tokens)
        return torch.func.functional_call(self._door, {f"mlp.{name}": p for name, p in parameters.items()}, (tokens,))

    def _validate(self, others: tuple[object, ...]) -> None:
        kind = f"`{self.name}` (`{type(self.module).__name__}`)"
        if any(other is not None for other in others):
            raise NotImplementedError(
                f"{kind} was called with {len(others)} more arguments beside its tokens, which cannot be cut into "
                "tiles: leave the MLPs of this model untiled."
            )
        for name, module in self.module.named_modules():
            if name and isinstance(module, FSDPModule):
                raise NotImplementedError(
                    f"`{self.name}.{name}` is sharded by itself, inside an MLP that runs in tiles, and would be "
                    "gathered for every tile: call `fully_shard` on the layer or on the whole MLP instead."
                )
            unlisted = any(isinstance(value, torch.Tensor) and value.requires_grad for value in vars(module).values())
            if unlisted or any(hasattr(p, "ds_id") for p in module._parameters.values()):
                raise NotImplementedError(
                    f"a wrapper keeps the parameters of {kind} to itself, as FSDP1 and DeepSpeed ZeRO-3 do, so that "
                    "their gradients would be lost in tiles: use DDP or FSDP2."
                )


class _Door(torch.nn.Module):
    """Leads `functional_call` to the MLP's own forward."""

    def __init__(self, tiled: TiledForward) -> None:
        super().__init__()
        self.tiled, self.mlp = tiled, tiled.module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tiled.run_whole(tokens)


class _Proof:
    """Whether MLPs of one kind treat each token by itself; found at the first call if there were no weights before."""

    def __init__(self) -> None:
        self.done, self.reason = False, None

    def run(self, *arguments) -> None:
        self.reason, self.done = find_mixing(*arguments), True
