"""Every adapter as one row of a table: how it is put on, what it changes, and how to see that it acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from hf_longctx import SequenceMesh, adapt, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.instance_forward import InstancePatch, PatchHandle, put_on
from hf_longctx.adapters.positions import follow_positions
from hf_longctx.adapters.router_losses import follow_router_losses
from hf_longctx.adapters.row_lengths import follow_lengths
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.adapters.tiled_mlp import tile_mlp

from .lengths import build_with_lengths
from .models import VOCAB, build
from .own_attention import keeps_apart, model_of
from .recurrent import build_hybrid


@dataclass(frozen=True)
class Adapter:
    """One row.

    Args:
        build (`Callable`): a model without the adapter, in evaluation mode.
        attach (`Callable`): puts the adapter on a model, or on a wrapper around it; returns a handle.
        target (`Callable`): from a model to a module whose forward is patched.
        run (`Callable`): from a model to numbers that are the same with and without the adapter.
        acts (`Callable`): whether the adapter has changed how a model works, seen from its behaviour.
    """

    build: Callable
    attach: Callable
    target: Callable
    run: Callable
    acts: Callable


def labelled() -> dict[str, torch.Tensor]:
    ids, labels = torch.randint(3, VOCAB, (2, 2, 13), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def _packed_row() -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in (9, 1, 13)])[None]
    ids = torch.randint(3, VOCAB, (1, 23), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def _follows(model) -> bool:
    try:
        model(**_packed_row())
    except (NotImplementedError, ValueError):  # the mask that the decoder makes would hide the documents
        return False
    return True


def _whole_row(model) -> torch.Tensor:
    """A row of one document, which a decoder counts rightly by itself."""
    return model(input_ids=_packed_row()["input_ids"], use_cache=False).logits


def _largest_tile(model) -> int:
    """The most tokens that the first linear layer of an MLP has seen at a time."""
    seen = []
    (layer,) = [module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj")]
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2]))
    try:
        model(**labelled())
    finally:
        handle.remove()
    return max(seen)


def _embedder():
    from .embedding import embedder

    return embedder("bert", "packed")


def _pack(model):
    from hf_longctx.embedding import pack_embeddings, unpack_embeddings

    pack_embeddings(model, prove=False)
    return SimpleNamespace(remove=lambda: unpack_embeddings(model))


def _embed(model) -> torch.Tensor:
    from .embedding import texts

    # Not `encode`, which runs past the hooks of the model, and so past FSDP2.
    return model(model.preprocess(texts((5, 1, 9))))["sentence_embedding"]


def _is_flat(model) -> bool:
    from hf_longctx.embedding.packed_model import is_packed

    from .embedding import texts

    flat = "cu_seq_lens_q" in model.preprocess(texts((5, 1, 9)))
    assert _embed(model).isfinite().all()
    return is_packed(model) and flat


def _hybrid():
    return build_hybrid("packed", dtype=torch.float32)


def _keeps_apart(model) -> bool:
    """Whether the documents of a packed row are what they are alone."""
    if not _follows(model):
        return False
    batch, start, alone = _packed_row(), 0, []
    for length in (9, 1, 13):
        document = batch["input_ids"][:, start : start + length]
        alone.append(model(input_ids=document, use_cache=False).logits)
        start += length
    return torch.allclose(model(**batch).logits, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


class _FinalNorm(InstancePatch):
    """The example of CONTRIBUTING.md: the last norm of a model gets its tokens in float32."""

    name = "float32 norm"

    def call(self, module, own, hidden_states):
        return own(hidden_states.float()).to(hidden_states.dtype)


def _put_final_norm(model) -> PatchHandle:
    for module in model.modules():
        if hasattr(module, "embed_tokens") and hasattr(module, "norm"):
            put_on(module.norm, _FinalNorm())
    return PatchHandle(model, _FinalNorm.name)


def _counts(model) -> bool:
    """Whether the loss of BERT, a mean over its own tokens, is one over the tokens of the step."""
    mesh = SequenceMesh.build()
    batch = {key: value for key, value in labelled().items() if key != "use_cache"}
    share = shard_batch(batch, mesh, shift_labels=False)
    once, twice = (model(**{**share, "num_items_in_batch": count}).loss for count in (10, 20))
    return torch.allclose(once, 2 * twice)


def _routed():
    return build("gpt_oss", "packed", router_aux_loss_coef=0.7).eval()


def _weighs(model) -> bool:
    """Whether the loss of routers counts as often as a share says."""
    share = shard_batch({key: value for key, value in labelled().items() if key != "use_cache"}, SequenceMesh.build())
    share["output_router_logits"] = True  # not in the configuration: with the hooks of that, no model can be pickled
    shard = share["sequence_shard"]
    once, twice = (
        model(**{**share, "sequence_shard": dataclasses.replace(shard, batch_weight=weight)}) for weight in (1.0, 2.0)
    )
    return torch.allclose(twice.loss - once.loss, 0.7 * once.aux_loss, rtol=1e-4)


ADAPTERS = {
    "example": Adapter(
        lambda: build("llama", "sdpa").eval(),
        _put_final_norm,
        lambda model: model.get_decoder().norm,
        lambda model: model(**labelled()).logits,
        lambda model: model(**labelled()) is not None and bool(PatchHandle(model, _FinalNorm.name).modules),
    ),
    "positions": Adapter(
        lambda: build("bart", "packed").eval(),
        follow_positions,
        lambda model: model.get_decoder(),
        _whole_row,
        _follows,
    ),
    "lengths": Adapter(
        lambda: build_with_lengths("llama", "dynamic", "packed", torch.float32),
        follow_lengths,
        lambda model: model.get_decoder(),
        _whole_row,
        _follows,
    ),
    "own attention": Adapter(
        lambda: model_of("openai-gpt", "packed"),
        attach_adapters,
        lambda model: model.transformer.h[0].attn,
        lambda model: model(input_ids=_packed_row()["input_ids"]).logits,
        keeps_apart,
    ),
    "recurrent layers": Adapter(
        _hybrid, attach_adapters, lambda model: model.get_decoder().layers[0].conv, _whole_row, _keeps_apart
    ),
    "rows of the forward": Adapter(_hybrid, attach_adapters, lambda model: model, _whole_row, _keeps_apart),
    "tiled loss": Adapter(
        lambda: build("llama", "sdpa").eval(),
        lambda model: tile_loss(model, 5),
        lambda model: model,
        lambda model: model(**labelled()).loss,
        lambda model: model(**labelled()).logits is None,
    ),
    "tiled MLP": Adapter(
        lambda: build("llama", "sdpa").eval(),
        lambda model: tile_mlp(model, 5),
        lambda model: model.get_decoder().layers[0].mlp,
        lambda model: model(**labelled()).logits,
        lambda model: _largest_tile(model) == 5,
    ),
    "loop": Adapter(
        lambda: build("bert", "packed").eval(),
        lambda model: adapt(model, SequenceMesh.build()),
        lambda model: model,
        lambda model: model(input_ids=labelled()["input_ids"]).logits,
        _counts,
    ),
    "router loss": Adapter(
        _routed, follow_router_losses, lambda model: model, lambda model: model(**labelled()).loss, _weighs
    ),
    "packed embeddings": Adapter(_embedder, _pack, lambda model: model[0], _embed, _is_flat),
}
