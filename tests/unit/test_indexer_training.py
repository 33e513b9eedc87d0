"""Runs that could not train their indexers as asked are refused before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch

from hf_longctx import IndexerConfig, LongContextTrainer
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.instance_forward import patches_on
from hf_longctx.adapters.sparse.sparse_layers import first_queries
from hf_longctx.trainer.indexer_checks import refuse_indexer_settings
from hf_longctx.trainer.indexer_training import IndexerTraining
from hf_longctx.trainer.mixin import SequenceParallelMixin

from ..models import build
from ..sparse import KINDS, build_sparse, build_trained, packed_rows
from ..training import arguments, reset_state
from ..world.test_indexer_loss import Documents, stack


def trainer(tmp_path, model, config, optimizers=(None, None), **changes):
    reset_state()
    return LongContextTrainer(
        model=model,
        args=arguments(str(tmp_path), **changes),
        train_dataset=Documents(),
        data_collator=stack,
        indexer=config,
        optimizers=optimizers,
    )


def test_a_model_without_indexers(tmp_path):
    with pytest.raises(ValueError, match="trains indexers, and `LlamaForCausalLM` has none that pick single tokens"):
        trainer(tmp_path, build("llama", "packed"), IndexerConfig(loss="sparse"))


def test_indexers_that_are_all_frozen(tmp_path):
    model = build_trained("deepseek_v32", "packed")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("indexer" not in name)
    with pytest.raises(ValueError, match="all of those of `DeepseekV32ForCausalLM` are frozen"):
        trainer(tmp_path, model, IndexerConfig(loss="sparse"))


def test_an_attention_that_is_not_of_this_package(tmp_path):
    with pytest.raises(ValueError, match="runs 'eager': load it with attn_implementation='packed'"):
        trainer(tmp_path, build_trained("deepseek_v32", "eager"), IndexerConfig(loss="sparse"))


def test_adapters_on_indexers_without_a_loss(tmp_path):
    lora = peft.LoraConfig(target_modules=["wq_b", "o_proj"])
    adapted = peft.get_peft_model(build_trained("deepseek_v32", "packed"), lora)
    with pytest.raises(ValueError, match="LoRA adapts the indexers .* which get no gradient"):
        trainer(tmp_path, adapted, IndexerConfig())
    trainer(tmp_path, adapted, IndexerConfig(loss="sparse"))
    reset_state()


def settings(**changes):
    args = {"fp16": False, "ddp_find_unused_parameters": None, "gradient_checkpointing": False}
    return SimpleNamespace(
        indexer=IndexerConfig(loss=changes.pop("loss", "dense")),
        model=build_trained(changes.pop("kind", "deepseek_v32"), "packed"),
        args=SimpleNamespace(**{**args, **{key: changes.pop(key) for key in list(changes) if key in args}}),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        mesh=SimpleNamespace(world_size=2),
        **changes,
    )


def test_what_freezing_and_scaling_do_not_go_with():
    refuse_indexer_settings(settings())
    for changes, kind, message in (
        ({"fp16": True}, NotImplementedError, "use `bf16`"),
        ({"ddp_find_unused_parameters": False}, ValueError, "set `ddp_find_unused_parameters=True`"),
        ({"gradient_checkpointing": True}, ValueError, "set `ddp_find_unused_parameters=True`"),
    ):
        with pytest.raises(kind, match=message):
            refuse_indexer_settings(settings(**changes))
    fsdp = settings()
    fsdp.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="which FSDP has placed by then"):
        refuse_indexer_settings(fsdp)


@pytest.mark.parametrize(
    "kind", [kind for kind in ("deepseek_v32", "deepseek_v4", "minimax_m3_vl_text") if kind in KINDS]
)
def test_indexers_without_a_gradient_that_ddp_would_wait_for(kind):
    run = settings(loss=None, gradient_checkpointing=True)
    run.model = build_sparse(kind, "packed")
    with pytest.raises(
        ValueError, match="`layers.*indexer.*` is trainable and gets no gradient with .*loss=None.*DDP"
    ):
        refuse_indexer_settings(run)
    if kind != "minimax_m3_vl_text":  # has no loss of its own
        run.indexer = IndexerConfig(loss="sparse")
        refuse_indexer_settings(run)
        run.indexer = IndexerConfig()
    for name, value in (("ddp_find_unused_parameters", True), ("gradient_checkpointing", False)):
        before = getattr(run.args, name)
        setattr(run.args, name, value)
        refuse_indexer_settings(run)
        setattr(run.args, name, before)
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("indexer" not in name)
    refuse_indexer_settings(run)


def test_a_rate_that_the_callers_scheduler_does_not_know(tmp_path):
    model = build_trained("deepseek_v32", "packed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    config = IndexerConfig(loss="sparse", indexer_learning_rate=1e-2)
    with pytest.raises(ValueError, match="which the scheduler in `optimizers` does not know"):
        trainer(tmp_path, model, config, optimizers=(optimizer, scheduler)).train()
    trainer(tmp_path, model, config, optimizers=(optimizer, None)).create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-2]
    reset_state()


@pytest.mark.parametrize("part", ["indexer", "compressor", "self_attn"])
@pytest.mark.parametrize(
    "kind", [kind for kind in ("deepseek_v32", "deepseek_v4", "minimax_m3_vl_text") if kind in KINDS]
)
def test_copies_of_parts_that_peft_trains(kind, part):
    if part == "compressor" and kind != "deepseek_v4":
        return
    model = build_sparse(kind, "packed", torch.float32)
    for parent in list(model.modules()):
        if part in parent._modules and parent._modules[part] is not None:
            setattr(parent, part, peft.utils.ModulesToSaveWrapper(parent._modules[part], "default"))
    with pytest.raises(NotImplementedError, match="`modules_to_save` wraps `.*` in a `ModulesToSaveWrapper`"):
        attach_adapters(model)
    assert not any(patches_on(module) for module in model.modules())


@pytest.mark.skipif("deepseek_v4" not in KINDS, reason="transformers has no deepseek_v4")
def test_weights_of_a_step_and_whose_they_are():
    model, rows = build_trained("deepseek_v4", "packed"), packed_rows()
    attach_adapters(model)
    training = IndexerTraining(IndexerConfig(loss="sparse", indexer_coefficient=0.5), model)
    training.begin_step(0, [rows, rows], SimpleNamespace(world_size=1, sequence_parallel_size=1), torch.device("cpu"))
    first, tokens, objective = first_queries(model)[1], rows["input_ids"].numel(), training.objective
    documents = torch.tensor([9, 1, 13, 2, 18, 3])  # of `packed_rows`
    counted = int((documents - first).clamp(min=0).sum())
    assert first > 0 and objective.weights == {0: 0.5 / (2 * tokens), first: 0.5 / (2 * counted)}
    for weights, has_gradient in (({0: 0.0, first: 1.0}, True), ({0: 1.0, first: 0.0}, False)):
        objective.weights = weights
        model.zero_grad()
        model(**rows, use_cache=False).loss.backward()
        assert all(bool(parameter.grad.any()) == has_gradient for parameter in training.parameters())


def test_checks_look_at_the_models_own_gradient(tmp_path, monkeypatch):
    """While a batch is checked, layers add nothing to it and count nothing for the log."""
    run = trainer(tmp_path, build_trained("deepseek_v32", "packed"), IndexerConfig(loss="sparse"))
    seen = []

    def look(self, inputs):
        self.model(**{name: value for name, value in inputs.items() if name != "sequence_shard"}, use_cache=False)
        seen.append((run._indexers.objective.weights, run._indexers.objective.take_found().tolist()))

    monkeypatch.setattr(SequenceParallelMixin, "check_share", look)
    run._indexers.begin_step(0, [packed_rows()], run.mesh, torch.device("cpu"))
    weights = run._indexers.objective.weights
    run.check_share({**packed_rows(), "sequence_shard": SimpleNamespace(num_tokens=23)})
    assert seen == [({}, [0.0] * 4)] and weights and run._indexers.objective.weights == weights
    reset_state()


def test_the_trainer_warns_of_rows_in_which_nothing_is_sparse(tmp_path, caplog):
    run = trainer(tmp_path, build_trained("deepseek_v32", "packed"), IndexerConfig())
    for tokens, warnings in ((24, 0), (5, 1), (5, 1)):
        run._sparse_rows.see(tokens)
        assert sum("so nothing is sparse" in record.getMessage() for record in caplog.records) == warnings
    reset_state()
