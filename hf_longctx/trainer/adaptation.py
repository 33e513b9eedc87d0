"""What a model needs before it trains on shares of rows, or on packed ones: attached, checked and marked.

`adapt` is the one call of a training loop; trainers do the same in steps, since they also know the loss.
"""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..adapters.attach import AttachedAdapters, attach_adapters
from ..adapters.axial_positions import follow_axial_positions
from ..adapters.hashed import follow_lsh, refuse_lost_lsh
from ..adapters.instance_forward import patch_on, put_on
from ..adapters.loop_batches import LoopBatches
from ..adapters.no_rotation import refuse_lost_alibi
from ..adapters.peft_kinds import PACKED_ROWS, check_peft
from ..adapters.reversible import follow_reversible
from ..adapters.sparse.sparse_rows import SparseRowsWatch
from ..adapters.tiled_loss import TILED_LOSS, TiledLossHandle
from ..adapters.wrapped import runs_our_attention, unwrap
from ..attention.contamination import assert_no_cross_document
from ..attention.registry import packs_rows
from ..attention.unadapted import refuse_token_mixing
from ..config.run import LongContextConfig
from ..families import expects_unshifted_labels, first_position, position_axes, text_marks
from ..parallel.adapted import Adapted
from ..parallel.mesh import SequenceMesh
from ..tiny_check import random_tokens
from ..ttt.fast_model import TTTForCausalLM
from .checks import check_model
from .random_draws import warn_about_draws
from .sanity_check import SanityResult, run_sanity_check


_DOCUMENTS = (4, 1, 3)


def adapt(model: torch.nn.Module, mesh: SequenceMesh, *, inner_attention: str = "auto") -> AttachedAdapters:
    """Make a model ready for a loop of your own on shared or packed rows, or say why it cannot be.

    The trainers' checks run on a few tokens, the adapters that the type needs are put on the instance, and every later
    forward looks at its batch. A checkpoint of the model is what it would be without.

    Args:
        model (`torch.nn.Module`): loaded with `attn_implementation="ulysses"`, or `"packed"` for whole rows; on its
            device. Before or after PEFT, DDP and FSDP2, and before `torch.compile`.
        mesh ([`SequenceMesh`]): the axes of the run.
        inner_attention (`str`, *optional*, defaults to `"auto"`): see [`LongContextConfig`].

    Returns:
        [`AttachedAdapters`]: `remove()` takes everything off again. A second call checks and attaches anew.

    Raises:
        ValueError: the model runs another attention, or has fewer heads than ranks.
        NotImplementedError: its numbers on shares would not be those of one process; the message says which layer or
            loss it is. Packed rows are refused by the forward that gets them, if that is all that is wrong.

    Communication: that of a few forwards and backwards of a few tokens; every rank of the world calls this.
    """
    config = LongContextConfig(
        sequence_parallel_size=mesh.sequence_parallel_size, inner_attention=inner_attention, check_packing=True
    )
    if isinstance(unwrap(model), TTTForCausalLM):
        raise NotImplementedError(
            f"`{type(unwrap(model)).__name__}` reads whole rows chunk by chunk, so there is nothing to adapt: "
            "train it with `sequence_parallel_size` 1, under DDP or as it is."
        )
    check_model(model, config)
    _validate_here(unwrap(model))
    follow_lsh(model, inner_attention)
    warn_about_draws(model, mesh.sequence_parallel_size)
    inner = unwrap(model)
    shifts, has_loss = predicts_next_token(inner), "labels" in inspect.signature(type(inner).forward).parameters
    axes = position_axes(inner.config)
    adapted = Adapted(mesh.sequence_parallel_size, inner_attention, shifts if has_loss else None, axes)
    handle = attach_adapters(model, adapted)
    try:
        if runs_our_attention(model):
            # A tiled loss makes no logits, which the checks compare; it has a proof of its own.
            tiled = patch_on(inner, TILED_LOSS) is not None
            with TiledLossHandle(inner).paused() if tiled else contextlib.nullcontext():
                # FSDP2 gathers weights where a forward enters the module that it wrapped last, which PEFT's may be.
                runs = model if isinstance(model, FSDPModule) else inner
                needs = run_sanity_check(runs, mesh, inner_attention, shifts, check_loss=has_loss)
                leaks = _known_across_documents(model) or _find_leaks(runs, mesh, inner_attention, needs)
            put_on(inner, LoopBatches(adapted, needs, leaks, SparseRowsWatch(inner)))
    except Exception:
        handle.remove()
        raise
    mesh.noted.add("adapted")
    return handle


