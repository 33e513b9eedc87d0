"""Padding-free sentence-transformers on any kernel, and documents that several processes share.

What: sentence-transformers flattens a batch of texts into one row, pools it by its bounds and slices it for gradient
caching, but opens that path for flash kernels only. `pack_embeddings` opens it for `"packed"` and `"ulysses"`.

How: attributes of the loaded model and a forward over its own ("covered") on the instance; nothing that is saved
changes, so a checkpoint loads without this package. With a mesh, a row is cut between the ranks of an `sp` group when
it enters the transformer, and pooling puts the pieces together, so every loss and evaluator sees whole embeddings.

Price: one row of integers on every rank; under a mesh one vector a document and pooling mode to exchange.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch

from ..parallel.mesh import SequenceMesh
from ..parallel.pooling import Spans, pool_spans
from ..parallel.shard import cut_batch, validate_same_rows


try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError as error:
    raise ImportError("`pack_embeddings` needs sentence-transformers: `pip install hf-longctx[embedding]`.") from error

from .flat_rows import FlatCollator
from .packable import check_packable, check_shardable, refuse_leak
from .packing_check import prove_packing
from .spans import spans_of_rows


# Where a covered module keeps how its rows are laid out.
_LAYOUT = "_hf_longctx_row_layout"
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
    layout = RowLayout(mesh, inner_attention)
    if layout.mesh is not None:
        check_shardable(model, layout.mesh.sequence_parallel_size, inner_attention)
    for module in transformers:
        module.data_collator = FlatCollator()
        module._flatten_position_offset = module._infer_flatten_position_offset()
        if module.model_forward_params is not None:
            module.model_forward_params |= _PASSED_KEYS
        module.can_flatten_inputs = True
        # The covers are named `forward` and `encode`, as what they cover, so that the model can be pickled.
        module.forward = MethodType(_transformer_forward(type(module)), module)
    for module in model.modules():
        if isinstance(module, Pooling):
            module.forward = MethodType(_pooling_forward(type(module)), module)
    model.encode = MethodType(_encode(type(model)), model)
    _lay_out(model, layout)
    if prove:
        prove_packing(model, transformers, shared=layout.mesh is not None)
    return model


@contextmanager
def shared_rows(model: SentenceTransformer, mesh: SequenceMesh, inner_attention: str = "auto") -> Iterator[None]:
    """A block in which the ranks of a group share the rows of a packed model; before and after, each holds its own.

    A trainer's steps run in it, so that `model.encode` of one process after training waits for nobody.
    """
    before = vars(model)[_LAYOUT]
    _lay_out(model, RowLayout(mesh, inner_attention))
    try:
        yield
    finally:
        _lay_out(model, before)


def _lay_out(model: SentenceTransformer, layout: RowLayout) -> None:
    for module in model.modules():
        if module is model or isinstance(module, (Transformer, Pooling)):
            setattr(module, _LAYOUT, layout)


def is_packed(model: torch.nn.Module) -> bool:
    """Whether `pack_embeddings` has opened this model and padding was not asked for since."""
    return _LAYOUT in vars(model) and all(
        module.can_flatten_inputs for module in model.modules() if isinstance(module, Transformer)
    )


def _transformer_forward(kind: type):
    @functools.wraps(kind.forward)
    def forward(self, features, **kwargs):
        layout: RowLayout = vars(self)[_LAYOUT]
        flat = "cu_seq_lens_q" in features
        if flat:
            refuse_leak(self)
        # What only pooling reads, and what an earlier forward left here.
        inputs = {key: value for key, value in features.items() if key not in ("span_ids", "sequence_shard")}
        shard = None
        if layout.mesh is not None:
            if not flat:
                raise NotImplementedError(
                    f"a padded batch ({', '.join(features)}) reached a model whose rows are shared by "
                    f"{layout.mesh.sequence_parallel_size} processes: query expansion, images and sound are padded, "
                    "and cannot be shared; set `sequence_parallel_size` to 1."
                )
            inputs, shard = _my_share(inputs, layout)
        output = kind.forward(self, inputs, **kwargs)
        features[self.module_output_name] = output[self.module_output_name]
        if "all_layer_embeddings" in output:
            features["all_layer_embeddings"] = output["all_layer_embeddings"]
        features.pop("sequence_shard", None)
        if shard is not None:
            features["sequence_shard"] = shard
        return features

    return forward


def _my_share(inputs: dict[str, object], layout: RowLayout):
    """My tokens of a flat row, and the facts of the row."""
    mesh = layout.mesh
    rows = {key: inputs[key] for key in _CUT_KEYS if key in inputs}
    share = cut_batch(
        rows,
        mesh.sequence_parallel_size,
        mesh.sequence_parallel_rank,
        inner_attention=layout.inner_attention,
        shift_labels=False,
    )
    shard = share["sequence_shard"].bind(mesh)
    validate_same_rows(shard)
    share["sequence_shard"] = shard
    others = {key: value for key, value in inputs.items() if key not in (*_CUT_KEYS, "max_length_q", "max_length_k")}
    return {**others, **share}, shard


def _pooling_forward(kind: type):
    @functools.wraps(kind.forward)
    def forward(self, features, **kwargs):
        shard, has_spans = features.get("sequence_shard"), "span_ids" in features
        if shard is None and not has_spans:
            return kind.forward(self, features, **kwargs)
        hidden = features["token_embeddings"][0]
        first, group = 0, None
        if shard is not None:
            hidden, first, group = hidden[: shard.num_local_tokens], shard.rank * shard.local_len, shard.group
        skipped = 0
        if not self.include_prompt and "prompt_length" in features:
            skipped = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
        if has_spans:
            spans = spans_of_rows(features["span_ids"][0], features["cu_seq_lens_q"])
        else:
            spans = Spans.of_documents(features["cu_seq_lens_q"], skipped)
        modes = (self.pooling_mode,) if isinstance(self.pooling_mode, str) else tuple(self.pooling_mode)
        vectors = pool_spans(hidden, spans, modes, first_token=first, group=group)
        features["sentence_embedding"] = torch.cat(vectors, dim=-1)
        return features

    return forward


def _encode(kind: type):
    own = kind.encode
    signature = inspect.signature(own)

    @functools.wraps(own)
    def encode(self, *args, **kwargs):
        wanted = signature.bind_partial(self, *args, **kwargs).arguments.get("output_value", "sentence_embedding")
        if wanted == "sentence_embedding" or not is_packed(self):
            return own(self, *args, **kwargs)
        layout: RowLayout = vars(self)[_LAYOUT]
        if layout.mesh is not None:
            raise NotImplementedError(
                f"`output_value` ({wanted!r}) asks for the vector of every token, but the tokens of a row are shared "
                f"by {layout.mesh.sequence_parallel_size} processes: encode with `output_value='sentence_embedding'`, "
                "or call `hf_longctx.pack_embeddings(model)` without a mesh first."
            )
        # The host hands out tokens row by row, which needs padded rows.
        transformers = [module for module in self.modules() if isinstance(module, Transformer)]
        for module in transformers:
            module.can_flatten_inputs = False
        try:
            return own(self, *args, **kwargs)
        finally:
            for module in transformers:
                module.can_flatten_inputs = True

    return encode
