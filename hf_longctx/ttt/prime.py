"""The prime MLPs: an extra SwiGLU MLP a suffix layer, whose matrices are the fast weights.

The parameters are what every row starts from. A row's own fast weights are explicit tensors with a leading batch axis,
passed from chunk to chunk; no module is ever changed by reading, and `B` rows learn `B` different things.
Price: `3 M D` numbers a row and layer, in float32.
"""

from __future__ import annotations

import copy
import math
import struct
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config.test_time import META_GRADIENTS, TTTConfig


Fast = list[torch.Tensor]  # gate, up and down of each suffix layer in order, with rows first
MATRICES = ("prime_gate", "prime_up", "prime_down")


class PrimeMLP(nn.Module):
    """What one layer's fast weights start from, and the norm before them.

    Args:
        norm (`nn.Module`): copied, with weights of 1: that of the layer's own MLP.
        hidden_size, intermediate_size (`int`): `D` and `M`.
        dtype, device: of the matrices.

    `prime_down` starts at zero, so that the layer is at first the layer without it. Only `prime_down` moves in the
    first step then, which is enough; with all three at zero nothing would ever learn.
    """

    def __init__(self, norm: nn.Module, hidden_size: int, intermediate_size: int, dtype, device) -> None:
        super().__init__()
        self.prime_norm = copy.deepcopy(norm)
        make = {"dtype": dtype, "device": device}
        self.prime_gate = nn.Parameter(torch.empty(intermediate_size, hidden_size, **make))
        self.prime_up = nn.Parameter(torch.empty(intermediate_size, hidden_size, **make))
        self.prime_down = nn.Parameter(torch.empty(hidden_size, intermediate_size, **make))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal gate and up with variance `1 / D` behind a norm of ones, and zero down."""
        if getattr(self.prime_norm, "weight", None) is not None:
            self.prime_norm.weight.fill_(1)
        for matrix in (self.prime_gate, self.prime_up):
            matrix.normal_(std=1 / math.sqrt(matrix.shape[1]))
        self.prime_down.zero_()


class PrimeMLPs(nn.Module):
    """The prime MLPs of all suffix layers, from the first of them to the last.

    Args:
        mlps (`list` of [`PrimeMLP`]).
        settings ([`TTTConfig`]): complete; those of `FACTS` are saved with the weights and compared when these are
            loaded, since weights that were trained with some are others under others.
        layers (`int`): of the whole model.
    """

    SHAPES = ("window", "chunk_tokens", "suffix_layers", "layers", "fast_intermediate_size")
    STEPS = ("inner_learning_rate", "inner_max_grad_norm", "meta_gradient")
    FACTS = SHAPES + STEPS

    def __init__(self, mlps: list[PrimeMLP], settings: TTTConfig, layers: int) -> None:
        super().__init__()
        self.prime_layers = nn.ModuleList(mlps)
        self.facts = {name: layers if name == "layers" else getattr(settings, name) for name in self.FACTS}
        self.register_buffer("prime_facts", _encode(self.facts))

    def start(self, rows: int) -> Fast:
        """Fast weights of rows that have read nothing: float32 or wider, each `(rows, M, D)` or `(rows, D, M)`."""
        return [_widened(matrix).expand(rows, -1, -1) for matrix in self.matrices()]

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that fast weights start from.

        Raises:
            NotImplementedError: an adapter is in front of them, which would not be run.
        """
        for index, mlp in enumerate(self.prime_layers):
            if not isinstance(mlp, PrimeMLP):
                raise NotImplementedError(
                    f"`primes.prime_layers.{index}` is inside an adapter (`{type(mlp).__name__}`), and fast weights "
                    "start from its matrices, which are read and not run: leave it out, and train all of them in full "
                    "with `modules_to_save=['primes']`."
                )
        return [getattr(mlp, name) for mlp in self.prime_layers for name in MATRICES]

    def run(self, index: int, hidden_states: torch.Tensor, fast: Fast) -> torch.Tensor:
        """What the prime MLP of suffix layer `index` adds to `(B, t, D)`, row by row with its own weights."""
        return apply_prime(self.prime_layers[index].prime_norm(hidden_states), *fast)

    @torch.no_grad()
    def check_loaded(self, missing: set[str]) -> None:
        """Raise `ValueError` where a loader that fills tensors by itself filled in weights of other settings.

        The size and clipping of inner steps may be others here: `from_pretrained` takes them from a configuration,
        and one that is not the checkpoint's was given on purpose.

        Args:
            missing (`set` of `str`): names below this module that the checkpoint did not have.
        """
        names = [name for name in self.state_dict() if name != "prime_facts"]
        found = [name for name in names if name not in missing]
        if "prime_facts" not in missing:
            self._validate_facts(self.prime_facts, self.SHAPES)
            if lost := [name for name in names if name in missing]:
                raise ValueError(
                    f"the checkpoint holds prime MLPs, but no `primes.{lost[0]}`, so a part of them would start anew: "
                    "load all that was saved, or leave the prime MLPs out to start them anew."
                )
        elif matrices := [name for name in found if _is_matrix(name)]:
            raise ValueError(_without_facts(matrices[0]))
        self.prime_facts.copy_(_encode(self.facts))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(prefix + "prime_facts")
        if saved is not None:
            self._validate_facts(saved, self.FACTS)
        else:  # a part of the matrices is one file of several: another one has the facts
            layers = range(len(self.prime_layers))
            names = [f"{prefix}prime_layers.{index}.{name}" for index in layers for name in MATRICES]
            if all(name in state_dict for name in names):
                raise ValueError(_without_facts(names[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _validate_facts(self, saved: torch.Tensor, names: tuple[str, ...]) -> None:
        if saved.shape != self.prime_facts.shape:
            raise ValueError(
                f"the checkpoint's `prime_facts` hold {saved.numel()} numbers, and this version's {len(self.FACTS)}: "
                "it was saved by another version of hf_longctx; load it there, or start from its base."
            )
        facts = _decode(saved, self.FACTS)
        others = [name for name in names if facts[name] != self.facts[name]]
        if others:
            there = ", ".join(f"`{name}` {facts[name]!r}" for name in others)
            here = ", ".join(f"`{name}` {self.facts[name]!r}" for name in others)
            raise ValueError(
                f"the checkpoint was trained with {there}, but this model has {here}: what fast weights start from "
                "suits the settings that it was trained with; build the model with these (`from_pretrained` does), "
                "or start from its base."
            )


def _encode(facts: dict[str, Any]) -> torch.Tensor:
    """Settings as integers, which no change of precision rounds: numbers with a point by their bits."""
    numbers = []
    for name, value in facts.items():
        if name == "meta_gradient":
            numbers.append(META_GRADIENTS.index(value))
        elif name in PrimeMLPs.STEPS:
            numbers.extend(struct.unpack("<q", struct.pack("<d", value)))
        else:
            numbers.append(value)
    return torch.tensor(numbers, dtype=torch.int64)


def _decode(numbers: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, number in zip(names, numbers.tolist(), strict=True):
        if name == "meta_gradient":
            facts[name] = META_GRADIENTS[number]
        elif name in PrimeMLPs.STEPS:
            (facts[name],) = struct.unpack("<d", struct.pack("<q", number))
        else:
            facts[name] = number
    return facts


def _is_matrix(name: str) -> bool:
    return name.rpartition(".")[2] in MATRICES


def _without_facts(name: str) -> str:
    return (
        f"the weights hold `{name}` but no `prime_facts`, so it is unknown which settings they were trained with: "
        "load all that was saved, or leave the prime MLPs out to start them anew."
    )


def apply_prime(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`down (silu(gate x) * up x)` with a matrix a row: `(B, t, D)` to `(B, t, D)`, in the precision of `x`.

    Tokens are columns, so that a matrix's gradient comes out laid out as the matrix is.
    """
    gate, up, down = (weight.to(x.dtype) for weight in (gate, up, down))
    columns = x.transpose(1, 2)
    return torch.bmm(down, F.silu(torch.bmm(gate, columns)) * torch.bmm(up, columns)).transpose(1, 2)


def _widened(parameter: torch.Tensor) -> torch.Tensor:
    return parameter if parameter.dtype == torch.float64 else parameter.float()
