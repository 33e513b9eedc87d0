"""Settings under which indexers would not be trained as asked: refused before the first step."""

from __future__ import annotations

from ..adapters.sparse.sparse_layers import indexers_of, untrained_indexers
from ..adapters.wrapped import runs_our_attention, unwrap


def refuse_indexer_settings(trainer) -> None:
    """Refuse a trainer whose arguments or model do not go with its [`IndexerConfig`].

    Raises:
        ValueError: indexers are adapted and not trained, DDP would wait for them, or the model runs another attention.
        NotImplementedError: a precision, wrapper or checkpointing that the loss of the indexers does not go through.
    """
    config, args, model = trainer.indexer, trainer.args, unwrap(trainer.model)
    if config.loss is None:
        adapted = [
            name
            for indexer in indexers_of(model)
            for name, parameter in indexer.named_parameters()
            if "lora_" in name and parameter.requires_grad
        ]
        if adapted:
            raise ValueError(
                f"LoRA adapts the indexers (`{adapted[0]}` and {len(adapted) - 1} more), which get no gradient "
                "without a loss of their own: pass `indexer=IndexerConfig(loss='sparse')`, or take the indexers "
                "out of `target_modules`."
            )
        _refuse_unused(trainer, model)
        return
    asked = f"`IndexerConfig(loss={config.loss!r})`"
    if not runs_our_attention(trainer.model):
        raise ValueError(
            f"{asked} needs an attention of this package, and `{type(model).__name__}` runs "
            f"{model.config.get_text_config()._attn_implementation!r}: load it with attn_implementation='packed', or "
            "'ulysses'."
        )
    if args.fp16:
        raise NotImplementedError(
            f"`fp16` (True) scales the loss of the model and not that of the indexers, with {asked}: use `bf16`."
        )
    if config.loss == "dense" and trainer.is_fsdp_enabled:
        raise NotImplementedError(
            f"{asked} freezes and unfreezes parameters, which FSDP has placed by then: freeze all but the indexers "
            "yourself and use `loss='sparse'`, or train that stage under DDP."
        )
    if config.loss == "dense" and trainer.mesh.world_size > 1 and not _finds_unused(args):
        raise ValueError(f"{asked} freezes parameters that DDP waits for: set `ddp_find_unused_parameters=True`.")
    _refuse_unused(trainer, model)


def refuse_own_scheduler(trainer) -> None:
    """Raise `ValueError` if a scheduler was made for the groups of the optimizer before indexers got their own."""
    rate = trainer.indexer.indexer_learning_rate
    if rate is not None and trainer.lr_scheduler is not None:
        raise ValueError(
            f"`indexer_learning_rate` ({rate}) gives indexers groups of their own in the optimizer, which the "
            "scheduler in `optimizers` does not know: pass `optimizers=(optimizer, None)`, or leave the rate out and "
            "make the groups yourself."
        )


def _refuse_unused(trainer, model) -> None:
    """Raise `ValueError` if DDP would wait for the gradient of indexers that get none."""
    if trainer.mesh.world_size == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    unused = untrained_indexers(model, trainer.indexer.loss)
    if unused and not _finds_unused(trainer.args):
        raise ValueError(
            f"`{unused[0]}` is trainable and gets no gradient with `IndexerConfig(loss={trainer.indexer.loss!r})`, "
            "and DDP would wait for it (`gradient_checkpointing` turns its search for unused parameters off): set "
            "`ddp_find_unused_parameters=True`, or freeze the indexers."
        )


def _finds_unused(args) -> bool:
    found = args.ddp_find_unused_parameters
    return not args.gradient_checkpointing if found is None else found
