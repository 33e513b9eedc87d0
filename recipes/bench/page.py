"""What the results of all benchmarks share: facts of the machine, the table in the terminal, how a page is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


QUIET = 0.05  # the share of the cores that others may use before a ratio of 5 % says nothing


def run_worker(script: str | Path, settings: dict, cores: int, label: str) -> dict:
    """What `script --worker SETTINGS` prints last, from a fresh process; an error with `label` if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), "--worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{label} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def describe_machine(rows: list[dict]) -> dict[str, str]:
    """Cores, memory and device of this machine, without its name."""
    model, memory = platform.machine(), None
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    devices = {run["device_name"] for row in rows for run in row["runs"]} - {"CPU"}
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": "unknown" if memory is None else f"{memory:.0f} GB",
        "device": ", ".join(sorted(devices)) or "none, on the CPU",
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def device_of(result: dict) -> str:
    """For the title of a page."""
    return "a CPU" if result["settings"]["device"] == "cpu" else "CUDA"


def print_table(
    result: dict, headers: Sequence[str], rows: Iterable[list[str]], console: Console, notes: Iterable[str] = ()
) -> None:
    """Versions, machine, command, numbers and `notes`, for the terminal."""
    console.print(" · ".join(f"{name} {version}" for name, version in result["versions"].items()))
    console.print(" · ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    console.print(result["command"])
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note)


def markdown_table(headers: Sequence[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows))


def write_page(path: Path, result: dict, lines: list[str], raw: str = "every run") -> None:
    """Write `lines` to `path` with how they were measured below them, and `result` as JSON next to it.

    Args:
        raw (`str`): what the JSON holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    facts = {**result["machine"], **result["versions"]}
    lines = [
        *lines,
        "## How it was measured",
        "",
        "```",
        result["command"],
        "```",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- {raw}: [{file.name}]({file.name})",
    ]
    path.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n")
