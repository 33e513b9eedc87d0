"""The pages hold together: links lead somewhere, the site's menu names pages that exist, the API page is complete."""

from __future__ import annotations

import json
import re
from dataclasses import fields
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


CELL = re.compile(r"^\|([^|]*)\|([^|]*)\|", re.MULTILINE)


def sections_of(page: str) -> dict[str, str]:
    parts = re.split(r"^## ", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts[1:]}


def test_migrating_names_keys_that_exist_here_and_in_accelerate():
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, TorchContextParallelConfig
    from trl import ModelConfig, SFTConfig

    from hf_longctx.config.audiences import TRAINERS
    from hf_longctx.tasks.sft import SFTArguments

    configs = {kind for row in TRAINERS.values() for kind in row.values()}
    ours = {field.name for kind in (SFTArguments, SFTConfig, ModelConfig, *configs) for field in fields(kind)}
    theirs = {"attn_implementation"} | {
        field.name
        for kind in (ParallelismConfig, DeepSpeedSequenceParallelConfig, TorchContextParallelConfig, DeepSpeedPlugin)
        for field in fields(kind)
    }
    theirs |= {"deepspeed_config_file", *(field.name for field in fields(FullyShardedDataParallelPlugin))}
    sections, checked = sections_of("migrating.md"), 0
    for title, text in sections.items():
        for left, right in CELL.findall(text):
            if title.startswith("DeepSpeed") or left.strip() in ("accelerate", "axolotl", "---"):
                continue
            for name in re.findall(r"`(\w+)(?:: [^`]*)?`", right):
                assert name in ours, (title, name)
                checked += 1
            if title.startswith("accelerate"):
                for name in re.findall(r"`(\w+)(?:: [^`]*)?`", left):
                    assert name in theirs, (title, name)
    assert checked > 25


def test_what_migrating_says_of_loops_exists():
    text = sections_of("migrating.md")["DeepSpeed: Ulysses and ALST in a loop"]
    for name in re.findall(r"hf_longctx\.(\w+)", text):
        assert hasattr(hf_longctx, name), name
    for memory in re.findall(r'MemoryConfig\(memory="(\w+)"\)', text):
        hf_longctx.MemoryConfig(memory=memory)


FORMATS = re.findall(
    r"^```jsonl (\w+)\n(.*?)^```", (ROOT / "docs" / "data_formats.md").read_text(encoding="utf-8"), re.M | re.S
)


@pytest.mark.parametrize(("kind", "rows"), FORMATS, ids=[kind for kind, _ in FORMATS])
def test_rows_of_the_page_of_formats_are_read(kind, rows, tmp_path):
    from hf_longctx.tasks import dpo, embed_files, inputs, sft

    file = tmp_path / "rows.jsonl"
    file.write_text(rows, encoding="utf-8")
    if kind == "texts":
        found = embed_files.open_file(str(file), None, 3, False)
    else:
        recipe = inputs.RecipeArguments(dataset_name=str(file))
        columns = (None, dpo.PAIRS) if kind == "pairs" else ("text", sft.CONVERSATIONS)
        found, _ = inputs.read_documents(recipe, None, *columns)
    assert len(list(found)) == 2 and set(next(iter(found))) == set(json.loads(rows.splitlines()[0]))


def test_the_page_of_formats_shows_all_kinds():
    assert [kind for kind, _ in FORMATS] == ["documents", "prompts", "conversations", "pairs", "texts"]


def test_the_citation_has_the_version_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == hf_longctx.__version__ and cited["license"] == "Apache-2.0"
    assert f"version = {{{cited['version']}}}" in (ROOT / "docs" / "citation.md").read_text(encoding="utf-8")


def test_pages_load_nothing_from_elsewhere():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config and "- offline" in config and "assets/iframe-worker.js" in config
    for asset in (ROOT / "docs" / "assets").iterdir():
        assert "http" not in asset.read_text(encoding="utf-8"), asset.name
