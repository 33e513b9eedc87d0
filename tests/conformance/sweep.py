"""Every text model type of the installed transformers against one process: `make conformance`.

A tiny random model of each type is shared by two processes that exchange over gloo, and compared with transformers'
own attention in one: loss, outputs and every gradient, on dense, padded and packed rows. Processes live on from type
to type. Each result is appended to a file at once, so that `--resume` goes on where a run ended.

The exit code is 1 if any type is wrong, or worse than `hf_longctx/proof/conformance.json` says.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx.cli.check_model import read_model, split_of
from hf_longctx.proof.bare_loop import prove_bare_loop
from hf_longctx.proof.known_types import TABLE
from hf_longctx.proof.model_under_test import KINDS, ModelUnderTest, Setting, default_config
from hf_longctx.proof.ranks import Ranks, RanksError
from hf_longctx.proof.result import EXACT, REFUSED, UNBUILDABLE, WRONG
from hf_longctx.proof.verification import run_proof

from .page import summary, worse, write_pages
from .terminal import Terminal


ROOT = Path(__file__).parents[2]
SIZE = 2
SECONDS_A_TYPE = 300.0
# Of the multimodal types, those that are trained on text; `--multimodal` sweeps all, in two more minutes.
MULTIMODAL = frozenset(
    "aria aya_vision cohere2_vision deepseek_vl ernie4_5_vl_moe glm4v glm4v_moe granite4_vision idefics3 internvl "
    "janus kimi_k25 lfm2_vl llava llava_next llava_onevision mistral3 mllama molmo2 ovis2 paddleocr_vl paligemma "
    "qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl "
    "qwen3_vl_moe smolvlm voxtral".split()
)


def models_under_test(every_multimodal: bool = False) -> list[tuple[str, str]]:
    """`(task, model type)` of everything that is swept.

    Every causal and every masked language model, multimodal ones that are not among them (the known ones, or every),
    and those encoders that have no language model head: types of the transformers' plain mapping in neither of the
    two, whose configuration has a vocabulary of its own and describes no encoder-decoder and no other input than text.
    """
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    rest = [name for name in modeling_auto.MODEL_MAPPING_NAMES if name not in causal and name not in masked]
    multimodal = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    tasks = {
        "causal-lm": list(causal),
        "masked-lm": list(masked),
        "multimodal-lm": [
            name
            for name, model in multimodal.items()
            if causal.get(name) != model and (every_multimodal or name in MULTIMODAL)
        ],
        "encoder": [name for name in rest if _reads_text(name)],
    }
    return [(task, name) for task, names in tasks.items() for name in names]


def _reads_text(name: str) -> bool:
    try:
        values = CONFIG_MAPPING[name]().to_dict()
    except Exception:
        return False
    others = ("vision", "image", "audio", "speech", "conv_", "patch", "feat_", "bbox", "mel", "coordinate")
    return (
        isinstance(values.get("vocab_size"), int)
        and not values.get("is_encoder_decoder")
        and not any(mark in field for field in values for mark in others)
    )


def prove(ranks: Ranks, task: str, name: str) -> dict:
    """The record of one type."""
    began = time.perf_counter()
    try:
        tested = ModelUnderTest.of(default_config(name), task, SIZE)
    except Exception as error:
        bare, rows = (
            UNBUILDABLE,
            [{"rows": kind, "outcome": UNBUILDABLE, "message": f"no configuration: {error}"} for kind in KINDS],
        )
    else:
        setting = Setting(SIZE, kinds=KINDS)
        found = run_proof(ranks, tested, setting, SECONDS_A_TYPE)
        rows = [_record_of(result) for result in found]
        bare = _bare_loop(ranks, tested, setting)
    seconds = round(time.perf_counter() - began, 2)
    return {"task": task, "type": name, "rows": rows, "bare": bare, "seconds": seconds}


def _bare_loop(ranks: Ranks, tested: ModelUnderTest, setting: Setting) -> str:
    """The outcome of a loop without `adapt`; one that hangs or kills its processes is at least not silent."""
    try:
        return ranks.run(prove_bare_loop, tested, setting, seconds=SECONDS_A_TYPE)[0]
    except RanksError:
        return REFUSED


def _record_of(result) -> dict:
    record = {"rows": result.rows, "outcome": result.outcome, "message": result.message}
    if result.errors is not None:
        record |= {"error": result.errors.worst, "parameter": result.errors.parameter, "dtype": result.dtype}
    return record


def sweep(
    wanted: list[tuple[str, str]],
    options: argparse.Namespace,
    done: list[dict],
    before: list[dict],
    terminal: Terminal,
) -> list[dict]:
    """Prove all that is wanted and append each result to the records; what is wrong or worse than before is shown."""
    waiting: queue.Queue = queue.Queue()
    for item in wanted:
        waiting.put(item)
    lock, results = threading.Lock(), list(done)

    def work() -> None:
        with Ranks(SIZE) as ranks:
            while True:
                try:
                    task, name = waiting.get_nowait()
                except queue.Empty:
                    return
                mark = terminal.mark()
                record = prove(ranks, task, name)
                problems = problems_of([record], before)
                with lock:
                    results.append(record)
                    with options.records.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    if problems:
                        terminal.fail(problems, mark)
                    terminal.advance(f"{name} ({task})")

    threads = [threading.Thread(target=work) for _ in range(options.workers)]
    terminal.expect(len(wanted))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def problems_of(results: list[dict], before: list[dict]) -> list[str]:
    """A message for each type that is wrong, and for each that was better on the committed page."""
    found = []
    for record in results:
        messages = dict.fromkeys(row["message"] for row in record["rows"] if row["outcome"] == WRONG)
        found += [f"{record['type']} ({record['task']}) is wrong: {message}" for message in messages]
    return found + worse(before, results)


def disagreements(results: list[dict]) -> list[str]:
    """A message for each type that is exact, and that `hf-longctx check` refuses from reading its model."""
    found = []
    for record in results:
        if any(row["outcome"] != EXACT for row in record["rows"]):
            continue
        options = argparse.Namespace(
            model=record["type"],
            task=record["task"],
            sequence_parallel_size=SIZE,
            inner_attention="auto",
            trust_remote_code=False,
        )
        try:
            split_of(read_model(options), options)
        except Exception as error:
            found.append(f"{record['type']} ({record['task']}) is exact, and `check` says: {error}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Sweep, write the pages, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="*", help="only these model types; the pages are not written")
    parser.add_argument("--multimodal", action="store_true", help="every multimodal type; the pages are not written")
    parser.add_argument("--resume", action="store_true", help="keep what the records already have for these versions")
    parser.add_argument("--redo", nargs="*", default=(), help="with --resume: outcomes or types to prove again")
    parser.add_argument("--records", type=Path, default=ROOT / "runs" / "conformance.jsonl")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // SIZE))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "conformance.md")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    versions = {"versions": {name: version(name) for name in ("torch", "transformers")}}
    before = json.loads(options.table.read_text())["models"] if options.table.exists() else []
    with Terminal() as terminal:
        every = models_under_test(options.multimodal)
        wanted = [item for item in every if not options.types or item[1] in options.types]
        if options.multimodal:
            wanted = [item for item in wanted if item[0] == "multimodal-lm"]
        done = _read(options.records, versions, options.redo) if options.resume else []
        done = [record for record in done if (record["task"], record["type"]) in wanted]
        _rewrite(options.records, versions, done)
        known = {(record["task"], record["type"]) for record in done}
        wanted = [item for item in wanted if item not in known]
        results = sweep(wanted, options, done, before, terminal)
    results.sort(key=lambda record: every.index((record["task"], record["type"])))
    problems = problems_of(results, before) + disagreements(results)
    for line in summary(results):
        print(line)
    print(f"{len(results)} models in {time.perf_counter() - began:.0f} s")
    for problem in problems:
        print(f"FAILED: {problem}")
    if not options.types and not options.multimodal:
        write_pages(options.page, options.table, results, versions["versions"])
    return 1 if problems else 0


def _read(records: Path, versions: dict, redo: list[str]) -> list[dict]:
    """Records of these versions; the last one of a type counts."""
    if not records.exists():
        return []
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    if not lines or lines[0] != versions:
        return []
    last = {(record["task"], record["type"]): record for record in lines[1:]}
    again = set(redo)
    return [r for r in last.values() if not again & {r["type"], *(row["outcome"] for row in r["rows"])}]


def _rewrite(records: Path, versions: dict, done: list[dict]) -> None:
    records.parent.mkdir(parents=True, exist_ok=True)
    records.write_text("".join(json.dumps(line) + "\n" for line in (versions, *done)))


if __name__ == "__main__":
    sys.exit(main())
