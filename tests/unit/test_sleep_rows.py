"""Rows that need thought: their labels against a simulation that anyone can check, and what sleep makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_longctx import SleepConfig
from hf_longctx.sleep.row_windows import windows_asleep
from hf_longctx.sleep.sleepers import check_sleeper
from hf_longctx.tasks import sleep
from hf_longctx.tasks.sleep_rows import DepoRows, Rule110Rows, SumRows, step_rule110


ROOT = Path(__file__).parents[2]
# From left, own and right bit to the next.
RULE_110 = {(1, 1, 1): 0, (1, 1, 0): 1, (1, 0, 1): 1, (1, 0, 0): 0, (0, 1, 1): 1, (0, 1, 0): 1, (0, 0, 1): 1}
RULE_110[0, 0, 0] = 0


def simulate(bits: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        size = len(bits)
        bits = [RULE_110[bits[place - 1], bits[place], bits[(place + 1) % size]] for place in range(size)]
    return bits


def test_the_rule_is_number_110():
    states = torch.tensor([[int(bit) for bit in f"{number:010b}"] for number in range(1024)])
    assert step_rule110(states.bool()).long().tolist() == [simulate(state, 1) for state in states.tolist()]
    assert sum(value << (4 * left + 2 * own + right) for (left, own, right), value in RULE_110.items()) == 110


@pytest.mark.parametrize(("num_states", "asks_all"), [(1, True), (4, False), (2, True)])
def test_an_automaton_is_asked_for_its_bits(num_states, asks_all):
    rows = Rule110Rows(5, 16, 3, 7, num_states, asks_all)
    for row in range(5):
        ids, labels = rows[row]["input_ids"].tolist(), rows[row]["labels"].tolist()
        states = [ids[16 * place : 16 * place + 16] for place in range(num_states)]
        expected = [bit for state in states for bit in simulate(state, 3)[: 16 if asks_all else 1]]
        asleep = 16 * num_states
        assert labels == [-100] * (asleep + 1) + expected and len(ids) == asleep + len(expected) + 1
        assert ids[asleep:] == list(range(2, 3 + len(expected)))
    assert max(ids) == rows.vocab_size - 1 and rows.window == 16 and rows.guess == 0.5 ** len(expected)


def test_hops_in_a_cycle_are_walked():
    rows = DepoRows(20, num_nodes=9, most_hops=5, num_questions=3, window=12, seed=3)
    names, pad = 5, 2 * 5 + 5
    for row in range(20):
        ids, labels = rows[row]["input_ids"].tolist(), rows[row]["labels"].tolist()
        edges = [ids[place : place + 4] for place in range(0, 36, 4) if ids[place] != pad]
        after = {tuple(edge[:2]): tuple(edge[2:]) for edge in edges}
        assert len(after) == len(edges) >= 3 and set(after) == set(after.values())
        assert all(one < names <= two < 2 * names for one, two in after)
        for question in range(3):
            hop, one, two, *answer = ids[36 + 6 * question : 42 + 6 * question]
            node = (one, two)
            for _ in range(hop - 2 * names + 1):
                node = after[node]
            assert [*node] == answer[:2] == labels[39 + 6 * question : 41 + 6 * question] and answer[2] == pad + 1
            assert rows.hops[row, question] == hop - 2 * names + 1
        assert sum(label != -100 for label in labels) == 6
    assert max(ids) == rows.vocab_size - 1


def test_sums_are_added_and_multiplied_behind_noise():
    rows = SumRows(20, num_noise=24, window=16, seed=0)
    for row in range(20):
        ids, labels = rows[row]["input_ids"].tolist(), rows[row]["labels"].tolist()
        assert labels == [-100] * 30 + [(ids[0] + ids[2]) * ids[4] % 10] and ids[-1] == labels[-1]
        assert ids[1] == 10 and ids[3] == 11 and ids[-2] == 12 and min(ids[5:-2]) >= 13
    with pytest.raises(
        ValueError, match=r"`num_noise` \(8\) leaves the question in a `window` \(16\) with its answer"
    ):
        SumRows(2, num_noise=8, window=16, seed=0)


def test_what_is_right_is_counted_by_row_and_by_label():
    rows = Rule110Rows(4, 10, 1, 0)
    logits = torch.nn.functional.one_hot(rows.labels.clamp(min=0).roll(-1, 1), rows.vocab_size).float()
    assert rows.right(logits, slice(0, 4)) == {"exact": 4, "labels": 1}
    logits[2, 12] = logits[2, 12].roll(1)
    assert rows.right(logits, slice(0, 4)) == {"exact": 3, "labels": pytest.approx(39 / 40)}


@pytest.mark.parametrize(
    ("pairs", "expected"), [(30, [0.876, 0.961, 0.988, 0.997, 0.999]), (24, [0.930, 0.984, 0.999, 1.0, 1.0])]
)
def test_a_state_recalls_more_of_what_is_replayed_to_it(pairs, expected):
    """No training: transformers' gated delta rule, without decay, over the same pairs 1, 2, 4, 8 and 16 times."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(8, pairs, 4, 32, generator=generator), dim=-1)
    values = torch.randn(8, pairs, 4, 48, generator=generator)
    state, recalled, shape = None, {}, keys.shape[:3]
    for count in range(1, 17):
        _, state = torch_chunk_gated_delta_rule(
            keys, keys, values, torch.zeros(shape), torch.ones(shape), initial_state=state, output_final_state=True
        )
        found = torch.nn.functional.normalize(torch.einsum("bthk,bhkv->bthv", keys, state), dim=-1)
        alike = torch.einsum("bthv,bshv->bhts", found, torch.nn.functional.normalize(values, dim=-1))
        recalled[count] = float((alike.argmax(-1) == torch.arange(pairs)).float().mean())
    found = [recalled[count] for count in (1, 2, 4, 8, 16)]
    assert found == sorted(found) and found == pytest.approx(expected, abs=0.015)


