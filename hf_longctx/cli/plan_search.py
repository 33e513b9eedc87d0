"""The search of `hf-longctx plan`: every memory preset on every number of GPUs that may share a row, and the cheapest
that fits."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ..adapters.hashed import refuse_unhashable
from ..config.lsh_settings import LSH, LSHConfig
from ..config.run import validate_inner_attention
from ..data.model_files import check_model_files
from ..planner.measure import can_measure, free_bytes, measure_in_process, shorten
from ..planner.memory_plan import USABLE_SHARE, Planner
from ..planner.presets import PRESETS, Preset
from ..planner.settings import Settings
from .plan_cells import num_workers, plan_all
from .plan_json import facts_of
from .plan_recipe import write_recipe
from .plan_report import (
    GIB,
    Cell,
    Speed,
    draw_plan,
    format_number,
    print_cells,
    print_facts,
    validate_outputs,
)
from .plan_saving import GPUS_PER_NODE
from .plan_sizes import print_sizes


if TYPE_CHECKING:
    from .answer import Answer


TASKS = ("sft", "dpo", "reward")
_SAVING = ("save_seconds", "hours_between_failures")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_MEASURED_TOKENS = {"cpu": 1024, "cuda": 16384}
_MEASURED_LAYERS = 2
# Of a GPU; a run of shorter rows needs no plan.
_LEAST_TOKENS = 1024


def plan_rows(answer: Answer, options: argparse.Namespace) -> None:
    """Print the plan, draw and write what is asked for; raise the message if it is refused."""
    _check_options(options)
    target = None if options.target_tokens is None else parse_tokens(options.target_tokens)
    config = _read_config(options.model)
    settings = _settings(options, config)
    planner = Planner(config, scores_rows=True) if options.task == "reward" else Planner(config)
    if settings.num_hashes is not None:
        refuse_unhashable(planner.model)
    if options.measure:
        planner = _calibrate(answer, planner)
    _report(answer, options, planner, settings, target)


def parse_tokens(text: str) -> int:
    """`"131072"`, `"128K"`, `"1.5M"` or `"1e6"` as a number; a K is 1,024 tokens and an M 1,048,576."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\d{1,2})?)([KM]?)", text.strip().upper())
    tokens = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if tokens < 1:
        raise ValueError(f"`--target_tokens` ({text}) must be a number of tokens, such as 131072, 128K or 1M.")
    return tokens


def recommend(cells: list[Cell], target: int | None) -> Cell | None:
    """The cheapest preset on which the target fits, with the fewest ranks a row; without a target the longest row."""
    names = list(PRESETS)
    if target is None:
        return max((cell for cell in cells if cell.longest), key=lambda cell: cell.longest, default=None)
    fitting = [cell for cell in cells if cell.longest >= target]
    return min(fitting, key=lambda cell: (names.index(cell.preset.name), cell.size), default=None)


def _report(
    answer: Answer, options: argparse.Namespace, planner: Planner, settings: Settings, target: int | None
) -> None:
    console, memory = answer.console, (int(options.gpu_memory * GIB), _bytes(options.cpu_memory))
    wanted = [(size, preset) for size in _sizes(options.gpus, planner) for preset in _presets(settings)]

    def plan(task: tuple[int, Preset]) -> Cell:
        size, preset = task
        sharing = settings.of(tokens=target or size, sequence_parallel_size=size)
        return _plan_cell(planner, preset, sharing, target, *memory)

    what = f"simulating {len(wanted)} ways to run it: presets, and GPUs that share a row"
    with answer.working(what):
        tell = lambda done: answer.progress(f"{what}; {done} done")
        cells: list[Cell] = plan_all(planner, plan, wanted, tell, 1 if options.measure else num_workers(len(wanted)))
    best = recommend(cells, target)
    speed = Speed.of(planner.config, options.peak_tflops, options.utilisation)
    if settings.num_hashes is not None:
        speed = Speed(None, "the operations of LSH attention are not counted", speed.tflops)
    answer.facts |= facts_of(options, planner, settings, cells, best, target, speed)
    print_facts(console, options, planner, settings, speed)
    print_cells(console, cells, best, target, speed)
    if settings.reversible and target is not None:
        print_sizes(answer, planner.config, cells[-1].settings.of(tokens=target), memory[0])
    if options.output and draw_plan(Path(options.output), planner, cells, best or cells[-1], memory[0]):
        answer.facts["picture"] = options.output
        answer.print(f"wrote {options.output}")
    elif options.output:
        missing = f"warning: `{options.output}` was not drawn, matplotlib is missing:"
        answer.print(f"{missing} run `pip install hf-longctx[demo]`")
    if best is None:
        raise ValueError(_why_not(planner, cells, target, options, *memory))
    if options.write:
        write_recipe(Path(options.write), options.model, best, target, options.task)
        answer.facts["recipe"] = options.write
        answer.print(f"wrote {options.write}: change the lines marked `<-`")


