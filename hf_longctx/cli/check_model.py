"""What `hf-longctx check` asks of a model: its configuration, its heads, and how its type is known to be exact."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..adapters.sparse.sparse_layers import count_sparse_layers, keeps_all_heads
from ..attention.registry import name_that_shards
from ..config.run import LongContextConfig
from ..data.model_files import check_model_files
from ..families import query_heads, values_of
from ..parallel.heads import HeadSplit, split_heads
from ..proof.build import AUTO_CLASSES
from ..proof.known_types import look_up
from ..proof.model_under_test import ModelUnderTest, read_config, task_of
from ..proof.result import EXACT, REFUSED, UNBUILDABLE, WORST_FIRST, WRONG, RowsResult
from ..proof.verification import verify
from ..trainer.checks import check_model


if TYPE_CHECKING:
    from .answer import Answer

TABLE, PROOF, NONE = "table", "proof", "none"
_PROVEN_SIZE = 2


@dataclass(frozen=True)
class CheckedModel:
    """A model that is looked at.

    Args:
        name (`str`): as it was given.
        config (`PretrainedConfig`): its configuration; of a type, that type's defaults.
        task (`str`): what it is for.
        is_type (`bool`): whether only a type was named, so that the configuration is nobody's in particular.
        remote (`bool`): whether its code is its own, which no proof of a tiny model builds.
    """

    name: str
    config: PretrainedConfig
    task: str
    is_type: bool
    remote: bool


@dataclass(frozen=True)
class Evidence:
    """How it is known what a type is.

    Args:
        source (`str`): `"table"`, `"proof"` or `"none"`.
        outcome (`str`): `"exact"`, `"refused"`, `"unbuildable"`, or `"unknown"` where nothing was asked.
        message (`str`): why, for an outcome other than exact.
        told (`str`): a line for people.
        rows (`dict[str, str]`): the outcome of each kind of rows.
        versions (`dict[str, str]`): with which it was proven.
    """

    source: str
    outcome: str
    message: str
    told: str
    rows: dict[str, str]
    versions: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("source", "outcome", "rows", "versions")}


class NoDefaultsError(ValueError):
    """A type whose defaults make no configuration, so that there is nothing to look at."""


def read_model(options: argparse.Namespace) -> CheckedModel:
    """The model that was named.

    Raises:
        ValueError: there is none, or it is no text model.
        NoDefaultsError: only a type was named, and it has no configuration by default.
    """
    if options.trust_remote_code:
        check_model_files(options.model)
        remote = {"trust_remote_code": options.trust_remote_code}
        config = AutoConfig.from_pretrained(options.model, **remote)
        return CheckedModel(options.model, config, options.task or "causal-lm", False, True)
    try:
        config = read_config(options.model)
    except Exception as error:
        if options.model not in CONFIG_MAPPING_NAMES:
            raise
        raise NoDefaultsError(_no_defaults(options.model, error)) from error
    return CheckedModel(
        options.model, config, options.task or task_of(config), options.model in CONFIG_MAPPING_NAMES, False
    )


def _no_defaults(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"`{name}` has no configuration by default ({reason}): give a folder or hub id with one."


def table_evidence(model: CheckedModel, options: argparse.Namespace) -> Evidence | None:
    """What the table of all types says, for kernels that are not chosen; `None` where it says nothing of this model.

    A configuration may do without what its type's defaults are refused for, so only a type is refused by the table.
    """
    if model.remote or options.inner_attention != "auto":
        return None
    known = look_up(model.config.model_type, model.task)
    if known is None or (known.outcome != EXACT and not model.is_type):
        return None
    told = (
        f"proven: a tiny `{known.model_type}` on {_PROVEN_SIZE} processes is exact on {_exact(known.rows)} rows "
        f"(table of all types, transformers {known.versions['transformers']})"
    )
    return Evidence(TABLE, known.outcome, known.message, told, known.rows, known.versions)


def prove(model: CheckedModel, options: argparse.Namespace, answer: Answer) -> Evidence:
    """The proof of a tiny model, unless it is not wanted or cannot be."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    if model.remote or options.no_proof:
        why = "code of its own is not proven here" if model.remote else "nothing is proven: the table does not know it"
        return Evidence(NONE, "unknown", "", why, {}, versions)
    name, inner = model.config.model_type, options.inner_attention
    with answer.working(f"the table does not know this `{name}`: {_PROVEN_SIZE} processes prove a tiny one"):
        found = verify(
            model.config, sequence_parallel_size=_PROVEN_SIZE, inner_attention=inner, packed=True, task=model.task
        )
    rows = {result.rows: result.outcome for result in found.rows}
    worst = min((result for result in found.rows if _is_shared(result.rows)), key=_badness)
    told = f"proven just now: a tiny `{name}` on {_PROVEN_SIZE} processes is exact on {_exact(rows)} rows"
    if worst.outcome == UNBUILDABLE:
        told = f"no tiny model of its type can be proven here: {worst.message}"
    outcome = REFUSED if worst.outcome == WRONG else worst.outcome
    return Evidence(PROOF, outcome, worst.message, told, rows, versions)


