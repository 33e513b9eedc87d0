"""Refusals of a sharded run, before it starts. Each names the value seen, the rule and the remedy."""

from __future__ import annotations

import inspect

from ..adapters.hashed import refuse_unhashable, wants_lsh
from ..adapters.peft_kinds import check_peft
from ..adapters.recurrent.layers import unfollowed_layers
from ..adapters.sparse.shared_row import unserved_indexers
from ..adapters.sparse.sparse_layers import keeps_all_heads
from ..adapters.wrapped import unwrap
from ..attention.kernels import validate_kernel_available
from ..attention.registry import name_that_shards, shards_rows
from ..attention.unadapted import validate_config
from ..config.lsh_settings import LSH
from ..config.run import LongContextConfig
from ..families import query_heads
from ..parallel.heads import validate_head_count
from .inner_checks import refuse_shared
from .other_axes import refuse_axes_of_arguments, refuse_axes_of_model


def check_arguments(args, config: LongContextConfig) -> None:
    """Refuse `TrainingArguments` that would make a sharded run inexact. Without sharding nothing is refused."""
    if args is None or config.sequence_parallel_size == 1:
        return
    size = config.sequence_parallel_size
    refuse_axes_of_arguments(getattr(args, "parallelism_config", None), size)
    refusals = {
        "deepspeed": "its engine scales and partitions gradients by its own rules; use DDP or FSDP2",
        "torch_compile": "the exchange between ranks is not traced exactly; leave it off",
        "neftune_noise_alpha": "its noise is scaled by the local length of a row; leave it unset",
        "use_liger_kernel": "it replaces the model's forward and loss; leave it off",
        "auto_find_batch_size": "one rank running out of memory would leave the others waiting; set the batch size",
    }
    for name, reason in refusals.items():
        if getattr(args, name, None):
            raise NotImplementedError(
                f"`{name}` ({getattr(args, name)!r}) cannot be used with `sequence_parallel_size` ({size}): {reason}."
            )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise NotImplementedError(
            "`train_sampling_strategy` ('batch_rebalance') assigns rows to single processes, but the ranks of a group "
            "must read the same rows: use 'random', 'sequential' or 'group_by_length'."
        )
    refuse_dispatcher(args, "the ranks of a group must read the same rows")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and would use `DataParallel`: start one process a GPU with `torchrun "
            f"--nproc_per_node {args.n_gpu} ...`."
        )


def refuse_dispatcher(args, reason: str) -> None:
    """Refuse accelerate's ways to read a batch once and send it around; `reason` ends the message."""
    for name in ("split_batches", "dispatch_batches"):
        if getattr(getattr(args, "accelerator_config", None), name, None):
            raise ValueError(
                f"`accelerator_config.{name}` (True) sends pieces of one batch to all processes, but {reason}: leave "
                "it unset."
            )


def check_trainer(trainer) -> None:
    """Refuse a built trainer whose wrapper or metrics would make a sharded run inexact."""
    size = trainer.long_context.sequence_parallel_size
    if size == 1:
        return
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            f"DeepSpeed is configured next to `sequence_parallel_size` ({size}): its engine scales and partitions "
            "gradients by its own rules; use DDP or FSDP2."
        )
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise NotImplementedError(
            f"FSDP version {plugin.fsdp_version} is configured next to `sequence_parallel_size` ({size}): use FSDP2, "
            "with "
            '`fsdp_config={"fsdp_version": 2}`.'
        )
    # Once more: `accelerate launch` may have brought axes that the arguments do not show.
    refuse_axes_of_arguments(getattr(trainer.accelerator, "parallelism_config", None), size)
    if trainer.compute_metrics is not None or trainer.preprocess_logits_for_metrics is not None:
        raise NotImplementedError(
            "`compute_metrics` needs the logits of whole rows, which no rank holds under sharding: drop it and read "
            "`eval_loss`, or compute metrics after training with `sequence_parallel_size` 1."
        )


def check_model(model, config: LongContextConfig) -> None:
    """Refuse a model that cannot be sharded, by its configuration. The sanity check looks at what it does."""
    size = config.sequence_parallel_size
    validate_kernel_available(config.inner_attention)
    refuse_eight_bits(model)
    is_hashed = wants_lsh(model, config.inner_attention)
    if is_hashed:
        refuse_unhashable(model)
    if size == 1:
        return
    refuse_shared(model, config)
    base = unwrap(model)
    name = type(base).__name__
    if hasattr(base, "_orig_mod"):
        raise NotImplementedError(
            f"the model is compiled (`{name}` from `torch.compile`), and the all-to-alls between ranks are not traced "
            f"exactly, with `sequence_parallel_size` ({size}): pass the model itself, `model._orig_mod`."
        )
    text = base.config.get_text_config()
    refuse_axes_of_model(model, size)
    if not shards_rows(text._attn_implementation):
        raise ValueError(
            f"`{name}` runs attn_implementation={text._attn_implementation!r}, which would see only this rank's "
            f"tokens, with `sequence_parallel_size` ({size}): load it with `from_pretrained(..., "
            f"attn_implementation={name_that_shards()!r})` or call "
            f"`model.set_attn_implementation({name_that_shards()!r})`"
            f"{' and pass `inner_attention` ' + repr(LSH) if is_hashed else ''}."
        )
    unserved = unserved_indexers(base)
    if unserved:
        raise NotImplementedError(
            f"`{name}` picks keys with `{unserved[0]}`, which scores pools of tokens: pools would be counted anew on "
            "every rank, and run on from one packed document to the next; set `sequence_parallel_size` to 1, do not "
            "pack, and load it with attn_implementation='eager'."
        )
    validate_config(name, base.config, unfollowed_layers(base))
    check_peft(model, "on a share of a row", "set `sequence_parallel_size` to 1")
    heads = query_heads(base.config)
    if heads is not None and not keeps_all_heads(base):
        validate_head_count(heads, size)
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(base).forward).parameters.values()):
        raise NotImplementedError(
            f"`{name}.forward` takes no extra keyword arguments, so its attention cannot learn of the shard: set "
            "`sequence_parallel_size` to 1."
        )


def refuse_eight_bits(model) -> None:
    """Refuse trainable weights of 8 bits or fewer: products with them return no gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize == 1:
            raise NotImplementedError(
                f"`{name}` is trainable and has dtype {str(parameter.dtype).removeprefix('torch.')}, which takes no "
                "gradient: load the model in bfloat16 (such as with `FineGrainedFP8Config(dequantize=True)`), or "
                "freeze it and train an adapter."
            )
