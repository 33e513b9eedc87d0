"""What is published: metadata, the links of the long description, the Dockerfile, and that the release check knows
every command. `make release-check` builds and installs it."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from urllib.parse import urlparse

import pytest

from hf_longctx.cli.command_line import main


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The arguments of `setup()`."""
    import setuptools

    found: dict = {}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        context.chdir(ROOT)
        names = runpy.run_path(str(ROOT / "setup.py"))
    found |= {"repository": names["REPOSITORY"], "absolute_links": names["absolute_links"]}
    return found


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_metadata_is_whole(metadata):
    assert metadata["license_expression"] == "Apache-2.0" and "license" not in metadata
    assert not [
        name for name in metadata["classifiers"] if name.startswith("License ::")
    ]  # beside SPDX they are refused
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(metadata["project_urls"])
    assert metadata["author"] and len(metadata["keywords"]) >= 5
    assert all(urlparse(url).scheme == "https" for url in [metadata["url"], *metadata["project_urls"].values()])
    files = metadata["package_data"]["hf_longctx"]
    assert all(list((ROOT / "hf_longctx").glob(pattern)) for pattern in files)


def test_links_of_the_long_description_are_absolute_and_lead_to_files(metadata):
    link = re.compile(r"\]\(([^)\s]+)\)")
    here = link.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    there = link.findall(metadata["long_description"])
    assert len(here) == len(there) and all(url.startswith(("https://", "#")) for url in there)
    start = re.compile(re.escape(metadata["repository"]) + "/(?:blob|raw)/main/")
    files = [start.sub("", url).partition("#")[0] for url in there if start.match(url)]
    assert len(files) == sum(not url.startswith(("https://", "http://", "#")) for url in here) > 20
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/x.md#y)", "[a]({}/blob/main/docs/x.md#y)"),
        ("![a](docs/img/x.png)", "![a]({}/raw/main/docs/img/x.png)"),
        ("[![a](x.png)](docs/x.md)", "[![a]({0}/raw/main/x.png)]({0}/blob/main/docs/x.md)"),
        ("[a](https://site.org/x) [b](#here) [c](mailto:me@site.org)", None),
        ("`list[int](x)`", None),
    ],
)
def test_links_are_turned_whatever_they_look_like(metadata, text, expected):
    turned = metadata["absolute_links"](text)
    assert turned == (text if expected is None else expected.format(metadata["repository"]))


def test_the_release_check_tries_every_command(check, capsys):
    with pytest.raises(SystemExit):
        main(["no_such_command"])
    names = check.command_names(capsys.readouterr().err)
    assert {"env", "check", "verify", "sft", "embed"} <= set(names) and set(names) <= set(check.SMOKE)
    assert all(check.SMOKE[name].split()[0] == name for name in check.SMOKE)


def test_the_dockerfile_copies_installs_and_starts_what_there_is(check, metadata):
    found = check.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    words = [word for word, _ in found]
    assert set(words) <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    values = dict(rest.partition("=")[::2] for word, rest in found if word == "ARG")
    assert set(values["EXTRAS"].split(",")) <= set(metadata["extras_require"])
    (install, env) = [rest for word, rest in found if word == "RUN"]
    constraint = re.search(r"--constraint (\S+)", install)
    assert constraint and (ROOT / constraint[1]).is_file() and '".[${EXTRAS}]"' in install
    assert env == "hf-longctx env" and ("ENTRYPOINT", '["hf-longctx"]') in found
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".git" in ignored and not {"hf_longctx", "setup.py", "README.md"} & set(ignored)


def test_the_source_distribution_takes_what_a_clone_has():
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    grafted = {word[1] for word in words if word[0] == "graft"}
    assert {"docs", "recipes", "tests", ".ci"} <= grafted
    named = {name for word in words if word[0] == "include" for name in word[1:]}
    assert all((ROOT / name).exists() for name in {*grafted, *named})
