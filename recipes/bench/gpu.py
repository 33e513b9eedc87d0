"""Everything that only a GPU can show, in one command: the tests of `tests/gpu`, then the benchmarks, one page of all.

What: the parts of `gpu_parts.py`, most valuable first, each in a process of its own. The minutes that are left are
shared out over the parts that are left, by the seconds that each asks for; a part that is still running after its
share is stopped. After every part the page and its numbers are written, so that a run that is stopped keeps what it
has, and a part that fails stops none of the others.

How: processes are forked from this one, which has loaded torch and transformers and never touches the device. Where a
forked process cannot use the device it starts itself anew. Price: the minutes that are asked for.

    python recipes/bench/gpu.py --minutes 8 --output docs/benchmarks
    python recipes/bench/gpu.py --parts step packing --minutes 3 --output /tmp/again
    python recipes/bench/gpu.py --device cpu --tiny --output /tmp/dry

The last runs the code of every part on a CPU, on shapes that say nothing; no figure of it means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import sysconfig
import time
import traceback
from pathlib import Path

from gpu_parts import PARTS, Part
from gpu_report import figures_of, page_of
from page import describe_run, print_table
from rich.console import Console
from versions import what_is_missing


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = (
    "hf-longctx",
    "torch",
    "transformers",
    "accelerate",
    "sentence-transformers",
    "trl",
    "datasets",
    "pytest",
)
LEAST_SECONDS = 3  # with less left, nothing is started
SHARE_FOR_WORK = 0.85  # of a part's time; what is left is for loading, and for writing its page
TAIL_LINES = 12
console = Console(width=max(Console().width, 120))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--minutes", type=float, default=8, help="of the whole run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pages")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of a dry run")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        raise ValueError("`device` ('cpu') runs the shapes of a GPU for hours: pass `--tiny` for a dry run.")
    if not args.minutes > 0:
        raise ValueError(f"`minutes` ({args.minutes}) must be positive: it is the time of the whole run.")
    return args


# One part


def words_of(part: Part, args: argparse.Namespace, limit: float) -> list[str]:
    """The arguments of a part's script."""
    own = (part.tiny if args.tiny else part.arguments).format(minutes=f"{SHARE_FOR_WORK * limit / 60:.2f}")
    return ["--device", args.device, *shlex.split(own), "--output", str(page_path(part, args))]


def page_path(part: Part, args: argparse.Namespace) -> Path:
    return args.output / f"{part.page}_{args.device}.md"


def run_here(job: dict) -> None:
    """A part in this process, its output in a file."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(PermissionError):  # it leads a group already if it was started anew
        os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    # Line by line, so that what was printed is there if the process is stopped.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    if not job["fresh"] and not can_use(job["device"]):
        again = json.dumps({**job, "fresh": True})
        os.execv(sys.executable, [sys.executable, __file__, "--part", again])
    sys.path[:0] = [str(HERE), str(ROOT)]
    try:
        importlib.import_module(job["script"]).main(job["words"])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()


def can_use(device: str) -> bool:
    """Whether this process can use the device: one that was forked cannot where its parent has touched it."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return False
    return True


