"""`hf-longctx verify` without processes: tiny configurations, outcomes, bad input, the result object."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx.cli import main
from hf_longctx.proof.build import build_model
from hf_longctx.proof.known_types import TABLE
from hf_longctx.proof.model_under_test import KINDS, ModelUnderTest, Setting, read_config, task_of
from hf_longctx.proof.numbers import Numbers, compare
from hf_longctx.proof.random_rows import make_rows, num_tokens_of
from hf_longctx.proof.ranks import RanksError
from hf_longctx.proof.result import Errors, RowsResult, VerifyResult, judge, tolerance
from hf_longctx.proof.tiny import CannotShrink, shrink
from hf_longctx.proof.verification import merge, run_proof

from ..conformance.page import worse


# Shrinking


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 2}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}),
        ("gpt2", {"n_head": 4, "n_embd": 64, "n_layer": 2, "attn_pdrop": 0.0}),
        ("deepseek_v3", {"q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
        ("bert", {"hidden_dropout_prob": 0.0, "type_vocab_size": 2, "vocab_size": 128}),
    ],
)
def test_shrinking_keeps_kinds_and_makes_sizes_small(kind, expected):
    config = read_config(kind)
    before = config.to_dict()
    tiny = shrink(config)
    assert {name: getattr(tiny, name) for name in expected} == expected
    assert config.to_dict() == before
    with torch.device("meta"):
        auto = tf.AutoModelForMaskedLM if kind == "bert" else tf.AutoModelForCausalLM
        assert sum(p.numel() for p in auto.from_config(tiny).parameters()) < 500_000


def kinds_of(config) -> set[str]:
    return set(getattr(config, "layer_types", None) or config.layers_block_type)


@pytest.mark.parametrize("kind", ["lfm2", "minimax_m3_vl_text", "recurrent_gemma", "gemma3_text", "jamba"])
def test_a_tiny_version_has_a_layer_of_every_kind(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip("a model type of newer transformers")
    config = read_config(kind)
    assert kinds_of(shrink(config)) == kinds_of(config)
    assert len(kinds_of(config)) == 2


def test_a_configuration_that_is_given_keeps_its_own_kinds():
    mixed = tf.Lfm2Config(num_hidden_layers=16, full_attn_idxs=[2, 5, 8])
    assert kinds_of(shrink(mixed)) == {"conv", "full_attention"}
    assert kinds_of(shrink(tf.Lfm2Config())) == {"full_attention"}


def test_a_kind_that_no_tiny_version_has_is_named():
    config = tf.RecurrentGemmaConfig(num_hidden_layers=20, block_types=["recurrent"] * 12 + ["attention"])
    with pytest.raises(CannotShrink, match="cannot be made tiny at `.*`: 8 layers hold none of kind '.*attention'"):
        shrink(config)


FITTED = ("bamba", "dory", "dots3_note", "dots3_note_text", "falcon_h1", "granitemoehybrid", "hy_v4_vl_text", "jamba")


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("kind", [kind for kind in (*FITTED, "mamba2") if kind in CONFIG_MAPPING])
def test_sizes_that_must_fit_each_other_do_for_any_number_of_ranks(kind, size):
    """transformers checks them when it makes the configuration."""
    tiny = shrink(CONFIG_MAPPING[kind](), size)
    assert tiny.get_text_config().num_hidden_layers <= 4 and tiny.get_text_config().hidden_size == 16 * max(4, size)
    if kind == "dory":
        assert tiny.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        assert (tiny.n_input_layers, tiny.n_recurrent_layers, tiny.n_output_layers) == (1, 2, 1)
    if kind == "mamba2":
        assert tiny.num_heads % tiny.n_groups == 0
    if kind == "jamba":
        assert tiny.layer_types == ["linear_attention", "full_attention"]


def test_a_tiny_model_has_a_head_a_rank_if_the_real_one_has():
    assert shrink(tf.LlamaConfig(num_attention_heads=32), 8).num_attention_heads == 8
    assert shrink(tf.LlamaConfig(num_attention_heads=3, hidden_size=48), 8).num_attention_heads == 3


def test_full_takes_the_configuration_as_it_is_without_dropout():
    tested = ModelUnderTest.of(tf.GPT2Config(), None, 2, weights="somewhere")
    assert tested.config.n_embd == 768 and tested.config.attn_pdrop == tested.config.embd_pdrop == 0.0
    assert tested.original.attn_pdrop == 0.1


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (tf.Qwen3Config(), "causal-lm"),
        (tf.BertConfig(), "masked-lm"),
        (tf.BertConfig(architectures=["BertLMHeadModel"]), "causal-lm"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_task_is_that_of_the_architecture(config, task):
    assert task_of(config) == task


def test_models_of_a_subject_are_equal_and_without_dropout():
    tested = ModelUnderTest.of(tf.BertConfig(), None, 2)
    ours, theirs = (build_model(tested, name, torch.float64) for name in ("ulysses", None))
    assert ours.config._attn_implementation == "ulysses" and theirs.config._attn_implementation == "sdpa"
    for (name, left), right in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(left, right), name
    assert {module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


# Rows


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_rows_are_odd_padded_on_both_sides_and_packed_with_a_single_token(task):
    tokens = num_tokens_of("padded", 2)
    assert tokens % 2 == 1 and num_tokens_of("even", 2) == tokens + 1 and num_tokens_of("even", 8) % 8 == 0
    padded = make_rows("padded", task, 128, 2, tokens, 10, task == "causal-lm")
    mask = padded.valid
    assert not mask[0, 0] and mask[0, -1] and mask[1, 0] and not mask[1, -1] and len(mask) == 4
    assert (padded.batch["labels"][~mask] == -100).all()
    packed = make_rows("packed", task, 128, 2, tokens, 10, task == "causal-lm")
    lengths = [stop - start for row, start, stop in packed.documents if row == 0]
    assert sum(lengths) == tokens and min(lengths) == 1
    assert (packed.batch["labels"][packed.batch["position_ids"] == 0] == -100).all()
    labels = packed.batch["labels"][:, 1:] if task == "causal-lm" else packed.batch["labels"]
    assert 0 < packed.num_items == (labels != -100).sum() < labels.numel()


# Outcomes

FINE = Errors(loss=0.0, logits=1e-7, gradient=2e-6, parameter="b", evaluation=0.0)


def result(*rows: RowsResult) -> VerifyResult:
    return VerifyResult("llama", "causal-lm", 2, 2, rows, 1.0)


def test_tolerance_is_one_rounding_a_token():
    assert tolerance(46) == pytest.approx(46 * 2.0**-23)


@pytest.mark.parametrize("field", ["loss", "logits", "gradient", "evaluation"])
@pytest.mark.parametrize("value", [1e-5, math.nan, math.inf])
def test_any_number_that_is_off_is_wrong(field, value):
    rows = judge("dense", Errors(**{**vars(FINE), field: value}), "float32", 46)
    assert rows.outcome == "wrong" and "please report" in rows.message
    assert ("`b`" in rows.message) == (field == "gradient")


def test_rounding_is_exact_and_so_is_what_the_host_itself_rounds_up_to_a_thousandth():
    assert judge("dense", FINE, "float32", 46).outcome == "exact"
    for error, measured, outcome in ((1e-4, 1e-4, "exact"), (3e-4, 1e-4, "wrong"), (2e-3, 1.0, "wrong")):
        off = Errors(**{**vars(FINE), "gradient": error})
        assert judge("dense", off, "float64", 46, measured=measured).outcome == outcome


def test_the_worst_rows_decide_and_the_exit_code_says_so():
    exact, refused = judge("dense", FINE, "float32", 46), RowsResult("packed", "refused", message="no.")
    off = judge("padded", Errors(**{**vars(FINE), "gradient": 0.5}), "float64", 46)
    missing = RowsResult("padded", "unbuildable", message="where?")
    assert [r.exit_code for r in (result(exact), result(exact, off), result(refused), result(missing, refused))] == [
        *(0, 1, 2, 3)
    ]
    assert result(exact).raise_unless_exact() and not result(exact, refused)
    with pytest.raises(AssertionError, match="`llama` is refused, not exact: no."):
        result(exact, refused).raise_unless_exact()
    both = result(exact, off)
    assert (both.worst_gradient, both.worst_parameter, both.loss_error) == (0.5, "b", 0.0)
    written = json.loads(json.dumps(result(refused).to_dict(), allow_nan=False))
    assert written["outcome"] == "refused" and written["loss_error"] is None and written["rows"][0]["errors"] is None


def test_the_rank_with_the_worst_verdict_speaks_for_all():
    exact, refused = judge("dense", FINE, "float32", 46), RowsResult("dense", "refused", message="no.")
    assert merge([[exact], [refused]]) == (refused,)


class OneRankFell:
    """Ranks of which one fell silent after another had spoken."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)

    def run(self, *_, **__):
        raise RanksError("rank 0: no answer in time\nrank 1: RuntimeError: gone", self.answers)


