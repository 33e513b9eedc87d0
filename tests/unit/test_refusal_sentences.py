"""Every message that no other test reads in full: what provokes it, the error, and what it says.

`docs/refusals.md` links messages to tests here and elsewhere. A new message gets a line in the table, unless the
test of its feature reads it already.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import masking_utils

import hf_longctx
from hf_longctx import LongContextConfig, MemoryConfig, PackingCollator
from hf_longctx.adapters import tiled_loss, tiled_loss_check, tiled_mlp
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.attention import kernels
from hf_longctx.attention.masks import AttentionRule, KernelPlan, read_rule
from hf_longctx.attention.packed import PACKED, packed_attention
from hf_longctx.cli import pack_inputs, pack_report, plan_report, plan_search
from hf_longctx.cli.answer import Answer
from hf_longctx.config import values
from hf_longctx.data.documents import load_documents
from hf_longctx.data.packing.lengths import balanced_order
from hf_longctx.losses import tiled_head
from hf_longctx.losses.tiled_scores import tiled_token_scores
from hf_longctx.losses.tiles import TokenLoss, validate_tile_size
from hf_longctx.parallel.shard import SequenceShard, cut_batch
from hf_longctx.planner import fake_model, measure, simulate
from hf_longctx.planner.fake_attention import shape_only_attention
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.settings import Settings
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.reporting import flops
from hf_longctx.trainer import checks, memory_presets, packed_rows

from ..models import build, config_of


CAUSAL, ANYWHERE = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
ROWS = torch.zeros(1, 2, 4, 8)
TWO = LongContextConfig(sequence_parallel_size=2)


def shares_of_two() -> SequenceShard:
    return SequenceShard(size=2, rank=0, num_tokens=8, local_len=4)


def chunks(*sizes: int):
    starts = torch.zeros(1, dtype=torch.long)
    return masking_utils.and_masks(CAUSAL, *(masking_utils.chunked_overlay(size, starts) for size in sizes))


def tile_twice() -> None:
    model = build("llama", "sdpa")
    tile_loss(model)
    tile_loss(model, 4)


def recurrent() -> transformers.MambaForCausalLM:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))


def another_loss() -> transformers.PreTrainedModel:
    model = build("llama", "sdpa")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    return model


def text_config(**changes):
    config = config_of("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def trainer_with(**facts) -> SimpleNamespace:
    absent = dict.fromkeys(("compute_loss_func", "label_smoother", "compute_metrics", "preprocess_logits_for_metrics"))
    common = {"long_context": TWO, "memory": MemoryConfig(), "is_deepspeed_enabled": False, "is_fsdp_enabled": False}
    return SimpleNamespace(**{**absent, **common, **facts})


def fsdp_of_version(version: int) -> SimpleNamespace:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    return trainer_with(is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state))


class TakesIdsOnly(transformers.LlamaForCausalLM):
    def forward(self, input_ids):
        return super().forward(input_ids)


def ids_only() -> TakesIdsOnly:
    return TakesIdsOnly._from_config(config_of("llama"), attn_implementation="ulysses")


def sorts_by_length() -> SimpleNamespace:
    return trainer_with(
        args=SimpleNamespace(train_sampling_strategy="group_by_length"), data_collator=PackingCollator(max_tokens=8)
    )


def outputs(**changes) -> Namespace:
    given = {"batch_size": 1, "hidden_size": 1, "limit": None, "output": "p.png", "write": None, "dataset": "d"}
    given |= {"gpus": 1, "gpu_memory": 80.0, "cpu_memory": None, "peak_tflops": 1.0, "utilisation": 0.4}
    given |= {"save_seconds": None, "hours_between_failures": None, "reversible": False, "task": "sft"}
    given |= {"precompute_ref_log_probs": False}
    return Namespace(**{**given, "split": "train", **changes})


N, V, R = NotImplementedError, ValueError, RuntimeError
SENTENCES = [
    (lambda: hf_longctx.LongContextTrainr, AttributeError, "has no attribute 'LongContextTrainr'; it offers"),
    # settings
    (lambda: MemoryConfig(loss_tile_size=0), V, "must be a positive integer, a number of tokens, or unset"),
    (lambda: LongContextConfig(inner_attention="sdpaa"), V, "is not a kernel that `ulysses` can wrap: choose one of"),
    (
        lambda: values.validate_choice("memory", "all", ("off", "loss")),
        V,
        r"`memory` \('all'\) must be one of off, loss",
    ),
    (lambda: MemoryConfig(memory="all"), V, r"`memory` \('all'\) must be one of off, loss"),
    # attention
    (
        lambda: read_rule(masking_utils.and_masks(ANYWHERE, masking_utils.sliding_window_overlay(5))),
        N,
        "this model looks 5 tokens back but also ahead, a rule that",
    ),
    (lambda: read_rule(chunks(4, 6)), N, r"this model intersects chunks of \[4, 6\] tokens"),
    (lambda: read_rule(lambda b, h, q, k: q), N, "this model masks attention with .* cannot apply to a sharded row"),
    (
        lambda: packed_attention(None, ROWS, ROWS, ROWS, None, sequence_shard=shares_of_two()),
        V,
        "`sequence_shard` is the share of one of 2 processes, but the model runs attn_implementation='packed'",
    ),
    (lambda: shape_only_attention(None, ROWS, ROWS, ROWS, None), R, "computes nothing, it only plans memory"),
    (
        lambda: cut_batch({"input_ids": torch.zeros(1, 4), "pixel_values": ROWS}, 1, 0),
        N,
        "`pixel_values` belongs to an image, video or audio input",
    ),
    (lambda: balanced_order([1.0], 0, seed=0), V, r"`group_size` \(0\) must be at least 1"),
    # FLOPs
    (
        lambda: flops.count_products(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 2)), config_of("llama")),
        N,
        r"`0.weight` of shape \(1, 1, 2, 2\) is neither a linear layer nor a stack of experts",
    ),
    (
        lambda: flops.count_flops(transformers.BartConfig()),
        N,
        "`BartConfig` is an encoder-decoder, whose two sequences",
    ),
    (
        lambda: flops._span(config_of("llama"), "mamba", True),
        N,
        "has layers of type 'mamba', whose FLOPs are not a sum",
    ),
    (lambda: flops._experts_of_a_token(config_of("llama")), N, "has experts but says in none of"),
    # losses in tiles
    (
        lambda: tile_loss(transformers.LlamaForCausalLM(text_config(logit_scale=0.5))).remove(),
        N,
        r"the configuration of `llama` has `logit_scale` \(0.5\), and it is not known",
    ),
    (tile_twice, R, "`LlamaForCausalLM` computes its loss in tiles already"),
    (lambda: tiled_loss.tile_loss(another_loss()), N, "the loss of `LlamaForCausalLM` cannot be tiled: its own is"),
    (
        lambda: tiled_token_scores(ROWS[0], ROWS[0, 0], ROWS, outputs=("top",)),
        V,
        "must name at least one of .*no other",
    ),
    (lambda: validate_tile_size(0), V, r"`tile_size` \(0\) must be .* the number of tokens whose logits exist"),
    (lambda: TokenLoss(z_loss=-1.0), V, "must be a number of at least 0; use 0 to switch it off"),
    (lambda: TokenLoss(scale=0.0), V, "must be a number other than 0: logits are multiplied by it"),
    (lambda: TokenLoss(softcap=0.0), V, "must be a positive number; use `None` for no cap"),
    # MLPs in tiles
    (
        lambda: tiled_mlp.tile_mlp(build("llama", "sdpa"), 0),
        V,
        "must be a positive integer: it is the number of tokens that an MLP works on",
    ),
    (
        lambda: tiled_mlp.tile_mlp(recurrent(), 4),
        N,
        "`MambaForCausalLM` .* has no MLP that can run in tiles",
    ),
    # the planner
    (lambda: Planner(transformers.BartConfig()), V, "`BartConfig` makes no decoder that transformers knows"),
    (lambda: Planner(transformers.MambaConfig()), N, "`MambaConfig` has no `num_attention_heads`: layers without"),
    (lambda: Settings(tokens=8, optimizer="lion"), V, r"`optimizer` \('lion'\) must be one of adamw, adafactor"),
    (lambda: Settings(tokens=0), V, r"`tokens` \(0\) must be a positive integer\.$"),
    (
        lambda: Settings(tokens=8, sequence_parallel_size=2, world_size=3, wrapper="ddp"),
        V,
        r"`sequence_parallel_size` \(2\) must divide `world_size` \(3\): all ranks are split",
    ),
    (lambda: Settings(tokens=8, world_size=2), V, "runs one process, but `world_size` is 2: choose"),
    (lambda: Settings(tokens=8, offload=True), V, "`offload` moves the checkpoints of layers to CPU memory"),
    (
        lambda: measure.measure_in_process(None, Settings(tokens=8, world_size=2, wrapper="ddp"), "cpu"),
        V,
        "are not those of one process that trains all weights: measure without",
    ),
    # commands
    (lambda: pack_report.validate_options(outputs(limit=0)), V, r"`--limit` \(0\) must be at least 1"),
    (lambda: pack_report.validate_options(outputs(output="p.txt")), V, "must be a picture, which may be written over"),
    (lambda: pack_inputs._count_tokens(None, {}, outputs()), V, "`d` has no rows in `--split` train: check"),
    (lambda: plan_search.parse_tokens("many"), V, r"`--target_tokens` \(many\) must be a number of tokens, such as"),
    (lambda: plan_search._check_options(outputs(utilisation=2.0)), V, "is a share of the peak: give at most 1"),
    (lambda: plan_report.validate_outputs("p.txt", None), V, "must be a picture, which may be written over"),
    (lambda: plan_report.validate_outputs("no/p.png", None), V, "must be a file in a folder that exists"),
    (
        lambda: plan_report.validate_outputs(None, __file__),
        V,
        "exists already and is not written over: choose another",
    ),
    # trainers
    (
        lambda: checks.check_arguments(SimpleNamespace(torch_compile=True), TWO),
        N,
        r"`torch_compile` \(True\) cannot be used with `sequence_parallel_size`",
    ),
    (
        lambda: checks.check_arguments(SimpleNamespace(n_gpu=4), TWO),
        V,
        "one process sees 4 GPUs and would use `DataParallel`",
    ),
    (lambda: checks.check_trainer(trainer_with(is_deepspeed_enabled=True)), N, "DeepSpeed is configured next to"),
    (lambda: checks.check_trainer(fsdp_of_version(1)), N, "FSDP version 1 is configured next to"),
    (
        lambda: checks.check_model(build("llama", "sdpa"), TWO),
        V,
        "runs attn_implementation='sdpa', which would see only this rank's tokens",
    ),
    (
        lambda: checks.check_model(ids_only(), TWO),
        N,
        "`TakesIdsOnly.forward` takes no extra keyword arguments, so its",
    ),
    (
        lambda: memory_presets._validate_own_loss(trainer_with(uses_model_loss=True, compute_metrics=len)),
        N,
        "`loss_tile_size` .* tiles the loss of the model, but `compute_metrics` needs",
    ),
    (
        lambda: packed_rows.pack_dataset(sorts_by_length(), None, "", 1, None, True),
        V,
        r"`train_sampling_strategy` \('group_by_length'\) sorts rows by length, but packed rows all have",
    ),
]


@pytest.mark.parametrize(("provoke", "error", "message"), SENTENCES, ids=[f"{s[2][:50]}" for s in SENTENCES])
def test_the_sentence_is_said(provoke, error, message):
    with pytest.raises(error, match=message):
        provoke()


# Sentences about this machine, an installation or another process, which are made up here


def test_a_missing_datasets_is_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="Loading documents needs `datasets`: run `pip install"):
        load_documents("folder")


def test_a_flash_kernel_without_windows_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_flash_supports", lambda *_: False)
    plan = KernelPlan(AttentionRule(causal=True, window=3))
    with pytest.raises(NotImplementedError, match="this model has a sliding window of 3 tokens, which"):
        kernels.plan_for_kernel(plan, "flash_attention_2", PACKED.call(None, ROWS, ROWS, ROWS, None))


def test_a_sharded_head_is_refused(monkeypatch):
    monkeypatch.setattr(tiled_head, "DTensor", torch.nn.Parameter)
    head = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="`weight` of `Linear` is sharded .* and every token needs all of it"):
        tiled_head._validate_whole(head, dict(head.named_parameters()))


def test_a_head_that_tiles_cannot_call_is_refused_by_the_proof(monkeypatch):
    def fail(*_):
        raise ValueError("a head must map tokens.")

    monkeypatch.setattr(tiled_loss_check, "_loss_and_gradient", fail)
    with pytest.raises(
        NotImplementedError, match="cannot be tiled: a head must map tokens; train it without a tiled loss"
    ):
        tiled_loss_check.prove_tiled_loss(build("llama", "sdpa"))


def test_an_mlp_that_is_sharded_inside_is_refused(monkeypatch):
    model = build("llama", "sdpa")
    tiled_mlp.tile_mlp(model, 4)
    monkeypatch.setattr(tiled_mlp, "FSDPModule", torch.nn.Linear)
    with pytest.raises(NotImplementedError, match="is sharded by itself, inside an MLP that runs in tiles"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))


def test_a_model_that_loops_over_tokens_is_not_planned(monkeypatch):
    monkeypatch.setattr(fake_model, "_MOST_OPERATIONS", 1)
    with pytest.raises(NotImplementedError, match="the model ran more than 1 operations for a few layers"):
        with fake_model.FakeAnswers(1):
            torch.zeros(1) + torch.ones(1)


def test_a_model_that_asks_for_numbers_is_not_planned(monkeypatch):
    def ask(*_):
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)

    monkeypatch.setattr(simulate, "run_step", ask)
    with pytest.raises(NotImplementedError, match="cannot be planned: it does not run on tensors without numbers"):
        Planner(config_of("llama")).breakdown(Settings(tokens=16))


def test_a_model_with_an_indexer_is_not_planned():
    with pytest.raises(NotImplementedError, match="cannot be planned: what its layers gather depends on what its ind"):
        Planner(default_config("deepseek_v32")).breakdown(Settings(tokens=16))


def test_a_measured_step_that_ends_badly_is_told(monkeypatch):
    def late(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(measure.subprocess, "run", late)
    with pytest.raises(RuntimeError, match="the measured step took longer than 3 s: measure fewer tokens"):
        measure.measure_in_process(config_of("llama"), Settings(tokens=8), "cpu", timeout=3)
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: no", stdout="")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="the measured step failed: MemoryError: no"):
        measure.measure_in_process(config_of("llama"), Settings(tokens=8), "cpu")


class NoRoom:
    """A planner for a machine on which nothing fits."""

    config, num_heads = config_of("llama"), 2

    def __init__(self, planned: int = 2**40) -> None:
        self.planned = SimpleNamespace(device=planned, cpu=0, weights=2**20, gradients=0, optimizer=0)

    def preset(self, preset, settings):
        return settings

    def breakdown(self, settings):
        return self.planned

    def fits(self, *_):
        return False


ANSWER = Answer(Namespace(command="plan", json=None))


def test_a_plan_in_which_nothing_fits_says_what_would(monkeypatch, capsys):
    for name in ("print_facts", "print_cells", "facts_of"):
        monkeypatch.setattr(plan_search, name, lambda *_: {})
    cell = lambda planner, preset, settings, *_: plan_search.Cell(preset, settings, 0, None)
    monkeypatch.setattr(plan_search, "num_workers", lambda _: 1)
    monkeypatch.setattr(plan_search, "_plan_cell", cell)
    options = outputs(gpu_memory=1.0, output=None, measure=False)
    with pytest.raises(ValueError, match="no row fits into 1 x 1 GiB on any preset: rows of"):
        plan_search._report(ANSWER, options, NoRoom(), Settings(tokens=1), None)


def test_a_measurement_that_cannot_be_made_is_told(monkeypatch):
    planner = NoRoom()
    monkeypatch.setattr(plan_search, "Planner", lambda *_: planner)
    monkeypatch.setattr(plan_search, "can_measure", lambda _: False)
    with pytest.raises(ValueError, match="`--measure` on a CPU reads Linux's high-water mark"):
        plan_search._calibrate(ANSWER, planner)
    monkeypatch.setattr(plan_search, "can_measure", lambda _: True)
    monkeypatch.setattr(plan_search, "free_bytes", lambda _: 2**30)
    with pytest.raises(ValueError, match="`--measure` needs .* GiB are free on this machine"):
        plan_search._calibrate(ANSWER, planner)
    planner.planned.device = 2**29
    monkeypatch.setattr(plan_search, "measure_in_process", lambda *_: 2**10)
    with pytest.raises(ValueError, match="`--measure` found 0.00 GiB, less than the weights alone"):
        plan_search._calibrate(ANSWER, planner)
