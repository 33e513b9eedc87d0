"""Padding-free sentence-transformers on any kernel, and documents that several processes share.

What: sentence-transformers flattens a batch of texts into one row, pools it by its bounds and slices it for gradient
caching, but opens that path for flash kernels only. `pack_embeddings` opens it for `"packed"` and `"ulysses"`.

How: attributes of the loaded model, and patches of `forward` and `encode` on the instance; nothing that is saved
changes, so a checkpoint loads without this package. With a mesh, a row is cut between the ranks of an `sp` group when
it enters the transformer, and pooling puts the pieces together, so every loss and evaluator sees whole embeddings.

Price: one row of integers on every rank; under a mesh one vector a document and pooling mode to exchange.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..adapters.few_bits import keep_gradients
from ..adapters.instance_forward import InstancePatch, PatchHandle, patch_on, put_on
from ..adapters.pass_shard import CALLER, pass_shard
from ..adapters.recurrent.layers import RECURRENT, follow_recurrences
from ..adapters.row_lengths import LENGTH_PATCHES, follow_lengths
from ..parallel.adapted import mark, unmark
from ..parallel.mesh import SequenceMesh
from ..parallel.pooling import Spans, pool_spans
from ..parallel.shard import cut_batch, validate_same_rows


try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError as error:
    raise ImportError("`pack_embeddings` needs sentence-transformers: `pip install hf-longctx[embedding]`.") from error

from .flat_rows import PACKED, POSITION_OFFSET, FlatCollator, ReaderPatch, drop_outputs, plain_ids
from .packable import check_packable, check_shardable, refuse_leak
from .packing_check import prove_packing
from .spans import spans_of_rows


# Of a `Transformer`, which are changed beyond its forward.
_CHANGED = ("data_collator", "_flatten_position_offset", "model_forward_params", "can_flatten_inputs")
_CUT_KEYS = ("input_ids", "position_ids", "token_type_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_PASSED_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "sequence_shard"}


class RowLayout:
    """Who holds the rows of a model: this process alone, or the `sp` group of a mesh."""

    def __init__(self, mesh: SequenceMesh | None, inner_attention: str) -> None:
        shared = mesh is not None and mesh.sequence_parallel_size > 1
        self.mesh = mesh if shared else None
        self.inner_attention = inner_attention


def pack_embeddings(
    model: SentenceTransformer, mesh: SequenceMesh | None = None, *, inner_attention: str = "auto", prove: bool = True
) -> SentenceTransformer:
    """Train and encode without padding, and with a mesh on documents that its `sp` ranks share.

    Args:
        model (`SentenceTransformer`): loaded with `model_kwargs={"attn_implementation": "packed"}` or `"ulysses"`.
            Changed in place; what it saves does not change. `model[0].unpad_inputs = False` pads again.
        mesh ([`SequenceMesh`], *optional*): with `sequence_parallel_size` above 1, every forward becomes collective:
            the ranks of a group must embed the same texts in the same order, until the function is called again
            without a mesh.
        inner_attention (`str`, *optional*, defaults to `"auto"`): the kernel of shared rows.
        prove (`bool`, *optional*, defaults to `True`): embed three short rows packed and alone, and refuse the model
            if they differ.

    Returns:
        `SentenceTransformer`: `model`.

    Raises:
        ValueError: the model's attention is not ours, or its padding was asked for.
        NotImplementedError: the model cannot be packed or shared, by name, or the proof found a difference.

    Communication: with a mesh, per forward the exchanges of [`ulysses_attention`][hf_longctx.attention.ulysses] and of
        [`pool_spans`][hf_longctx.parallel.pooling]; otherwise none.
    Gradient: equal to the padded model's. Every rank of a group holds all embeddings, so any loss works.
    """
    transformers = check_packable(model)
    keep_gradients(model)
    layout = RowLayout(mesh, inner_attention)
    if layout.mesh is not None:
        check_shardable(model, layout.mesh.sequence_parallel_size, inner_attention)
    for module in transformers:
        former = patch_on(module, PACKED)
        before = {name: vars(module)[name] for name in _CHANGED if name in vars(module)}
        before = before if former is None else former.before
        module._flatten_position_offset = module._infer_flatten_position_offset()
        module.data_collator = FlatCollator(module._flatten_position_offset)
        if module.model_forward_params is not None:
            module.model_forward_params = module.model_forward_params | _PASSED_KEYS
        module.can_flatten_inputs = True
        put_on(module, _TransformerPatch(layout, before))
        follow_lengths(module)
        follow_recurrences(module)
        pass_shard(module)
    for module in model.modules():
        if isinstance(module, Pooling):
            put_on(module, _PoolingPatch())
    put_on(model, ReaderPatch())
    put_on(model, _EncodePatch(layout), "encode")
    mark(model)
    if prove:
        prove_packing(model, PACKED, shared=layout.mesh is not None)
    return model


def unpack_embeddings(model: SentenceTransformer) -> SentenceTransformer:
    """Undo [`pack_embeddings`]: the model pads again, with the forwards and settings that it had before.

    Args:
        model (`SentenceTransformer`): packed or not; changed in place.

    Returns:
        `SentenceTransformer`: `model`.
    """
    for module in model.modules():
        patch = patch_on(module, PACKED)
        if isinstance(patch, _TransformerPatch):
            for name in _CHANGED:
                vars(module).pop(name, None)
            vars(module).update(patch.before)
    PatchHandle(model, PACKED, *LENGTH_PATCHES, RECURRENT, CALLER).remove()
    unmark(model)
    return model


@contextmanager
def shared_rows(model: SentenceTransformer, mesh: SequenceMesh, inner_attention: str = "auto") -> Iterator[None]:
    """A block in which the ranks of a group share the rows of a packed model; before and after, each holds its own.

    A trainer's steps run in it, so that `model.encode` of one process after training waits for no other.
    """
    before = patch_on(model, PACKED, "encode").layout
    _lay_out(model, RowLayout(mesh, inner_attention))
    try:
        yield
    finally:
        _lay_out(model, before)


def _lay_out(model: SentenceTransformer, layout: RowLayout) -> None:
    patch_on(model, PACKED, "encode").layout = layout
    for module in model.modules():
        patch = patch_on(module, PACKED)
        if isinstance(patch, _TransformerPatch):
            patch.layout = layout


def is_packed(model: torch.nn.Module) -> bool:
    """Whether `pack_embeddings` has opened this model and padding was not asked for since."""
    return patch_on(model, PACKED, "encode") is not None and all(
        module.can_flatten_inputs for module in model.modules() if isinstance(module, Transformer)
    )


class _TransformerPatch(InstancePatch):
    """On a `Transformer`: my share of a flat row.

    Args:
        layout ([`RowLayout`]): who holds the rows.
        before (`dict`): attributes of the module as they were.
    """

    name = PACKED

    def __init__(self, layout: RowLayout, before: dict[str, object]) -> None:
        self.layout, self.before = layout, before

    def call(self, module: Transformer, own: Callable, features: dict, **kwargs):
        flat = "cu_seq_lens_q" in features
        if flat:
            refuse_leak(module)
        # Less what only pooling reads, and what an earlier forward left here.
        inputs = drop_outputs(features)
        inputs = {key: value for key, value in inputs.items() if key not in ("span_ids", "sequence_shard")}
        if flat:
            inputs["input_ids"] = plain_ids(inputs["input_ids"])
        offset = inputs.pop(POSITION_OFFSET, None)  # of the model that made the row, which may be another one
        if flat and offset is not None and "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + module._flatten_position_offset - offset
        shard = None
        if self.layout.mesh is not None:
            if not flat:
                raise NotImplementedError(
                    f"a padded batch ({', '.join(features)}) reached a model whose rows are shared by "
                    f"{self.layout.mesh.sequence_parallel_size} processes: query expansion, images and sound are "
                    "padded, and cannot be shared; set `sequence_parallel_size` to 1."
                )
            inputs, shard = _my_share(inputs, self.layout.mesh, self.layout.inner_attention)
        output = own(inputs, **kwargs)
        features[module.module_output_name] = output[module.module_output_name]
        if "all_layer_embeddings" in output:
            features["all_layer_embeddings"] = output["all_layer_embeddings"]
        features.pop("sequence_shard", None)
        if shard is not None:
            features["sequence_shard"] = shard
        return features


def _my_share(inputs: dict[str, Any], mesh: SequenceMesh, inner_attention: str):
    """My tokens of a flat row, and the facts of the row."""
    rows = {key: inputs[key] for key in _CUT_KEYS if key in inputs}
    share: dict[str, Any] = cut_batch(
        rows,
        mesh.sequence_parallel_size,
        mesh.sequence_parallel_rank,
        inner_attention=inner_attention,
        shift_labels=False,
    )
    shard = share["sequence_shard"].bind(mesh)
    validate_same_rows(shard)
    share["sequence_shard"] = shard
    others = {key: value for key, value in inputs.items() if key not in (*_CUT_KEYS, "max_length_q", "max_length_k")}
    return {**others, **share}, shard


class _PoolingPatch(InstancePatch):
    """On a `Pooling`: documents that ranks share, and spans of documents."""

    name = PACKED

    def call(self, module: Pooling, own: Callable, features: dict, **kwargs):
        shard, has_spans = features.get("sequence_shard"), "span_ids" in features
        if shard is None and not has_spans:
            return own(features, **kwargs)
        hidden = features["token_embeddings"][0]
        first, group = 0, None
        if shard is not None:
            hidden, first, group = hidden[: shard.num_local_tokens], shard.rank * shard.local_len, shard.group
        skipped = 0
        if not module.include_prompt and "prompt_length" in features:
            skipped = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
        if has_spans:
            spans = spans_of_rows(features["span_ids"][0], features["cu_seq_lens_q"])
        else:
            spans = Spans.of_documents(features["cu_seq_lens_q"], skipped)
        modes = (module.pooling_mode,) if isinstance(module.pooling_mode, str) else tuple(module.pooling_mode)
        vectors = pool_spans(hidden, spans, modes, first_token=first, group=group)
        features["sentence_embedding"] = torch.cat(vectors, dim=-1)
        return features


class _EncodePatch(InstancePatch):
    """On the model's `encode`: token by token output comes from padded rows."""

    name = PACKED

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout

    def call(self, module: SentenceTransformer, own: Callable, *args, **kwargs):
        given = inspect.signature(own).bind_partial(*args, **kwargs).arguments
        wanted = given.get("output_value", "sentence_embedding")
        if wanted == "sentence_embedding" or not is_packed(module):
            return own(*args, **kwargs)
        if self.layout.mesh is not None:
            raise NotImplementedError(
                f"`output_value` ({wanted!r}) asks for the vector of every token, but the tokens of a row are shared "
                f"by {self.layout.mesh.sequence_parallel_size} processes: encode with `output_value="
                "'sentence_embedding'`, or call `hf_longctx.pack_embeddings(model)` without a mesh first."
            )
        # sentence-transformers hands out tokens row by row, which needs padded rows.
        transformers = [child for child in module.modules() if isinstance(child, Transformer)]
        for child in transformers:
            child.can_flatten_inputs = False
        try:
            return own(*args, **kwargs)
        finally:
            for child in transformers:
                child.can_flatten_inputs = True
