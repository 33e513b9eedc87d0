"""The inner kernels: which one runs, what it can do, and how it is called. All are transformers' or torch's own.

A kernel of transformers reads facts from the attention module (`num_key_value_groups`, `config._attn_implementation`,
`is_causal`). Under sharding those facts are local, so a kernel is handed a view of the module in which they differ;
the module itself is never touched.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from ..config.lsh_settings import LSH
from ..parallel.segments import PAD_SEGMENT
from .blocks import BlockPlan, plan_blocks, run_blocks, visible
from .call import AttentionCall
from .distance_bias import (
    blocks_for_distances,
    has_distance_bias,
    refuse_other_kernels,
    run_flex,
    run_with_distance_bias,
    suits_flex,
)
from .eager import eager_attention
from .lsh_models import is_lsh_model
from .masks import AttentionRule, KernelPlan, build_mask, segment_bounds
from .side_inputs import refuse_dropped_inputs
from .varlen import VarlenBounds, fits, run_varlen


_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
}
_FLASH_HEAD_SIZE_LIMIT = 256


def is_flash(kernel: str) -> bool:
    return kernel in _FLASH_PACKAGES or "/" in kernel


def validate_kernel_available(kernel: str) -> None:
    """Raise `ImportError` if `kernel` needs a package that is not installed."""
    if not is_flash(kernel):
        return
    module, package = _FLASH_PACKAGES.get(kernel, ("kernels", "kernels"))
    has_hub_kernels = importlib.util.find_spec("kernels") is not None
    if not has_hub_kernels and (kernel not in _FLASH_PACKAGES or not _importable(module)):
        raise ImportError(
            f"`inner_attention` ('{kernel}') needs the package "
            f"`{package}`{'' if package == 'kernels' else ' or `kernels`'}, which is not installed: `pip install "
            f"{package}`, or use 'sdpa', which is always there."
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def choose_kernel(name: str, call: AttentionCall) -> str:
    """Turn `"auto"` into a kernel for this call; any other name is kept.

    Args:
        name (`str`): `LongContextConfig.inner_attention`.
        call ([`AttentionCall`]): its query decides by device, precision and head size; sinks and softcap rule kernels
            out.
    """
    if is_lsh_model(call.module):
        return LSH
    if name != "auto":
        return name
    query = call.query
    needs_more = call.per_head.get("s_aux") is not None or call.extras.get("softcap") is not None
    on_gpu = query.device.type == "cuda"
    if has_distance_bias(call):
        return "eager" if needs_more else "flex_attention" if on_gpu and suits_flex(call) else "sdpa"
    if needs_more:
        return "flex_attention" if on_gpu else "eager"
    half = query.dtype in (torch.float16, torch.bfloat16)
    if on_gpu and half and query.shape[-1] <= _FLASH_HEAD_SIZE_LIMIT and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def refuse_unsupported(kernel: str, call: AttentionCall) -> None:
    """Raise `NotImplementedError` if the model asks `kernel` for something it would silently ignore."""
    sinks, softcap, dropout = call.per_head.get("s_aux"), call.extras.get("softcap"), call.dropout
    refuse_other_kernels(kernel, call)
    if sinks is not None and (
        kernel == "sdpa" or (is_flash(kernel) and not _flash_supports(kernel, "s_aux", "learnable_sink"))
    ):
        raise NotImplementedError(
            f"this model has attention sinks (`s_aux`), which the '{kernel}' kernel does not have: use "
            "`inner_attention='auto'`, 'eager' or 'flex_attention'."
        )
    if softcap is not None and (kernel == "sdpa" or (is_flash(kernel) and not _flash_supports(kernel, "softcap"))):
        raise NotImplementedError(
            f"this model caps its attention scores (`softcap`), which the '{kernel}' kernel does not do: use "
            "`inner_attention='auto'`, 'eager' or 'flex_attention'."
        )
    if dropout and (kernel == "flex_attention" or (is_flash(kernel) and not _flash_supports(kernel, "dropout_p"))):
        raise NotImplementedError(
            f"attention dropout ({dropout}) is not done by '{kernel}': set the model's `attention_dropout` to 0, or "
            "use `inner_attention='auto'` or 'eager'."
        )


def _flash_supports(kernel: str, *names: str) -> bool:
    """Whether the flash kernel takes any of these arguments; transformers silently drops those it does not take."""
    _, process_arguments = lazy_import_flash_attention(kernel)
    if isinstance(process_arguments, tuple):  # newer transformers also return one for paged caches
        process_arguments = process_arguments[0]
    supports = process_arguments.keywords["supports_mapping"]
    return any(supports.get(name) for name in names)


class ModuleView:
    """An attention module as one kernel call should see it: everything of the module, except the given facts."""

    def __init__(self, module: torch.nn.Module, kernel: str, **facts: object) -> None:
        self._module = module
        config = getattr(module, "config", None)
        self.config = SimpleNamespace(**{**getattr(config, "__dict__", {}), "_attn_implementation": kernel})
        for name, value in facts.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


def run_plain(kernel: str, call: AttentionCall, mask: object, is_causal: bool | None) -> tuple:
    """Run `kernel` exactly as transformers would have run it under its own name, on a mask that it built itself."""
    kwargs: dict[str, Any] = {**call.extras, **call.per_head, "dropout": call.dropout, "scaling": call.scaling}
    if is_causal is not None:
        kwargs["is_causal"] = is_causal
    module, tensors = call.module, (call.query, call.key, call.value)
    if kernel == "eager":
        own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", eager_attention)
        refuse_dropped_inputs(call, kernel, own)
        return own(module, *tensors, mask, **kwargs)
    function = flash_attention_forward if is_flash(kernel) else ALL_ATTENTION_FUNCTIONS[kernel]
    refuse_dropped_inputs(call, kernel, function)
    return function(ModuleView(module, kernel), *tensors, mask, **kwargs)


def run_planned(kernel: str, call: AttentionCall, plan: KernelPlan) -> torch.Tensor:
    """Run `kernel` on whole rows under `plan`.

    Args:
        call ([`AttentionCall`]): some heads of whole rows.
        plan ([`KernelPlan`]): what may be seen; `plan.prepared` was made by [`plan_for_kernel`].

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    query, key, value = call.query, call.key, call.value
    softcap, s_aux = call.extras.get("softcap"), call.per_head.get("s_aux")
    rule, prepared = plan.rule, plan.prepared
    groups = query.shape[1] // key.shape[1]
    view = ModuleView(call.module, kernel, num_key_value_groups=groups, is_causal=rule.causal)
    extras: dict[str, Any] = {"dropout": call.dropout, "scaling": call.scaling}
    if has_distance_bias(call):
        if kernel == "flex_attention":
            return _without_padding(run_flex(call, prepared), plan)
        return run_with_distance_bias(kernel, call, plan, view)
    if isinstance(prepared, VarlenBounds):
        return _without_padding(run_varlen(rule, prepared, query, key, value, call.scaling), plan)
    if is_flash(kernel):
        window = rule.window
        if window is not None and not rule.causal:
            window += 1  # transformers' flash helper counts the query itself, its bidirectional masks do not
        facts = {**extras, "is_causal": rule.causal, "sliding_window": window, "softcap": softcap, "s_aux": s_aux}
        output, _ = flash_attention_forward(view, query, key, value, None, **facts, **(prepared or {}))
        return _without_padding(output, plan)
    if kernel != "sdpa":
        extras |= {"softcap": softcap, "s_aux": s_aux}
    function = eager_attention if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]

    def attend(query, key, value, mask, is_causal: bool) -> torch.Tensor:
        return function(view, query, key, value, mask, is_causal=is_causal, **extras)[0]

    if not isinstance(prepared, BlockPlan):
        return attend(query, key, value, prepared, rule.causal)
    return run_blocks(prepared, lambda q, k, v, cut: attend(q, k, v, cut.mask, cut.is_causal), query, key, value)


