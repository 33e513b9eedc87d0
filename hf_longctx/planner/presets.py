"""The memory presets, from nothing to everything; each keeps what the one before it did."""

from __future__ import annotations

from dataclasses import dataclass

from ..losses.tiles import choose_tile_size
from .settings import Settings


# Tokens: large enough that a matmul does not notice, small next to a long row.
MLP_TILE_SIZE = 4096


@dataclass(frozen=True)
class Preset:
    """One memory preset.

    Args:
        name (`str`): of the preset.
        price (`str`): what it costs compared with the preset before, for people.
        tiles_loss, tiles_mlp, checkpointing, offload (`bool`): see [`Settings`].
    """

    name: str
    price: str
    tiles_loss: bool = False
    tiles_mlp: bool = False
    checkpointing: bool = False
    offload: bool = False

    def apply(self, settings: Settings, vocab_size: int) -> Settings:
        """`settings` with this preset applied."""
        return settings.of(
            loss_tile_size=choose_tile_size(None, vocab_size) if self.tiles_loss else None,
            mlp_tile_size=MLP_TILE_SIZE if self.tiles_mlp else None,
            checkpointing=self.checkpointing,
            offload=self.offload,
        )


_LOSS, _MLP = {"tiles_loss": True}, {"tiles_loss": True, "tiles_mlp": True}
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("off", "nothing"),
        Preset("loss", "next to nothing", **_LOSS),
        Preset("mlp", "the forward of the MLPs once more", **_MLP),
        Preset("checkpoint", "the whole forward once more", **_MLP, checkpointing=True),
        Preset("max", "copies to CPU memory and back", **_MLP, checkpointing=True, offload=True),
    )
}
