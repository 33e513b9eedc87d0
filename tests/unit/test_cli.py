"""The console command, as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.falcon import modeling_falcon

import hf_longctx
from hf_longctx.cli import main
from hf_longctx.cli.command_line import COMMANDS, build_parser
from hf_longctx.cli.env import is_newer
from hf_longctx.cli.pack_report import Padded
from hf_longctx.cli.train import TASKS
from hf_longctx.data.packing.lengths import STRATEGIES, pack_lengths, packing_cost

from ..models import config_of
from ..tokenizer import tiny_tokenizer, words


COMMAND = Path(sys.executable).with_name("hf-longctx")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


def test_env_names_versions_and_kernels(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert transformers.__version__ in out and "sdpa" in out


@pytest.mark.parametrize("limit", [transformers.__version__, "5.0.0"])
def test_env_says_which_library_is_newer_than_tested(limit, monkeypatch, capsys):
    monkeypatch.setattr("hf_longctx.cli.env.read_tested_versions", lambda: {"transformers": limit})
    assert main(["env"]) == 0
    message = f"`transformers` {transformers.__version__} is newer than tested (5.0.0)"
    assert (message in capsys.readouterr().out) == (limit == "5.0.0")


@pytest.mark.parametrize(
    ("installed", "newer"),
    [("2.13.0", False), ("2.13.0+cu130", False), ("2.12.1", False), ("2.13.0.dev1", False), ("2.13.1", True)]
    + [("2.14.0.dev20261101+cpu", True), ("not installed", False), ("unknown", False)],
)
def test_a_build_of_the_tested_version_is_not_newer(installed, newer):
    assert is_newer(installed, "2.13.0") == newer


def test_check_shows_who_gets_which_heads(tmp_path, capsys):
    config_of("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=36).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--sequence_parallel_size", "2"]) == 0
    out = capsys.readouterr().out
    assert "0..4" in out and "5..8" in out and "1.33 times" in out


@pytest.mark.parametrize(
    ("kind", "said", "table"),
    [
        ("qwen3", "each gets 16 of 32 query heads and 16 of 32 key/value heads", True),
        ("hy_v4", "34 layers attend to what an indexer picks", False),
        ("mamba2", "", False),
        ("dots3_note_text", "layers attend to what an indexer picks", True),  # its layers have heads of their own
        ("dots1", "each gets", True),  # its defaults build no model, so a tiny one is looked at
    ],
)
def test_check_takes_a_type_by_name(kind, said, table, capsys):
    """Layers that gather keys of whole rows trade no heads, so 33 ranks may share a model of 32 heads."""
    size = "2" if table else "33"
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {kind}")
    assert main(["check", kind, "--sequence_parallel_size", size]) == 0
    out = capsys.readouterr().out
    assert "can be sharded" in out and said in " ".join(out.split()) and ("query heads" in out) == table


def test_check_says_what_a_folder_lacks(tmp_path, capsys):
    config = config_of("llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "dots1"}))
    assert main(["check", str(tmp_path)]) == 2
    assert "builds no model from its configuration (TypeError: " in capsys.readouterr().out


def test_check_refuses_with_the_sentence(tmp_path, capsys):
    config_of("llama").save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--sequence_parallel_size", "7"]) == 2
    assert "exceeds the model's query heads (6)" in capsys.readouterr().out


def test_check_refuses_a_model_that_lists_its_attentions_itself(tmp_path, capsys, monkeypatch):
    # As every version of transformers would without the names that `class_tables` puts into its lists.
    monkeypatch.delitem(modeling_falcon.FALCON_ATTENTION_CLASSES, "ulysses")
    transformers.FalconConfig(vocab_size=97, hidden_size=48, num_attention_heads=6).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 2
    assert "looks up attn_implementation='ulysses' in a list of its own" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_printed():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"hf-longctx {hf_longctx.__version__}"


def test_a_wrong_argument_is_told_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "qwen3", "--packd"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --packd; did you mean --packed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft", "--config", "nothing.yaml"], "`nothing.yaml` cannot be read"),
        (["sft", "--max_lenth", "3"], "`max_lenth` is no argument of this recipe: did you mean `max_length`?"),
        (
            ["sft", "--sources_per_batch", "3"],
            "`sources_per_batch` is a setting of `SourcesConfig`, which this recipe does not take and `hf-longctx "
            "embed` does: leave it out, or run that command.",
        ),
        (["sft", "--accelerate_config", "fsdp3"], "`--accelerate_config` (fsdp3) is neither a file nor one of ddp_1"),
        (
            ["sft", "--bf16", "false", "--load_best_model_at_end", "true", "--save_strategy", "epoch"]
            + ["--eval_strategy", "steps", "--eval_steps", "2"],
            "requires the save and eval strategy to match",
        ),
        (["sft", "--num_processes", "2"], "`--num_processes` (2) is of a launch"),
    ],
)
def test_a_task_is_refused_with_its_sentence(words, said, capsys, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "refused: " in error and said in error.partition("refused: ")[2]


def test_a_fault_that_is_not_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "hf_longctx.tasks.sft", types.SimpleNamespace(main=lambda: json.loads("{")))
    with pytest.raises(json.JSONDecodeError):
        main(["sft"])


def test_a_launch_names_the_module_and_passes_everything_on(monkeypatch):
    from accelerate.commands import launch

    started = []
    monkeypatch.setattr(launch, "launch_command", started.append)
    words = ["--config", "run.yaml", "--accelerate_config", "ddp_1node", "--num_processes", "2", "--max_length", "64"]
    assert main(["sft", *words]) == 0
    (options,) = started
    assert options.module and options.training_script == "hf_longctx" and options.num_processes == 2
    assert options.config_file.endswith("ddp_1node.yaml")
    assert options.training_script_args == ["sft", "--config", "run.yaml", "--max_length", "64"]


def test_a_wrong_command_is_told():
    done = run("chek")
    assert done.returncode == 2 and "invalid choice" in done.stderr


HELP = """
import sys
import hf_longctx
from hf_longctx.cli import main
for arguments in (["--help"], *([name, "--help"] for name in sys.argv[1:])):
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == 0, arguments
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "transformers", "numpy", "rich", "datasets"}))
"""


def test_help_of_every_command_imports_no_library():
    names = list(build_parser().subcommands_by_name())
    assert len(names) == len(COMMANDS) and set(TASKS) < set(names)
    helped = subprocess.run([sys.executable, "-c", HELP, *names], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.splitlines()[-1] == "[]"
    assert all(f"usage: hf-longctx {name} [-h]" in helped.stdout for name in names)


def test_every_module_can_be_imported_first():
    """Registration runs inside somebody's import, which must not be one of our own half-imported files."""
    root = Path(__file__).parents[2] / "hf_longctx"
    names = [f"hf_longctx.attention.{path.stem}" for path in sorted((root / "attention").glob("*.py"))]
    assert len(names) > 5
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH_FIRST, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A child for each module, from a parent that has loaded whatever transformers' models need, but not those nor ours.
IMPORT_EACH_FIRST = """
import importlib, os, sys, transformers.modeling_utils
del sys.modules["transformers.modeling_utils"]
assert not any(name.startswith("hf_longctx") for name in sys.modules)
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(name)
        stock = importlib.import_module("transformers.modeling_utils")
        assert "ulysses" in stock.AttentionInterface(), name
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
assert not failed, failed
"""


