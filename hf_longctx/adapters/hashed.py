"""LSH attention for one model: settings in its configuration, and what a run needs before its first step."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import PreTrainedModel

from ..attention.lsh import refuse_other_kernel
from ..attention.registry import find_attention
from ..config.lsh_settings import LSH, LSH_KEY, LSHConfig
from .tied_query_key import attention_layers, tie_equal_weights, validate_tieable
from .wrapped import unwrap


logger = logging.getLogger(__name__)


class LSHHandle:
    """What [`use_lsh`] returns; `remove()` takes the settings out of the model's configuration.

    Args:
        model (`torch.nn.Module`): the model.
        before (`dict`, *optional*): the settings that it had.
    """

    def __init__(self, model: torch.nn.Module, before: dict | None) -> None:
        self.model, self._before = model, before

    def remove(self) -> None:
        """The model as it was before, to be called once."""
        text = unwrap(self.model).config.get_text_config()
        vars(text).pop(LSH_KEY, None)
        if self._before is not None:
            setattr(text, LSH_KEY, self._before)


def use_lsh(model: torch.nn.Module, lsh: LSHConfig | None = None) -> LSHHandle:
    """Let a model run LSH attention under `"lsh"`, `"packed"` and `"ulysses"`, with these settings.

    They are written into the model's configuration as `hf_longctx_lsh`, and `save_pretrained` writes them with it. A
    model that is loaded on one of our attentions runs LSH attention again; on another, trainers refuse it.

    Args:
        model (`torch.nn.Module`): on an attention of ours; changed in place, on this instance only. Tie its queries
            and keys with [`tie_query_key`][hf_longctx.tie_query_key], before or after.
        lsh ([`LSHConfig`], *optional*): defaults to `LSHConfig()`.

    Returns:
        [`LSHHandle`]: `remove()` undoes it. A second call replaces the settings.

    Raises:
        ValueError: it is no model of transformers, or runs an attention of transformers.
        NotImplementedError: an encoder-decoder, or layers whose queries and keys cannot be tied.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    lsh = LSHConfig() if lsh is None else lsh
    if not isinstance(inner, PreTrainedModel) or not isinstance(lsh, LSHConfig):
        what = (
            f"`lsh` ({lsh!r}) is no `LSHConfig`"
            if isinstance(inner, PreTrainedModel)
            else (f"`{name}` is not a model of transformers")
        )
        raise ValueError(
            f"{what}: call `use_lsh(model, LSHConfig(...))` with the model that has the attention layers."
        )
    text = inner.config.get_text_config()
    if find_attention(text._attn_implementation) is None:
        raise ValueError(
            f"`{name}` runs attn_implementation={text._attn_implementation!r}, which knows nothing of LSH: load it "
            f"with attn_implementation='{LSH}', or call `model.set_attn_implementation('{LSH}')`."
        )
    refuse_unhashable(inner)
    before = getattr(text, LSH_KEY, None)
    _own_config(inner)
    setattr(inner.config.get_text_config(), LSH_KEY, lsh.to_dict())
    return LSHHandle(model, before)


def refuse_unhashable(model: torch.nn.Module) -> None:
    """Refuse a model whose layers cannot run LSH attention, by what it is made of.

    Raises:
        NotImplementedError: an encoder-decoder, layers whose queries and keys cannot be tied, or none.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"`{name}` is an encoder-decoder, whose cross-attention has queries and keys of two sequences, and LSH "
            "attention has one of both: use a decoder or an encoder."
        )
    layers = attention_layers(inner)
    if not layers:
        raise NotImplementedError(
            f"`{name}` has no attention layer whose queries and keys could be tied, as LSH attention needs: choose a "
            "model such as Llama or Qwen."
        )
    for layer in layers:
        validate_tieable(layer)


def wants_lsh(model: torch.nn.Module, inner_attention: str) -> bool:
    """Whether a run on this kernel is one of LSH attention: by its name, the kernel or the model's configuration.

    Raises:
        ValueError: the configuration of the model has LSH settings that cannot be used, or the run another kernel.
    """
    text = unwrap(model).config.get_text_config()
    stored = LSHConfig.of_model(text)
    wanted = stored is not None or text._attn_implementation == LSH
    if wanted and inner_attention not in ("auto", LSH):
        refuse_other_kernel(inner_attention)
    return wanted or inner_attention == LSH


def follow_lsh(model: torch.nn.Module, inner_attention: str) -> None:
    """Make a model ready for a run of LSH attention, or say why it is not; any other is left alone.

    What a checkpoint of a tied model brought is tied again. A model without settings gets the defaults written into
    its configuration, so that its checkpoint says how it was trained.

    Args:
        model (`torch.nn.Module`): wrapped or not.
        inner_attention (`str`): see [`LongContextConfig`].

    Raises:
        ValueError: it runs an attention of transformers, or another kernel than its configuration says.
        NotImplementedError: see [`refuse_unhashable`].
    """
    if not wants_lsh(model, inner_attention):
        return
    refuse_lost_lsh(model, inner_attention)
    refuse_unhashable(model)
    tie_equal_weights(model)
    text = unwrap(model).config.get_text_config()
    if LSHConfig.of_model(text) is None:
        settings = LSHConfig()
        use_lsh(model, settings)
        logger.info("the model gets the default settings of LSH attention: %s", settings)


def refuse_lost_lsh(model: torch.nn.Module, inner_attention: str) -> None:
    """Raise `ValueError` for a run of LSH attention on an attention of transformers, which would ignore it."""
    inner = unwrap(model)
    attention = inner.config.get_text_config()._attn_implementation
    if wants_lsh(model, inner_attention) and find_attention(attention) is None:
        raise ValueError(
            f"`{type(inner).__name__}` is to run LSH attention (`config.{LSH_KEY}` or `inner_attention`), which "
            f"attn_implementation={attention!r} does not compute: load it with attn_implementation='{LSH}', or call "
            f"`model.set_attn_implementation('{LSH}')`; 'ulysses' if ranks share rows."
        )


def _own_config(model: PreTrainedModel) -> None:
    """Give an instance a configuration of its own: models that are built from one object share it."""
    shared, own = model.config, copy.deepcopy(model.config)
    text = shared.get_text_config()
    for module in model.modules():
        held = vars(module).get("config")
        if held is shared:
            module.config = own
        elif held is text:
            module.config = own.get_text_config()
