"""Which reversible models fit, for `hf-longctx plan --reversible`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from ..planner.reversible_plan import deepest_stack
from ..planner.settings import GIB, Settings


if TYPE_CHECKING:
    from .answer import Answer


# Of tokens, for which the deepest model is looked for.
_WIDTHS = (256, 512, 1024, 2048, 4096)


def print_sizes(answer: Answer, config: PretrainedConfig, settings: Settings, device_bytes: int) -> None:
    """For some widths, the deepest model of this kind whose rows of `settings.tokens` fit."""
    answer.print(f"which reversible models of this kind fit rows of {settings.tokens:,} tokens on such a GPU:")
    sizes: list[dict[str, int]] = []
    answer.facts["reversible_sizes"] = sizes
    for width in _WIDTHS:
        try:
            with answer.working(f"simulating width {width:,}"):
                found = deepest_stack(config, width, settings, device_bytes)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            answer.print(f"  width {width:,}: no model ({error})")
            continue
        if not found.num_layers:
            answer.print(f"  width {width:,}: none, one layer takes {found.device / GIB:.1f} GiB")
            break
        sizes.append({"width": width, "layers": found.num_layers, "parameters": found.parameters})
        answer.print(
            f"  width {width:,}: up to {found.num_layers:,} layers, {found.parameters / 1e6:,.0f}M parameters, "
            f"{found.device / GIB:.1f} GiB"
        )
