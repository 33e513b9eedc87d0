"""Where a trained model comes from, for its card: the name of its base model on the Hub, and the licence of that.

A card is public and a folder of this machine is not, so a base model in a folder is named only where the folder itself
says which one it is: it lies in the Hub's cache, or its configuration, adapter or card names a model of the Hub.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from yaml import YAMLError

from .card_rules import LICENSES, is_hub_id


logger = logging.getLogger(__name__)

_IN_CACHE = re.compile(r"/models--([\w.-]+)/snapshots/")
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md", ".gz", ".zst", ".arrow")
_SECONDS = 5.0  # for the one question to the Hub, which a card can do without
_LICENSE_KEYS = ("license", "license_name", "license_link")


def is_hub_name(name: object) -> bool:
    """Whether `name` reads as `owner/name` on the Hub and is no file or folder here."""
    return isinstance(name, str) and name.count("/") == 1 and is_hub_id(name) and not os.path.exists(name)


def check_license(name: str | None) -> None:
    """`ValueError` for what is no identifier of a licence on the Hub, with the nearest one."""
    if name is None or name in LICENSES:
        return
    near = difflib.get_close_matches(name.lower(), sorted(LICENSES), 1)
    remedy = f"did you mean `{near[0]}`?" if near else "take `other` for one of your own."
    raise ValueError(f"`license` ({name}) is no identifier of a licence on the Hub: {remedy}")


def base_model_of(place: str | None) -> str | None:
    """The name on the Hub of a model that was loaded from `place`, a name or a folder; `None` if nothing says it."""
    if not place:
        return None
    if not os.path.isdir(place):
        if is_hub_name(place):
            return place
        cached = is_hub_id(place) and isinstance(try_to_load_from_cache(place, "config.json"), str)
        return place if cached and not os.path.exists(place) else None  # such as "gpt2"
    found = _IN_CACHE.search(os.path.realpath(place).replace(os.sep, "/") + "/")
    if found:
        return found[1].replace("--", "/")
    named = [
        _json(place, "adapter_config.json").get("base_model_name_or_path"),
        _json(place, "config.json").get("_name_or_path"),
        card_metadata(Path(place, "README.md")).get("base_model"),
    ]
    for name in named:
        name = name[0] if isinstance(name, list) and len(name) == 1 else name
        if is_hub_name(name):
            return name
    return None


def hub_datasets(places: Iterable[str | None]) -> list[str]:
    """The names on the Hub among places of data, in their order.

    A configuration or revision behind a name (`owner/name:config`) is left out, as is the rest of an address
    (`hf://datasets/owner/name@revision/file`).
    """
    found = []
    for place in filter(None, places):
        address = _ADDRESS.match(place)
        name = address[1] if address else place if os.path.exists(place) else re.split("[:@]", place)[0]
        if is_hub_name(name) and not name.endswith(_FILES):
            found.append(name)
    return list(dict.fromkeys(found))


def license_of(place: str | None, base_model: str | None) -> dict[str, str]:
    """The licence of the base model, as keys of a card's metadata; empty where it is not known.

    Read from the card in the model's folder, from the one in the Hub's cache, and else, for a model that was loaded by
    its name, from the Hub, unless offline.
    """
    cards = [Path(place, "README.md")] if place and os.path.isdir(place) else []
    cached = try_to_load_from_cache(base_model, "README.md") if base_model else None
    cards += [Path(cached)] if isinstance(cached, str) else []
    for card in cards:
        found = _license(card_metadata(card), base_model)
        if found:
            return found
    return _license(_ask_hub(base_model), base_model) if base_model and base_model == place else {}


def card_metadata(path: Path) -> dict[str, Any]:
    """The front matter of a card; empty where there is no card, or one that cannot be read."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return {}


def _json(folder: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _license(metadata: dict[str, Any], base_model: str | None) -> dict[str, str]:
    name = metadata.get("license")
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    if not isinstance(name, str) or not name:
        return {}
    if name in LICENSES:
        found = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}
        link = found.pop("license_link", None)
        if link and "://" in link:
            found["license_link"] = link
        elif link and base_model:  # a file of that repository, and not of this one
            found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
        return {**found, "license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "unknown"}


def _ask_hub(base_model: str) -> dict[str, Any]:
    """The card of a model that was downloaded by this name."""
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    try:
        card = HfApi().model_info(base_model, timeout=_SECONDS).card_data
    except Exception as error:  # of any HTTP client: a run that is over does not fail for want of a licence
        logger.info("the licence of `%s` was not found: %s", base_model, error)
        return {}
    return card.to_dict() if card is not None else {}
