"""The load-balancing loss of routers on shared rows: loss and every gradient are those of one process.

One process adds it once for each micro-batch, so several groups are compared with as many micro-batches.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_longctx import SequenceMesh, adapt, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.rebind import called_names
from hf_longctx.proof.model_under_test import ModelUnderTest, default_config

from ..models import _BASE, build
from ..training import Rows, assert_same_trajectory, pad_right, steps, train
from .test_models_exact import assert_close, gradients, make_batch


ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TYPES = {
    "mixtral": (tf.MixtralConfig, {**_BASE, **_EXPERTS, **ROUTED}),
    "granitemoe": (tf.GraniteMoeConfig, {**_BASE, **_EXPERTS, **ROUTED, "logits_scaling": 3.0}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {**_BASE, **ROUTED, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 32},
    ),
    "jetmoe": (
        tf.JetMoeConfig,
        {**_BASE, **_EXPERTS, "output_router_logits": True, "aux_loss_coef": 0.7, "kv_channels": 8}
        | {"num_key_value_heads": 2, "num_attention_heads": 4},
    ),
}


def routed(name: str, attention: str, dtype: torch.dtype = torch.float64):
    """A model that adds the loss of its routers, of which a test sees seven tenths."""
    if name == "gpt_oss":
        return build(name, "eager" if attention == "sdpa" else attention, dtype, **ROUTED)
    kind, values = TYPES[name]
    torch.manual_seed(0)
    loading = {"attn_implementation": attention, "experts_implementation": "eager"}
    model = tf.AutoModelForCausalLM.from_config(kind(**values), **loading).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1)
    return model


def on_one_process(name: str, rows: str, dtype: torch.dtype, tokens: int):
    model, batch = routed(name, "sdpa", dtype), make_batch(rows, name, tokens)
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    alone = model(**batch, use_cache=False, output_router_logits=False).loss
    assert outputs.loss - alone > 0.5, "the routers add nothing to see"
    return outputs.loss.detach(), outputs.aux_loss.detach(), gradients(model)


def on_a_share(name: str, rows: str, dtype: torch.dtype, tokens: int, size: int):
    model = routed(name, "ulysses", dtype)
    mesh = SequenceMesh.build(size)
    adapt(model, mesh)
    share = shard_batch(make_batch(rows, name, tokens), mesh, model)
    outputs = model(**share, use_cache=False)
    outputs.loss.backward()
    assert len(outputs.router_logits[0]) == 2 * share["sequence_shard"].local_len, "logits of other ranks' tokens"
    loss, found = outputs.loss.detach(), gradients(model)
    for tensor in [loss, *found.values()]:
        dist.all_reduce(tensor, group=mesh.sp_group)
        tensor /= size
    return loss, outputs.aux_loss.detach(), found


# transformers 5.17 records no router logits of these in one process.
LACKING = ("granitemoe", "granitemoeshared", "jetmoe", "dbrx") if Version(tf.__version__) < Version("5.24") else ()
CASES = [
    (name, rows, torch.float64 if name != "gpt_oss" else torch.float32, tokens)
    for name in (*TYPES, "gpt_oss")
    if name not in LACKING
    for rows, tokens in (("full", 23), ("packed", 23), ("left", 24), ("right", 21))
    if (name, rows) != ("gpt_oss", "packed")  # whose documents leak into each other in one process
]


def all_cases(function, *args):
    return [function(*case, *args) for case in CASES]


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradients_equal_one_process(worlds, size):
    expected = all_cases(on_one_process)
    for results in worlds(size).run(all_cases, on_a_share, size):
        for case, ours, theirs in zip(CASES, results, expected):
            tolerance = 1e-6 if case[2] is torch.float64 else 1e-5
            assert_close(ours[0], theirs[0], tolerance, f"{case}: loss")
            assert_close(ours[1], theirs[1], tolerance, f"{case}: loss of the routers")
            assert ours[2].keys() == theirs[2].keys()
            largest = max(gradient.abs().max() for gradient in theirs[2].values())
            for name, gradient in theirs[2].items():
                error = (ours[2][name] - gradient).abs().max() / max(gradient.abs().max(), 1e-3 * largest)
                assert error <= tolerance, f"{case} {name}: {error:.1e}"


# Every type


# Types whose forward adds the loss of routers and whose layers rows can be shared by.
KINDS = ("dbrx", "ernie4_5_moe", "flex_olmo", "granitemoeshared", "laguna", "mellum", "minimax_m2", "olmoe", "phimoe")
KINDS += ("qwen2_moe",)  # and those above


def test_every_type_computes_it_of_what_its_backbone_returns():
    found = []
    for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        forward = getattr(getattr(tf, kind, None), "forward", None)
        names = called_names(forward) if forward is not None else set()
        if "load_balancing_loss_func" in names:
            found.append(name)
            assert {"loss_function", "router_logits"} <= names, f"{kind} computes it otherwise"
    assert set(found) >= {*KINDS, *TYPES, "gpt_oss"}


def of_type(name: str, attention: str, size: int):
    """Loss and gradients of a tiny model of this type, as the mean over ranks."""
    config = ModelUnderTest.of(default_config(name), "causal-lm", 2).config
    config.update({"output_router_logits": True, "router_aux_loss_coef": 0.7})
    torch.manual_seed(0)
    loading = {"attn_implementation": attention, "experts_implementation": "eager"}
    model = tf.AutoModelForCausalLM.from_config(config, **loading).to(torch.float64).eval()
    mesh, batch = SequenceMesh.build(size), make_batch("right", name)
    if size > 1:
        attach_adapters(model)
        batch = shard_batch(batch, mesh)
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    found = {"loss": outputs.loss.detach()}
    found |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for tensor in found.values():
        if size > 1:
            dist.all_reduce(tensor, group=mesh.sp_group)
            tensor /= size
    return found


def errors_of_types(size: int) -> dict[str, float]:
    errors = {}
    for name in (kind for kind in KINDS if kind not in LACKING):
        expected, ours = of_type(name, "sdpa", 1), of_type(name, "ulysses", size)
        floor = 1e-3 * max(value.abs().max() for key, value in expected.items() if key != "loss")
        differences = ((ours[key] - v).abs().max() / max(v.abs().max(), floor) for key, v in expected.items())
        errors[name] = float(max(differences))
    return errors


def test_every_type_is_exact(world2):
    for errors in world2.run(errors_of_types, 2):
        assert errors.keys() == set(KINDS) - set(LACKING) and all(error < 1e-6 for error in errors.values()), errors


# Trainers


def fit(size: int, lora: bool = False, override=None, evaluate: bool = False, **options):
    """`size` 0 is the stock Trainer."""
    model = build("gpt_oss", "eager" if size == 0 else "ulysses", **ROUTED)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.router.weight", "mlp.experts.down_proj"]}
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM", **targets))
    if evaluate:
        options["trainer_options"] = {"eval_dataset": Rows(11)}
        options |= {"after": "evaluate", "per_device_eval_batch_size": 2}
    return train(size, model=model, rows=options.pop("rows", None) or Rows(24), num_train_epochs=9, **options)


def run_here(size: int, options: dict):
    return fit(size, **options)


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2), (4, 4)])
def test_trainer_adds_it_once_for_each_micro_batch(worlds, world_size, size):
    groups, options = world_size // size, {"learning_rate": 0.1}
    expected = fit(0, gradient_accumulation_steps=2 * groups, **options)
    for actual in worlds(world_size).run(run_here, size, {"gradient_accumulation_steps": 2, **options}):
        assert_same_trajectory(actual, expected)
    without = fit(0, gradient_accumulation_steps=2 * groups, prepare=switched_off, **options)
    assert steps(expected[0])[0][0] - steps(without[0])[0][0] > 0.5


def switched_off(model):
    model.config.output_router_logits = False
    return model


def test_tokens_averaged_per_group_when_asked(worlds):
    options = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    expected = worlds(2).run(run_here, 0, options)[0]
    for actual in worlds(4).run(run_here, 2, options):
        assert_same_trajectory(actual, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": True},
        {"memory": {"loss_tile_size": 5}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["lora", "tiled loss", "checkpointing"],
)
def test_what_is_put_on_the_model_keeps_it(world2, changes):
    stock = {name: value for name, value in changes.items() if name != "memory"}
    expected = fit(0, learning_rate=0.1, **stock)
    for actual in world2.run(run_here, 2, {"learning_rate": 0.1, **changes}):
        assert_same_trajectory(actual, expected)


def test_eval_loss_weighs_the_batches_of_groups(worlds):
    """Each batch's loss by its trained tokens, in whichever group."""
    found = []
    for world_size in (2, 4):
        found.append(worlds(world_size).run(run_here, 2, {"evaluate": True, "learning_rate": 0.0}))
    model = build("gpt_oss", "eager", **ROUTED).eval()
    total, count = 0.0, 0
    rows = Rows(11)
    for first in range(0, 11, 2):
        batch = pad_right([rows[index] for index in range(first, min(first + 2, 11))])
        trained = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * trained
        count += trained
    for results in found:
        for _, _, extra in results:
            assert extra["after"]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
