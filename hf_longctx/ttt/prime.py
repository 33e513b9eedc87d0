"""The prime MLPs: an extra SwiGLU MLP a suffix layer, whose matrices are the fast weights.

The parameters are what every row starts from. A row's own fast weights are explicit tensors with a leading batch axis,
passed from chunk to chunk; no module is ever changed by reading, and `B` rows learn `B` different things.
Price: `3 M D` numbers a row and layer, in float32.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


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
        facts (`tuple` of `int`): settings that its weights belong to, saved and compared with them.
    """

    NAMES = ("window", "chunk_tokens")

    def __init__(self, mlps: list[PrimeMLP], facts: tuple[int, ...]) -> None:
        super().__init__()
        self.prime_layers = nn.ModuleList(mlps)
        self.facts = tuple(facts)
        self.register_buffer("prime_facts", torch.tensor(facts, dtype=torch.int64))

    def start(self, rows: int) -> Fast:
        """Fast weights of rows that have read nothing: float32 or wider, each `(rows, M, D)` or `(rows, D, M)`."""
        return [_widened(getattr(mlp, name)).expand(rows, -1, -1) for mlp in self.prime_layers for name in MATRICES]

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that fast weights start from."""
        return [getattr(mlp, name) for mlp in self.prime_layers for name in MATRICES]

    def run(self, index: int, hidden_states: torch.Tensor, fast: Fast) -> torch.Tensor:
        """What the prime MLP of suffix layer `index` adds to `(B, t, D)`, row by row with its own weights."""
        return apply_prime(self.prime_layers[index].prime_norm(hidden_states), *fast)

    @torch.no_grad()
    def check_loaded(self, missing: set[str]) -> None:
        """Raise `ValueError` where a loader that fills tensors by itself filled in weights of other settings.

        Args:
            missing (`set` of `str`): names below this module that the checkpoint did not have.
        """
        found = [name for name in self.state_dict() if _is_matrix(name) and name not in missing]
        if "prime_facts" not in missing:
            self._validate_facts(tuple(self.prime_facts.tolist()))
        elif found:
            raise ValueError(_without_facts(found[0]))
        else:
            self.prime_facts.copy_(torch.tensor(self.facts))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(prefix + "prime_facts")
        if saved is not None:
            self._validate_facts(tuple(saved.tolist()))
        elif found := [name for name in state_dict if name.startswith(prefix) and _is_matrix(name)]:
            raise ValueError(_without_facts(found[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _validate_facts(self, saved: tuple[int, ...]) -> None:
        if saved != self.facts:
            there = ", ".join(f"`{name}` {value}" for name, value in zip(self.NAMES, saved))
            here = ", ".join(f"`{name}` {value}" for name, value in zip(self.NAMES, self.facts))
            raise ValueError(
                f"the checkpoint was trained with {there}, but this model has {here}: fast weights start from what "
                "suits one chunk length; build the model with the checkpoint's settings, or start from its base."
            )


def _is_matrix(name: str) -> bool:
    return name.rpartition(".")[2] in MATRICES


def _without_facts(name: str) -> str:
    return (
        f"the weights hold `{name}` but no `prime_facts`, so it is unknown which window and chunk length they were "
        "trained for: load all that was saved, or leave the prime MLPs out to start them anew."
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
