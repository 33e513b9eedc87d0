"""The command line as a whole: help of every parser, JSON of every command, what wrong input leads to, completion, and
programs that are started with our names."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_longctx.cli import check, check_model, main, run_program
from hf_longctx.cli.command_line import build_parser
from hf_longctx.cli.completion import commands_of, fish
from hf_longctx.cli.expected import sentence_of
from hf_longctx.cli.plan_cells import plan_all
from hf_longctx.config.run import INNER_ATTENTIONS
from hf_longctx.data.packing.lengths import LONG_DOCUMENTS
from hf_longctx.planner.settings import OPTIMIZERS
from hf_longctx.planner.settings import WRAPPERS as PLANNED_WRAPPERS
from hf_longctx.proof import known_types
from hf_longctx.proof.model_under_test import DTYPES, TASKS, WRAPPERS
from hf_longctx.proof.result import EXACT, EXIT_CODES, REFUSED, UNBUILDABLE, WRONG, RowsResult

from ..models import build, config_of
from ..tokenizer import tiny_tokenizer, words


# Help


def leaves(parser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser, by its words."""
    yield path.strip(), parser
    for name, below in parser.subcommands_by_name().items():
        yield from leaves(below, f"{path} {name}")


PARSERS = dict(leaves(build_parser()))
CHOICES = {
    "--inner_attention": INNER_ATTENTIONS,
    "--optimizer": OPTIMIZERS,
    "--long_documents": LONG_DOCUMENTS,
    "--dtype": DTYPES,
    "--accelerate_config": ("ddp_1node", "fsdp2_8gpu", "fsdp2_2nodes"),
    ("verify", "--wrapper"): WRAPPERS,
    ("plan", "--wrapper"): PLANNED_WRAPPERS,
    ("verify", "--task"): TASKS,
}


@pytest.mark.parametrize("name", PARSERS)
def test_help_fits_eighty_columns_and_tells_every_default_and_choice(name):
    parser = PARSERS[name]
    printed = parser.format_help()
    assert max(map(len, printed.splitlines())) <= 80
    told = " ".join(printed.split())
    assert name.split()[-1:] == [] or f"usage: hf-longctx {name} [-h]" in told
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
            continue
        assert action.help, action
        for option in action.option_strings[-1:]:
            if action.nargs == 0 or action.required:
                continue
            shown = parser._get_formatter()._expand_help(action)
            assert "default" in shown, (name, option)
            if action.default is not None:
                assert str(action.default) in shown, (name, option)
            known = action.choices or CHOICES.get((name, option)) or CHOICES.get(option) or ()
            assert all(str(choice) in told for choice in known), (name, option)


def test_check_offers_the_tasks_of_the_proof():
    assert (*check.TASKS, "embedding", "dpo", "reward") == TASKS


# JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, a tokenizer that chats, and rows of every form."""
    root = tmp_path_factory.mktemp("inputs")
    config_of("llama", num_attention_heads=12, num_key_value_heads=6, hidden_size=48).save_pretrained(root / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(root / "tokenizer")
    one, two = words(5, 1), words(7, 2)
    turns = [{"role": "user", "content": one}, {"role": "assistant", "content": two}]
    rows = {
        "lengths": [{"length": 5}, {"length": 60}],
        "texts": [{"text": one}, {"text": two}],
        "chats": [{"messages": turns}, {"messages": turns[:1]}],
        "sharegpt": [{"conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": two}]}],
        "prompts": [{"prompt": one, "completion": f" {two}"}],
        "pairs": [{"prompt": f"{one} ", "chosen": two, "rejected": one}],
        "marked": [{"prompt": one, "completion": two, "label": True}],
        "anchors": [{"anchor": one, "positive": two}],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "table.csv").write_text(f"text,other\n{one},x\n{two},y\n")
    (root / "notes.md").write_text(one)
    return root


