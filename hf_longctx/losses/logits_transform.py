"""What a model does with its logits between its head and its loss, read from its configuration.

Models have many names for it, and one name with two meanings, so a field is only read for the model types in
`families` that it was checked on. Anything else that looks like a treatment of logits is refused, and
`prove_tiled_loss` checks what a configuration cannot tell.
"""

from __future__ import annotations

import re

from ..families import LOGITS_DIVISORS, LOGITS_MULTIPLIERS


# softcap * tanh(logits / softcap), after the scale, in every model that has one of them
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_NOT_OF_THE_HEAD = re.compile(
    r"^(attn_|attention_|conf_attention_|gate_|mlp_|router_|num_logits_to_keep|lm_head_bias|output_router_logits|"
    r"final_logits_bias|freeze_lm_head|logit_scale_init_value)"
)
_OF_THE_HEAD = re.compile(r"logit|lm_head|^output_(multiplier|scale)|soft_?cap")


def read_logits_transform(config) -> tuple[float, float | None]:
    """The scale and softcap between a model's head and its loss.

    Args:
        config (`PreTrainedConfig`): of the model; of a multimodal one, its text part is read.

    Returns:
        tuple of `scale` and `softcap`, as in `softcap * tanh(scale * logits / softcap)`; mostly `(1.0, None)`.

    Raises:
        NotImplementedError: the configuration has a field about logits that is not known for this model.
    """
    config = config.get_text_config(decoder=True)
    kind, scale, softcap, known = config.model_type or "", 1.0, None, set()
    for field, prefixes in LOGITS_MULTIPLIERS.items():
        if kind.startswith(prefixes):
            known.add(field)
            scale *= _number(config, field)
    for field, prefixes in LOGITS_DIVISORS.items():
        if kind.startswith(prefixes):
            known.add(field)
            scale /= _number(config, field)
    for field in _SOFTCAPS:
        known.add(field)
        softcap = softcap or getattr(config, field, None)
    words = getattr(config, "unpadded_vocab_size", None)
    if words is not None and words < config.vocab_size:
        _refuse(config, "unpadded_vocab_size", words)
    for field, value in config.to_dict().items():
        about_logits = _OF_THE_HEAD.search(field) and not _NOT_OF_THE_HEAD.search(field)
        if about_logits and field not in known and value not in (None, False, 1, 0):
            _refuse(config, field, value)
    return scale, softcap


def _number(config, field: str) -> float:
    value = getattr(config, field, None)
    return 1.0 if value is None else float(value)


def _refuse(config, field: str, value: object) -> None:
    raise NotImplementedError(
        f"the configuration of `{config.model_type}` has `{field}` ({value!r}), and it is not known what this model "
        "does with it between its head and its loss: train it without a tiled loss."
    )
