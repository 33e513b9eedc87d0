"""`verify`: is this model, shared by several processes, the model of one process? Answered here, in seconds, without
a GPU.

A tiny random model of the same architecture is compared with itself: loss, outputs and every gradient, on real
processes. The other side is one process, whole rows and transformers' own attention.
Price: that of importing torch in each process, then seconds.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .model_under_test import ModelUnderTest, Setting, kinds_of_task, read_config, validate_task
from .ranks import Ranks, RanksError
from .result import EXACT, WORST_FIRST, WRONG, RowsResult, VerifyResult


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, PreTrainedModel

SECONDS = 600.0


def verify(
    model: str | PretrainedConfig | PreTrainedModel | SentenceTransformer,
    *,
    sequence_parallel_size: int = 2,
    data_parallel_size: int = 1,
    inner_attention: str = "auto",
    packed: bool = False,
    wrapper: str = "none",
    dtype: str = "float32",
    full: bool = False,
    task: str | None = None,
    bidirectional: bool = False,
    seconds: float = SECONDS,
) -> VerifyResult:
    """Compare a model that several processes share with the same model in one process.

    Args:
        model (`str`, `PretrainedConfig`, `PreTrainedModel` or `SentenceTransformer`): hub id, folder, model type such
            as `"qwen3"`, a configuration, or a model. A tiny random model of that architecture is built from it.
        sequence_parallel_size (`int`, *optional*, defaults to 2): processes that share each row.
        data_parallel_size (`int`, *optional*, defaults to 1): groups of them, each with rows of its own.
        inner_attention (`str`, *optional*, defaults to `"auto"`): see [`LongContextConfig`].
        packed (`bool`, *optional*, defaults to `False`): compare packed rows with their documents one by one, too;
            with `"dpo"`, rows without their padding.
        wrapper (`str`, *optional*, defaults to `"none"`): `"ddp"` or `"fsdp2"` averages the gradients.
        dtype (`str`, *optional*, defaults to `"float32"`): in which what exceeds its tolerance is decided in float64;
            or `"float64"`.
        full (`bool`, *optional*, defaults to `False`): take the model with its own size and weights, once a process.
        task (`str`, *optional*): `"causal-lm"`, `"masked-lm"`, `"multimodal-lm"` (on text alone) or `"encoder"`, where
            a type is several. `"embedding"`: compare a sentence-transformer, packed and shared, with the padded one.
            `"dpo"` and `"reward"`: pairs of answers, whose rows the model cuts itself.
        bidirectional (`bool`, *optional*, defaults to `False`): with `"embedding"`, a decoder without its causal mask.
        seconds (`float`, *optional*, defaults to 600): time limit.

    Returns:
        [`VerifyResult`]: true in a condition if every number is exact; `raise_unless_exact()` for tests.

    Raises:
        ValueError: an argument that no proof could use, or a `model` that cannot be found.
        ImportError: `"embedding"` without sentence-transformers, `"dpo"` or `"reward"` without TRL and PEFT.

    Communication: none with the caller's processes; it starts its own.
    """
    began = time.perf_counter()
    validate_task(task, bidirectional)
    kinds = kinds_of_task(task, packed)
    setting = Setting(sequence_parallel_size, data_parallel_size, inner_attention, kinds, wrapper, dtype)
    with _config_and_weights(model, full) as (config, weights):
        if bidirectional:
            config = copy.deepcopy(config)
            config.get_text_config().is_causal = False
        tested = ModelUnderTest.of(config, task, sequence_parallel_size, weights, inner_attention)
        with Ranks(setting.world_size, _threads(setting.world_size, full)) as ranks:
            rows = run_proof(ranks, tested, setting, seconds)
    spent = time.perf_counter() - began
    return VerifyResult(tested.name, tested.task, setting.world_size, sequence_parallel_size, rows, spent)


def run_proof(ranks: Ranks, tested: ModelUnderTest, setting: Setting, seconds: float) -> tuple[RowsResult, ...]:
    """The outcome on every kind of rows, from ranks that live on. A rank that stops responding is a defect."""
    from .compare import prove

    try:
        answers = ranks.run(prove, tested, setting, seconds=seconds)
    except RanksError as error:
        known = [answer for answer in error.answers if answer is not None]
        if any(rows.outcome != EXACT for answer in known for rows in answer):
            return merge(known)
        message = f"a process failed: {_last_line(error)}"
        return tuple(RowsResult(kind, WRONG, message=message) for kind in setting.kinds)
    return merge(answers)


def merge(answers: list[list[RowsResult]]) -> tuple[RowsResult, ...]:
    """One result for each kind of rows: that of the rank with the worst outcome, the first among equals."""
    return tuple(min(rows, key=lambda result: WORST_FIRST.index(result.outcome)) for rows in zip(*answers))


@contextlib.contextmanager
def _config_and_weights(model, full: bool) -> Iterator[tuple[PretrainedConfig, str | None]]:
    """The configuration, and where the weights are if they are wanted."""
    if isinstance(model, str):
        yield read_config(model), model if full else None
    elif hasattr(model, "save_pretrained") and not hasattr(model, "to_diff_dict"):
        with tempfile.TemporaryDirectory(prefix="hf_longctx_") as folder:
            if full:
                model.save_pretrained(folder)
            inner = model if hasattr(model, "config") else model[0]  # of a sentence-transformer
            yield inner.config, folder if full else None
    elif full:
        raise ValueError(
            "`full` (True) needs weights, but `model` is a configuration: pass a hub id, a folder or the model."
        )
    else:
        yield model, None


def _threads(world_size: int, full: bool) -> int:
    """One for a tiny model; a real one gets the machine."""
    return max(1, (os.cpu_count() or 1) // world_size) if full else 1


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
