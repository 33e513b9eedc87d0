"""Prove that documents packed in one row do not see each other in this model, with this batch.

One document a row is replaced by other tokens: no output of another document may move. Then the outputs of that
document are followed backward: no embedding of another document may receive a gradient. Together they check both
directions, whatever the model does between embedding and output.
Price: two forwards of the batch, and a third with its backward down to the embeddings. No gradient of a parameter is
computed or changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..families import SHARDED_LAYERS, TOKEN_LAYERS, position_axes
from ..parallel.adapted import is_marked
from ..parallel.collectives import gather_sequence
from ..parallel.mesh import SequenceMesh
from ..parallel.position_planes import text_positions
from ..parallel.segments import PAD_SEGMENT, segment_rows
from ..parallel.shard import share_of_group
from ..tiny_check import SAME_SUMS, as_leaf, first_ordinary_token, vectors_of, whole_model
from .registry import name_that_packs, name_that_shards, packs_rows


_LABELS = ("labels", "shift_labels", "num_items_in_batch")


def assert_no_cross_document(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    mesh: SequenceMesh | None = None,
    *,
    inner_attention: str = "auto",
    check_gradients: bool = True,
) -> None:
    """Raise unless every document of `batch` is computed as if it stood alone.

    Args:
        model (`torch.nn.Module`): a model with one output vector a token; its mode and gradients are left as they are.
        batch (`Mapping`): full packed rows, as for `model(**batch)`: `input_ids` of shape `(B, T)` and the bounds.
        mesh ([`SequenceMesh`], *optional*): the axes of a run that shares rows; every rank of a group passes the same
            rows. `None`: the batch goes to the model as it is.
        inner_attention (`str`, *optional*, defaults to `"auto"`): with `mesh`, see [`LongContextConfig`].
        check_gradients (`bool`, *optional*, defaults to `True`): follow gradients too. Off, only outputs are compared,
            which a kernel without backward needs.

    Raises:
        AssertionError: an output or a gradient moved; the message says by how much.
        ValueError: the batch has no row with two documents, or the model does not return a vector a token.

    Communication: with `mesh`, that of the forwards, the backward and two gathers of the outputs.
    """
    rows, num_tokens = batch["input_ids"].shape
    documents = {**batch, "position_ids": text_positions(batch, _axes(model))}
    segments, _ = segment_rows(documents, rows, num_tokens, batch["input_ids"].device)
    chosen = None if segments is None else _choose_documents(segments)
    if chosen is None or not chosen.any():
        raise ValueError(
            "`batch` has no row with two documents, so there is nothing to keep apart: pass packed rows with "
            "`cu_seq_lens_q`, `seq_idx` or `position_ids` that restart."
        )
    others = (segments != PAD_SEGMENT) & ~chosen & chosen.any(dim=1, keepdim=True)
    batch = {key: value for key, value in batch.items() if key not in _LABELS}
    run, remedy = _Run(model, mesh, inner_attention), _remedy(model)
    with whole_model(model):
        with torch.no_grad():
            before = run.outputs(batch)
            after = run.outputs({**batch, "input_ids": _other_tokens(model, batch["input_ids"], chosen)})
        _validate_moved(before, after, chosen, others, remedy)
        if check_gradients:
            _validate_gradients(*run.gradients(batch, chosen), chosen, others, remedy)


class _Run:
    """The model on whole rows, shared by the ranks of a mesh or not."""

    def __init__(self, model: torch.nn.Module, mesh: SequenceMesh | None, inner_attention: str) -> None:
        self.model, self.mesh, self.inner_attention = model, mesh, inner_attention

    def outputs(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """`(B, T, D)` of whole rows, on every rank."""
        return self._whole(self._forward(batch), batch)

    def gradients(self, batch: Mapping[str, Any], chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How large a gradient every token's embedding, `(B, T)`, gets from a random sum of the chosen documents'
        outputs, and the largest among those documents."""
        seen: list[torch.Tensor] = []

        handle = self.model.get_input_embeddings().register_forward_hook(lambda *call: as_leaf(call[-1], seen))
        try:
            outputs = self._forward(batch)
        finally:
            handle.remove()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(outputs.shape[-1], generator=generator).to(outputs)
        mine = chosen
        if self.mesh is not None:
            start = self.mesh.sequence_parallel_rank * outputs.shape[1]
            mine = chosen[:, start : start + outputs.shape[1]]
        # Every rank counts its own tokens; the all-to-alls inside the model carry the gradients between ranks.
        projected = outputs[:, : mine.shape[1]][mine] @ weights
        gradient = torch.autograd.grad(projected.sum(), seen[:1])[0]
        size = self._whole(gradient, batch).abs().amax(dim=-1)
        return size, size[chosen].amax()

    def _whole(self, local: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        if self.mesh is None:
            return local
        return gather_sequence(local, self.mesh.sp_group)[:, : batch["input_ids"].shape[1]]

    def _forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        if self.mesh is not None:
            settings: dict[str, Any] = {"inner_attention": self.inner_attention, "shift_labels": True}
            batch = share_of_group(batch, self.mesh, position_axes=_axes(self.model), **settings)
        tokens = batch["input_ids"].shape
        extras = {"use_cache": False} if hasattr(self.model.config.get_text_config(), "use_cache") else {}
        output = vectors_of(self.model(**{**batch, **extras}))
        if output.dim() != 3 or output.shape[:2] != tokens:
            raise ValueError(
                f"`{type(self.model).__name__}` answers with {tuple(output.shape)} for tokens of shape "
                f"{tuple(tokens)}, not with one vector a token: check the model without its pooled head."
            )
        return output


def _axes(model: Any) -> int:
    config = model.config.get_text_config()
    return position_axes(config) if hasattr(config, "model_type") else 0


def _choose_documents(segments: torch.Tensor) -> torch.Tensor:
    """The tokens, boolean `(B, T)`, of one middle document of every row that has at least two."""
    chosen = torch.zeros_like(segments, dtype=torch.bool)
    for index, row in enumerate(segments):
        documents = row[row != PAD_SEGMENT].unique_consecutive()
        if len(documents) > 1:
            chosen[index] = row == documents[(len(documents) - 1) // 2]
    return chosen


def _other_tokens(model: torch.nn.Module, ids: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The same rows with another ordinary token at each chosen position."""
    vocabulary = model.config.get_text_config().vocab_size
    lowest = first_ordinary_token(vocabulary)
    other = lowest + (ids - lowest + 1 + (vocabulary - lowest) // 3) % (vocabulary - lowest)
    return torch.where(chosen, other, ids)


def _remedy(model: Any) -> str:
    """What to change, by the attention that the model runs already."""
    text = model.config.get_text_config()
    if not packs_rows(getattr(text, "_attn_implementation", None)):
        return (
            f"run the model with attn_implementation={name_that_packs()!r}, or {name_that_shards()!r} if rows are "
            "shared, without a cache and without an `attention_mask`"
        )
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    other = sorted({str(kind) for kind in kinds if kind not in (*SHARDED_LAYERS, *TOKEN_LAYERS)})
    mixes = f"layers of type {', '.join(other)} carry a state from one to the next" if other else "another layer mixes"
    advice = (
        ""
        if any(is_marked(module) for module in model.modules())
        else "call `hf_longctx.adapt(model, mesh)` before, or "
    )
    return (
        f"its attention, {text._attn_implementation!r}, keeps them apart, so {mixes}{'' if other else ' them'}: "
        f"{advice}pad documents instead of packing them for this model"
    )


def _validate_moved(
    before: torch.Tensor, after: torch.Tensor, chosen: torch.Tensor, others: torch.Tensor, remedy: str
) -> None:
    moved = (before - after).abs().amax(dim=-1) / before.abs().amax().clamp(min=1e-30)
    noise = SAME_SUMS.of(before.dtype)
    leak = float(moved[others].max())
    if not leak <= noise:
        raise AssertionError(
            f"documents packed in one row see each other: with one of them replaced, the outputs of others moved by "
            f"{leak:.1e} of the largest (allowed {noise:.0e}); {remedy}."
        )
    if not float(moved[chosen].max()) > 0:
        raise AssertionError(
            "replacing a document's tokens changed none of its own outputs, so the check proves nothing: the model "
            "does not read `input_ids`."
        )


def _validate_gradients(
    size: torch.Tensor, largest: torch.Tensor, chosen: torch.Tensor, others: torch.Tensor, remedy: str
) -> None:
    noise = SAME_SUMS.of(size.dtype)
    leak = float(size[others].max() / largest.clamp(min=1e-30))
    if not leak <= noise or not float(largest) > 0:
        raise AssertionError(
            f"documents packed in one row see each other: the outputs of one send gradients of {leak:.1e} of its own "
            f"largest ({float(largest):.1e}) to the embeddings of others (allowed {noise:.0e}); {remedy}."
        )
