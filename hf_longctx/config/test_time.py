"""`TTTConfig`: a model that goes on learning from what it reads (TTT-E2E)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import is_number, validate_choice, validate_tokens


META_GRADIENTS = ("exact", "first_order")
SUFFIX_ATTENTION = ("eager", "sdpa")
# What weights are trained for: under another value they are other weights.
TRAINED_WITH = (
    *("window", "chunk_tokens", "suffix_layers", "fast_intermediate_size"),
    *("inner_learning_rate", "inner_max_grad_norm", "meta_gradient"),
)
FAST_WEIGHTS = "hf_longctx_ttt_e2e"  # the `model_type` of models with fast weights, which `AutoModel` does not know


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """How a model learns while it reads: which layers carry fast weights, and when and how these take a step.

    Args:
        window (`int`, *optional*): tokens that attention sees, the token itself among them. Unset: the window of the
            base model, which must have one.
        chunk_tokens (`int`, *optional*, defaults to 1024): tokens after which fast weights take a step; at most
            `window`.
        suffix_layers (`int`, *optional*): last layers that carry fast weights. Unset: a quarter of the layers.
        fast_intermediate_size (`int`, *optional*): width of their extra MLP. Unset: that of the layer's own MLP.
        inner_learning_rate (`float`, *optional*, defaults to 1.0): of the steps while reading.
        inner_max_grad_norm (`float`, *optional*, defaults to 1.0): each row's gradient is clipped to this norm.
        learn_while_generating (`bool`, *optional*, defaults to `True`): whether `generate()` also learns from what it
            writes, and not from its prompt only.
        meta_gradient (`str`, *optional*, defaults to `"exact"`): training differentiates through the steps;
            `"first_order"` takes their gradients as constants, which is another gradient.
        suffix_attention (`str`, *optional*, defaults to `"eager"`): kernel of the suffix, whose gradient is
            differentiated again: `"eager"`, or `"sdpa"` with torch's math backend.

    Raises:
        ValueError: a field has a value that no model could use.
    """

    window: int | None = field(default=None, metadata={"help": "Tokens that attention sees; unset: the base's."})
    chunk_tokens: int = field(default=1024, metadata={"help": "Tokens after which fast weights take a step."})
    suffix_layers: int | None = field(
        default=None, metadata={"help": "Last layers with fast weights; unset: a quarter of the layers."}
    )
    fast_intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of their extra MLP; unset: that of the layer's own."}
    )
    inner_learning_rate: float = field(default=1.0, metadata={"help": "Learning rate of the steps while reading."})
    inner_max_grad_norm: float = field(default=1.0, metadata={"help": "Each row's gradient is clipped to this norm."})
    learn_while_generating: bool = field(
        default=True, metadata={"help": "Whether `generate()` learns from what it writes, too."}
    )
    meta_gradient: str = field(
        default="exact", metadata={"help": "exact, or first_order: steps are constants of the outer gradient."}
    )
    suffix_attention: str = field(
        default="eager", metadata={"help": "Kernel of the layers with fast weights: eager, or sdpa (math backend)."}
    )

    def __post_init__(self) -> None:
        for name in ("window", "suffix_layers", "fast_intermediate_size"):
            _validate_count(name, getattr(self, name))
        if self.chunk_tokens is None:
            raise ValueError("`chunk_tokens` (None) must be a positive integer, a number of tokens.")
        validate_tokens("chunk_tokens", self.chunk_tokens)
        validate_choice("meta_gradient", self.meta_gradient, META_GRADIENTS)
        if self.suffix_attention not in SUFFIX_ATTENTION:
            raise ValueError(
                f"`suffix_attention` ({self.suffix_attention!r}) must be 'eager' or 'sdpa': the gradient of no other "
                "kernel can be differentiated again; any kernel can run in the layers before (`attn_implementation`)."
            )
        if not isinstance(self.learn_while_generating, bool):
            raise ValueError(f"`learn_while_generating` ({self.learn_while_generating!r}) must be True or False.")
        if not (is_number(self.inner_learning_rate) and self.inner_learning_rate >= 0):
            raise ValueError(
                f"`inner_learning_rate` ({self.inner_learning_rate!r}) must be a finite number, 0 or more; 0 never "
                "learns."
            )
        if not (is_number(self.inner_max_grad_norm) and self.inner_max_grad_norm > 0):
            raise ValueError(f"`inner_max_grad_norm` ({self.inner_max_grad_norm!r}) must be a finite number above 0.")
        if self.window is not None and self.chunk_tokens > self.window:
            raise ValueError(
                f"`chunk_tokens` ({self.chunk_tokens}) must be at most `window` ({self.window}): tokens that left the "
                "window before the step learned from them would be lost; make chunks shorter, or the window wider."
            )


def _validate_count(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer, or unset.")
