"""Every MLP in tiles of the sequence: its wide activations exist for one tile at a time, forward and backward.

How: forward runs tile after tile without a graph and keeps nothing but the MLP's input. Backward runs each tile again,
this time with a graph, and adds up the gradients of the parameters, so that each parameter gets one gradient a
backward and the hooks of DDP and FSDP2 fire once.
Price: one more forward of every MLP. Free with non-reentrant activation checkpointing of the layers, because torch
stops recomputing a layer once the MLP's input is back. Where something behind the MLP needs its output (a norm, as in
Gemma 2; dropout; a second layer in the same checkpoint; reentrant checkpointing), the layer's recomputation runs the
MLP as well, which is one more forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.distributed.fsdp import FSDPModule

from .dense_mlps import find_dense_mlps, find_mixing, has_weights, kind_of, layer_classes
from .instance_forward import InstancePatch, PatchHandle, own_method, patch_on, put_on
from .recompute import Tiles, run_and_recompute


logger = logging.getLogger(__name__)

TILED_MLP = "tiled MLP"


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
        RuntimeError: the model runs in tiles of another size already; of the same size is once.

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
    sizes = {patch.tile_size for patch in _patches(model)} - {tile_size}
    if sizes:
        raise RuntimeError(
            f"the MLPs of `{type(model).__name__}` already run in tiles of {sizes.pop()} tokens: call `remove()` of "
            f"that handle before asking for tiles of {tile_size}."
        )
    found, skipped = find_dense_mlps(model)
    proofs: dict[tuple[str, ...], _Proof] = {}
    tiled: dict[str, MLPPatch] = {}
    for name, mlp in found.items():
        proof = proofs.setdefault(kind_of(mlp), _Proof())
        if not proof.done and has_weights(mlp):
            proof.run(mlp, own_method(mlp, TILED_MLP))
        if proof.reason is None:
            tiled[name] = MLPPatch(name, tile_size, proof)
        else:
            skipped[name] = proof.reason
    if not tiled:
        _refuse(model, skipped)
    for name, patch in tiled.items():
        put_on(found[name], patch)
    if skipped:
        name, reason = next(iter(skipped.items()))
        logger.warning(
            f"{len(tiled)} MLPs run in tiles and {len(skipped)} blocks do not, such as `{name}`: {reason}, so its "
            "activations stay whole"
        )
    return TiledMLPHandle(model, tile_size, skipped)


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


def _patches(model: torch.nn.Module) -> list[MLPPatch]:
    found = (patch_on(module, TILED_MLP) for module in model.modules())
    return [patch for patch in found if patch is not None]


def mlp_tile_size(model: torch.nn.Module) -> int | None:
    """The tile size of a model whose MLPs run in tiles, or `None`."""
    return next((patch.tile_size for patch in _patches(model)), None)


class TiledMLPHandle(PatchHandle):
    """What [`tile_mlp`] did to a model, and the way back.

    Args:
        model (`torch.nn.Module`): whose MLPs run in tiles.
        tile_size (`int`): tokens of a row in one tile.
        skipped (`dict`): modules that were left alone, by name, with a reason each.
    """

    def __init__(self, model: torch.nn.Module, tile_size: int, skipped: dict[str, str]) -> None:
        super().__init__(model, TILED_MLP)
        self.tile_size, self.skipped = tile_size, dict(skipped)

    @property
    def tiled(self) -> tuple[str, ...]:
        """The names of the modules that run in tiles; none after `remove()`."""
        return tuple(patch.path for patch in _patches(self.model))


class MLPPatch(InstancePatch):
    """On an MLP: its own forward, tile by tile.

    Args:
        path (`str`): the name of the MLP in its model.
        tile_size (`int`): tokens of a row in one tile.
        proof: whether MLPs of this kind treat each token by itself.
    """

    name = TILED_MLP

    def __init__(self, path: str, tile_size: int, proof: _Proof) -> None:
        self.path, self.tile_size, self.proof = path, tile_size, proof

    @torch.compiler.disable
    def call(
        self, module: torch.nn.Module, own: Callable, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        self._validate(module, (*args, *kwargs.values()))
        if not self.proof.done and hidden_states.shape[-2] > 1:
            self.proof.run(module, own, hidden_states)
        if self.proof.reason is not None:
            raise NotImplementedError(
                f"`{self.path}` cannot run in tiles: {self.proof.reason}; leave the MLPs of this model untiled."
            )
        wrapper = _WithParameters(module, own)
        tiles = Tiles(self.path, wrapper.run, self.tile_size)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if torch.is_grad_enabled() and (hidden_states.requires_grad or parameters):
            return run_and_recompute(tiles, hidden_states, parameters)
        return tiles.run(hidden_states, {})

    def _validate(self, mlp: torch.nn.Module, others: tuple[object, ...]) -> None:
        kind = f"`{self.path}` (`{type(mlp).__name__}`)"
        if any(other is not None for other in others):
            raise NotImplementedError(
                f"{kind} was called with {len(others)} arguments in addition to its tokens, which cannot be cut into "
                "tiles: leave the MLPs of this model untiled."
            )
        for name, module in mlp.named_modules():
            if name and isinstance(module, FSDPModule):
                raise NotImplementedError(
                    f"`{self.path}.{name}` is sharded by itself, inside an MLP that runs in tiles, and would be "
                    "gathered for every tile: call `fully_shard` on the layer or on the whole MLP instead."
                )
            unlisted = any(isinstance(value, torch.Tensor) and value.requires_grad for value in vars(module).values())
            if unlisted or any(hasattr(p, "ds_id") for p in module._parameters.values()):
                raise NotImplementedError(
                    f"a wrapper keeps the parameters of {kind} to itself, as FSDP1 and DeepSpeed ZeRO-3 do, so that "
                    "their gradients would be lost in tiles: use DDP or FSDP2."
                )


class _WithParameters(torch.nn.Module):
    """Wrapper module through which `functional_call` reaches what is below the patch."""

    def __init__(self, mlp: torch.nn.Module, own: Callable) -> None:
        super().__init__()
        self.mlp, self.own = mlp, own

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.own(tokens)

    def run(self, tokens: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """The MLP's own forward, with these tensors in place of its parameters."""
        if not parameters:
            return self.own(tokens)
        return torch.func.functional_call(self, {f"mlp.{name}": p for name, p in parameters.items()}, (tokens,))


class _Proof:
    """Whether MLPs of one kind treat each token by itself; found at the first call if there were no weights before."""

    def __init__(self) -> None:
        self.done, self.reason = False, None

    def run(self, *arguments) -> None:
        self.reason, self.done = find_mixing(*arguments), True