def _badness(result: RowsResult) -> int:
    return WORST_FIRST.index(result.outcome)


def _is_shared(kind: str) -> bool:
    """Packed rows are no condition of sharing."""
    return kind != "packed"


def _exact(rows: dict[str, str]) -> str:
    kinds = [kind for kind, outcome in rows.items() if outcome == EXACT]
    return f"{', '.join(kinds[:-1])} and {kinds[-1]}" if len(kinds) > 1 else "".join(kinds)


def split_of(model: CheckedModel, options: argparse.Namespace) -> tuple[HeadSplit | None, int]:
    """Who gets which heads, and how many layers gather keys of whole rows; `ValueError` or `NotImplementedError`
    where the model is refused."""
    size, config = options.sequence_parallel_size, model.config
    wanted = LongContextConfig(sequence_parallel_size=size, inner_attention=options.inner_attention)
    if model.task == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config = copy.deepcopy(config)
        config.is_decoder = True  # as transformers requires for such an encoder that predicts the next token
    remote = {"trust_remote_code": options.trust_remote_code}
    build = partial(AUTO_CLASSES[model.task].from_config, attn_implementation="ulysses", **remote)
    with torch.device("meta"):
        built = _built(model, build, config, size)
    check_model(built, wanted)
    config = built.config
    heads, gathering = query_heads(config), count_sparse_layers(built)
    if heads is None or keeps_all_heads(built):  # no layer of it trades heads
        return None, gathering
    counts = zip(values_of(config, "num_attention_heads"), values_of(config, "num_key_value_heads"))
    key_value = next((theirs for mine, theirs in counts if mine == heads and theirs), heads)
    return split_heads(heads, key_value, size), gathering


def _built(model: CheckedModel, build: Any, config: PretrainedConfig, size: int) -> Any:
    """The model of a configuration; of a type that is only named and whose defaults build none, a tiny one."""
    try:
        return build(config)
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (name_that_shards(),):
            raise ValueError(
                f"{model.name} looks up attn_implementation={error} in a list of its own and does not find it: set "
                "`sequence_parallel_size` to 1."
            ) from error
        if not model.is_type:
            raise ValueError(
                f"`{model.name}` builds no model from its configuration ({_reason(error)}): check the file, or the "
                "installed version of transformers."
            ) from error
    tested = ModelUnderTest.of(config, model.task, size)
    if tested.config is None:
        raise ValueError(f"the defaults of type `{model.name}` build no model to look at, and {tested.problem}")
    try:
        return build(tested.config)
    except Exception as error:
        raise ValueError(
            f"no model of type `{model.name}` can be built, from its defaults or in small ({_reason(error)}): name a "
            "checkpoint of it."
        ) from error


def _reason(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no more is known'])[0]}"