def test_a_rank_that_fell_silent_is_a_defect_unless_another_said_why():
    exact, refused = judge("dense", FINE, "float32", 46), RowsResult("dense", "refused", message="no.")
    tested, setting = ModelUnderTest.of(tf.LlamaConfig(), None, 2), Setting(kinds=("dense",))
    (rows,) = run_proof(OneRankFell(None, [exact]), tested, setting, 1.0)
    assert rows.outcome == "wrong" and rows.message == "a process failed: rank 1: RuntimeError: gone"
    assert run_proof(OneRankFell(None, [refused]), tested, setting, 1.0) == (refused,)


def numbers(**gradients) -> Numbers:
    one = torch.ones(())
    values = {name: torch.tensor(value) for name, value in gradients.items()}
    return Numbers(torch.ones(2, 3, 4), one, one, values)


def test_the_worst_gradient_is_named_and_rounding_of_a_zero_gradient_is_not_it():
    theirs = numbers(weight=[1.0, -4.0], bias=[1e-9, 0.0], unused=[0.0])
    errors = compare(numbers(weight=[1.0, -3.0], bias=[-1e-9, 0.0]), theirs, 0)
    assert errors.parameter == "weight" and errors.gradient == pytest.approx(0.25)
    assert compare(numbers(weight=[1.0, -4.0], bias=[-1e-9, 0.0]), theirs, 0).gradient < 1e-6
    assert compare(numbers(bias=[0.0, 0.0]), theirs, 0).gradient == 1.0  # a parameter that got none
    assert math.isnan(compare(numbers(weight=[math.nan, 0.0], bias=[0.0, 0.0]), theirs, 0).gradient)


