"""The planner: lines that hold, presets in order, the longest row as the inverse of the peak; and `hf-longctx
plan`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig

from hf_longctx import cli
from hf_longctx.cli import plan_search
from hf_longctx.cli.plan_report import Cell, Speed, print_cells
from hf_longctx.cli.plan_search import parse_tokens
from hf_longctx.planner.memory_plan import DEVICE_KINDS, USABLE_SHARE, MemoryBreakdown, Planner
from hf_longctx.planner.presets import PRESETS
from hf_longctx.planner.settings import Settings
from hf_longctx.reporting.flops import count_flops


CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,  # simulated as they are; `test_memory_plan.py` shows that few layers tell many
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32_000,
)
PLAIN = {"compute_dtype": torch.float32, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG)


def test_weights_are_counted_to_the_byte(planner):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG)
    weights = sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))
    breakdown = planner.breakdown(Settings(tokens=1024, **PLAIN))
    assert breakdown.weights == weights
    split = planner.breakdown(Settings(tokens=1024, world_size=4, wrapper="fsdp2", **PLAIN))
    assert split.weights == pytest.approx(weights / 4, rel=0.01)


def test_bytes_lie_on_a_line_of_the_tokens(planner):
    for name in PRESETS:
        settings = planner.preset(name, Settings(tokens=1, **PLAIN))
        one, two, four = (planner.breakdown(settings.of(tokens=tokens)) for tokens in (2**18, 2**19, 2**20))
        assert one.phase == two.phase == four.phase  # each phase of a step has its own line
        assert four.device - two.device == pytest.approx(2 * (two.device - one.device), rel=1e-6), name


def test_logits_are_most_of_a_plain_step_and_gone_on_the_first_rung(planner):
    settings = Settings(tokens=65_536, **PLAIN)
    plain = planner.breakdown(planner.preset("off", settings))
    assert plain.logits >= 2 * 65_536 * CONFIG.vocab_size * 4
    assert planner.breakdown(planner.preset("loss", settings)).logits < plain.logits / 10


def test_every_rung_takes_less_and_more_ranks_take_less(planner):
    settings = Settings(tokens=262_144, **PLAIN)
    device = [planner.breakdown(planner.preset(name, settings)).device for name in PRESETS]
    assert device == sorted(device, reverse=True) and device[-1] < device[0] / 4
    shared = Settings(tokens=262_144, sequence_parallel_size=4, world_size=4, wrapper="ddp", **PLAIN)
    for name in ("off", "checkpoint"):
        alone, quarter = (planner.breakdown(planner.preset(name, kind)) for kind in (settings, shared))
        assert quarter.hidden == pytest.approx(alone.hidden / 4, rel=0.05)


@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in PRESETS), ("off", 4), ("max", 4)])
def test_longest_row_is_the_inverse_of_the_peak(planner, name, size):
    budget = 24 * 2**30
    wrapper = {"wrapper": "ddp", "world_size": 4, "sequence_parallel_size": 4} if size == 4 else {}
    settings = planner.preset(name, Settings(tokens=4, **PLAIN, **wrapper))
    longest = planner.longest_tokens(settings, budget)
    assert longest > 1000 and longest % size == 0
    assert planner.breakdown(settings.of(tokens=longest)).device <= budget * USABLE_SHARE
    assert planner.breakdown(settings.of(tokens=longest + 64 * size)).device > budget * USABLE_SHARE


def test_cheapest_rung_that_fits_is_chosen(planner):
    settings = Settings(tokens=65_536, **PLAIN)
    for name in ("off", "mlp", "checkpoint"):
        need = planner.breakdown(planner.preset(name, settings)).device / USABLE_SHARE
        preset, chosen = planner.choose_preset(settings, int(need * 1.001))
        assert preset.name == name and planner.fits(chosen, int(need * 1.001))
    assert planner.choose_preset(settings, 2**20) is None


def test_more_ranks_than_heads_are_refused(planner):
    with pytest.raises(ValueError, match="query heads"):
        planner.breakdown(Settings(tokens=1024, sequence_parallel_size=16, world_size=16, wrapper="ddp"))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    one_layer = copy.deepcopy(CONFIG)
    one_layer.num_hidden_layers = 1
    one_layer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def planners():
    return {}


@pytest.fixture
def shared_planner(planners, monkeypatch):
    """One planner for all commands about one model, since it keeps what it has simulated."""

    def planner_of(config):
        return planners.setdefault(config.to_json_string(), Planner(config))

    monkeypatch.setattr(plan_search, "Planner", planner_of)


@pytest.mark.parametrize(
    ("text", "tokens"), [("1e6", 1_000_000), ("131072", 131_072), ("128K", 131_072), ("1.5m", 1_572_864)]
)
def test_tokens_are_read(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "-3", "1G", "K", "0"])
def test_tokens_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="--target_tokens"):
        parse_tokens(text)


def test_plan_prints_a_table_and_writes_the_run(shared_planner, folder, tmp_path, capsys):
    recipe, picture = tmp_path / "run.yaml", tmp_path / "plan.png"
    command = ["plan", str(folder), "--gpu_memory", "16", "--target_tokens", "128K"]
    assert cli.main([*command, "--write", str(recipe), "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("off", "loss", "mlp", "->", "131,072"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = yaml.safe_load(recipe.read_text())
    assert written["max_length"] == 131_072 and written["sequence_parallel_size"] == 1
    assert cli.main([*command, "--write", str(recipe)]) == 2
    assert "refused" in capsys.readouterr().out


def test_plan_says_how_often_to_save(shared_planner, folder, capsys):
    """BLOOM's own figures, and those of a run whose saves nobody has measured."""
    command = ["plan", str(folder), "--gpu_memory", "16", "--target_tokens", "8K"]
    assert cli.main([*command, "--save_seconds", "40", "--hours_between_failures", "168"]) == 0
    assert "one takes 40.0 s; with a failure every 168 hours, saving every 116 minutes" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "GiB and takes about" in (printed := capsys.readouterr().out) and "every 43,008 hours" in printed
    assert cli.main([*command, "--optimizer", "lora"]) == 0
    assert "only adapters are saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu_memory", "16", "--target_tokens", "64M"], "the longest row is"),
        (["--gpus", "0"], "`--gpus` (0) must be more than 0"),
        (["--save_seconds", "0"], "`--save_seconds` (0) must be more than 0"),
        (["--hours_between_failures", "nan"], "`--hours_between_failures` (nan) must be more than 0"),
        (["--optimizer", "lion"], "must be one of adamw"),
        (["--target_tokens", "many"], "--target_tokens"),
    ],
)
def test_plan_refuses_with_the_sentence(shared_planner, folder, capsys, arguments, message):
    assert cli.main(["plan", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().out


def test_plan_of_no_model_is_refused(tmp_path, capsys):
    assert cli.main(["plan", str(tmp_path / "nothing")]) == 2
    assert "no model that transformers can read" in capsys.readouterr().out


def test_table_fits_a_terminal_of_120_columns_and_is_never_cut():
    settings = Settings(tokens=2**30, world_size=16, wrapper="fsdp2", sequence_parallel_size=16)
    amounts = dict.fromkeys(DEVICE_KINDS, round(999.9 * 2**30)) | {"weights": round(1234.5 * 2**30)}
    amounts |= {"attention": round(499.9 * 2**30), "recurrent": round(500 * 2**30)}  # one column for both
    breakdown = MemoryBreakdown(tokens=2**30, **amounts, cpu=round(9999.9 * 2**30), phase="loss")
    cells = [Cell(preset, settings, 2**30, breakdown) for preset in PRESETS.values()]
    speed = Speed(count_flops(CONFIG), "", 400.0)
    for width, is_terminal in ((120, True), (1000, False)):
        console = Console(
            file=io.StringIO(), width=width, soft_wrap=True, force_terminal=is_terminal, color_system=None
        )
        print_cells(console, cells, cells[-1], 2**30, speed)
        printed = console.file.getvalue()
        rows = [line for line in printed.splitlines() if "1,073,741,824" in line and "tokens" not in line]
        assert len(rows) == len(cells) and max(map(len, rows)) <= 120
        assert all("1,234.5" in row and row.count("999.9") == 8 for row in rows) and "…" not in printed
