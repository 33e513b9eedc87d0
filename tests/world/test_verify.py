"""`verify` on real ranks: right models are exact, broken ones wrong, refused ones told; and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_longctx.parallel import collectives
from hf_longctx.proof import compare
from hf_longctx.proof.model_under_test import KINDS, ModelUnderTest, Setting
from hf_longctx.proof.verification import merge
from hf_longctx.trainer import adaptation
from hf_longctx.trainer.sanity_check import SanityResult


COMMAND = Path(sys.executable).with_name("hf-longctx")


def outcomes(world, config, setting, function=compare.prove, task=None):
    tested = ModelUnderTest.of(config, task, setting.sequence_parallel_size)
    return merge(world.run(function, tested, setting))


@pytest.mark.parametrize("config", [tf.Qwen3Config, tf.BertConfig], ids=lambda kind: kind.__name__)
def test_a_right_model_is_exact_on_every_kind_of_rows(world2, config):
    results = outcomes(world2, config(), Setting(2, kinds=KINDS))
    assert [(rows.rows, rows.outcome) for rows in results] == [(kind, "exact") for kind in KINDS], results
    for rows in results:
        assert rows.errors.worst <= rows.tolerance < rows.baseline / 100


@pytest.mark.parametrize("setting", [Setting(1, 2, wrapper="ddp"), Setting(2, 1, wrapper="fsdp2")], ids=str)
def test_wrappers_average_the_gradients_of_one_process(world2, setting):
    results = outcomes(world2, tf.BertConfig(), setting)  # whose embeddings are tied
    assert {rows.outcome for rows in results} == {"exact"}, results


def prove_with_a_broken_backward(tested, setting):
    """The exchange loses one rank's gradient, and no check looks for it; forward is right."""
    right, check = collectives._HeadsToSequence.backward, adaptation.run_sanity_check
    adaptation.run_sanity_check = lambda *_, **__: SanityResult()

    def backward(ctx, grad):
        return right(ctx, grad * ctx.rank)

    collectives._HeadsToSequence.backward = staticmethod(backward)
    try:
        return compare.prove(tested, setting)
    finally:
        collectives._HeadsToSequence.backward, adaptation.run_sanity_check = staticmethod(right), check


def prove_with_two_tokens_swapped(tested, setting):
    """Forward is wrong by two of the tokens, and no check looks for it."""
    from hf_longctx.attention import ulysses

    right, check = ulysses.heads_to_sequence, adaptation.run_sanity_check
    adaptation.run_sanity_check = lambda *_, **__: SanityResult()
    ulysses.heads_to_sequence = lambda output, *rest: right(output[:, [1, 0, *range(2, output.shape[1])]], *rest)
    try:
        return compare.prove(tested, setting)
    finally:
        ulysses.heads_to_sequence, adaptation.run_sanity_check = right, check


@pytest.mark.parametrize("broken", [prove_with_a_broken_backward, prove_with_two_tokens_swapped])
def test_a_defect_is_wrong_and_settled_in_float64(world2, broken):
    (rows,) = outcomes(world2, tf.LlamaConfig(), Setting(2, kinds=("dense",)), broken)
    assert rows.outcome == "wrong" and rows.dtype == "float64"
    assert rows.errors.gradient > 1e-2 and rows.errors.parameter in rows.message
    assert (rows.errors.loss > 1e-3) == (broken is prove_with_two_tokens_swapped)


def prove_without_a_sentence(tested, setting):
    def crash(*_):
        raise RuntimeError("shapes do not fit")

    right = adaptation.check_model
    adaptation.check_model = crash
    try:
        return compare.prove(tested, setting)
    finally:
        adaptation.check_model = right


def test_an_error_that_is_no_sentence_of_ours_is_a_defect(world2):
    (rows,) = outcomes(world2, tf.LlamaConfig(), Setting(2, kinds=("dense",)), prove_without_a_sentence)
    assert rows.outcome == "wrong" and "crashed instead of being refused: RuntimeError: shapes" in rows.message


def test_what_trainers_refuse_is_refused_with_their_sentence(world2):
    results = outcomes(world2, tf.T5Config(), Setting(2), task="encoder")
    assert {rows.outcome for rows in results} <= {"refused", "unbuildable"}
    (rows,) = outcomes(world2, tf.RwkvConfig(), Setting(2, kinds=("dense",)))
    assert rows.outcome == "refused" and "set `sequence_parallel_size` to 1" in rows.message


def test_the_command_starts_its_own_processes_and_writes_what_it_found(tmp_path):
    output = tmp_path / "proof.json"
    arguments = [COMMAND, "verify", "qwen3", "--json", str(output)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact: 3 kinds of rows" in done.stdout and not any(letter in done.stdout for letter in "\x1b┃│")
    written = json.loads(output.read_text())
    assert written["outcome"] == "exact" and [rows["rows"] for rows in written["rows"]] == ["dense", "even", "padded"]
    assert written["world_size"] == 2 and 0 < written["worst_gradient"] < 6e-6
    assert torch.tensor([rows["baseline"] for rows in written["rows"]]).min() > 1e-2
