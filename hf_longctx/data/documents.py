"""From what people with long context have on disk to rows of tokens.

`load_documents` reads a folder of documents (text, Markdown, code: one file is one row, whole), jsonl or parquet
files, or a dataset on the Hub. `split_into_rows` cuts documents into rows of tokens without throwing text away, as
truncation would. Reading, caching and streaming are `datasets`' own; it is imported here only, when needed.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_files import load_rows
from .files import count_reasons, describe, irregular, select_files, shown, walk
from .text_files import read_folder


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENT_EXTENSIONS = tuple(
    ".txt .md .markdown .rst .org .adoc .tex .html .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt "
    ".scala .js .jsx .ts .tsx .swift .rb .php .pl .lua .r .jl .sh .sql .hs .ml .ex .erl .zig .cs".split()
)
DATA_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_ONLY_WHERE_NAMED = (".json", ".csv")  # in a folder these are settings and tables, as a rule
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_documents(
    path_or_name: str,
    *,
    split: str = "train",
    text_field: str | None = "text",
    config_name: str | None = None,
    extensions: Sequence[str] | None = None,
    streaming: bool = False,
    or_columns: Collection[str] = (),
) -> Dataset | IterableDataset:
    """Read documents from wherever they are.

    Args:
        path_or_name (`str`):
            A folder of documents, a folder of jsonl or parquet files, one such file or a CSV file, a glob such as
            `"notes/**/*.md"`, or the name of a dataset on the Hub. In a folder of documents every file is one row with
            the columns `text` and `path`; hidden files are left out. Undecodable, binary and empty ones, and what is
            no regular file inside the folder (pipes, devices, links that lead out), are skipped and counted in the
            log.
        split (`str`, *optional*, defaults to `"train"`): split of a data file or Hub dataset, as `datasets` writes it.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column that must exist and, in a file, hold a text in every row; `None` checks nothing.
        config_name (`str`, *optional*): configuration of a Hub dataset.
        extensions (`Sequence[str]`, *optional*):
            File endings that count as documents, instead of the usual ones of text, Markdown and source code. Giving
            them says that the folder holds documents, whatever else lies in it.
        streaming (`bool`, *optional*, defaults to `False`): return an `IterableDataset` that reads while training.
        or_columns (`Collection[str]`, *optional*):
            Columns that serve instead of `text_field`, which then need not exist; next to one of them it is not
            checked.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: files in the order of their paths.

    Raises:
        ValueError: nothing is there, nothing in it is readable, the text column is missing, or a row of a file has no
            text in it; the message names the file and the line.
    """
    datasets = _import_datasets()
    root, files, skipped = _find_files(path_or_name)
    if files is None:
        dataset = _load_from_hub(datasets, path_or_name, config_name, split, streaming)
    else:
        kind, files = _choose_files(path_or_name, files, extensions, skipped)
        num_files = len(files) + skipped.total()
        if kind == "documents":
            dataset = read_folder(path_or_name, root, files, skipped, split=split, streaming=streaming)
        else:
            options: dict[str, Any] = {
                "split": split,
                "streaming": streaming,
                "text_field": text_field,
                "or_columns": or_columns,
            }
            dataset = load_rows(path_or_name, kind, files, skipped, **options)
        if skipped.total():
            reasons = count_reasons(skipped)
            logger.warning("skipped %d of %d files in `%s`: %s", skipped.total(), num_files, path_or_name, reasons)
    if text_field is not None and not or_columns:
        _check_column(path_or_name, text_field, column_names(dataset))
    return dataset


def split_into_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    row_tokens: int,
    *,
    text_field: str = "text",
    join_documents: bool = False,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize whole documents, each closed by the end-of-sequence token, and cut them into consecutive rows.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): documents in the column `text_field`.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        row_tokens (`int`): longest row, in tokens.
        text_field (`str`, *optional*, defaults to `"text"`): column of the text.
        join_documents (`bool`, *optional*, defaults to `False`):
            `False`: a row holds one document or a part of it, so rows have up to `row_tokens` tokens; only a single
            last token, which has nothing to predict, is left out. `True`: documents follow one another and every row
            has exactly `row_tokens` tokens, as in pretraining; only the unfinished last row is left out.
        num_proc (`int`, *optional*): processes that tokenize.

    Returns:
        the same kind of dataset with the columns `input_ids` and `labels` (equal; the model shifts).

    Raises:
        ValueError: `row_tokens` is below 2, a row holds no text, or the documents do not fill one row.
    """
    if row_tokens < 2:
        raise ValueError(f"`row_tokens` ({row_tokens}) must be at least 2: one token to read and one to predict.")
    datasets = _import_datasets()
    names = column_names(dataset)
    _check_column("the dataset", text_field, names)
    in_memory = isinstance(dataset, datasets.Dataset)
    options = {"num_proc": num_proc, "desc": "Tokenizing documents"} if in_memory else {}
    end = tokenizer.eos_token_id

    def tokenize(batch: dict, numbers: list[int]) -> dict:
        check_texts(batch[text_field], text_field, numbers)
        documents = tokenizer(batch[text_field], return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in documents]}

    tokens = dataset.map(tokenize, with_indices=True, batched=True, batch_size=16, remove_columns=names, **options)
    source = {"documents": tokens, "row_tokens": row_tokens, "join_documents": join_documents}
    if not in_memory:
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs=source)
    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": ids, "labels": ids})
    if next(_rows(**source), None) is None:
        raise ValueError(
            f"{len(dataset)} documents do not fill one row of `row_tokens` ({row_tokens}) tokens: lower it or add "
            "documents."
        )
    rows = datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=source)
    logger.info("%d documents became %d rows of up to %d tokens", len(dataset), len(rows), row_tokens)
    return rows


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of a dataset; of a stream that does not know them, read from its first row."""
    first = dataset.column_names or next(iter(dataset), None)
    if first is None:
        raise ValueError("the stream of documents has no row: check what was read.")
    return list(first)


def check_texts(texts: Sequence[object], text_field: str, numbers: Sequence[int], name: str = "the data set") -> None:
    """Raise `ValueError` for the first of `texts` that is none, by the number of its row."""
    for text, number in zip(texts, numbers):
        if not isinstance(text, str):
            raise ValueError(
                f"row {number} of {name}: column `{text_field}` holds {describe(text)}, and a document is a text: "
                "filter such rows out, or name another column."
            )


def _rows(documents: Iterable[dict], row_tokens: int, join_documents: bool) -> Iterator[dict]:
    carried: list[int] = []
    for document in documents:
        ids = carried + document["input_ids"]
        whole = len(ids) - len(ids) % row_tokens
        for start in range(0, whole, row_tokens):
            yield _row(ids[start : start + row_tokens])
        rest = ids[whole:]
        if join_documents:
            carried = rest
        elif len(rest) > 1:
            yield _row(rest)


def _row(ids: list[int]) -> dict:
    return {"input_ids": ids, "labels": list(ids)}


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Loading documents needs `datasets`: run `pip install hf-longctx[demo]`.") from error
    return datasets


def _find_files(path_or_name: str) -> tuple[Path, list[Path] | None, Counter[str]]:
    """The folder that paths are relative to, every readable file under it, and what was left out by its reason.

    The files are `None` for a name on the Hub.
    """
    path, skipped = Path(path_or_name).expanduser(), Counter[str]()
    if path.is_dir():
        return path, list(walk(path, skipped)), skipped
    if path.is_file():
        return path.parent, [path], skipped
    if os.path.lexists(path):
        raise ValueError(f"`{shown(path)}` is {irregular(path)} and no regular file: give a file or a folder.")
    if glob.has_magic(path_or_name):
        matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not os.path.isdir(name)]
        files = select_files(matched, _fixed_part(path), skipped)
        if not files:
            left_out = f" that may be read, but {count_reasons(skipped)}" if matched else ""
            raise ValueError(
                f"`{path_or_name}` matches no file{left_out}: check the pattern (`**` walks through folders)."
            )
        return Path(os.path.commonpath([file.parent for file in files])), files, skipped
    if _HUB_NAME.fullmatch(path_or_name) and _extension(path) not in (*DATA_FORMATS, *DOCUMENT_EXTENSIONS):
        return path, None, skipped
    raise ValueError(
        f"`{path_or_name}` does not exist and is not the name of a dataset on the Hub (`name` or `owner/name`): give "
        "a folder of documents, a jsonl or parquet file, or a dataset's name."
    )


def _fixed_part(pattern: Path) -> Path:
    """The folder in front of the first part with a wildcard."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]) if first else Path(".")


