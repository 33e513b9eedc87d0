"""What a plan is for: the settings of a run that decide its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


GIB = 2**30  # bytes
OPTIMIZERS = ("adamw", "adafactor", "sgd", "lora")
REFERENCES = ("none", "model", "adapter")
WRAPPERS = ("none", "ddp", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run, as far as its memory depends on it.

    Args:
        tokens (`int`): of a whole row, `T`.
        rows (`int`, *optional*, defaults to 1): rows of a micro-batch, `B`.
        sequence_parallel_size (`int`, *optional*, defaults to 1): ranks that share a row, `P`.
        world_size (`int`, *optional*, defaults to 1): all ranks, `W`.
        processes_per_node (`int`, *optional*): ranks that share the CPU memory of one node; defaults to `W`.
        weights_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights that the model is loaded
            with. Under `"lora"` they are frozen, and the adapters are fp32.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of matrix products. Where it is not
            `weights_dtype`, autocast casts, or FSDP2 does.
        optimizer (`str`, *optional*, defaults to `"adamw"`): `"adamw"`, `"adafactor"`, `"sgd"` without momentum, or
            `"lora"`: AdamW on adapters of rank `lora_rank` in every linear layer of the stack.
        lora_rank (`int`, *optional*, defaults to 16): of the adapters.
        wrapper (`str`, *optional*, defaults to `"none"`): `"none"`, `"ddp"` or `"fsdp2"`.
        accumulates (`bool`, *optional*, defaults to `False`): gradients of an earlier micro-batch are there already.
        checkpointing (`bool`, *optional*, defaults to `False`): recompute layers in backward.
        every_n_layers (`int`, *optional*, defaults to 1): of which only every `n`-th is checkpointed.
        offload (`bool`, *optional*, defaults to `False`): keep the checkpoints in CPU memory.
        loss_tile_size (`int`, *optional*): tokens whose logits exist at a time; `None` computes them all.
        reversible (`bool`, *optional*, defaults to `False`): layers run in two streams and keep nothing else.
        mlp_tile_size (`int`, *optional*): tokens in an MLP at a time; `None` for all.
        on_gpu (`bool`, *optional*, defaults to `True`): attention runs a flash kernel, whose backward has buffers that
            the CPU's has not.
        num_hashes (`int`, *optional*): rounds of LSH attention, which runs in the place of that kernel.
        whole_rows (`bool`, *optional*, defaults to `False`): every rank holds a batch of whole rows, as trainers of
            preference pairs do, and their losses run in tiles under every preset; `rows` are two a pair.
        reference (`str`, *optional*, defaults to `"none"`): whose forward runs, without gradients, between forward and
            backward of the trained model: `"model"`, another one with its own weights; `"adapter"`, the trained one
            without its adapters; `"none"` where its numbers were computed ahead.
    """

    tokens: int
    rows: int = 1
    sequence_parallel_size: int = 1
    world_size: int = 1
    processes_per_node: int | None = None
    weights_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.bfloat16
    optimizer: str = "adamw"
    lora_rank: int = 16
    wrapper: str = "none"
    accumulates: bool = False
    checkpointing: bool = False
    every_n_layers: int = 1
    offload: bool = False
    loss_tile_size: int | None = None
    mlp_tile_size: int | None = None
    on_gpu: bool = True
    reversible: bool = False
    num_hashes: int | None = None
    whole_rows: bool = False
    reference: str = "none"

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "sequence_parallel_size", "world_size", "every_n_layers", "lora_rank"):
            _validate_count(name, getattr(self, name))
        for name in ("processes_per_node", "loss_tile_size", "mlp_tile_size", "num_hashes"):
            if getattr(self, name) is not None:
                _validate_count(name, getattr(self, name))
        for name, known in (("optimizer", OPTIMIZERS), ("wrapper", WRAPPERS), ("reference", REFERENCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` ({getattr(self, name)!r}) must be one of {', '.join(known)}.")
        if self.reference == "adapter" and self.optimizer != "lora":
            raise ValueError(
                f"`reference` ('adapter') switches the adapters of `optimizer` 'lora' off, and that is "
                f"{self.optimizer!r}: set `reference` to 'model' or 'none'."
            )
        if self.world_size % self.sequence_parallel_size:
            raise ValueError(
                f"`sequence_parallel_size` ({self.sequence_parallel_size}) must divide `world_size` "
                f"({self.world_size}): all ranks are split into groups of that size."
            )
        if self.wrapper == "none" and self.world_size > 1:
            raise ValueError(
                f"`wrapper` ('none') runs one process, but `world_size` is {self.world_size}: choose 'ddp' or 'fsdp2'."
            )
        if self.reversible and self.checkpointing:
            raise ValueError("`reversible` layers keep nothing that `checkpointing` could free: set one of them.")
        if self.offload and not self.checkpointing:
            raise ValueError("`offload` moves the checkpoints of layers to CPU memory: set `checkpointing` as well.")

    @property
    def local_tokens(self) -> int:
        """Tokens of a row on one rank, `t`."""
        return -(-self.tokens // self.sequence_parallel_size)

    @property
    def is_mixed(self) -> bool:
        """Whether the trainer computes under autocast."""
        differ = self.weights_dtype != self.compute_dtype or self.optimizer == "lora"
        return differ and self.compute_dtype != torch.float32

    def of(self, **changes: Any) -> Settings:
        """The same run with some settings changed."""
        return replace(self, **changes)


def _validate_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")