def run_part(part: Part, args: argparse.Namespace, limit: float) -> dict:
    """Run a part for at most `limit` seconds; its row, whatever became of it."""
    row = {"part": part.name, "what": part.what, "limit": limit, "figures": [], "page": None, "reason": None}
    row["reason"] = what_is_missing(part.needs)
    if row["reason"]:
        return {**row, "status": "skipped", "seconds": 0.0, "tail": []}
    log, page = args.output / f"{part.name}.log", page_path(part, args)
    words = words_of(part, args, limit)
    job = {"script": part.script, "words": words, "log": str(log), "device": args.device, "fresh": False}
    before = read_stamp(page.with_suffix(".json"))
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run_here, args=(job,))
    process.start()
    try:
        process.join(limit)
    finally:
        stopped = process.is_alive()
        # Its own processes with it: those that torchrun started lead groups of their own. It may be so young that it
        # leads none yet.
        below = processes_below(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if stopped:
            process.kill()
        process.join()
    row |= {"seconds": time.monotonic() - start, "tail": read_tail(log)}
    row["status"] = "stopped" if stopped else "failed" if process.exitcode else "finished"
    if stopped:
        row["reason"] = f"still running after its {limit:.0f} s"
    elif process.exitcode:
        row["reason"] = reason_of(row["tail"], process.exitcode)
    if read_stamp(page.with_suffix(".json")) != before:
        row["page"] = page.name
    log.unlink(missing_ok=True)
    return row


def processes_below(pid: int) -> list[int]:
    """The processes that `pid` has started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def read_stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def read_tail(log: Path) -> list[str]:
    """The last lines that a part printed, without paths of this machine."""
    if not log.exists():
        return []
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    for path, name in ((ROOT, "."), (sysconfig.get_paths()["purelib"], "site-packages"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return [line.rstrip()[:200] for line in text.splitlines() if line.strip()][-TAIL_LINES:]


def reason_of(tail: list[str], code: int) -> str:
    """The last error in the lines of a part."""
    errors = [line for line in tail if re.match(r"(\w+\.)*\w*(Error|Exception|Exit)\b", line)]
    return errors[-1] if errors else f"exit code {code}"


# All of them


def run_all(args: argparse.Namespace, arguments: list[str] | None, load: bool = True) -> dict:
    """Every part, and after each the page; the result of the run."""
    deadline = time.monotonic() + 60 * args.minutes
    if load:
        load_libraries(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    parts, rows, results = [part for part in PARTS if part.name in args.parts], [], {}
    for index, part in enumerate(parts):
        left = deadline - time.monotonic()
        limit = left * part.seconds / sum(other.seconds for other in parts[index:])
        if limit < LEAST_SECONDS:
            rows.append(
                {"part": part.name, "what": part.what, "limit": limit, "seconds": 0.0, "figures": [], "tail": []}
            )
            rows[-1] |= {"status": "not run", "reason": "no time left", "page": None}
            continue
        console.print(f"{index + 1} of {len(parts)}, {part.name}: {limit:.0f} s of {left:.0f} s left", highlight=False)
        row = run_part(part, args, limit)
        rows.append(row)
        if row["page"]:
            results[part.name] = json.loads((args.output / row["page"]).with_suffix(".json").read_text())
        row["figures"] = figures_of(part, results, args.tiny)
        console.print(f"  {row['status']} after {row['seconds']:.0f} s {row['reason'] or ''}", markup=False)
        for figure in row["figures"]:
            if figure["shown"]:
                console.print(f"  {figure['what']}: {figure['shown']} {figure['goal']}", markup=False, highlight=False)
        write(args, arguments, rows, results)
    return write(args, arguments, rows, results)


def load_libraries(device: str) -> None:
    """What every part needs, once, before the processes are forked. The device must not be touched."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch then asks the driver's library, not the device
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device: pass `--device cpu --tiny` for a dry run.")
    import transformers.trainer  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def write(args: argparse.Namespace, arguments: list[str] | None, rows: list[dict], results: dict[str, dict]) -> dict:
    """Write the page of what there is."""
    result = describe_run("gpu", arguments, args, PACKAGES, [])
    devices = [
        other["machine"]["device"] for other in results.values() if not other["machine"]["device"].startswith("none")
    ]
    result["machine"]["device"] = devices[0] if devices else "none, on the CPU" if args.device == "cpu" else "unknown"
    result["rows"] = rows
    page_of(result).write(result, args.output / "gpu.md")
    return result


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--part"]:  # a part that could not be forked
        run_here(json.loads(words[1]))
        return
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the part is ended too
    result = run_all(args, arguments)
    page = page_of(result)
    print_table(result, page.headers, page.cells, console, filter(None, page.notes))
    console.print(f"{args.output / 'gpu.md'}", highlight=False)
    if any(row["status"] in ("failed", "stopped") for row in result["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