def _extension(path: Path) -> str:
    """The ending that tells what a file is, looking through compression: `a.jsonl.gz` is `.jsonl`."""
    packed = path.suffix in (".gz", ".zst", ".xz", ".bz2")
    return Path(path.stem if packed else path.name).suffix.lower()


def _choose_files(
    name: str, files: list[Path], extensions: Sequence[str] | None, skipped: Counter[str]
) -> tuple[str, list[Path]]:
    """Which builder reads these files, and which of them."""
    wanted = DOCUMENT_EXTENSIONS if extensions is None else tuple(ending.lower() for ending in extensions)
    documents = [file for file in files if file.suffix.lower() in wanted]
    if extensions is not None and documents:
        return "documents", documents
    formats = dict(DATA_FORMATS)
    if Path(name).expanduser().is_dir():
        formats = {ending: kind for ending, kind in formats.items() if ending not in _ONLY_WHERE_NAMED}
    data = [file for file in files if _extension(file) in formats]
    if not documents and not data:
        found = ", ".join(sorted({shown(file.suffix or file.name) for file in files})[:10]) or "no file"
        if skipped.total():
            found += f", and {count_reasons(skipped)}, which are not read"
        raise ValueError(
            f"`{name}` holds no document: found {found}, looked for {' '.join((*wanted, *formats))}; pass "
            "`extensions` to read other text files."
        )
    if data and all(file.stem.lower() == "readme" for file in documents):
        kinds = {formats[_extension(file)] for file in data}
        if len(kinds) == 1:
            return kinds.pop(), data
    elif not data:
        return "documents", documents
    raise ValueError(
        f"`{name}` holds {len(data)} data files (such as `{shown(data[0].name)}`) of different kinds or next to "
        f"{len(documents)} documents: give a glob for the ones to read, or `extensions` for documents."
    )


def _load_from_hub(datasets, name: str, config_name: str | None, split: str, streaming: bool):
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`{name}` is neither a file or folder here nor a dataset that the Hub gave us: check the spelling, the "
            "connection and, for a private dataset, `hf auth login`."
        ) from error


def _check_column(name: str, text_field: str, names: list[str]) -> None:
    if text_field not in names:
        raise ValueError(
            f"`{name}` has no column `{text_field}`, only {', '.join(names)}: set the text field to one of these."
        )
