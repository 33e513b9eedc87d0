"""What the Hub's check of a model card accepts, as far as that can be said offline.

`huggingface_hub.ModelCard.validate` sends a card to the Hub, which answers with the first key that it does not take,
and refuses an upload for it. The rules here are those of its answers and of its documentation: identifiers of licences
and tasks, names of models and data sets, languages, and the form of everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)
TASKS = frozenset(
    """
    biology text-classification token-classification table-question-answering question-answering
    zero-shot-classification translation summarization feature-extraction text-generation text2text-generation
    fill-mask sentence-similarity text-to-speech text-to-audio automatic-speech-recognition audio-to-audio
    audio-classification audio-text-to-text voice-activity-detection depth-estimation image-classification
    object-detection image-segmentation text-to-image image-to-text image-to-image image-to-video
    unconditional-image-generation video-classification reinforcement-learning robotics tabular-classification
    tabular-regression tabular-to-text table-to-text multiple-choice text-ranking text-retrieval
    time-series-forecasting text-to-video image-text-to-text visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any other
    """.split()
)
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_LINK = re.compile(r"LICENSE(\.md|\.txt)?|https?://\S+")
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")


def is_hub_id(name: object) -> bool:
    """Whether `name` has the form of a repository's name on the Hub: `owner/name`, or one word."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def card_problems(metadata: dict[str, Any]) -> dict[str, str]:
    """The keys of a card's metadata that the Hub would refuse or ignore, each with the reason.

    Args:
        metadata (`dict`): the front matter, as `ModelCard.data.to_dict()` gives it.
    """
    found = {key: _problem(key, value) for key, value in metadata.items()}
    if "license_name" in metadata and metadata.get("license") != "other":
        found["license_name"] = "stands beside `license: other` only"
    return {key: problem for key, problem in found.items() if problem}


def _problem(key: str, value: Any) -> str | None:
    if key not in _RULES:
        return None
    takes_list, rule, reason = _RULES[key]
    values = value if isinstance(value, list) and takes_list is not None else [value]
    if takes_list and not isinstance(value, list):
        return "must be a list"
    bad = [one for one in values if not rule(one)]
    return f"has {str(bad[0])!r}, which {reason}" if bad else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\n" not in value


def _matches(pattern: re.Pattern) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and bool(pattern.fullmatch(value))


def _one_of(names: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _is_result(entry: Any) -> bool:
    """One model of `model-index`: a name and results, each with a task, a data set and measured values."""
    if not isinstance(entry, dict) or not _is_text(entry.get("name")) or not isinstance(entry.get("results"), list):
        return False
    for result in entry["results"]:
        task, data, metrics = (result.get(key) for key in ("task", "dataset", "metrics"))
        if not isinstance(task, dict) or not _is_text(task.get("type")):
            return False
        if data is not None and not (_is_text(data.get("type")) and _is_text(data.get("name"))):
            return False
        if not isinstance(metrics, list) or not all(_is_text(one.get("type")) and "value" in one for one in metrics):
            return False
    return True


# A key: whether it must be a list (True), may be one (False) or is none (None); the rule of a value; what breaks it.
_RULES: dict[str, tuple[bool | None, Callable[[Any], bool], str]] = {
    "license": (False, _one_of(LICENSES), "is no identifier of https://hf.co/docs/hub/repositories-licenses"),
    "license_name": (None, _matches(_SLUG), "is not lower case, digits, dots and dashes"),
    "license_link": (None, _matches(_LINK), "is neither an address nor `LICENSE`"),
    "base_model": (False, is_hub_id, "is no name of a model on the Hub"),
    "new_version": (None, is_hub_id, "is no name of a model on the Hub"),
    "base_model_relation": (None, _one_of(_RELATIONS), f"is none of {', '.join(_RELATIONS)}"),
    "datasets": (False, is_hub_id, "is no name of a data set on the Hub"),
    "pipeline_tag": (None, _one_of(TASKS), "is no task of https://hf.co/tasks"),
    "library_name": (None, _is_text, "is no text"),
    "language": (False, _matches(_LANGUAGE), "is no code of a language"),
    "tags": (True, _is_text, "is no text"),
    "metrics": (True, _is_text, "is no text"),
    "widget": (True, lambda value: isinstance(value, dict), "is no example"),
    "thumbnail": (None, _matches(re.compile(r"https?://\S+")), "is no address"),
    "model-index": (True, _is_result, "lacks a name, a task, a data set or a value"),
}
