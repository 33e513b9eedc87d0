"""The pages hold together: links lead somewhere, the site's menu names pages that exist, the API page is complete."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import hf_longctx


ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "recipes" / "README.md"])
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Headings as GitHub and the site name them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_the_menu_names_pages_that_exist():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [
        page for entry in nav for pages in (entry.values() if isinstance(entry, dict) else [[entry]]) for page in pages
    ]
    pages = [
        page.removeprefix("source/") for pages in named for page in ([pages] if isinstance(pages, str) else pages)
    ]
    assert len(pages) == len(set(pages)) > 15
    assert [page for page in pages if not ((ROOT / "docs" / page).is_file() or (ROOT / page).is_file())] == []


def exports_of_rooms() -> set[tuple[str, str]]:
    rooms = [path.parent for path in Path(hf_longctx.__file__).parent.rglob("__init__.py")]
    names = [".".join(room.relative_to(ROOT).parts) for room in rooms]
    return {(name, export) for name in names for export in getattr(import_module(name), "__all__", [])}


def test_the_api_page_has_every_exported_name_once_and_by_its_room():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(hf_longctx[\w.]*)\.(\w+)` \|", text, re.MULTILINE)
    names = [name for _, name in rows]
    assert len(names) == len(set(names))
    assert set(rows) <= exports_of_rooms()
    assert set(names) == {name for _, name in exports_of_rooms()}
    assert set(hf_longctx.__all__) == {name for room, name in rows if room == "hf_longctx"}
    assert "<!-- docstrings -->" in text and ".py" not in text
