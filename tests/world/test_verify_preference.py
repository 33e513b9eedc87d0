"""`verify(task="dpo")` and `verify(task="reward")`: exact on ranks under every wrapper, wrong where the gather loses a
gradient, and the command."""

from __future__ import annotations

import importlib.util

import pytest
import transformers as tf


pytest.importorskip("trl")
pytest.importorskip("peft")

from hf_longctx.cli import main
from hf_longctx.parallel import gathered
from hf_longctx.proof import compare, whole_rows_pair
from hf_longctx.proof.model_under_test import DPO_KINDS, REWARD_KINDS, ModelUnderTest, Setting, kinds_of_task
from hf_longctx.proof.result import EXACT, REFUSED, UNBUILDABLE, WRONG
from hf_longctx.proof.verification import merge, verify


def outcomes(world, config, task, setting, function=compare.prove):
    return merge(world.run(function, ModelUnderTest.of(config, task, setting.sequence_parallel_size), setting))


def assert_exact(results, kinds):
    assert [(rows.rows, rows.outcome) for rows in results] == [(kind, EXACT) for kind in kinds], results
    for rows in results:
        assert 0 < rows.errors.worst <= rows.tolerance < rows.baseline / 100


@pytest.mark.parametrize(
    ("config", "task", "setting"),
    [
        (tf.Qwen3MoeConfig, "dpo", Setting(2, kinds=DPO_KINDS)),  # with the loss of its routers, as TRL adds it
        (tf.GPT2Config, "reward", Setting(2, kinds=REWARD_KINDS)),
        (tf.BertConfig, "reward", Setting(2, kinds=("padded",))),  # whose pooler gets gathered hidden states
        (tf.LlamaConfig, "dpo", Setting(2, 2, kinds=("padded", "lora", "flattened"), wrapper="ddp")),
        (tf.LlamaConfig, "dpo", Setting(2, kinds=("padded", "lora"), wrapper="fsdp2")),
        (tf.LlamaConfig, "reward", Setting(2, 2, kinds=("padded", "lora"), wrapper="fsdp2")),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "wrapper", None) or value.__name__,
)
def test_pairs_on_ranks_give_the_numbers_of_one_process(worlds, config, task, setting):
    assert_exact(outcomes(worlds(setting.world_size), config(), task, setting), setting.kinds)


def prove_with_my_slice(tested, setting):
    """The backward of the gather takes its own slice: forward, and so the proof at a trainer's start, is right."""
    right = gathered._GatherShares.backward

    def backward(ctx, grad):
        return grad[gathered.place_in(ctx.group)[0]].contiguous(), None, None

    gathered._GatherShares.backward = staticmethod(backward)
    try:
        return compare.prove(tested, setting)
    finally:
        gathered._GatherShares.backward = staticmethod(right)


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_a_gather_that_loses_the_factor_of_its_ranks_is_wrong(world2, task):
    (rows,) = outcomes(world2, tf.LlamaConfig(), task, Setting(2, kinds=("padded",)), prove_with_my_slice)
    assert rows.outcome == WRONG and rows.dtype == "float64"
    assert 0.4 < rows.errors.gradient and rows.errors.logits < 1e-6


# One process


def prove(config, task, *kinds):
    return compare.prove(ModelUnderTest.of(config, task, 1), Setting(1, kinds=kinds))


def test_layers_that_read_padding_are_flattened_without_it_on_the_left(monkeypatch):
    """RecurrentGemma's state passes through padding in front of a row, so rows are compared without it."""
    config = tf.RecurrentGemmaConfig(num_hidden_layers=3)
    (rows,) = prove(config, "dpo", "flattened")
    assert rows.outcome == EXACT, rows
    monkeypatch.setattr(whole_rows_pair.WholeRowsPair, "_reads_left_padding", lambda _: False)
    (rows,) = prove(config, "dpo", "flattened")
    assert rows.outcome == REFUSED and "`RecurrentGemmaForCausalLM` reads it in one process" in rows.message


def test_a_type_without_a_classifier_has_no_rewards():
    (rows,) = prove(tf.XGLMConfig(), "reward", "dense")
    assert rows.outcome == UNBUILDABLE and "AutoModelForSequenceClassification" in rows.message


def test_kinds_of_rows():
    assert kinds_of_task("dpo", packed=False) == ("dense", "even", "padded", "lora")
    assert kinds_of_task("dpo", packed=True) == DPO_KINDS and DPO_KINDS[-1] == "flattened"
    assert kinds_of_task("reward", packed=True) == REWARD_KINDS  # a head that pools a row has no packed ones


def test_pairs_need_trl_and_peft(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ImportError, match=r"`task` \('reward'\) needs TRL and PEFT: `pip install hf-longctx\[trl\]`"):
        verify("llama", task="reward")
    assert main(["verify", "llama", "--task", "dpo"]) == 2
    assert "hf-longctx[trl]" in capsys.readouterr().out
