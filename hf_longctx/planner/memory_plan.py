"""What a run needs, before it runs: bytes by kind, the longest row that fits, the cheapest preset for a given one.

Every component grows by the same bytes with each layer and with each token. So a few layers and two lengths are
simulated; straight lines through them tell the rest, and the longest row is solved for, not searched. Lines are drawn
for each phase of a step by itself, since the fullest phase of a short row need not be that of a long one.

Price: a simulation of a few layers takes a fraction of a second to some seconds; a preset and its longest row take
four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from ..adapters.dense_mlps import find_dense_mlps
from ..adapters.tiled_loss import tile_loss
from ..families import values_of
from ..losses.tiles import choose_tile_size
from ..parallel.heads import validate_head_count
from .fake_model import count_adapters, find_stack, model_on_meta
from .presets import MLP_TILE_SIZE, PRESETS, Preset
from .reference_forward import gathered_reference
from .reversible_plan import reversible_peaks, reversible_settings, trained_numbers
from .settings import Settings
from .simulate import PhasePeaks, simulate
from .tracker import CPU, KINDS


DEVICE_KINDS = tuple(kind for kind in KINDS if kind != CPU)
# Kinds that a step makes and frees; a measured step tells how well they are planned.
STEP_KINDS = ("hidden", "attention", "recurrent", "mlp", "logits", "workspace")
# Of a device; the rest is left to the CUDA context, the buffers of NCCL and cuBLAS, and the gaps of the allocator.
USABLE_SHARE = 0.92
# Tokens of one rank in the shorter of two simulations, so many that what grows with tokens leads. Rows of fewer are
# simulated as they are.
_START = 4 * MLP_TILE_SIZE


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of one rank at the peak of a step.

    Args:
        tokens (`int`): of a whole row.
        weights, gradients, optimizer (`int`): the share of this rank.
        hidden (`int`): checkpoints, residual stream and norms.
        attention, recurrent, mlp (`int`): what these layers keep, and what they use while they run; for recurrent ones
            the states and last tokens of all ranks, too.
        logits (`int`): head and loss.
        workspace (`int`): buffers of the wrapper, temporaries of the optimizer, the batch.
        cpu (`int`): checkpoints in CPU memory, of all ranks that share it.
        phase (`str`): when that is; `"backward -1"` is that of the last layer.
    """

    tokens: int
    weights: int
    gradients: int
    optimizer: int
    hidden: int
    attention: int
    recurrent: int
    mlp: int
    logits: int
    workspace: int
    cpu: int
    phase: str

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return sum(getattr(self, kind) for kind in DEVICE_KINDS)


