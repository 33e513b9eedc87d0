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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENT_EXTENSIONS = tuple(
    ".txt .md .markdown .rst .org .adoc .tex .html .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt "
    ".scala .js .jsx .ts .tsx .swift .rb .php .pl .lua .r .jl .sh .sql .hs .ml .ex .erl .zig .cs".split()
)
DATA_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_documents(
    path_or_name: str,
    *,
    split: str = "train",
    text_field: str | None = "text",
    config_name: str | None = None,
    extensions: Sequence[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read documents from wherever they are.

    Args:
        path_or_name (`str`):
            A folder of documents, a folder of jsonl or parquet files, one such file, a glob such as
            `"notes/**/*.md"`, or the name of a dataset on the Hub. In a folder of documents every file is one row with
            the columns `text` and `path`; hidden files are left out, and undecodable, binary and empty ones are
            skipped and counted in the log.
        split (`str`, *optional*, defaults to `"train"`): split of a data file or Hub dataset, as `datasets` writes it.
        text_field (`str`, *optional*, defaults to `"text"`): column that must exist; `None` checks nothing.
        config_name (`str`, *optional*): configuration of a Hub dataset.
        extensions (`Sequence[str]`, *optional*):
            File endings that count as documents, instead of the usual ones of text, Markdown and source code. Giving
            them says that the folder holds documents, whatever else lies in it.
        streaming (`bool`, *optional*, defaults to `False`): return an `IterableDataset` that reads while training.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: files in the order of their paths.

    Raises:
        ValueError: nothing is there, nothing in it is readable, or the text column is missing.
    """
    datasets = _import_datasets()
    root, files = _find_files(path_or_name)
    if files is None:
        dataset = _load_from_hub(datasets, path_or_name, config_name, split, streaming)
    else:
        kind, files = _choose_files(path_or_name, files, extensions)
        if kind == "documents":
            dataset = _read_folder(datasets, path_or_name, root, files, split, streaming)
        else:
            names = [str(file) for file in files]
            try:
                dataset = datasets.load_dataset(kind, data_files=names, split=split, streaming=streaming)
            except datasets.exceptions.DatasetGenerationError as error:
                raise ValueError(
                    f"`{path_or_name}` cannot be read as {kind}: {error.__cause__}: check the file."
                ) from error
    if text_field is not None:
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
        ValueError: `row_tokens` is below 2, or the documents do not fill one row.
    """
    if row_tokens < 2:
        raise ValueError(f"`row_tokens` ({row_tokens}) must be at least 2: one token to read and one to predict.")
    datasets = _import_datasets()
    names = column_names(dataset)
    _check_column("the dataset", text_field, names)
    in_memory = isinstance(dataset, datasets.Dataset)
    options = {"num_proc": num_proc, "desc": "Tokenizing documents"} if in_memory else {}
    end = tokenizer.eos_token_id

    def tokenize(batch: dict) -> dict:
        documents = tokenizer(batch[text_field], return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in documents]}

    tokens = dataset.map(tokenize, batched=True, batch_size=16, remove_columns=names, **options)
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
    return dataset.column_names or list(next(iter(dataset)))


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


def _find_files(path_or_name: str) -> tuple[Path, list[Path] | None]:
    """The folder that paths are relative to and every visible file under it; `None` for a name on the Hub."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path, list(_walk(path))
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(path_or_name):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not files:
            raise ValueError(f"`{path_or_name}` matches no file: check the pattern (`**` walks through folders).")
        return Path(os.path.commonpath([file.parent for file in files])), files
    if _HUB_NAME.fullmatch(path_or_name) and _extension(path) not in (*DATA_FORMATS, *DOCUMENT_EXTENSIONS):
        return path, None
    raise ValueError(
        f"`{path_or_name}` does not exist and is not the name of a dataset on the Hub (`name` or `owner/name`): give "
        "a folder of documents, a jsonl or parquet file, or a dataset's name."
    )


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _extension(path: Path) -> str:
    """The ending that tells what a file is, looking through compression: `a.jsonl.gz` is `.jsonl`."""
    packed = path.suffix in (".gz", ".zst", ".xz", ".bz2")
    return Path(path.stem if packed else path.name).suffix.lower()


def _choose_files(name: str, files: list[Path], extensions: Sequence[str] | None) -> tuple[str, list[Path]]:
    """Which builder reads these files, and which of them."""
    wanted = DOCUMENT_EXTENSIONS if extensions is None else tuple(ending.lower() for ending in extensions)
    documents = [file for file in files if file.suffix.lower() in wanted]
    if extensions is not None and documents:
        return "documents", documents
    formats = dict(DATA_FORMATS)
    if Path(name).expanduser().is_dir():
        del formats[".json"]  # in a folder these are settings, as a rule
    data = [file for file in files if _extension(file) in formats]
    if not documents and not data:
        found = ", ".join(sorted({file.suffix or file.name for file in files})[:10]) or "no file"
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
        f"`{name}` holds {len(data)} data files (such as `{data[0].name}`) of different kinds or next to "
        f"{len(documents)} documents: give a glob for the ones to read, or `extensions` for documents."
    )


def _read_folder(datasets, name: str, root: Path, files: list[Path], split: str, streaming: bool):
    if split != "train":
        raise ValueError(f"`split` ({split!r}) must be 'train' for `{name}`: a folder of documents has no other.")
    # Sizes and times are among the arguments so that an edited file is read again, not found in a cache.
    stamps = [(str(file), file.relative_to(root).as_posix(), *_stamp(file)) for file in files]
    if streaming:
        return datasets.IterableDataset.from_generator(_read_documents, gen_kwargs={"files": stamps})
    text = datasets.Value("large_string")  # one batch of long documents passes the 2 GiB of an ordinary string column
    features = datasets.Features({"text": text, "path": datasets.Value("string")})
    if next(_read_documents(stamps), None) is None:
        raise ValueError(f"all {len(stamps)} files of `{name}` are binary, empty or not UTF-8: save them as UTF-8.")
    dataset = datasets.Dataset.from_generator(_read_documents, features=features, gen_kwargs={"files": stamps})
    skipped = len(stamps) - len(dataset)
    if skipped:
        logger.warning("skipped %d of %d files in `%s`: binary, empty or not UTF-8", skipped, len(stamps), name)
    return dataset


def _stamp(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


def _read_documents(files: list[tuple[str, str, int, int]]) -> Iterator[dict]:
    for file, name, _size, _time in files:
        data = Path(file).read_bytes()
        try:
            text = "" if b"\0" in data else data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = ""
        if text.strip():
            yield {"text": text, "path": name}
        else:
            logger.debug("skipped `%s`: binary, empty or not UTF-8", name)


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
