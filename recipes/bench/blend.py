"""Building the index of a blend: rows a second, memory, and how far any prefix is from its proportions.

What: `BlendedRows` over sources of skewed weights, and sizes from tens of rows to millions, builds its index into an
empty folder, for several numbers of rows. How: each in a fresh process, which reports its seconds, those of the
processor, and the most anonymous memory that it took on top of what the imports took. Mapped pages and the page cache
are not counted: the system takes them back. What was built is read again: the worst error of all sources at all
prefixes of the first rows, and of all sources at the end.

    python recipes/bench/blend.py --output docs/benchmarks/blend_cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from page import Page, add_medians, describe_run, fill, finish, quietness
from rich.console import Console


PREFIXES = 1_000_000
COLUMNS = {
    "rows": "{num_rows:,}",
    "sources": "{sources}",
    "s": "{seconds:.1f}",
    "CPU s": "{cpu_seconds:.1f}",
    "rows a CPU second": lambda row: f"{row['num_rows'] / row['cpu_seconds']:,.0f}",
    "anonymous memory, MB": "{anonymous:.0f}",
    "index, MB": "{bytes:.0f}",
    "worst error, rows": "{error:.4f}",
    "error at the end": "{last:.4f}",
    "others": "{other_load:.0%}",
}
READING = """\
- *anonymous memory*: the most that the process took beyond its imports, sampled while the index was built.
- *worst error*: over all sources and all prefixes of the first million rows, the rows that a source has given less
  those that it is owed; *at the end*: the same after the last row.
- Weights fall by a constant factor (*factors*: from 1 to 3e-9 of the whole for 50 sources) or as a power of the
  source's number (*power*), and a source has as many rows as its number makes of 30 to 30 million.
"""
console = Console(width=max(Console().width, 130))


class Numbers:
    """A source whose rows are numbers, so that only the index costs anything."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": [row]}


def weights_of(sources: int, skew: str) -> np.ndarray:
    places = np.arange(sources)
    return np.exp(-0.4 * places) if skew == "factors" else 1 / (places + 1) ** 1.5


def anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def build(settings: dict) -> dict:
    """One measurement, in a process of its own."""
    from hf_longctx import BlendedRows

    num_rows, sources = settings["num_rows"], settings["sources"]
    weights = weights_of(sources, settings["skew"])
    given = {f"source {i}": (Numbers(int(30 * 10 ** (6 * i / sources))), float(weights[i])) for i in range(sources)}
    BlendedRows(given, 1000)  # what is imported on the way is no memory of the index
    before, most, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        machine, start, cpu = machine_seconds(), time.perf_counter(), time.thread_time()
        blend = BlendedRows(given, num_rows, cache_dir=folder)
        seconds, cpu_seconds = time.perf_counter() - start, time.thread_time() - cpu
        others = machine_seconds() - machine
        done.set()
        watcher.join()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.npy"))
        error = worst_error(blend)
        last = np.abs(np.array(list(blend.counts().values())) - blend.proportions.owed(np.array([num_rows]))[0]).max()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "machine_cpu_seconds": others,
        "anonymous": most[0] - before,
        "bytes": size / 1e6,
        "error": error,
        "last": float(last),
        "device_name": "CPU",
    }


def machine_seconds() -> float:
    """Seconds that all processes of this machine ran."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def worst_error(blend) -> float:
    sources = np.asarray(blend.index.sources[:PREFIXES])
    owed = blend.proportions.owed(np.arange(1, len(sources) + 1))
    return max(float(np.abs(np.cumsum(sources == i) - owed[:, i]).max()) for i in range(len(blend.names)))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--skews", nargs="+", choices=("power", "factors"), default=["power", "factors"])
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def page_of(result: dict) -> Page:
    """The page of a run."""
    columns = {"weights": "{skew}", **COLUMNS}
    return Page(
        title="The index of a blend",
        intro=[
            "`BlendedRows` builds its index into an empty folder, on one core. Source and row of each row are written "
            "to disk as they are made, 6 bytes a row."
        ],
        headers=list(columns),
        cells=[fill(columns, row) for row in result["rows"]],
        notes=[quietness(result, "*s*", rest="*CPU s*, memory and errors are.")],
        reading=READING,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(build(json.loads(args.worker))))
        return
    rows: list[dict] = []
    for skew in args.skews:
        for num_rows in args.num_rows:
            settings = {"num_rows": num_rows, "sources": args.sources, "skew": skew}
            command = [sys.executable, __file__, "--worker", json.dumps(settings)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            row = {**settings, "runs": [json.loads(answer)]}
            add_medians(row, row["runs"], args.cores, ("anonymous", "bytes", "error", "last"))
            if not max(row["error"], row["last"]) < 1:
                raise RuntimeError(
                    f"{skew}, {num_rows:,} rows: a source is {row['error']} rows off, and not below one"
                )
            rows.append(row)
            console.print(f"{skew}, {num_rows:,} rows: {row['cpu_seconds']:.1f} s of CPU", highlight=False)
    result = describe_run("blend", arguments, args, ("hf-longctx", "numpy", "torch"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()