# pack

LENGTHS = np.random.default_rng(0).lognormal(4, 1, 200).astype(int).clip(1, 900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data files of every form with the same lengths, and a tokenizer."""
    root = tmp_path_factory.mktemp("pack")
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    rows = {
        "length": [{"length": int(length)} for length in LENGTHS],
        "input_ids": [{"input_ids": [1] * length, "length": "long"} for length in LENGTHS],
        "text": [{"text": words(int(length), 1)} for length in LENGTHS],
        "some_empty": [{"body": words(length, 1)} for length in (3, 0, 5, 0, 60)],
        "titles": [{"title": "a"}],
        "nothing": [{"text": ""}],
        "broken": ["{{"],
    }
    for name, lines in rows.items():
        written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (root / f"{name}.jsonl").write_text("\n".join(written) + "\n")
    (root / "notes.md").write_text("mine")
    return root


@pytest.fixture
def pack(folder, monkeypatch, capsys):
    """The command as typed in that folder, in this process: exit code and what it prints."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))

    def run_here(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(["pack", *arguments]), capsys.readouterr().out

    return run_here


@pytest.mark.parametrize(
    "arguments",
    [
        ["length.jsonl"],
        ["input_ids.jsonl"],
        ["input_ids.jsonl", "--streaming"],
        ["text.jsonl", "--model_name_or_path", "tokenizer"],
        ["text.jsonl", "--model_name_or_path", "tokenizer", "--streaming"],
    ],
    ids=" ".join,
)
def test_pack_tells_rows_waste_and_speed_of_every_form_of_data(pack, tmp_path, arguments):
    picture = tmp_path / "picture.png"
    code, out = pack(*arguments, "--max_tokens", "256", "--hidden_size", "16", "--output", str(picture))
    assert code == 0, out
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["documents"][1] == "200,"
    assert lines["tokens"][1] == f"{LENGTHS.sum():,}"
    assert f"{LENGTHS.max()}, {np.median(LENGTHS):.0f} tokens" in out
    for strategy in STRATEGIES:
        packing = pack_lengths(LENGTHS, 256, strategy=strategy, long_documents="split", seed=0)
        assert lines[strategy][1:3] == [str(len(packing)), f"{packing.efficiency:.2%}"]
    padded = Padded.measure(packing.lengths[np.argsort(packing.rows, kind="stable")], 8, 12 * 16)
    assert f"{padded.waste:.1%} of the tokens in random batches of 8" in out
    speedup = padded.cost / packing_cost(packing.lengths, 12 * 16)
    assert f"{speedup:.2f} times, an estimate" in out and speedup > 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not any(letter in out for letter in "\x1b┃│")  # plain where it is no terminal


def test_padding_waste_is_what_batches_of_the_longest_compute():
    assert Padded.measure(np.array([2, 2, 2]), 2, 10) == Padded(0.0, 3 * (4 + 20))
    padded = Padded.measure(np.array([1, 3, 4]), 8, 10)
    assert padded.waste == pytest.approx(4 / 12) and padded.cost == 3 * (16 + 40)
    many = Padded.measure(np.arange(1, 1001), 1, 10)
    assert many.waste == 0 and many.cost == packing_cost(np.arange(1, 1001), 10)


def test_pack_leaves_out_empty_documents_and_says_so(pack, folder):
    options = ["--text_field", "body", "--model_name_or_path", "tokenizer", "--max_tokens", "8", "--output", "e.svg"]
    code, out = pack("some_empty.jsonl", *options, "--limit", "4")
    assert code == 0 and "2, and 2 empty ones left out" in out
    assert ["best_fit_decreasing", "1", "100.00%"] in [line.split()[:3] for line in out.splitlines()]
    assert "<svg" in (folder / "e.svg").read_text()
    code, out = pack("some_empty.jsonl", *options, "--long_documents", "truncate")  # over the picture
    assert code == 0 and "1 documents (truncate)" in out
    code, out = pack("some_empty.jsonl", *options, "--long_documents", "error")
    assert code == 2 and "row 4 has 60 tokens, over `max_tokens` (8)" in out


def test_pack_draws_only_when_asked(pack, folder):
    code, out = pack("length.jsonl")
    assert code == 0 and "wrote" not in out and not list(folder.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.jsonl"], "only a tokenizer can count: name it with `--model_name_or_path`"),
        (["titles.jsonl"], "`chosen` with `rejected`, and `text`, only title: name the column"),
        (["nothing.jsonl", "--model_name_or_path", "tokenizer"], "the 1 documents of `nothing.jsonl` have no tokens"),
        (["broken.jsonl"], "`broken.jsonl`, line 1 is no JSON"),
        (["missing.jsonl"], "`missing.jsonl` does not exist"),
        (["length.jsonl", "--max_tokens", "0"], "`max_tokens` (0) must be a whole number"),
        (["length.jsonl", "--long_documents", "drop"], "`long_documents` ('drop') must be one of"),
        (["length.jsonl", "--limit", "0"], "`--limit` (0) must be at least 1"),
        (["length.jsonl", "--batch_size", "0"], "`--batch_size` (0) must be at least 1"),
        (["length.jsonl", "--output", "notes.md"], "`--output` (notes.md) must be a picture"),
        (["length.jsonl", "--output", "no/such.png"], "the folder of `--output` (no/such.png) does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pack_refuses_with_the_sentence(pack, folder, arguments, message):
    code, out = pack(*arguments)
    assert code == 2 and out.startswith("refused: ") and message in out
    assert (folder / "notes.md").read_text() == "mine" and not (folder / "packing.png").exists()


def test_pack_without_matplotlib_says_how_to_draw(folder):
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom hf_longctx.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", code, "pack", "length.jsonl", "--output", "undrawn.png"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "`undrawn.png` was not drawn, matplotlib is missing: run `pip install hf-longctx[demo]`" in done.stdout
    assert "best_fit_decreasing" in done.stdout and not (folder / "undrawn.png").exists()
