"""Prove on a tiny batch, before training, that this model under sharding is this model.

What a configuration says can be wrong; what a model does cannot. Two short rows (one padded on the left) go through
the model unsharded, sharded, and cut without communication. Sharded must equal unsharded; if it equals the run
without communication instead, some layer never saw the shard. The loss is checked the same way: it must be a token
mean that obeys `num_items_in_batch`. Gradients, and lengths at which a configuration changes, are in
[`gradient_check`][hf_longctx.trainer.gradient_check].
Price: three forwards of `4 P - 1` tokens, and one exchange each, and those of the gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

from ..adapters.rotary_lengths import lengths_forgotten
from ..adapters.router_losses import asks_for_router_loss
from ..adapters.wrapped import unwrap
from ..families import first_position, pads_left, text_marks
from ..losses.token_mean import token_mean
from ..parallel.collectives import gather_integers, gather_sequence
from ..parallel.mesh import SequenceMesh
from ..parallel.segments import has_documents
from ..parallel.shard import IGNORE_INDEX, SequenceShard, share_of_group
from ..tiny_check import REORDERED_SUMS, random_tokens, vectors_of, whole_model
from .gradient_check import check_gradients, zeros_drawn
from .router_check import check_router_loss
from .true_cause import refuse_broken_model, refuse_nonfinite_outputs


_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class SanityResult:
    """What the trainer must supply for this model to be exact.

    Args:
        needs_position_ids (`bool`): the model would count positions on a share.
        loss_ignores_count (`bool`): its loss is a mean over its own tokens, whatever `num_items_in_batch` says.
        drops_padding (`bool`): its loss leaves out targets that the mask says are padding.
        padding_predicts (`bool`): what the last of the padding on the left predicts is not what one process predicts.
        readers (`frozenset` of `int`): the `id` of every attention layer that read the shard.
    """

    needs_position_ids: bool = False
    loss_ignores_count: bool = False
    drops_padding: bool = False
    padding_predicts: bool = False
    readers: frozenset[int] = frozenset()

    def validate_batch(self, model, shard: SequenceShard, inputs: dict[str, Any]) -> None:
        """Refuse a share whose batch leaves out what this model needs, or trains what kernels disagree about.

        Args:
            model: wrapped or not.
            shard ([`SequenceShard`]): bound to its group; every rank of the group calls this.
            inputs (`dict`): this rank's share.

        Raises:
            ValueError: there are no positions, or a padding token has or is a target.

        Communication: none, save 8 bytes a rank for a model of the last two kinds.
        """
        name = type(unwrap(model)).__name__
        if self.needs_position_ids and not shard.has_own_positions:
            raise ValueError(
                f"the collated batch has no `position_ids`, but `{name}` derives them from the mask or the token ids, "
                "which a rank sees only a part of: add `position_ids` of shape (rows, tokens)."
            )
        if has_documents(shard.segment_ids):
            self.validate_first_positions(model, shard, inputs)
        targets, mask = inputs.get("shift_labels"), inputs.get("attention_mask")
        if self.drops_padding and mask is not None and inputs.get("labels") is not None:
            on_padding = int(((inputs["labels"] != IGNORE_INDEX) & (mask == 0)).sum())
            if sum(gather_integers(on_padding, shard.group)):
                raise ValueError(
                    f"`labels` of padding are not -100, and the loss of `{name}` leaves them out by the mask, of "
                    "which a rank sees its share: set them to -100."
                )
        if not self.padding_predicts or targets is None or mask is None:
            return
        trained = int(((targets != IGNORE_INDEX) & (mask == 0)).sum())
        if sum(gather_integers(trained, shard.group)):
            raise ValueError(
                f"padding on the left has a target (the first real token), and what `{name}` predicts from padding "
                "depends on the kernel: set the label of each row's first real token to -100, or pad on the right."
            )

    def validate_first_positions(self, model, shard: SequenceShard, inputs: dict[str, Any]) -> None:
        """Refuse packed documents that begin below where the model would begin to count.

        Args, communication: see [`SanityResult.validate_batch`].

        Raises:
            ValueError: they do, on any rank.
        """
        config = unwrap(model).config
        first = first_position(config) if self.needs_position_ids else 0
        if not first:
            return
        positions = inputs["position_ids"][..., : shard.num_local_tokens]
        lowest = int(positions.min()) if positions.numel() else first
        if min(gather_integers(lowest, shard.group)) < first:
            kind = config.get_text_config().model_type
            raise ValueError(
                f"`position_ids` of packed documents begin below {first}, but `{kind}` counts a text from "
                f"`pad_token_id` + 1: pass `position_ids_start={first}` to `PackingCollator`, or add as much yourself."
            )


@torch.no_grad()
def run_sanity_check(
    model,
    mesh: SequenceMesh,
    inner_attention: str,
    shift_labels: bool,
    check_loss: bool,
    context=None,
    adds_router_loss: bool | None = None,
) -> SanityResult:
    """Compare a sharded with an unsharded forward of two short rows.

    Args:
        model: on its device, wrapped or not; every rank of the world calls this.
        mesh ([`SequenceMesh`]): the axes of the run.
        inner_attention (`str`): see [`LongContextConfig`].
        shift_labels (`bool`): the model predicts the next token.
        check_loss (`bool`): the run uses the model's own loss.
        context (*optional*): a context manager around each forward, for autocast.
        adds_router_loss (`bool`, *optional*): the run trains the loss of routers; unset, as its configuration says.

    Raises:
        NotImplementedError: the two differ, or the loss is not a token mean.

    Communication: that of three forwards, and of the forwards and backwards of [`check_gradients`].
    """
    with whole_model(model), lengths_forgotten(model), zeros_drawn(model), context or contextlib.nullcontext():
        result = _compare(model, mesh, inner_attention, shift_labels, check_loss)
        if mesh.sequence_parallel_size > 1:
            check_gradients(model, mesh, inner_attention, _padded_rows(model, mesh.sequence_parallel_size))
            if asks_for_router_loss(unwrap(model)) if adds_router_loss is None else adds_router_loss:
                rows = _padded_rows(model, mesh.sequence_parallel_size)
                check_router_loss(model, mesh, inner_attention, rows, shift_labels, check_loss)
        return result


def _compare(model, mesh, inner_attention, shift_labels, check_loss) -> SanityResult:
    name, size = type(unwrap(model)).__name__, mesh.sequence_parallel_size
    batch = _padded_rows(model, size)
    valid = batch["attention_mask"].bool()
    share = share_of_group(batch, mesh, inner_attention=inner_attention, shift_labels=shift_labels)
    forward = {key: value for key, value in share.items() if key != "shift_labels"}
    local = _on_a_share(model, name, forward, batch)
    _validate_one_vector_a_token(local, name, size, share["sequence_shard"].local_len)
    readers = frozenset(share["sequence_shard"].readers)
    needs_position_ids = padding_predicts = False
    if size == 1:
        refuse_nonfinite_outputs(model, name, local[valid])
    if size > 1 or "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters:
        positions = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1).contiguous()
        one_process = vectors_of(model(**batch, position_ids=positions))
        explicit = one_process[valid]
        needs_position_ids = _difference(vectors_of(model(**batch))[valid], explicit) > _noise(explicit)
    if size > 1:
        sharded = _whole_rows(local, mesh, valid)
        unaware = _whole_rows(
            vectors_of(model(**{key: value for key, value in forward.items() if key != "sequence_shard"})), mesh, valid
        )
        refuse_nonfinite_outputs(model, name, explicit)
        error, baseline_error = _difference(sharded, explicit), _difference(unaware, explicit)
        _validate_outputs(name, sharded, unaware, error, baseline_error)
        last_padding = ~valid & torch.nn.functional.pad(valid, (0, 1))[:, 1:]
        if shift_labels and bool(last_padding.any()):
            padding = _whole_rows(local, mesh, last_padding), one_process[last_padding]
            # Two kernels do not equal one kernel of transformers, and kernels disagree about what padding sees.
            kernels = {kernel for _, kernel, *_ in share["sequence_shard"].kernel_plans}
            padding_predicts = len(kernels) > 1 or not _difference(*padding) <= _noise(explicit)
    ignores = drops = False
    if check_loss:
        ignores, drops = _loss_ignores_count(model, share, local.shape[-1], shift_labels)
    return SanityResult(needs_position_ids, ignores, drops, padding_predicts, readers)


def _validate_one_vector_a_token(local: torch.Tensor, name: str, size: int, num_tokens: int) -> None:
    if local.dim() == 3 and local.shape[1] == num_tokens:
        return
    if size == 1:
        raise NotImplementedError(
            f"`{name}` returns {tuple(local.shape)} for {num_tokens} tokens a row, not one vector a token: a head "
            "that pools a row would pool the documents of a packed one together, and its loss is no mean over tokens; "
            "train it on padded rows, with attn_implementation='sdpa'."
        )
    raise NotImplementedError(
        f"`{name}` returns {tuple(local.shape)} for {num_tokens} tokens a rank, not one vector a token: a head that "
        "pools a row cannot be sharded yet; set `sequence_parallel_size` to 1."
    )


def _on_a_share(model, name: str, share: dict[str, Any], batch: dict[str, Any]) -> torch.Tensor:
    """Outputs of a share; an error of the model's own code, which never saw one, is reported as what it means."""
    try:
        return vectors_of(model(**share))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        if share["sequence_shard"].size == 1 or place.startswith(_PACKAGE) or isinstance(error, DistError):
            raise
        refuse_broken_model(model, name, batch)
        reason = " ".join(str(error).split())[:200]
        raise NotImplementedError(
            f"`{name}` cannot run on a share of a row ({type(error).__name__}: {reason}): one of its layers needs the "
            "whole row; set `sequence_parallel_size` to 1."
        ) from error


