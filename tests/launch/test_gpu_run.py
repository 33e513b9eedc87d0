"""`make gpu` without a GPU: all its parts in small on a CPU, without what a GPU's machine lacks; how parts are run."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
BENCH = ROOT / "recipes" / "bench"
# What may be missing where the run takes place. `socket` stays, but no address outside the machine can be reached.
BLOCKED = ("trl", "peft", "datasets", "flash_attn", "sentence_transformers", "matplotlib", "liger_kernel")
BLOCKING = f'''
import socket, sys

class Blocked:
    """Knows no module of these names, and asks the finders behind it about all others."""

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, *context, **keywords):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_, **__: ())(*context, **keywords)

    def invalidate_caches(self):
        pass

sys.meta_path[:] = [Blocked(list(sys.meta_path))]
connect = socket.socket.connect

def refuse(self, address):
    if isinstance(address, tuple) and address[0] not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise OSError(f"the network is blocked in this test: {{address}}")
    return connect(self, address)

socket.socket.connect = refuse
'''


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Path:
    """The folder that a dry run wrote, on a machine that lacks every package that is not needed."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "blocking").mkdir()
    (folder / "blocking" / "sitecustomize.py").write_text(BLOCKING)
    environment = {**os.environ, "PYTHONPATH": str(folder / "blocking"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_LONGCTX_RAISES", None)
    command = [
        sys.executable,
        str(BENCH / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "30",
    ]  # no limit ends a part here
    done = subprocess.run(
        [*command, "--output", str(folder / "pages")], capture_output=True, text=True, env=environment, timeout=1200
    )
    page = folder / "pages" / "gpu.md"
    failures = page.read_text().partition("## What failed")[2] if page.exists() else done.stdout[-2000:]
    assert done.returncode == 0, failures + done.stderr[-2000:]
    return folder / "pages"


@pytest.fixture
def load(monkeypatch):
    """A function from a name to the module of a benchmark, which is a script beside the package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


def test_every_part_runs_without_the_packages_that_a_gpu_machine_lacks(dry_run):
    rows = {row["part"]: row for row in json.loads((dry_run / "gpu.json").read_text())["rows"]}
    assert [rows.pop(name)["status"] for name in ("embed", "preference")] == ["skipped", "skipped"]
    assert {name: (row["status"], row["reason"]) for name, row in rows.items() if row["status"] != "finished"} == {}
    assert all(row["page"] and (dry_run / row["page"]).exists() for row in rows.values())
    assert not list(dry_run.glob("*.log"))


def test_a_dry_run_publishes_no_figure(dry_run):
    rows = json.loads((dry_run / "gpu.json").read_text())["rows"]
    assert {figure["value"] for row in rows for figure in row["figures"]} == {None}
    assert "**A dry run**" in (dry_run / "gpu.md").read_text()


def test_the_page_says_why_the_embedding_part_did_not_run(dry_run):
    text = (dry_run / "gpu.md").read_text()
    assert "*embed*, skipped: sentence-transformers 6.2 is needed, and it is not installed" in text
    assert "6.2 is needed, and it is not installed" in (dry_run / "embed_shapes_cpu.md").read_text()


def test_every_page_of_the_run_is_written_again_from_its_numbers(dry_run, load, tmp_path):
    pages = sorted(dry_run.glob("*.md"))
    assert len(pages) > 8
    for path in pages:
        result = json.loads(path.with_suffix(".json").read_text())
        script = result["command"].split()[1].removeprefix("recipes/bench/").removesuffix(".py")
        report = f"{script}_report"
        module = load(report if (BENCH / f"{report}.py").exists() else script)
        page = module.page_of(result)
        written = load("page").write_page
        again = [line for line in page.lines(path) if not line.startswith("![")]  # matplotlib was missing
        written(tmp_path / path.name, result, again, page.raw)
        assert (tmp_path / path.name).read_text() == path.read_text()
        assert (tmp_path / path.name).with_suffix(".json").read_text() == path.with_suffix(".json").read_text()
        if hasattr(module, "summarize"):
            summarized = copy.deepcopy(result)
            words = [summarized] if "presets" in result else [summarized["rows"], os.cpu_count()]
            module.summarize(*words)
            assert summarized == result


def test_the_page_states_what_mfu_counts_and_every_goal(dry_run):
    text = (dry_run / "gpu.md").read_text()
    for words in ("causal\n  attention is counted half", "nothing that is run again", "names the kernel"):
        assert words in text
    for goal in ("at least 45.0%", "at least 1.80", "at least 1.30", "at most 10.0%", "at least 262,144"):
        assert f"| {goal} |" in text


# How parts are run


GOOD = """
import argparse, json, pathlib
def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device"); parser.add_argument("--output"); parser.add_argument("--minutes", type=float)
    args = parser.parse_args(arguments)
    result = {"rows": [{"speed": 3.0, "failed": None}], "machine": {"device": "none"}, "minutes": args.minutes}
    pathlib.Path(args.output).with_suffix(".json").write_text(json.dumps(result))
"""
BAD = "def main(arguments):\n    raise ValueError('no such thing')\n"
SLOW = """
import subprocess, sys, time
def main(arguments):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("loading", flush=True); print(f"measured: 7 s, child {child.pid}", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(load, tmp_path, monkeypatch):
    """A function that runs parts with these scripts, and returns the rows of the result."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name, text in (("good_part", GOOD), ("bad_part", BAD), ("slow_part", SLOW)):
        (scripts / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(scripts))
    monkeypatch.setenv("PYTHONPATH", str(scripts))
    gpu, parts = load("gpu"), load("gpu_parts")
    figures = [load("gpu_figures").Figure("speed", lambda results: results["good"]["rows"][0]["speed"], least=2)]

    def run(*names: str, seconds: float = 60, minutes: float = 1, **needs: str) -> list[dict]:
        words = (seconds, "--minutes {minutes}", "", figures, needs)
        rows = tuple(parts.Part(name, name, f"{name}_part", *words) for name in names)
        monkeypatch.setattr(gpu, "PARTS", rows)
        settings = {"output": tmp_path / "out", "device": "cpu", "tiny": False, "minutes": minutes}
        args = argparse.Namespace(**settings, parts=list(names))
        return gpu.run_all(args, ["--device", "cpu"], load=False)["rows"]

    run.out, run.gpu = tmp_path / "out", gpu
    return run


def test_a_part_that_fails_stops_none_of_the_others_and_is_named(run):
    bad, good = run("bad", "good")
    assert (bad["status"], bad["reason"]) == ("failed", "ValueError: no such thing")
    assert good["status"] == "finished" and good["figures"][0]["shown"] == "3.00"
    assert good["figures"][0]["reached"] == "yes"
    text = (run.out / "gpu.md").read_text()
    assert "*bad*, failed: ValueError: no such thing." in text and str(ROOT) not in text


def test_a_part_is_stopped_with_its_processes_after_its_share_of_the_time(run):
    slow, good = run("slow", "good", seconds=10, minutes=0.25)
    assert slow["status"] == "stopped" and "still running after its 7 s" in slow["reason"]
    child = int(slow["tail"][-1].rpartition(" ")[2])
    assert slow["tail"][0] == "loading" and not _runs(child)
    assert good["status"] == "finished"
    assert "measured: 7 s" in (run.out / "gpu.md").read_text()  # what it had is kept


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def test_what_early_parts_leave_is_shared_out_again(run):
    first, second = run("good", "good")
    assert first["limit"] == pytest.approx(30, abs=1) and second["limit"] > 50


def test_without_time_nothing_is_started(run):
    (row,) = run("good", minutes=0.01)
    assert (row["status"], row["reason"], row["page"]) == ("not run", "no time left", None)


def test_a_page_of_an_earlier_run_is_no_result_of_this_one(run):
    run("good")
    (run.out / "good_part_cpu.json").rename(run.out / "bad_part_cpu.json")
    (bad,) = run("bad")
    assert bad["page"] is None and not any(figure["shown"] for figure in bad["figures"])


def test_a_part_that_needs_a_newer_package_names_both_versions(run, load, monkeypatch):
    monkeypatch.setattr(load("versions"), "version_of", lambda package: "6.0.1")
    (row,) = run("good", **{"sentence-transformers": "6.2"})
    assert row["status"] == "skipped"
    assert row["reason"] == "sentence-transformers 6.2 is needed, and 6.0.1 is installed"


def test_a_process_that_cannot_use_the_device_starts_anew(run, monkeypatch):
    monkeypatch.setattr(run.gpu, "can_use", lambda device: False)
    (row,) = run("good")
    assert row["status"] == "finished", row["tail"]


def test_a_run_that_ends_early_has_written_what_it_measured(run, monkeypatch):
    run_part = run.gpu.run_part

    def interrupted(part, args, limit):
        if part.name == "bad":
            raise KeyboardInterrupt
        return run_part(part, args, limit)

    monkeypatch.setattr(run.gpu, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("good", "bad")
    (row,) = json.loads((run.out / "gpu.json").read_text())["rows"]
    assert row["figures"][0]["shown"] == "3.00"


def test_the_shapes_of_a_gpu_are_not_run_on_a_cpu(load):
    with pytest.raises(ValueError, match="`device` .'cpu'.*--tiny"):
        load("gpu").parse_arguments(["--device", "cpu", "--output", "x"])


def test_without_a_device_nothing_is_written(load, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device.*--device cpu --tiny"):
        load("gpu").main(["--output", str(tmp_path / "pages")])
    assert not (tmp_path / "pages").exists()


def test_a_run_that_is_told_to_end_ends_its_part_too(load, tmp_path):
    """As a launcher ends it, by SIGTERM to the run alone."""
    (tmp_path / "slow_part.py").write_text(SLOW)
    (tmp_path / "start.py").write_text(STARTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(BENCH)])}
    command = [sys.executable, str(tmp_path / "start.py"), str(tmp_path / "out")]
    log = tmp_path / "out" / "slow.log"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and "child" in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        child = int(log.read_text().split()[-1])
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not _runs(child)


STARTED = """
import sys
import gpu, gpu_parts
gpu.PARTS = (gpu_parts.Part("slow", "slow", "slow_part", 60, "", ""),)
gpu.load_libraries = lambda device: None
gpu.main(["--device", "cpu", "--tiny", "--minutes", "1", "--output", sys.argv[1]])
"""


def test_parts_are_rows_that_exist_and_fit_the_time(load):
    parts = load("gpu_parts").PARTS
    assert sum(part.seconds for part in parts) <= 8 * 60
    assert len({part.name for part in parts}) == len({part.page for part in parts}) == len(parts)
    assert all((BENCH / f"{part.script}.py").exists() for part in parts)
    for part in parts:
        for figure in part.figures:
            assert figure.form.format(1.5) and isinstance(figure.goal, str)
