"""`TTTForCausalLM`: a causal language model that learns from what it reads (TTT-E2E).

It holds the base model and runs its parts; the base stays transformers' own. All arithmetic is in `forward`, so every
trainer of transformers, TRL's SFT and a loop of one's own train it. Nothing is registered with transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .base_comparison import compare_parts
from .base_loading import LoadingMixin, validate_base
from .base_parts import BaseParts, find_parts
from .cached_forward import CachedForwardMixin, TTTOutput, keep_last
from .chunked_rows import RowPlan, RowsOutput, Tokens, recomputation_levels, run_rows
from .fast_cache import TTTCache
from .fast_config import TTTModelConfig, validate_made
from .forward_checks import (
    as_tokens,
    find_one_cache,
    validate_batch,
    validate_kept_logits,
    validate_learn,
    validate_lengths,
    validate_model,
    validate_positions,
    validate_shapes,
    validate_vocabulary,
)
from .generating import GeneratingMixin
from .held_base import hold_base, validate_hooks
from .inner import Step, Suffix
from .prime import PrimeMLP, PrimeMLPs
from .prime_blocks import set_kernel
from .reading import first_bad_step, next_tokens
from .step_record import StepRecord
from .suffix_checks import validate_suffix
from .weight_checksum import WeightChecksum


class TTTForCausalLM(GeneratingMixin, CachedForwardMixin, LoadingMixin, PreTrainedModel, GenerationMixin):
    """A causal language model with fast weights: an extra MLP in its last layers takes a gradient step of the
    next-token loss after every chunk that is read, and training differentiates through these steps.

    Args:
        config ([`TTTModelConfig`]): of the base model and of the fast weights.
        base (*optional*): the base model; built from the configuration if it is not given.

    Build it with [`TTTForCausalLM.from_base`], and load what `save_pretrained` wrote with `from_pretrained`.

    Example:
    ```python
    model = TTTForCausalLM.from_base("HuggingFaceTB/SmolLM2-135M", TTTConfig(window=2048, chunk_tokens=1024))
    memory = model.read(book_ids)
    model.generate(question_ids, cache=memory.copy(), learn=False)
    ```
    """

    config_class = TTTModelConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules: list[str] = []
    accepts_loss_kwargs = True

    def __init__(self, config: TTTModelConfig, base: Any = None, **unknown: Any) -> None:
        validate_made(config, unknown)
        super().__init__(config)
        self.settings = config.settings
        if base is None:
            name = config._attn_implementation or "packed"
            # `from_pretrained` makes what it is asked for the default while a model is built.
            made = {"dtype": torch.get_default_dtype(), "attn_implementation": name}
            base = AutoModelForCausalLM.from_config(config.build_base(), **made)
        else:
            validate_base(base)
            self.generation_config = copy.deepcopy(base.generation_config)
        self.base = base
        parts = find_parts(base, self.settings)
        validate_suffix(parts)
        for layer in parts.suffix[1:]:
            set_kernel(layer, self.settings.suffix_attention)
        self.primes = self._make_primes(parts)
        self.gradient_checkpointing = False
        self.inner_learning_rate = self.settings.inner_learning_rate
        self.measures_gain = False
        self.last_rows: RowsOutput | None = None
        self.step_record = StepRecord()
        self.weight_checksum = WeightChecksum()
        is_meta = any(parameter.is_meta for parameter in self.parameters())
        if not is_meta:
            for module in self.modules():  # weights are there, and are not to be drawn again
                module._is_hf_initialized = True
        self.post_init()
        if not is_meta:
            compare_parts(base, self.parts)
        hold_base(parts)

    def _make_primes(self, parts: BaseParts) -> PrimeMLPs:
        width = self.settings.fast_intermediate_size
        assert width is not None
        mlps = []
        for layer in parts.suffix:
            norm, weight = layer.post_attention_layernorm, next(layer.mlp.parameters())
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            mlps.append(PrimeMLP(norm, parts.config.hidden_size, width, dtype, weight.device))
        return PrimeMLPs(mlps, self.settings, len(parts.layers))

    def _get_name(self) -> str:
        """The base's: by it transformers' trainer knows that `label_smoothing_factor` scores the next token."""
        base = self._modules.get("base")
        return type(self).__name__ if base is None else type(base).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, PrimeMLP):
            module.reset_parameters()

    @property
    def parts(self) -> BaseParts:
        return find_parts(self.base, self.settings)

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    @torch.compiler.disable  # torch.compile traces no gradient of a gradient
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: TTTCache | None = None,
        past_key_values: TTTCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        learn: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TTTOutput:
        """Read rows, each of one document, and learn from them chunk by chunk.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): rows of tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): padding on the right.
            position_ids (`torch.Tensor`, *optional*): from 0 up, if given; with a cache, from what it has read.
            cache ([`TTTCache`], *optional*): what was read before; `past_key_values` is its older name.
            labels (`torch.Tensor` of shape `(B, T)`, *optional*): of the outer loss; the inner one needs none.
            use_cache (`bool`, *optional*): `True` reads into a new cache, and returns it.
            learn (`bool`, *optional*): whether steps are taken; `True` unless given.
            logits_to_keep (`int` or `torch.Tensor`): how many last tokens have logits, 0 for all, or which.
            num_items_in_batch (`int`, *optional*): what the sum over labels is divided by; else their number.
            kwargs: `shift_labels`, which are already shifted; all else is refused unless it changes nothing.

        Returns:
            [`TTTOutput`]: in training with labels no logits, so that they are not kept.

        Raises:
            NotImplementedError: rows that are not one document each; with a cache, rows with padding.
            RuntimeError: a cache that cannot go on, or inference mode.
            ValueError: shapes, an argument that there is not, labels with a cache, or a cache of another model.
        """
        cache = find_one_cache({"cache": cache, "past_key_values": past_key_values})
        # No argument by name: trainers take each with `label` in its name for one that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        self._validate_model()
        learns = validate_learn(learn, unset=True)
        validate_kept_logits(logits_to_keep)
        if cache is not None or use_cache:
            self._validate_untrained(labels, shift_labels)
            rest = (attention_mask, position_ids, kwargs)
            cache = self.make_cache() if cache is None else cache
            return self._forward_with_cache(input_ids, cache, learns, logits_to_keep, rest)
        validate_batch(kwargs, input_ids, attention_mask)
        assert input_ids is not None
        validate_shapes(input_ids, attention_mask=attention_mask, labels=labels, shift_labels=shift_labels)
        validate_positions(position_ids, input_ids)
        validate_vocabulary(input_ids, self.get_input_embeddings().weight.shape[0])
        if learns and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "reading takes gradient steps, and `torch.inference_mode()` forbids gradients for good: use "
                "`torch.no_grad()`, or pass `learn=False`."
            )
        shift_labels = _shifted(input_ids, attention_mask, labels, shift_labels)
        output = self._read_rows(as_tokens(input_ids), attention_mask, shift_labels, learns)
        loss = None
        if shift_labels is not None:
            count = (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = output.loss / (count.to(output.loss.device) if isinstance(count, torch.Tensor) else count)
            if self.training:
                return TTTOutput(loss=loss)
        logits = keep_last(output.logits, logits_to_keep)
        return TTTOutput(loss=loss, logits=logits, last_hidden_state=output.hidden_states)

    def _validate_model(self) -> None:
        parts = self.parts
        validate_model(self, parts, self.primes)
        validate_hooks(self, parts)

    def _read_rows(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None, learn: bool
    ) -> RowsOutput:
        parts, settings = self.parts, self.settings
        tokens = Tokens(*next_tokens(input_ids, mask, self._ignored()), labels)
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        hidden_states = parts.run_prefix(input_ids, None, recomputes=recomputes)
        assert settings.window is not None
        chunks = -(-input_ids.shape[1] // settings.chunk_tokens)
        plan = RowPlan(
            settings.chunk_tokens,
            settings.window,
            self._step() if learn and self.inner_learning_rate > 0 else None,
            recomputation_levels(chunks) if recomputes else 0,
            returns_tokens=labels is None or not self.training,
            measures_gain=self.measures_gain,
        )
        rotary, positions = parts.rotation(hidden_states, 0)
        output = run_rows(self._suffix(parts), hidden_states, rotary, positions, tokens, plan)
        self.last_rows = RowsOutput(
            output.loss.detach(), *(output.squares.new_zeros(0),) * 2, output.squares.detach(), output.gains
        )
        if self.training and torch.is_grad_enabled():
            self.step_record.add(output, self.inner_learning_rate, settings.inner_max_grad_norm)
        return output

    def explain_nonfinite(self) -> str | None:
        """Where the last forward's inner steps first were not finite, in words."""
        if self.last_rows is None:
            return None
        place = first_bad_step(self.last_rows.squares, 0, len(self.parts.prefix))
        return None if place is None else f"in the inner step of {place}"

    def _suffix(self, parts: BaseParts) -> Suffix:
        return Suffix(parts.suffix, self.primes, parts.norm, parts.head)

    def _step(self) -> Step:
        exact = self.settings.meta_gradient == "exact"
        return Step(self.inner_learning_rate, self.settings.inner_max_grad_norm, exact)

    def _ignored(self) -> int | None:
        return self.config.bos_token_id


def _shifted(input_ids: torch.Tensor, mask: Any, labels: Any, shift_labels: Any) -> torch.Tensor | None:
    """The outer loss's targets, each at the token before it."""
    if labels is None and shift_labels is None:
        return None
    validate_lengths(input_ids, mask)
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return as_tokens(shift_labels)