def _padded_rows(model, size: int) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    config = unwrap(model).config
    num_tokens = 4 * size - 1
    ids = random_tokens(config.get_text_config().vocab_size, 2, num_tokens)
    mask = torch.ones_like(ids)
    padding = num_tokens // 3
    mask[1, slice(0, padding) if pads_left(config) else slice(num_tokens - padding, None)] = 0
    batch = {"input_ids": ids, "attention_mask": mask, **text_marks(config, ids)}
    return {key: value.to(device) for key, value in batch.items()}


def _whole_rows(local: torch.Tensor, mesh: SequenceMesh, valid: torch.Tensor) -> torch.Tensor:
    return gather_sequence(local, mesh.sp_group)[:, : valid.shape[1]][valid]


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _noise(output: torch.Tensor) -> float:
    return REORDERED_SUMS.of(output.dtype)


def _validate_outputs(name: str, sharded, unaware, error: float, baseline_error: float) -> None:
    # In half precision a router may choose another expert for a near tie; such an error stays far below the baseline.
    near = sharded.dtype not in (torch.float64, torch.float32) and error < baseline_error / 5
    if error <= _noise(sharded) or near:
        return
    if torch.equal(sharded, unaware):
        raise NotImplementedError(
            f"the attention of `{name}` never received the shard, so each rank would attend to its own tokens only: "
            "it does not use transformers' attention interface; set `sequence_parallel_size` to 1."
        )
    raise NotImplementedError(
        f"`{name}` gives other outputs when its rows are sharded (largest relative difference {error:.1e}, allowed "
        f"{_noise(sharded):.0e}): one of its layers mixes tokens without seeing the shard; set "
        "`sequence_parallel_size` to 1."
    )