@pytest.fixture
def typed(folder, monkeypatch, capsys):
    """A command as typed in that folder: exit code, stdout and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main(line.split()), *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("env --json", {"packages", "devices", "inner_kernels"}),
        ("check --json qwen3", {"model_type", "task", "heads", "num_query_heads", "gathering_layers", "proof"}),
        ("check qwen3_5 --sleep --json", {"can_sleep", "state_layers", "num_layers"}),
        ("pack lengths.jsonl --max_tokens 64 --json", {"documents", "tokens", "strategies", "padded", "speedup"}),
        ("verify model --sequence_parallel_size 0 --json", set()),
        ("plan nothing/here --json", set()),
        ("ttt eval model --by nothing --json", set()),
        ("sft --config nothing.yaml --json", {"output_dir"}),
    ],
)
def test_json_is_all_of_stdout(typed, line, keys):
    code, out, _ = typed(line)
    found = json.loads(out)
    assert {"command", "version", "outcome", "exit_code", "message", *keys} <= set(found)
    command = "ttt eval" if line.startswith("ttt") else line.split()[0]
    assert found["exit_code"] == code and found["command"] == command
    assert (found["outcome"] == "ok") == (code == 0) == (found["message"] == "")


def test_json_stands_in_a_file_beside_the_lines(typed, tmp_path):
    code, out, _ = typed(f"check model --no_proof --json {tmp_path / 'check.json'}")
    found = json.loads((tmp_path / "check.json").read_text())
    assert code == 0 and "can be sharded" in out and f"wrote {tmp_path / 'check.json'}" in out
    assert found["heads"][1] == {"rank": 1, "query": [6, 12], "key_value": [3, 6]} and found["can_be_sharded"]
    code, out, _ = typed(f"env --json {tmp_path / 'no' / 'such.json'}")
    assert code == 2 and "the folder of `--json`" in out


def test_a_task_trains_and_answers_with_its_metrics(typed, tmp_path):
    pytest.importorskip("trl")
    build("llama", "sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": words(3, i), "completion": words(4, i), "label": i % 2 == 0} for i in range(4)]
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/marked.jsonl --output_dir {tmp_path}/run"
    )
    more = "--max_steps 1 --per_device_train_batch_size 2 --use_cpu true --bf16 false --report_to none"
    code, out, err = typed(f"kto {places} {more} --max_length 32 --logging_steps 1 --save_strategy no --json")
    assert code == 0, err
    found = json.loads(out)
    assert found["output_dir"] == f"{tmp_path}/run" and found["metrics"]["history"][0]["loss"] > 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


# Check


def test_check_says_the_heads_of_many_ranks_in_one_line(typed):
    code, out, _ = typed("check model --sequence_parallel_size 12 --no_proof")
    assert code == 0 and "each gets 1 of 12 query heads and 1 of 6 key/value heads" in out
    code, out, _ = typed("check model --sequence_parallel_size 9 --no_proof")
    assert "each gets 1 to 2 of 12 query heads and 1" in out and "rank" not in out.partition("`--json`")[0]


def test_check_answers_for_every_type_of_the_page_as_the_proof_did(monkeypatch):
    """From the table; that reading a model agrees with it is checked for a few below, and by the sweep for all."""
    versions = json.loads(known_types.TABLE.read_text())["versions"]
    monkeypatch.setattr(known_types, "version", versions.__getitem__)
    options = argparse.Namespace(inner_attention="auto")
    for (task, name), known in known_types.read_table().items():
        model = check_model.CheckedModel(name, types.SimpleNamespace(model_type=name), task, True, False)
        found = check_model.table_evidence(model, options)
        assert found.outcome == known.outcome and bool(found.message) == (known.outcome != EXACT)
        of_a_folder = check_model.CheckedModel(".", model.config, task, False, False)
        assert (check_model.table_evidence(of_a_folder, options) is None) == (known.outcome != EXACT)


@pytest.mark.parametrize("outcome", EXIT_CODES)
def test_check_ends_as_the_proof_of_its_type_does(outcome, monkeypatch, capsys):
    table = {key: known for key, known in known_types.read_table().items() if key[1] in CONFIG_MAPPING_NAMES}
    versions = json.loads(known_types.TABLE.read_text())["versions"]
    monkeypatch.setattr(known_types, "version", versions.__getitem__)
    names = [key for key, known in table.items() if known.outcome == outcome]
    for task, name in names[:3]:
        assert main(["check", name, "--task", task]) == EXIT_CODES[outcome]
        out = capsys.readouterr().out
        assert ("table of all types" in out) if outcome == EXACT else (table[task, name].message.split()[-1] in out)


@pytest.mark.parametrize("outcome", [EXACT, REFUSED, WRONG, UNBUILDABLE])
def test_check_proves_what_the_table_does_not_know(outcome, monkeypatch, capsys):
    rows = [RowsResult("dense", outcome, message="why"), RowsResult("packed", REFUSED, message="no condition")]
    asked = []
    prove = lambda config, **settings: asked.append((config.model_type, settings)) or types.SimpleNamespace(rows=rows)
    monkeypatch.setattr(check_model, "look_up", lambda *_: None)
    monkeypatch.setattr(check_model, "verify", prove)
    assert main(["check", "qwen3", "--json"]) == {EXACT: 0, UNBUILDABLE: 3}.get(outcome, 2)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["proof"]["source"] == "proof" and found["proof"]["rows"] == {"dense": outcome, "packed": REFUSED}
    assert found["message"] == ("" if outcome == EXACT else "why") and "prove a tiny one" in err
    ((kind, settings),) = asked
    assert kind == "qwen3" and settings["sequence_parallel_size"] == 2 and settings["packed"]


@pytest.mark.parametrize("name", ["T5", "t5", "vit", "Qwen3", "gemma4_assistant", "no-such-model"])
def test_check_of_a_name_that_is_no_text_model_is_a_sentence(name, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", name]) in (2, 3)
    out = capsys.readouterr().out
    assert len(out) < 600 and name.lower() in out.lower()
    assert name != "T5" or "`T5` is neither a folder nor a model type: did you mean `t5`" in out


def test_check_of_a_type_that_the_table_lacks_and_nobody_can_build_is_a_sentence(monkeypatch, capsys):
    def from_config(config, **_):
        raise AttributeError("no attribute 'vocab_size'")

    monkeypatch.setattr(check_model, "look_up", lambda *_: None)
    monkeypatch.setattr(check_model, "AUTO_CLASSES", {"causal-lm": types.SimpleNamespace(from_config=from_config)})
    assert main(["check", "qwen3"]) == 2
    said = capsys.readouterr().out
    assert "no model of type `qwen3` can be built, from its defaults or in small (AttributeError: no attribu" in said


# Pack


@pytest.mark.parametrize(
    ("file", "documents", "tokens"),
    [
        ("texts.jsonl", 2, 12),
        ("table.csv", 2, 12),
        ("chats.jsonl", 2, 17),
        ("sharegpt.jsonl", 1, 12),
        ("prompts.jsonl", 1, 13),
        ("pairs.jsonl", 2, 24),
        ("marked.jsonl", 1, None),
        ("anchors.jsonl --text_field anchor,positive", 2, 12),
    ],
)
def test_pack_reads_what_recipes_read(typed, file, documents, tokens):
    code, out, err = typed(f"pack {file} --model_name_or_path tokenizer --max_tokens 64 --json")
    found = json.loads(out)
    assert code == 0, (out, err)
    assert found["documents"] == documents and tokens in (None, found["tokens"])


def test_pack_reads_the_sources_of_recipes(typed, monkeypatch):
    monkeypatch.setattr("hf_longctx.tasks.document_places._stdlib_pattern", lambda: str(Path(json.__file__)))
    for place in ("stdlib_functions:", "package:torchgen", "docstrings:yaml"):
        code, out, err = typed(f"pack {place} --model_name_or_path tokenizer --json")
        assert code == 0 and json.loads(out)["documents"] > 1, (place, out)
    code, out, _ = typed("pack chats.jsonl")
    assert code == 2 and "holds conversations, whose tokens only a tokenizer can count" in out


def test_pack_asks_for_a_chat_template(typed, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    code, out, _ = typed(f"pack chats.jsonl --model_name_or_path {tmp_path}")
    assert code == 2 and "has no chat template" in out


# Plan


class Counted:
    """What `plan_all` needs of a planner."""

    def __init__(self) -> None:
        self.simulated: dict[int, int] = {}

    def square(self, number: int) -> int:
        self.simulated[number] = os.getpid()
        if number == 3 and os.getpid() != HERE and self.simulated.get(-1):
            os._exit(9)
        return number**2


HERE = os.getpid()


@pytest.mark.parametrize("killed", [False, True])
def test_simulations_in_workers_come_back_in_order_and_survive_a_killed_worker(killed):
    planner, told = Counted(), []
    if killed:
        planner.simulated[-1] = 1
    found = plan_all(planner, planner.square, [1, 2, 3, 4], told.append, 2)
    assert found == [1, 4, 9, 16] and {1, 2, 3, 4} <= set(planner.simulated)
    assert (planner.simulated[3] == os.getpid()) == killed and told


# Wrong input


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sft --beta 0.1", "`beta` is no argument of this recipe, but of `hf-longctx dpo` and `hf-longctx kto`"),
        ("pretrain --max_length 8", "`max_length` is no argument of this recipe, but of `hf-longctx sft`"),
        ("dpo --ramp_start 2", "`ramp_start` is"),
        ("sft --learning_rat 1", "did you mean `learning_rate`?"),
        ("recall_sparse --stepz 3", "`stepz` is no argument of this recipe: did you mean `steps`?"),
        ("recall_sparse --config nothing.yaml", "`nothing.yaml` cannot be read"),
        ("run nothing.py", "`nothing.py` is neither a Python file here nor a command"),
        ("run tirchrun", "did you mean `torchrun`?"),
    ],
)
def test_a_wrong_name_is_told_with_the_right_one(typed, line, said):
    pytest.importorskip("trl")
    code, _, err = typed(line)
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize(("word", "near"), [("chek", "check"), ("trian", "ttt train"), ("pretrian", "pretrain")])
def test_a_wrong_command_is_told_with_the_nearest(word, near, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ttt", word] if " " in near else [word])
    assert ended.value.code == 2 and f"did you mean {near.split()[-1]}?" in capsys.readouterr().err


DATA = [
    ("pretrain", "chats", "holds conversations (`messages`), which `hf-longctx sft` trains on"),
    ("pretrain", "anchors", "which `hf-longctx embed` trains on"),
    ("sft", "anchors", "holds pairs of texts for an embedder (`anchor`, `positive`), which `hf-longctx embed`"),
    ("dpo", "chats", "these are conversations (`messages`), which `hf-longctx sft` trains on"),
    ("reward", "texts", "these are plain texts (`text`), which `hf-longctx sft` or `hf-longctx pretrain` trains on"),
    ("kto", "texts", "KTO needs `prompt`, `completion` and `label`"),
]


@pytest.mark.parametrize(("task", "file", "said"), DATA)
def test_data_of_another_command_is_told_by_it(typed, monkeypatch, tmp_path, task, file, said):
    pytest.importorskip("trl")
    import importlib

    # The body of `kto` is that of `dpo`, on rows of its own.
    module = importlib.import_module(f"hf_longctx.tasks.{'dpo' if task == 'kto' else task}")
    loaded = types.SimpleNamespace(config=None)
    monkeypatch.setattr(module, "load_model", lambda *_, **__: (loaded, None))
    line = f"{task} --dataset_name {file}.jsonl --output_dir {tmp_path} --use_cpu true --report_to none --bf16 false"
    code, _, err = typed(line)
    assert code == 2 and said in err, err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("notes.md", "`notes.md` holds plain text, which `hf-longctx sft` or `hf-longctx pretrain` trains on"),
        ("chats.jsonl", "holds conversations (`messages`), which `hf-longctx sft` trains on"),
        ("texts.jsonl", "holds plain texts (`text`), which `hf-longctx sft` or `hf-longctx pretrain` trains on"),
    ],
)
def test_documents_given_to_an_embedder_are_told(typed, tmp_path, place, said):
    pytest.importorskip("sentence_transformers")
    sources = json.dumps({"mine": place}).replace(" ", "")
    code, _, err = typed(f"embed --sources {sources} --output_dir {tmp_path} --use_cpu true --report_to none")
    assert code == 2 and said in err, err


@pytest.mark.parametrize("task", ["sft", "kto", "recall_sparse", "pretrain_alibi"])
def test_a_folder_with_an_earlier_run_is_left_alone(typed, tmp_path, task):
    pytest.importorskip("trl")
    for name in ("recall_sparse.json", "alibi.json"):
        (tmp_path / name).write_text("mine")
    steps = "" if task == "recall_sparse" else " --max_steps 1 --use_cpu true --report_to none --bf16 false"
    code, _, err = typed(f"{task} --output_dir {tmp_path}{steps}")
    assert code == 2 and ("is not empty: choose another, continue with `--resume_from_checkpoint" in err) == (
        task in ("sft", "kto")
    )
    assert "choose another" in err and (tmp_path / "recall_sparse.json").read_text() == "mine"


WITHOUT_EXTRAS = """
import io, json, sys
from contextlib import redirect_stderr
for name in ("trl", "datasets", "sentence_transformers", "peft"):
    sys.modules[name] = None