class Planner:
    """Plans for one model. Simulations are kept, so asking again costs nothing.

    Args:
        config (`PretrainedConfig`): of a causal language model of transformers; of a multimodal one, the text part.
        factor (`float`, *optional*, defaults to 1.0): what the planned bytes of `STEP_KINDS` are multiplied by, from a
            measured step.
        scores_rows (`bool`, *optional*, defaults to `False`): it is the base of a reward model.

    Raises:
        ValueError: transformers has no causal language model for this configuration.
        NotImplementedError: its layers have no attention heads.
    """

    def __init__(self, config: PretrainedConfig, factor: float = 1.0, scores_rows: bool = False) -> None:
        text = config.get_text_config()
        self.config, self.factor = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config, factor
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or self.config.is_encoder_decoder:
            raise ValueError(
                f"`{type(config).__name__}` makes no decoder that transformers knows as a causal language model: plan "
                "one that `AutoModelForCausalLM` loads without code of its own."
            )
        num_heads = min((count for count in values_of(self.config, "num_attention_heads") if count), default=None)
        if num_heads is None:
            raise NotImplementedError(
                f"`{type(config).__name__}` has no `num_attention_heads`: layers without attention cannot be planned."
            )
        self.num_heads: int = num_heads
        self.model = model_on_meta(self.config, scores_rows)
        self.stack = find_stack(self.model)
        self.tiles_loss, self.tiles_mlp = _can_tile_loss(self.model), bool(find_dense_mlps(self.model)[0])
        self.simulated: dict[Settings, PhasePeaks] = {}

    def preset(self, preset: Preset | str, settings: Settings) -> Settings:
        """`settings` with a preset applied, without what this model cannot do."""
        preset = PRESETS[preset] if isinstance(preset, str) else preset
        settings = preset.apply(settings, self.config.vocab_size)
        if settings.whole_rows:
            settings = settings.of(loss_tile_size=choose_tile_size(None, self.config.vocab_size))
        if not self.tiles_loss:
            settings = settings.of(loss_tile_size=None)
        return settings if self.tiles_mlp else settings.of(mlp_tile_size=None)

    def breakdown(self, settings: Settings) -> MemoryBreakdown:
        """What one rank needs for rows of `settings.tokens`.

        Raises:
            ValueError: more ranks share a row than there are query heads.
            NotImplementedError: the model cannot be simulated.
        """
        start = _start(settings)
        if settings.local_tokens < start:
            peaks = self._at(settings, settings.local_tokens)
        else:
            peaks = self._line(settings, start).at(settings.local_tokens)
        phase, kinds = max(peaks.device.items(), key=lambda item: on_device(item[1]))
        whole = {kind: round(kinds[kind]) for kind in DEVICE_KINDS}
        return MemoryBreakdown(tokens=settings.tokens, **whole, cpu=_on_cpu(peaks, settings), phase=phase[0])

    def longest_tokens(self, settings: Settings, device_bytes: int, cpu_bytes: int | None = None) -> int:
        """The longest row that fits, a multiple of `sequence_parallel_size`; 0 if none does.

        Args:
            settings ([`Settings`]): of the run; its `tokens` are not looked at.
            device_bytes (`int`): of one device, of which `USABLE_SHARE` is planned with.
            cpu_bytes (`int`, *optional*): of one node, for checkpoints that are offloaded.
        """
        start = _start(settings)
        for _ in range(4):  # rows that turn out short are solved for again, from short ones
            line = self._line(settings, start)
            tokens = line.longest(device_bytes * USABLE_SHARE)
            if tokens >= start or start == 1 or line.first.states > device_bytes * USABLE_SHARE:
                break
            start = max(1, tokens // 2)
        if cpu_bytes is not None and settings.offload:
            tokens = min(tokens, line.longest_on_cpu(cpu_bytes, settings))
        return tokens * settings.sequence_parallel_size

    def choose_preset(
        self, settings: Settings, device_bytes: int, cpu_bytes: int | None = None
    ) -> tuple[Preset, Settings] | None:
        """The first preset with which `settings.tokens` fit, with the settings it makes, or `None`."""
        for preset in PRESETS.values():
            candidate = self.preset(preset, settings)
            if self.fits(candidate, device_bytes, cpu_bytes):
                return preset, candidate
        return None

    def fits(self, settings: Settings, device_bytes: int, cpu_bytes: int | None = None) -> bool:
        """Whether rows of `settings.tokens` fit."""
        breakdown = self.breakdown(settings)
        return breakdown.device <= device_bytes * USABLE_SHARE and (cpu_bytes is None or breakdown.cpu <= cpu_bytes)

    def _line(self, settings: Settings, start: int) -> LinearFit:
        return LinearFit(start, self._at(settings, start), self._at(settings, 2 * start))

    def _at(self, settings: Settings, local_tokens: int) -> PhasePeaks:
        """The whole model at a length: simulated, or continued from two short stacks."""
        validate_head_count(self.num_heads, settings.sequence_parallel_size)
        settings = settings.of(tokens=local_tokens * settings.sequence_parallel_size, processes_per_node=None)
        if settings.reversible and settings not in self.simulated:
            self.simulated[settings] = self._reversible(settings, local_tokens)
        if settings not in self.simulated:
            stack = self.stack
            if stack is not None and settings.checkpointing:
                stack = replace(stack, period=math.lcm(stack.period, settings.every_n_layers))
            sizes = (0,) if stack is None else stack.sizes
            peaks, *more = (simulate(self.model, settings, stack, size) for size in sizes)
            if more and stack is not None:
                steps = (stack.num_layers - sizes[0]) / (sizes[1] - sizes[0])
                peaks = peaks.towards(more[0], steps)
            self.simulated[settings] = self._with_buffers(peaks, settings)
        return self.simulated[settings]

    def _reversible(self, settings: Settings, local_tokens: int) -> PhasePeaks:
        """Two streams instead of checkpoints; FSDP2 gathers the whole model, since its layers run as one."""
        if self.stack is None:
            raise NotImplementedError(
                f"`{type(self.model).__name__}` has no list of layers that could be reversible: plan it without."
            )
        layers = self.model.get_submodule(self.stack.name)
        trained, table = trained_numbers(layers), self.model.get_input_embeddings().weight
        if settings.optimizer == "lora":
            trained = count_adapters(self.model, self.stack, settings.lora_rank)
        peaks = self._at(reversible_settings(settings), local_tokens)
        return reversible_peaks(peaks, settings, self.stack.num_layers, table, trained)

    def _with_buffers(self, peaks: PhasePeaks, settings: Settings) -> PhasePeaks:
        """The same with the buffers of the wrapper, and with the factor of a measured step."""
        device = {}
        for phase, kinds in peaks.device.items():
            buffers = self._buffers(settings, phase[0]) + gathered_reference(self.model, settings, phase[0])
            kinds = {**kinds, "workspace": kinds["workspace"] + buffers}
            device[phase] = {kind: n * self.factor if kind in STEP_KINDS else n for kind, n in kinds.items()}
        return replace(peaks, device=device)

    def _buffers(self, settings: Settings, phase: str) -> int:
        """What the wrapper holds in addition to shards and gradients.

        FSDP2: the gathered head; while layers run, the weights of one and of the next and the buffer in which they
        arrive; in backward the gradients of one, and the buffer in which those of the last leave. DDP: its buckets, a
        second copy of the gradients.
        """
        if settings.wrapper == "none" or settings.world_size == 1:
            return 0
        if settings.wrapper == "ddp" and settings.optimizer == "lora":
            return 4 * count_adapters(self.model, self.stack, settings.lora_rank)
        if settings.wrapper == "ddp":
            return _count(self.model) * settings.weights_dtype.itemsize
        if settings.reversible:  # as one unit: weights stay gathered, and all gradients leave at the end
            return 2 * _count(self.model) * settings.compute_dtype.itemsize
        layers = [] if self.stack is None else self.model.get_submodule(self.stack.name)
        copies = {"forward": 3, "backward": 5}.get(phase.split()[0], 0)
        gathered = copies * max(map(_count, layers), default=0) + _count(self.model.get_output_embeddings())
        return gathered * settings.compute_dtype.itemsize


@dataclass(frozen=True)
class LinearFit:
    """The peaks of a step as straight lines over the tokens of one rank, through those at `start` and twice it."""

    start: int
    first: PhasePeaks
    second: PhasePeaks

    def at(self, local_tokens: int) -> PhasePeaks:
        """The peaks at any length."""
        return self.first.towards(self.second, local_tokens / self.start - 1)

    def longest(self, budget: float) -> int:
        """The most tokens at which no phase exceeds `budget` bytes."""
        lengths = []
        for phase in self.first.device.keys() & self.second.device.keys():
            here, there = (on_device(peaks.device[phase]) for peaks in (self.first, self.second))
            slope = (there - here) / self.start
            constant = here - slope * self.start
            if slope > 0:
                lengths.append((budget - constant) / slope)
            elif constant > budget:
                lengths.append(0)
        return max(0, int(min(lengths)))

    def longest_on_cpu(self, cpu_bytes: int, settings: Settings) -> int:
        """The most tokens whose checkpoints fit into the CPU memory of a node, rounded up as they are."""
        count = round(self.first.num_checkpoints)
        per_token = self.first.cpu / count / self.start
        each = cpu_bytes // (count * _processes(settings))
        return int(2 ** (each.bit_length() - 1) / per_token) if each else 0


def on_device(kinds: dict[str, float]) -> float:
    """The sum of the kinds that are on the device."""
    return sum(kinds[kind] for kind in DEVICE_KINDS)


def _start(settings: Settings) -> int:
    return max(_START, 2 * (settings.mlp_tile_size or 0), settings.loss_tile_size or 0)


def _processes(settings: Settings) -> int:
    return settings.processes_per_node or settings.world_size


def _on_cpu(peaks: PhasePeaks, settings: Settings) -> int:
    """Bytes of offloaded checkpoints: torch rounds each block of pinned memory up to a power of two."""
    count = round(peaks.num_checkpoints)
    if not count:
        return 0
    return _processes(settings) * count * 2 ** (round(peaks.cpu / count) - 1).bit_length()


def _count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _can_tile_loss(model: torch.nn.Module) -> bool:
    try:
        tile_loss(model).remove()
    except NotImplementedError:
        return False
    return True
