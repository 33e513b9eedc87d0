"""Where the pairs of embedding training come from: sources by name, what of them is here, and what is not.

A source is a data set on the Hub (`org/name`, `org/name:config`), one file of a data set there
(`hf://datasets/org/name/file.jsonl.gz`), a jsonl, parquet or csv file or a folder of them, or pairs from installed
packages (`docstrings:`, `modules:`, see `docstrings.py`). An unavailable source is logged and left out.

Files of JSON lines may hold objects with a key a column, or what the training data of sentence-transformers hold:
`[anchor, positive]`, triplets, `{"set": [...]}`, `{"query": ..., "pos": [...], "neg": [...]}`. Of several positives or
negatives one is taken, always the same. `embed_files.py` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfFileSystem
from huggingface_hub.constants import HF_HUB_OFFLINE


try:
    from datasets import Dataset, IterableDataset, load_dataset
    from datasets.exceptions import DatasetGenerationError
except ImportError as error:
    raise ImportError("The sources of `embed` need datasets: `pip install hf-longctx[embedding]`.") from error

from ..config.sources import read_mapping
from ..data.data_files import is_utf8
from ..data.files import irregular, is_inside
from ..data.sources.plan import load_source_weights
from ..data.sources.rows import LABEL_COLUMNS
from .data_kinds import explain_source, refuse_documents, refuse_rows_without_pairs
from .docstrings import FUNCTIONS, MODULES, mine_functions, mine_modules
from .document_places import PACKAGE, model_folder
from .embed_files import HUB_FILES, LINES, TABLES, open_file, open_folder


MINED = {FUNCTIONS: mine_functions, MODULES: mine_modules}


@dataclass
class SourceArguments:
    """Which sources there are."""

    sources: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Name of every source and where it is, as JSON on the command line."}
    )
    source_columns: dict[str, list[str]] | str | None = field(
        default=None, metadata={"help": "The columns to use of a source and their order, where it has others."}
    )
    num_texts: int | None = field(
        default=None, metadata={"help": "Use only the first so many texts of every row: 2 makes pairs of triplets."}
    )
    sources_config: str | None = field(
        default=None,
        metadata={"help": "A `data_config.json` with names, rows, weights; `package:NAME/file` if a package has it."},
    )
    sources_at: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Beginnings of names in `sources_config` and where the rest lies; '' is nowhere public."},
    )
    sources_renamed: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Names in `sources_config` whose public files have another name."}
    )
    sources_folder: str | None = field(
        default=None, metadata={"help": "Folder with files of `sources_config`, looked at before `sources_at`."}
    )
    shortest_text: int | None = field(
        default=None, metadata={"help": "Leave out rows whose longest text has fewer characters."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read all sources while training."})
    eval_source: str | None = field(
        default=None,
        metadata={"help": "A source's name, from which rows are held out, or where other pairs are, for retrieval."},
    )
    num_eval_rows: int = field(default=1000, metadata={"help": "Pairs of `eval_source` that are searched."})

    def __post_init__(self) -> None:
        for name in ("sources", "source_columns", "sources_at", "sources_renamed"):
            value = read_mapping(name, getattr(self, name))
            kind = list if name == "source_columns" else str
            if value is not None and not (
                isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())
            ):
                wanted = "lists of columns" if kind is list else "texts"
                raise ValueError(f"`{name}` ({value!r}) must map names to {wanted}: write it like the recipes do.")
            setattr(self, name, value)


@dataclass(frozen=True)
class Wanted:
    """A source of the recipe: where it should be, and what is known of it."""

    name: str
    place: str
    rows: int | None = None
    weight: float | None = None
    refused: str | None = None


def list_sources(args: SourceArguments) -> list[Wanted]:
    """All sources that the recipe asks for.

    Raises:
        ValueError: none is asked for, or a name in `sources_config` has no place.
    """
    sources: Any = args.sources or {}
    wanted = [Wanted(name, place) for name, place in sources.items()]
    if args.sources_config:
        config = _installed(args.sources_config)
        renamed: Any = args.sources_renamed or {}
        for name, source in load_source_weights(config).items():
            place, root = _place(name, renamed.get(name, name), args)
            refused = None if root is None or is_inside(place, root) else f"{name} leads out of {root}"
            wanted.append(Wanted(name, place, source.rows, source.weight, refused))
    if not wanted:
        raise ValueError("`sources` is missing: give at least one name with a place, such as `pairs: pairs.jsonl`.")
    return wanted


def _place(name: str, file: str, args: SourceArguments) -> tuple[str, str | None]:
    """Where a name of `sources_config` lies, and the folder here that it must not lead out of."""
    folder = args.sources_folder
    if folder and Path(folder, name).is_file():
        return str(Path(folder, name)), folder
    places: Any = args.sources_at or {}
    for beginning, place in sorted(places.items(), key=lambda item: -len(item[0])):
        if name.startswith(beginning):
            found = place + file.removeprefix(beginning) if place else ""
            return found, os.path.dirname(place) or "." if os.path.lexists(found) else None
    if folder:
        return str(Path(folder, name)), folder
    raise ValueError(f"`sources_at` has no beginning of `{name}`: add one, or give `sources_folder`.")


def open_sources(wanted: list[Wanted], args: SourceArguments) -> tuple[dict[str, Any], dict[str, str]]:
    """The sources that are here by name, and why the others are not.

    Raises:
        ValueError: none is here.
    """
    present, absent, hub = {}, {}, HfFileSystem()
    for source in wanted:
        reason = source.refused or why_absent(source.place, hub)
        if reason is None:
            try:
                present[source.name] = open_source(source.name, source.place, args)
                continue
            except OSError as error:  # the Hub is offline, or the data set is private or gone
                reason = f"{type(error).__name__}: {_reason(error)}"
        absent[source.name] = reason
    if not present:
        name, reason = next(iter(absent.items()))
        raise ValueError(
            f"none of the {len(wanted)} sources is here, so there is nothing to train on; `{name}`: {reason}. Give "
            "`sources_folder`, or `sources` that this machine has."
        )
    return present, absent


def why_absent(place: str, hub: HfFileSystem) -> str | None:
    """Why nothing can be read at a place, or `None` if that is worth a try."""
    if not place:
        return "published nowhere in this form"
    if place.startswith(tuple(MINED)) or os.path.isdir(place):
        return None
    if os.path.lexists(place):
        other = irregular(place)
        return None if other is None else f"{place} is {other} and no regular file"
    if place.startswith(HUB_FILES):
        if HF_HUB_OFFLINE:
            return f"{place} is on the Hub, and this machine is offline"
        try:
            return None if hub.exists(place) else f"{place} does not exist"
        except OSError as error:
            return f"{place} cannot be reached ({type(error).__name__})"
    is_file = place.startswith((".", "/", "~")) or place.count("/") != 1 or Path(place).suffix in (".gz", *TABLES)
    return f"there is no {place}" if is_file or place.endswith((".jsonl", ".json")) else None


def open_source(name: str, place: str, args: SourceArguments):
    """Rows of one source, in memory or as a stream."""
    columns: Any = (args.source_columns or {}).get(name)  # type: ignore[union-attr]
    mined = next((kind for kind in MINED if place.startswith(kind)), None)
    is_here, kind = not place.startswith(HUB_FILES), TABLES.get(Path(place).suffix)
    dataset = None
    if mined:
        rows = partial(MINED[mined], place[len(mined) :])
        dataset = IterableDataset.from_generator(rows) if args.streaming else Dataset.from_list(list(rows()))
    elif place.endswith(LINES) or (kind and is_here and os.path.lexists(place)):
        try:
            dataset = open_file(place, columns, args.num_texts, args.streaming)
        except ValueError as error:
            raise explain_source(name, place, columns, error) from error
    elif os.path.isdir(place):
        dataset = open_folder(place, columns, args.num_texts, args.streaming)
    if dataset is None:
        refuse_documents(name, place)
        options: dict[str, Any] = {"split": "train", "streaming": args.streaming}
        path, _, config = place.partition(":")
        try:
            dataset = (
                load_dataset(kind, data_files=place, **options)
                if kind
                else load_dataset(path, config or None, **options)
            )
        except (DatasetGenerationError, EOFError, StopIteration) as error:
            raise ValueError(
                f"source `{name}`: `{place}` cannot be read ({_reason(error)}): check its files."
            ) from error
        if not args.streaming and os.path.isdir(path) and not all(map(is_utf8, dataset.data.columns)):
            raise ValueError(f"source `{name}`: the texts in `{place}` are not UTF-8: convert the files.")
    refuse_rows_without_pairs(name, place, dataset, columns)
    dataset = choose_texts(dataset, columns, args.num_texts)
    if args.shortest_text:
        dataset = dataset.filter(partial(_is_long, shortest=args.shortest_text))
    return dataset


def _reason(error: BaseException) -> str:
    said = str(error.__cause__ or error).strip() or type(error).__name__
    return said.splitlines()[0][:120]


def _is_long(row: dict, shortest: int) -> bool:
    return max(len(text) for text in row.values() if isinstance(text, str)) >= shortest


def choose_texts(dataset, columns: list[str] | None, num_texts: int | None):
    """The wanted columns of a data set, in order; labels stay."""
    found = dataset.column_names or list(next(iter(dataset)))
    for column in columns or ():
        if column not in found:
            raise ValueError(f"`source_columns` names `{column}`, but the source has {', '.join(found)}.")
    texts = list(columns) if columns else [column for column in found if column not in LABEL_COLUMNS]
    texts = texts[:num_texts]
    labels = [column for column in found if column in LABEL_COLUMNS] if num_texts is None else []
    if [*texts, *labels] == found:
        return dataset
    return dataset.select_columns([*texts, *labels])


def describe_absent(wanted: list[Wanted], absent: Mapping[str, str]) -> dict[str, object]:
    """What is missing: how many sources, their rows and the share of the weight, as far as known."""
    missing = [source for source in wanted if source.name in absent]
    known = [source.weight for source in wanted if source.weight is not None]
    weight = sum(source.weight or 0 for source in missing) / sum(known) if known else None
    return {
        "num_sources": len(wanted),
        "num_absent": len(missing),
        "absent_rows": sum(source.rows or 0 for source in missing) if known else None,
        "absent_weight_share": weight,
        "absent": {source.name: absent[source.name] for source in missing},
    }


def present_weights(wanted: list[Wanted], present: Mapping[str, object], given) -> dict[str, float] | None:
    """The weights of the sources that are here: those given, or those of `sources_config`."""
    weights = given or {source.name: source.weight for source in wanted if source.weight is not None}
    known = {source.name for source in wanted}
    return {name: weight for name, weight in weights.items() if name in present or name not in known} or None


def _installed(path: str) -> Path:
    if not path.startswith(PACKAGE):
        return Path(path)
    package, _, rest = path[len(PACKAGE) :].partition("/")
    return Path(model_folder(PACKAGE + package), rest)
