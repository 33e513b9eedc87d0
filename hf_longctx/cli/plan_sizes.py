"""Which reversible models fit, for `hf-longctx plan --reversible`."""

from __future__ import annotations

from rich.console import Console
from transformers import PretrainedConfig

from ..planner.reversible_plan import deepest_stack
from ..planner.settings import GIB, Settings


# Of tokens, for which the deepest model is looked for.
_WIDTHS = (256, 512, 1024, 2048, 4096)


def print_sizes(console: Console, config: PretrainedConfig, settings: Settings, device_bytes: int) -> None:
    """For some widths, the deepest model of this kind whose rows of `settings.tokens` fit."""
    console.print(f"which reversible models of this kind fit rows of {settings.tokens:,} tokens on such a GPU:")
    for width in _WIDTHS:
        try:
            with console.status(f"simulating width {width:,}"):
                found = deepest_stack(config, width, settings, device_bytes)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            console.print(f"  width {width:,}: no model ({error})", markup=False)
            continue
        if not found.num_layers:
            console.print(f"  width {width:,}: none, one layer takes {found.device / GIB:.1f} GiB")
            break
        console.print(
            f"  width {width:,}: up to {found.num_layers:,} layers, {found.parameters / 1e6:,.0f}M parameters, "
            f"{found.device / GIB:.1f} GiB"
        )
