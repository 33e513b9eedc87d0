"""What the site needs next to the pages: files that they link to outside of docs/, docstrings, formulas, pages not in
`nav`.

On GitHub `../recipes/sft.py` is the file itself. The site has no such place, so every file that a page links to
outside of docs/ becomes a page under `source/`, and the link is turned there. A link to nothing is an error.
"""

from __future__ import annotations

import html as markup
import posixpath
import re
from importlib import import_module
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
SOURCE = "source/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
# A row of the API page's tables: | `hf_longctx.room.name` |
API_NAME = re.compile(r"^\| `(hf_longctx[\w.]*)\.(\w+)` \|", re.MULTILINE)
DOCSTRINGS = "<!-- docstrings -->"
# In docstrings: [`Name`], with no address, as the libraries write it; and names that have no page of their own.
CODE_IN_BRACKETS = re.compile(r"\[(<code>[\w.]+</code>)\](?!\()")
OWN_NAME = re.compile(r'<autoref (?=[^>]*identifier="hf_longctx\.)')
# The column of types shows what the docstring has, marks and all: `int`, *optional*, defaults to `1`.
TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")
MARKS = re.compile(r"[`*]|\[(?=`)|(?<=`)\]")
# What pymdownx.arithmatex leaves of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CODE_PAGE = "---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n`````{language}\n{code}\n`````\n"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}


def repository_path(src_uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return src_uri[len(SOURCE) :] if src_uri.startswith(SOURCE) else f"docs/{src_uri}"


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site: one that is no Markdown becomes a page around its text."""
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return SOURCE + path if path.endswith(".md") else f"{SOURCE}{path}.md"


def is_code(src_uri: str) -> bool:
    return src_uri.startswith(SOURCE) and Path(src_uri[: -len(".md")]).suffix in LANGUAGES


def linked_files(src_uri: str, text: str) -> list[str]:
    """The files of the repository outside of docs/ to which a page links."""
    folder = posixpath.dirname(repository_path(src_uri))
    found = (posixpath.normpath(posixpath.join(folder, match[1])) for match in LINK.finditer(text))
    return sorted({path for path in found if not path.startswith("docs/")})


def source_of(room: str, name: str) -> str:
    """The dotted name of what a room exports, in the module that defines it."""
    exports = import_module(room)._EXPORTS
    return next(f"{room}.{module}.{name}" for module, names in exports.items() if name in names)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that `nav` in mkdocs.yml does not name follow those that it does: results among the benchmarks, others
    among the proofs."""
    sections = {name: pages for entry in config.nav if isinstance(entry, dict) for name, pages in entry.items()}
    named = {page for pages in sections.values() for page in pages} | set(map(str, config.nav))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        src_uri = path.relative_to(ROOT / "docs").as_posix()
        if src_uri not in named:
            sections["Benchmarks" if src_uri.startswith("benchmarks/") else "Proof"].append(src_uri)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside of docs/ that a page links to, and those that these link to in turn."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        src_uri, text = waiting.pop()
        for path in linked_files(src_uri, text):
            if files.get_file_from_path(site_path(path)) is not None:
                continue
            if path.startswith("..") or not (ROOT / path).is_file():
                raise PluginError(f"`{src_uri}` links to `{path}`, which is no file of the repository.")
            text = (ROOT / path).read_text(encoding="utf-8")
            if path.endswith(".md"):
                waiting.append((site_path(path), text))
            else:
                language = LANGUAGES.get(Path(path).suffix, "text")
                text = CODE_PAGE.format(path=path, language=language, code=text.rstrip())
            files.append(File.generated(config, site_path(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ to the copies, and put the docstrings under the API page's tables."""
    if is_code(page.file.src_uri):
        return markdown
    folder, here = posixpath.dirname(repository_path(page.file.src_uri)), posixpath.dirname(page.file.src_uri)

    def turn(match: re.Match) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, match[1])))
        return posixpath.relpath(target, here or ".") + (match[2] or "")

    if DOCSTRINGS in markdown:
        names = [source_of(room, name) for room, name in API_NAME.findall(markdown)]
        markdown = markdown.replace(DOCSTRINGS, "\n\n".join(f"::: {name}" for name in names))
    return LINK.sub(turn, markdown)


def mathml(match: re.Match) -> str:
    """A formula as MathML, which browsers typeset by themselves: no script, no fonts, also from disk."""
    block = match[2] == "["
    return convert(markup.unescape(match[3]), display="block" if block else "inline")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings in the libraries' form: no marks in types, no brackets and links of names without a page."""
    html = FORMULA.sub(mathml, html)
    html = TYPE.sub(lambda match: f"<code>{MARKS.sub('', match[1])}</code>", html)
    return OWN_NAME.sub("<autoref optional ", CODE_IN_BRACKETS.sub(r"\1", html))