def _without_padding(output: torch.Tensor, plan: KernelPlan) -> torch.Tensor:
    """Zeros where there is padding, as transformers' own unpadding leaves them."""
    if plan.segments is None:
        return output
    return output.masked_fill((plan.segments == PAD_SEGMENT)[..., None, None], 0)


def plan_for_kernel(plan: KernelPlan, kernel: str, call: AttentionCall) -> object:
    """What `kernel` takes to obey `plan` on the whole rows of `call`; none of it is `T x T` where rows are cut.

    Returns:
        `None` (nothing to obey but causality), flat bounds for a flash kernel, [`VarlenBounds`], a [`BlockPlan`],
        or a mask: for flex attention its block mask, and for the others only if a document is interrupted by padding,
        or for `"eager"` with padding, whose padded queries see everything in transformers.
    """
    query = call.query
    rows, _, num_tokens, _ = query.shape
    if has_distance_bias(call) and kernel != "flex_attention":
        return blocks_for_distances(plan, rows, num_tokens)
    if is_flash(kernel):
        return _bounds_for_flash(plan, kernel, rows, num_tokens, query.device)
    if kernel == "sdpa" and plan.is_plain:
        return None
    device, dtype = query.device, query.dtype
    if kernel == "sdpa" and fits(query, call.key, call.value, call.dropout):
        try:
            return VarlenBounds(*segment_bounds(plan.segments, rows, num_tokens, device))
        except NotImplementedError:
            return build_mask(plan, kernel, rows, num_tokens, dtype, device)
    cut = kernel == "sdpa" or (kernel == "eager" and not plan.is_plain and not plan.has_padding)
    masks = _BlockMasks(kernel, dtype, device)
    blocks = plan_blocks(plan.rule, plan.segments, rows, num_tokens, masks.make) if cut else None
    return blocks or build_mask(plan, kernel, rows, num_tokens, dtype, device)