def _loss_ignores_count(model, share: dict, num_classes: int, shift_labels: bool) -> tuple[bool, bool]:
    """Whether the model averages over its own tokens, whatever `num_items_in_batch` says; and whether it shifts
    `labels` itself, whatever `shift_labels` says, and leaves out padding by the mask."""
    labels = (share["input_ids"] % num_classes).masked_fill(share["attention_mask"] == 0, IGNORE_INDEX)
    share = {**share, "labels": labels}
    if shift_labels:
        share["shift_labels"] = labels.flip(1)  # any targets will do, if they are not the model's own shift
    targets = share["shift_labels" if shift_labels else "labels"]
    adds_router_loss = asks_for_router_loss(unwrap(model))
    if adds_router_loss:  # which has a check of its own
        share["output_router_logits"] = False
    outputs = model(**share, num_items_in_batch=10.0)
    loss = outputs["loss"]
    noise = max(_noise(outputs["logits"]), 1e-3)
    counted = token_mean(outputs, targets, 10.0)
    if torch.allclose(loss.float(), counted, rtol=noise, atol=noise):
        return False, False
    averaged = token_mean(outputs, targets)
    if adds_router_loss:
        raise NotImplementedError(
            f"the loss of `{type(unwrap(model)).__name__}` does not obey `num_items_in_batch`, and the one that would "
            "replace it lacks that of its routers (`output_router_logits` True): set it to False, or pass a "
            "`compute_loss_func`."
        )
    if torch.allclose(loss.float(), averaged, rtol=noise, atol=noise) or not (targets != IGNORE_INDEX).any():
        return True, False
    if shift_labels:
        own_targets = labels[:, 1:]
        own = token_mean({"logits": outputs["logits"][:, :-1]}, own_targets)
        if torch.allclose(loss.float(), own, rtol=noise, atol=noise) or not (own_targets != IGNORE_INDEX).any():
            return True, True
    raise NotImplementedError(
        f"the loss of `{type(unwrap(model)).__name__}` ({float(loss):.4f}) is not the mean cross entropy of its "
        f"tokens ({float(averaged):.4f}), so shards cannot add up to it: pass a `compute_loss_func` that divides a "
        "sum over tokens by `num_items_in_batch`."
    )