def _count_whole_steps(trainer) -> None:
    """Let the trainer count the tokens of a step for the loss, also where the model's class says that it takes none.

    transformers says so of multimodal models (`accepts_loss_kwargs`), whose loss would average over a share, as SFT's
    would. The sanity check looks at what the model's own does with the count.
    """
    parameters = inspect.signature(type(unwrap(trainer.model)).forward).parameters.values()
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if trainer.mesh.sequence_parallel_size > 1 and takes_more:
        trainer.model_accepts_loss_kwargs = True


def _validate_here(model: torch.nn.Module) -> None:
    """Raise `ValueError` for weights that hooks bring only while a layer runs."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"weights of `{type(model).__name__}` are on the meta device, so hooks bring them in or nothing was "
            "loaded: call `hf_longctx.adapt(model, mesh)` before accelerate or DeepSpeed offload the model."
        )


def predicts_next_token(model) -> bool:
    """Whether the loss of a transformers model compares each token with the label of the next one."""
    if expects_unshifted_labels(model.config):
        return False
    loss_type = getattr(model, "loss_type", None)
    # transformers falls back to this loss for a class whose name it does not know, such as GPT-2's.
    return loss_type not in LOSS_MAPPING or LOSS_MAPPING[loss_type] is ForCausalLMLoss


def _known_across_documents(model) -> dict[str, str]:
    """Why packed rows are refused, by the way in which a batch tells them, for what is known to read across tokens."""
    try:
        check_peft(model, *PACKED_ROWS)
        refuse_token_mixing(type(unwrap(model)).__name__, unwrap(model).config)
    except NotImplementedError as error:
        return dict.fromkeys(("shard", "position_ids", "seq_idx", "cu_seq_lens_q"), str(error))
    return {}


def _find_leaks(model, mesh: SequenceMesh, inner_attention: str, needs: SanityResult) -> dict[str, str]:
    """Why the model mixes documents, by the way in which a batch tells them; nothing if it keeps them apart."""
    text = model.config.get_text_config()
    if not packs_rows(text._attn_implementation):
        return {}
    sizes, device = torch.tensor(_DOCUMENTS), next(model.parameters()).device
    start = first_position(model.config) if needs.needs_position_ids else 0
    batch = {
        "input_ids": random_tokens(text.vocab_size, 1, int(sizes.sum())).to(device),
        "position_ids": torch.cat([start + torch.arange(size) for size in sizes])[None].to(device),
    }
    batch |= text_marks(model.config, batch["input_ids"])
    ways: dict[str, dict[str, object]] = {"shard": {}}
    if mesh.sequence_parallel_size == 1:  # then batches may also go to the model as they are
        bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32).to(device)
        index = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)[None].to(device)
        longest = {"max_length_q": max(_DOCUMENTS), "max_length_k": max(_DOCUMENTS)}
        ways |= {"position_ids": {}, "seq_idx": {"seq_idx": index}}
        ways["cu_seq_lens_q"] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **longest}
    follows_gradients = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    leaks = {}
    for way, facts in ways.items():
        try:
            assert_no_cross_document(
                model,
                {**batch, **facts},
                mesh if way == "shard" else None,
                inner_attention=inner_attention,
                check_gradients=follows_gradients,
            )
        except DistError:
            raise
        except Exception as error:  # also what transformers says of layers that cannot keep documents apart
            leaks[way] = " ".join(str(error).split())
    return leaks


def adapt_model(trainer) -> bool:
    """Attach what the trainer's model needs, and leave labels as they are where its loss does.

    Returns:
        `bool`: whether the model runs an attention of ours; of any other nothing is changed.
    """
    if isinstance(unwrap(trainer.model), TTTForCausalLM):
        return False  # rows stay whole, and each forward of it tells its attention so
    follow_axial_positions(trainer.model)
    follow_reversible(trainer.model)
    if not runs_our_attention(trainer.model):
        refuse_lost_alibi(trainer.model)
        refuse_lost_lsh(trainer.model, trainer.long_context.inner_attention)
        return False
    follow_lsh(trainer.model, trainer.long_context.inner_attention)
    attach_adapters(trainer.model)
    _count_whole_steps(trainer)
    own_loss = trainer.uses_model_loss and trainer.compute_loss_func is None and trainer.label_smoother is None
    if own_loss and expects_unshifted_labels(unwrap(trainer.model).config):
        trainer._loss_shifts_labels = False  # transformers looks at the loss's name, which these models do not call
    return True