from hf_longctx.cli import main
said = {}
for task in sys.argv[1:]:
    with redirect_stderr(io.StringIO()) as error:
        said[task] = [main(task.split()), error.getvalue()]
print(json.dumps(said))
"""


def test_a_wheel_without_extras_names_them():
    tasks = ["sft", "pretrain", "dpo", "reward", "kto", "embed", "ttt train", "sleep", "lsh_pretrain"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, *tasks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for task, (code, said) in json.loads(done.stdout.splitlines()[-1]).items():
        extra = "embedding" if task == "embed" else "trl"
        assert code == 2 and f"`pip install hf-longctx[{extra}]`" in said, (task, said)


def test_arguments_cannot_be_read_without_trl(monkeypatch):
    from hf_longctx.tasks.recipe_file import parse_recipe

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ImportError, match=r"The recipes read their arguments with trl: `pip install hf-longctx\[trl\]`"
    ):
        parse_recipe([])


def test_what_a_library_says_of_arguments_is_a_sentence_and_of_a_step_a_fault():
    def config() -> None:
        from transformers import TrainingArguments

        kinds = {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 2}
        TrainingArguments(output_dir="x", use_cpu=True, load_best_model_at_end=True, **kinds)

    def training_step() -> None:
        config()

    for function in (config, training_step):
        with pytest.raises(ValueError) as caught:
            function()
        sentence = sentence_of(caught.value)
        assert (sentence is None) == (function is training_step)
    assert sentence_of(caught.value.with_traceback(None)) is None
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).view(3)
    assert sentence_of(caught.value) is None


# Programs with our names


SCRIPT = """
import json, sys
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as names
import theirs
print(json.dumps([sys.argv, "packed" in names.valid_keys(), theirs.seen]))
"""


def test_run_starts_a_script_with_our_names_and_everything_else_as_it_was(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "theirs.py").write_text("seen = []\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(tmp_path)!r})\n")
    (other / "launch.py").write_text(
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(other), root])}
    start = [sys.executable, "-m", "hf_longctx", "run"]
    words = ["-m", "launch", str(tmp_path / "train.py"), "--flag", "-m"]  # a process that a launcher starts
    done = subprocess.run([*start, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [words[2:], True, []]


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["train.py", "--lr", "1"], ["PYTHON", "train.py", "--lr", "1"]),
        (["-m", "pkg.train", "-m"], ["PYTHON", "-m", "pkg.train", "-m"]),
        (["python", "-c", "1"], [str(Path(sys.executable).with_name("python")), "-c", "1"]),
    ],
)
def test_run_finds_scripts_modules_and_commands(words, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    became = []
    monkeypatch.setattr(os, "execvpe", lambda *call: became.append(call))
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 0)
    monkeypatch.setenv("PYTHONPATH", "mine")
    main(["run", *words])
    ((_, line, environment),) = became
    assert line == [sys.executable if word == "PYTHON" else word for word in started]
    assert environment["PYTHONPATH"] == os.pathsep.join([str(run_program.STARTUP), "mine"])


# Completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hf-longctx che", {"check"}),
        ("hf-longctx ttt co", {"convert"}),
        ("hf-longctx verify qwen3 --pa", {"--packed"}),
        ("hf-longctx completion f", {"fish"}),
        ("hf-longctx check qwen3 --task mask", {"masked-lm"}),
    ],
)
def test_bash_completes(line, expected, capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + (
        f'COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _hf_longctx; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert set(done.stdout.split()) == expected and not done.stderr


def test_every_shell_knows_every_option(capsys):
    commands = dict(commands_of(build_parser()))
    assert ("ttt", "convert") in commands
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for options in commands.values():
            for option in options:
                name = option.name if shell != "fish" else option.name.lstrip("-")
                assert name in script, (shell, option)
    assert "-d 'processes that share one sequence" in fish(commands)
