"""What benchmarks make by themselves where a library is missing is what the library makes; versions are compared."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from .test_bench_pages import load  # noqa: F401  a fixture


LENGTHS = (5, 9, 3, 20, 7, 1, 13, 13, 2)
ROW_TOKENS = 32


@pytest.fixture
def without_trl(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "trl" else find(name, *args))


def tensors_of(batches: list[dict]) -> list[dict[str, torch.Tensor]]:
    return [{key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} for batch in batches]


def test_padded_batches_without_trl_are_those_of_trl(load, request):  # noqa: F811
    pytest.importorskip("trl")
    batches = load("packing_batches")
    documents = batches.make_documents(LENGTHS, 50)
    theirs = tensors_of(batches.padded(documents, 4, ROW_TOKENS))
    request.getfixturevalue("without_trl")
    ours = tensors_of(batches.padded(documents, 4, ROW_TOKENS))
    assert [batch.keys() for batch in ours] == [batch.keys() for batch in theirs]
    assert all(torch.equal(mine[key], batch[key]) for mine, batch in zip(ours, theirs) for key in batch)


def test_packed_rows_without_trl_tell_the_model_what_trl_tells_it(load, request):  # noqa: F811
    pytest.importorskip("trl")
    batches = load("packing_batches")
    documents = batches.make_documents(LENGTHS, 50)
    theirs = batches.packed_by_trl(documents, 4, ROW_TOKENS)
    request.getfixturevalue("without_trl")
    ours = batches.packed_by_trl(documents, 4, ROW_TOKENS)
    assert {key for batch in ours for key in batch} == {key for batch in theirs for key in batch}
    assert sorted(map(documents_in, ours)) == sorted(map(documents_in, theirs))


def documents_in(batch: dict) -> list[tuple]:
    """(token ids, labels) of the documents of a row, which begin where positions do."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    bounds = zip(starts, [*starts[1:], batch["input_ids"].shape[1]])
    rows = [tuple(tuple(batch[key][0, a:b].tolist()) for key in ("input_ids", "labels")) for a, b in bounds]
    return sorted(rows)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("6.2.0", None),
        ("6.10.1+local", None),
        ("7.0.0.dev0", None),
        ("6.0.1", "torch 6.2 is needed, and 6.0.1 is installed"),
        (None, "torch 6.2 is needed, and it is not installed"),
    ],
)
def test_what_is_missing_names_both_versions(load, monkeypatch, found, reason):  # noqa: F811
    versions = load("versions")
    monkeypatch.setattr(versions, "version_of", lambda package: found)
    assert versions.what_is_missing({"torch": "6.2"}) == reason


def test_versions_are_those_of_this_checkout_and_of_what_is_installed(load):  # noqa: F811
    found = load("versions").versions_of(["hf-longctx", "torch", "no-such-package"])
    assert found.keys() == {"hf-longctx", "torch"} and found["torch"] == torch.__version__


def test_a_page_is_written_without_matplotlib(load, monkeypatch, tmp_path):  # noqa: F811
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "matplotlib" else find(name, *args)
    )
    drawn = []
    page = load("page").Page("T", ["What."], ["a"], [["1"]], "- *a*\n", picture="x", draw=lambda *a: drawn.append(a))
    page.write({"machine": {}, "versions": {}, "command": "python x.py"}, tmp_path / "t.md")
    assert not drawn and "![" not in (tmp_path / "t.md").read_text()


def test_a_measurement_that_fails_in_this_process_says_why(load):  # noqa: F811
    here = load("processes").measure_here

    def fail(settings):
        raise ValueError("no such kernel\nand more")

    def out_of_memory(settings):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert here(fail, {}) == {"failed": "ValueError: no such kernel"}
    assert here(out_of_memory, {}) == {"failed": "out of memory"}
    assert here(lambda settings: {"bytes": settings["n"]}, {"n": 3}) == {"bytes": 3}