def _bounds_for_flash(plan: KernelPlan, kernel: str, rows: int, num_tokens: int, device) -> dict | None:
    if plan.rule.window is not None and not _flash_supports(kernel, "window_size"):
        raise NotImplementedError(
            f"this model has a sliding window of {plan.rule.window} tokens, which '{kernel}' does not do: use "
            "`inner_attention='sdpa'` or 'flex_attention'."
        )
    if plan.segments is None:
        return None
    bounds, longest = segment_bounds(plan.segments, rows, num_tokens, device)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


class _BlockMasks:
    """Masks of blocks for one kernel: additive for `"eager"`, boolean for `"sdpa"`, which needs fewer of them."""

    def __init__(self, kernel: str, dtype: torch.dtype, device: torch.device) -> None:
        self.is_eager, self.dtype, self.device = kernel == "eager", dtype, device
        self.largest: torch.Tensor | None = None

    def make(self, rule: AttentionRule, queries: int, keys: int, offset: int) -> torch.Tensor | None:
        """The mask of a block, or `None`. Masks that start at their own first key are views of the largest one."""
        reach = queries if rule.causal else queries - 1
        unlimited = offset == 0 and queries == keys and (rule.window is None or reach <= rule.window)
        if unlimited and not (self.is_eager and rule.causal):
            return None
        square = offset == 0 and queries == keys
        if square and self.largest is not None and self.largest.shape[2] >= queries:
            return self.largest[..., :queries, :keys]
        seen = visible(rule, queries, keys, offset, self.device)
        if seen is None:
            return None
        seen = seen[None, None]
        if self.is_eager:
            lowest = torch.finfo(self.dtype).min
            seen = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, lowest)
        if square:
            self.largest = seen
        return seen