def _presets(settings: Settings) -> list[Preset]:
    """Those that make sense: reversible layers keep nothing to checkpoint."""
    same = "loss" if settings.whole_rows else ""  # the losses of pairs are tiled without it
    return [
        preset
        for preset in PRESETS.values()
        if preset.name != same and not (settings.reversible and preset.checkpointing)
    ]


def _plan_cell(
    planner: Planner,
    preset: Preset,
    settings: Settings,
    target: int | None,
    device_bytes: int,
    cpu_bytes: int | None,
) -> Cell:
    settings = planner.preset(preset, settings)
    longest = planner.longest_tokens(settings, device_bytes, cpu_bytes)
    shown = target or longest
    settings = settings.of(tokens=max(shown, settings.sequence_parallel_size))
    return Cell(preset, settings, longest, planner.breakdown(settings) if shown else None)


def _why_not(
    planner: Planner,
    cells: list[Cell],
    target: int | None,
    options: argparse.Namespace,
    device_bytes: int,
    cpu_bytes: int | None,
) -> str:
    """The longest row that fits, and what the wanted one would need."""
    widest = max(cells, key=lambda cell: (cell.longest, cell.size, list(PRESETS).index(cell.preset.name)))
    tokens = target or _LEAST_TOKENS * widest.size
    settings = widest.settings.of(tokens=tokens)
    breakdown = planner.breakdown(settings)
    needs = [f"{format_number(breakdown.device / USABLE_SHARE / GIB)} GiB a GPU"]
    if cpu_bytes is not None and breakdown.cpu > cpu_bytes:
        needs.append(f"{format_number(breakdown.cpu / GIB)} GiB of CPU memory a node")
    wanted = f"rows of {tokens:,} tokens need {' and '.join(needs)}"
    for times in (2, 4, 8):
        size = _sizes(options.gpus * times, planner)[-1]
        more = settings.of(
            sequence_parallel_size=size,
            world_size=options.gpus * times,
            processes_per_node=min(options.gpus * times, GPUS_PER_NODE),
            wrapper="fsdp2" if settings.wrapper == "none" else settings.wrapper,
        )
        if planner.fits(more, device_bytes, cpu_bytes):
            wanted += f", or {options.gpus * times} GPUs ({size} a row)"
            break
    if not widest.longest:
        return f"no row fits into {options.gpus} x {options.gpu_memory:g} GiB on any preset: {wanted}."
    return (
        f"`--target_tokens` ({tokens:,}) fit on no preset: the longest row is {widest.longest:,} tokens "
        f"('{widest.preset.name}', {widest.size} GPUs a row); {wanted}."
    )


def _sizes(gpus: int, planner: Planner) -> list[int]:
    """How many GPUs may share a row: what divides them all, up to the query heads."""
    return [size for size in range(1, gpus + 1) if gpus % size == 0 and size <= planner.num_heads]