def test_a_type_that_got_worse_is_told():
    def record(outcome):
        return {"task": "causal-lm", "type": "llama", "rows": [{"rows": "dense", "outcome": outcome}]}

    assert worse([record("exact")], [record("exact")]) == []
    assert worse([record("refused")], [record("exact")]) == []
    assert worse([record("exact")], [record("refused")]) == ["llama (causal-lm), dense rows: was exact, is refused"]
    assert worse([record("exact")], []) == []


# Bad input


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["qwen3", "--sequence_parallel_size", "0"], 2, "`sequence_parallel_size` (0) must be a positive integer"),
        (["qwen3", "--data_parallel_size", "0"], 2, "`data_parallel_size` (0) must be a positive integer"),
        (["qwen3", "--wrapper", "fsdp"], 2, "`wrapper` ('fsdp') must be one of none, ddp, fsdp2"),
        (["qwen3", "--dtype", "bfloat16"], 2, "`dtype` ('bfloat16') must be one of float32, float64; half precision"),
        (["qwen3", "--inner_attention", "spda"], 2, "`inner_attention` ('spda') is not a kernel"),
        (["qwen3", "--task", "chat"], 2, "`task` ('chat') must be one of causal-lm, masked-lm, multimodal-lm, e"),
        (["qwen3", "--sequence_parallel_size", "1", "--wrapper", "ddp"], 2, "but there is 1: set"),
        (["qwen3", "--json", "."], 2, "`--json` (.) is a folder"),
        (["qwen3", "--json", "no/such.json"], 2, "the folder of `--json` (no/such.json) does not exist"),
        (["qwen33"], 3, "`qwen33` is neither a folder nor a model type: did you mean `qwen3`"),
        (["Qwen/Qwen3-4B"], 3, "verify its model type without them, such as `qwen3`"),
        (["."], 3, "the folder `.` has no config.json"),
        (["vit"], 3, "transformers has no text model of type `vit`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_before_any_process_starts(capsys, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert main(["verify", *arguments]) == code
    assert message in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["verify", "qwen3", "--json", str(tmp_path / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().out


def test_setting_counts_its_processes():
    assert Setting(2, 3).world_size == 6


def test_the_committed_page_has_nothing_wrong_and_every_refusal_has_a_sentence():
    docs = Path(__file__).parents[2] / "docs"
    models = json.loads(TABLE.read_text())["models"]
    page = (docs / "conformance.md").read_text()
    exact = Counter()
    for model in models:
        outcomes = {rows["outcome"] for rows in model["rows"]}
        assert [rows["rows"] for rows in model["rows"]] == list(KINDS) and "wrong" not in outcomes, model
        assert all(rows["message"] for rows in model["rows"] if rows["outcome"] != "exact"), model
        assert f"| `{model['type']}` |" in page
        exact[model["task"]] += outcomes == {"exact"}
    assert exact["causal-lm"] >= 110 and exact["masked-lm"] >= 25 and exact["encoder"] >= 15
    assert exact["multimodal-lm"] >= 30
