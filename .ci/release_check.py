"""`make release-check`: what a stranger gets from a package index, tried before it is there.

Builds the source distribution and from that the wheel, checks both with twine, installs the wheel into a fresh
environment and tries every command on tiny models (two minutes on two idle cores), then walks a stranger's way:
`hf-longctx sft --config` on a folder of files, `verify`, a model card that the Hub accepts. Last come the commands of
the Dockerfile, in the same environment, since there is no Docker here. Everything is written under `build/release`,
which is replaced. `--only-from STEP` goes on where a run ended.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "release"
TOOLS, FRESH, WORK, DIST = (BUILD / name for name in ("tools", "fresh", "work", "dist"))
EXTRAS = "trl,embedding,demo"
STRANGERS_SECONDS = 600  # of processors, for a stranger with the wheel, installation included
WIDTH = 80
IN_SDIST = (
    "tests/conftest.py",
    "docs/README.md",
    "recipes/sft.py",
    "Makefile",
    "CHANGELOG.md",
    "pyproject.toml",
    "LICENSE",
)
IN_WHEEL = ("hf_longctx/py.typed", "hf_longctx/tested_versions.txt", "hf_longctx/launch/fsdp2_8gpu.yaml")

_TRAIN = "--use_cpu true --bf16 false --max_steps 2 --logging_steps 1 --save_strategy no --report_to none"
_TRAIN += " --per_device_train_batch_size 2 --disable_tqdm true --learning_rate 1e-3"
_MODEL = "--model_name_or_path model"
# A command of each name, in `build/release/work`. A new command without one here fails the check.
SMOKE = {
    "env": "env",
    "check": "check model --sequence_parallel_size 2",
    "pack": f"pack texts.jsonl {_MODEL} --max_tokens 64",
    "plan": "plan large --gpus 2 --gpu_memory 24 --target_tokens 4K",
    "verify": "verify llama",
    "ttt": "ttt convert model --output ttt_model --window 8 --chunk_tokens 8 --suffix_layers 1",
    "sft": f"sft {_MODEL} --dataset_name texts.jsonl --max_length 64 --output_dir sft_run {_TRAIN}",
    "pretrain": f"pretrain {_MODEL} --dataset_name documents --row_tokens 32 --output_dir pretrain_run {_TRAIN}",
    "dpo": f"dpo {_MODEL} --dataset_name preferences.jsonl --max_length 64 --output_dir dpo_run {_TRAIN}",
    "kto": f"kto {_MODEL} --dataset_name labelled.jsonl --max_length 64 --output_dir kto_run {_TRAIN}",
    "reward": f"reward {_MODEL} --dataset_name preferences.jsonl --max_length 64 --output_dir reward_run {_TRAIN}",
    "embed": "embed --config embed.yaml",
    "run": "run script.py",
    "completion": "completion bash",
    # Toys take minutes; tests run them in small.
    **{
        toy: f"{toy} --help"
        for toy in ("indexer_warmup", "lsh_duplication", "lsh_pretrain", "pretrain_alibi", "recall_sparse", "sleep")
    },
}
_EMBED = """\
model_name_or_path: encoder
pooling_mode: mean
max_seq_length: 64
sources: {pairs: pairs.jsonl}
output_dir: embed_run
use_cpu: true
bf16: false
max_steps: 2
logging_steps: 1
save_strategy: "no"
report_to: none
per_device_train_batch_size: 4
"""
_STRANGER = """\
model_name_or_path: model
dataset_name: documents
output_dir: my_run
max_length: 64
num_eval_documents: 1
use_cpu: true
bf16: false
max_steps: 4
eval_strategy: steps
eval_steps: 2
logging_steps: 1
save_strategy: "no"
report_to: none
"""
_CARDS = ("sft_run", "pretrain_run", "dpo_run", "kto_run", "reward_run", "embed_run")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(*words: object, folder: Path = WORK, code: int = 0, **more: str) -> str:
    """The output of a command; the check ends with it where the exit code is not `code`."""
    environment = {**os.environ, "PATH": f"{FRESH / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": str(WIDTH), **more}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):  # only what is installed
        environment.pop(name, None)
    line = [str(word) for word in words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    if done.returncode != code:
        sys.exit(f"{output}\n{shlex.join(line)} ended with {done.returncode} and not {code}")
    return output


def command(words: str, code: int = 0) -> str:
    return run(FRESH / "bin" / "hf-longctx", *shlex.split(words), code=code)


def copy_sources(to: Path) -> None:
    """What a clone has: files that git tracks or would, so that building leaves nothing here."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def build() -> None:
    """Build, and look at what is in both and at what they say."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for folder in (BUILD, WORK):
        folder.mkdir(parents=True)
    copy_sources(BUILD / "sources")
    run(sys.executable, "-m", "venv", TOOLS)
    run(TOOLS / "bin" / "pip", "install", "--quiet", "build>=1.2", "twine>=6")
    run(TOOLS / "bin" / "python", "-m", "build", "--outdir", DIST, ".", folder=BUILD / "sources")
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(TOOLS / "bin" / "twine", "check", "--strict", sdist, wheel)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in in_wheel if name.endswith("/METADATA"))
    missing = [name for name in IN_SDIST if name not in names] + [name for name in IN_WHEEL if name not in in_wheel]
    if missing or any(name.startswith(("tests/", "recipes/")) for name in in_wheel):
        sys.exit(f"the distributions are not what they should be; missing: {missing}")
    relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", metadata) if not link.startswith(("https://", "#"))]
    if relative or "License-Expression: Apache-2.0" not in metadata:
        sys.exit(f"the metadata has relative links ({relative}) or no SPDX licence")


def install() -> None:
    """The core first, in which a trainer must name its extra; then the extras."""
    (wheel,) = DIST.glob("*.whl")
    tested = ROOT / "hf_longctx" / "tested_versions.txt"
    torch = re.search(r"^torch<=(\S+)$", tested.read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None
    run(sys.executable, "-m", "venv", FRESH)
    pip = (FRESH / "bin" / "pip", "install", "--quiet", "--constraint", tested)
    run(*pip, f"torch=={torch[1]}" if shutil.which("nvidia-smi") is None else "torch")
    run(*pip, wheel)
    command("--version")
    told = command("sft --config run.yaml", code=2)
    if "pip install hf-longctx[trl]" not in told:
        sys.exit(f"`hf-longctx sft` without trl does not name the extra:\n{told}")
    run(*pip, f"{wheel}[{EXTRAS}]")


def smoke() -> None:
    """Every command once, and its help in 80 columns."""
    shutil.rmtree(WORK)
    WORK.mkdir()
    run(FRESH / "bin" / "python", ROOT / ".ci" / "release_inputs.py", WORK)
    (WORK / "embed.yaml").write_text(_EMBED, encoding="utf-8")
    names = command_names(command("no_such_command", code=2))
    unknown = sorted(set(names) - set(SMOKE))
    if unknown:
        sys.exit(f"SMOKE in .ci/release_check.py has no command for {', '.join(unknown)}")
    for name in names:
        started = time.perf_counter()
        lines = command(f"{name} --help").splitlines()
        wide = [line for line in lines if len(line) > WIDTH]
        if wide:
            sys.exit(f"the help of `{name}` is wider than {WIDTH} columns: {wide[0]}")
        command(SMOKE[name])
        say(f"  hf-longctx {name:<12} {time.perf_counter() - started:6.1f} s")
    for folder in _CARDS:
        if (WORK / folder).is_dir():
            check_card(folder)


def command_names(told: str) -> list[str]:
    """The commands, out of what is said to a name that is none."""
    listed = re.search(r"choose from (.*?)\)", told, re.DOTALL)
    return re.sub(r"['\s]", "", listed[1]).split(",") if listed else []


def check_card(folder: str) -> None:
    """The card that a run left: metadata, pictures, and its code run."""
    code = f"from pathlib import Path; from cards import check_card; check_card(Path({str(WORK / folder)!r}))"
    run(FRESH / "bin" / "python", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); {code}")


def stranger() -> None:
    """A folder of files, one YAML, a proof, a card."""
    (WORK / "run.yaml").write_text(_STRANGER, encoding="utf-8")
    command("sft --config run.yaml")
    command("verify llama --packed")
    check_card("my_run")


def docker() -> None:
    """What the Dockerfile runs, in a copy of the sources and this environment."""
    arguments: dict[str, str] = {}
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word == "RUN":
            run("bash", "-euc", rest, folder=BUILD / "sources", PIP_QUIET="1", **arguments)
        elif word == "CMD":
            run("hf-longctx", *[part.strip('" ') for part in rest.strip("[]").split(",")])


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, in order: the word and what follows."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


STEPS: dict[str, Callable[[], None]] = {step.__name__: step for step in (build, install, smoke, stranger, docker)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-from", choices=STEPS, default="build", help="step to begin with, on what is there")
    first = list(STEPS).index(parser.parse_args().only_from)
    spent: dict[str, float] = {}
    for name in list(STEPS)[first:]:
        started, before = time.perf_counter(), processor_seconds()
        STEPS[name]()
        spent[name] = processor_seconds() - before
        say(f"{name:<10} {time.perf_counter() - started:6.1f} s, of processors {spent[name]:6.1f} s")
    taken = spent.get("install", 0.0) + spent.get("stranger", 0.0)
    say(f"a stranger's way, installation included: {taken:.0f} s of processors; all: {sum(spent.values()):.0f} s")
    if taken > STRANGERS_SECONDS:
        sys.exit(f"a stranger's way may take {STRANGERS_SECONDS} s")


def processor_seconds() -> float:
    """What the processes that this one started have taken; a clock would tell how busy the machine is."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