def _calibrate(answer: Answer, planner: Planner) -> Planner:
    """A planner corrected by one measured step of a few layers on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not can_measure(device):
        raise ValueError("`--measure` on a CPU reads Linux's high-water mark, which is not here: leave it out.")
    config = shorten(planner.config, _MEASURED_LAYERS)
    short = Planner(config)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = _MEASURED_TOKENS[device]
    settings = Settings(tokens=tokens, compute_dtype=dtype, optimizer="sgd", on_gpu=device == "cuda")
    settings = short.preset("loss", settings)
    planned, free = short.breakdown(settings), free_bytes(device)
    if planned.device > 0.9 * free:
        raise ValueError(
            f"`--measure` needs {planned.device / GIB:.1f} GiB for {_MEASURED_LAYERS} layers and {tokens:,} tokens, "
            f"and {free / GIB:.1f} GiB are free on this machine: leave it out, or measure on a larger one."
        )
    with answer.working("measuring one step"):
        measured = measure_in_process(config, settings, device)
    states = planned.weights + planned.gradients + planned.optimizer
    factor = (measured - states) / (planned.device - states)
    if factor <= 0:
        raise ValueError(
            f"`--measure` found {measured / GIB:.2f} GiB, less than the weights alone: this machine cannot tell what "
            "a step takes; leave it out."
        )
    answer.facts["measured"] = {"bytes": measured, "planned_bytes": planned.device, "factor": factor}
    answer.print(
        f"measured on this {device.upper()} with {_MEASURED_LAYERS} layers and {tokens:,} tokens: "
        f"{measured / GIB:.2f} GiB; planned {planned.device / GIB:.2f} GiB ({planned.device / measured - 1:+.1%}); "
        f"activations are multiplied by {factor:.3f}"
    )
    return Planner(planner.config, factor)


def _settings(options: argparse.Namespace, config: PretrainedConfig) -> Settings:
    lsh = LSHConfig.of_model(config.get_text_config())
    if lsh is None and options.inner_attention == LSH:
        lsh = LSHConfig()
    return Settings(
        tokens=1,
        world_size=options.gpus,
        processes_per_node=min(options.gpus, GPUS_PER_NODE),
        weights_dtype=torch.bfloat16 if options.optimizer == "lora" else torch.float32,
        optimizer=options.optimizer,
        wrapper=options.wrapper or ("fsdp2" if options.gpus > 1 else "none"),
        reversible=options.reversible,
        accumulates=True,  # so that the plan holds for any number of accumulation steps
        num_hashes=None if lsh is None else lsh.num_hashes,
        **_pairs(options),
    )


def _pairs(options: argparse.Namespace) -> dict[str, Any]:
    """What a task makes of a row: a pair of answers is two, and DPO compares them with a reference."""
    if options.task == "sft":
        return {}
    reference = "none"
    if options.task == "dpo" and not options.precompute_ref_log_probs:
        reference = "adapter" if options.optimizer == "lora" else "model"
    return {"rows": 2, "whole_rows": True, "reference": reference}


def _read_config(model: str) -> PretrainedConfig:
    check_model_files(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"`{model}` is no model that transformers can read ({reason}): give a hub id, a folder with a "
            "config.json, or the path of one."
        ) from error


def _check_options(options: argparse.Namespace) -> None:
    for name in ("gpus", "gpu_memory", "cpu_memory", "peak_tflops", "utilisation", *_SAVING):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`--{name}` ({value:g}) must be more than 0, and finite.")
    if options.task not in TASKS:
        raise ValueError(f"`--task` ({options.task}) must be one of {', '.join(TASKS)}.")
    if options.precompute_ref_log_probs and options.task != "dpo":
        raise ValueError(
            f"`--precompute_ref_log_probs` leaves out the reference model of DPO, and `--task` is {options.task}: set "
            "it to dpo, or leave the flag out."
        )
    if options.task != "sft" and options.reversible:
        raise ValueError(
            f"`--reversible` layers are not trained on pairs, and `--task` is {options.task}: leave one of them out."
        )
    if options.utilisation > 1:
        raise ValueError(f"`--utilisation` ({options.utilisation:g}) is a share of the peak: give at most 1.")
    if options.reversible and options.write:
        raise ValueError(
            "`--write` makes a file for `hf-longctx sft`, which trains a model further, and `--reversible` is for new "
            "ones: leave one of them out, and put `reversible_layers: true` into a file for `hf-longctx pretrain`."
        )
    validate_outputs(options.output, options.write)
    validate_inner_attention(options.inner_attention)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
