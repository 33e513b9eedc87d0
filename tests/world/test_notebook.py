"""The notebook runs from its first cell to its last, on ranks that are there already."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest

from hf_longctx.proof import verification
from tests.cards import check_card


pytest.importorskip("peft")
pyplot = pytest.importorskip("matplotlib.pyplot")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "packing_and_verify.ipynb"


def test_every_cell_runs_and_leaves_an_adapter_with_its_card(world2, tmp_path, monkeypatch, capsys):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["cell_type"] == "markdown" or not cell["outputs"] for cell in cells)
    monkeypatch.setattr(verification, "Ranks", lambda *_: contextlib.nullcontext(world2))
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for index, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {index}", "exec"), names)
    printed = capsys.readouterr().out
    assert "no document sees another" in printed and "packed   exact" in printed
    assert names["OUTPUT"].parent == tmp_path
    assert check_card(names["OUTPUT"] / "adapter")["pipeline_tag"] == "text-generation"
