"""Settings under which indexers would not be trained as asked: refused before the first step."""

from __future__ import annotations

from ..adapters.sparse.sparse_layers import indexers_of
from ..adapters.wrapped import runs_our_attention, unwrap


def refuse_indexer_settings(trainer) -> None:
    """Refuse a trainer whose arguments or model do not go with its [`IndexerConfig`].

    Raises:
        ValueError: indexers are adapted and not trained, or the model runs another attention.
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
    finds_unused = args.ddp_find_unused_parameters
    if finds_unused is None:
        finds_unused = not args.gradient_checkpointing
    if config.loss == "dense" and trainer.mesh.world_size > 1 and not finds_unused:
        raise ValueError(f"{asked} freezes parameters that DDP waits for: set `ddp_find_unused_parameters=True`.")
