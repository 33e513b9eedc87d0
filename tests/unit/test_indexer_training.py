"""Runs that could not train their indexers as asked are refused before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest

from hf_longctx import IndexerConfig, LongContextTrainer
from hf_longctx.trainer.indexer_checks import refuse_indexer_settings

from ..models import build
from ..sparse import build_trained
from ..training import arguments, reset_state
from ..world.test_indexer_loss import Documents, stack


def trainer(tmp_path, model, config, **changes):
    reset_state()
    return LongContextTrainer(
        model=model,
        args=arguments(str(tmp_path), **changes),
        train_dataset=Documents(),
        data_collator=stack,
        indexer=config,
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
        indexer=IndexerConfig(loss="dense"),
        model=build_trained("deepseek_v32", "packed"),
        args=SimpleNamespace(**{**args, **{key: changes.pop(key) for key in list(changes) if key in args}}),
        is_fsdp_enabled=False,
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