def settings(folder, steps: int, **changes):
    toy = sleep.SleepArguments(
        **{"num_bits": 8, "difficulties": [1], "passes": [1, 2], "num_eval_rows": 128, **changes}
    )
    return toy, TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def test_two_passes_learn_an_automaton_sooner_than_one(tmp_path):
    toy, args = settings(tmp_path, 50, every=50)
    exact = [sleep.train_one(toy, args, 1, passes)[1][-1]["exact"] for passes in toy.passes]
    assert exact[1] >= exact[0] + 0.2, exact


@pytest.mark.parametrize("name", ["rule110_cpu", "rule110_paper", "depo", "hybrid_sft"])
def test_every_recipe_of_sleep_starts(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    config = ROOT / "recipes" / f"sleep_{name}.yaml"
    tiny = "--max_steps 1 --every 1 --per_device_train_batch_size 2 --num_eval_rows 2 --passes 1 2 --hidden_size 32"
    tiny += " --num_bits 8 --num_nodes 4 --use_cpu true --bf16 false --raise_passes_every 0 --num_layers 2"
    tiny += "" if name == "rule110_cpu" else " --equal_compute false"
    hardest = max(yaml.safe_load(config.read_text())["difficulties"][:1])
    words = f"x --config {config} {tiny} --difficulties {hardest} --output_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    sleep.main()
    found = json.loads((tmp_path / "sleep.json").read_text())
    assert found["curves"][f"{hardest}: N = 2"]["points"][0]["step"] == 1
    assert found["curves"][f"{hardest}: N = 2"]["read_with"].keys() == {"1", "2"}
    assert f"{hardest}: attention alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "layers", "width", "tokens", "windows"), [("rule110_paper", 4, 256, 101, 4), ("depo", 10, 512, 360, 4)]
)
def test_recipes_of_the_size_of_the_paper_can_be_built(name, layers, width, tokens, windows):
    told = yaml.safe_load((ROOT / "recipes" / f"sleep_{name}.yaml").read_text())
    known = vars(sleep.SleepArguments())
    toy = sleep.SleepArguments(**{key: value for key, value in told.items() if key in known})
    rows = toy.rows(2, toy.difficulties[0], 0)
    with torch.device("meta"):
        model = sleep._start_model(toy, rows.vocab_size)
    assert (len(model.model.layers), model.config.hidden_size, rows.input_ids.shape[1]) == (layers, width, tokens)
    for passes in toy.passes:
        config = SleepConfig(window=rows.window, passes=passes, warmup=sleep._warmup(toy, passes))
        assert config.at(told["max_steps"] - 1).passes == passes and check_sleeper(model, config)
        assert int(windows_asleep(rows.labels, config).sum(dim=1).min()) == windows


def test_a_task_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"`task` \('chess'\) must be one of rule110, depo, sums"):
        settings(tmp_path, 1, task="chess")
