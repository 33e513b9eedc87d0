"""The norm behind a word embedding: its numbers, saving and loading, and models that cannot have one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    TrainingArguments,
    default_data_collator,
)

from hf_longctx import LongContextTrainer, SequenceMesh, adapt, add_embedding_norm
from hf_longctx.adapters.embedding_norm import follow_embedding_norm
from hf_longctx.parallel.shard import cut_batch


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
KINDS = ("llama", "gpt2", "gemma2", "gpt_neox", "bert")
TIED = {"tie_word_embeddings": True}


def build(kind: str = "llama", seed: int = 0, **fields) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **{**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields})
    torch.manual_seed(seed)
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    return auto.from_config(config).double().eval()


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))}


def output(model, **batch) -> torch.Tensor:
    return model(**(batch or tokens()))[0].detach()


def stir(model) -> None:
    norm = model.get_input_embeddings().embedding_norm
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0)


@pytest.mark.parametrize("fields", [{}, TIED], ids=["", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_behind_the_embedding(kind, fields):
    model = build(kind, **fields)
    reference, before = copy.deepcopy(model), output(model)
    handle = add_embedding_norm(model)
    stir(model)
    embedding = model.get_input_embeddings()
    own = torch.nn.Embedding.forward if kind != "gemma2" else type(embedding).forward
    norm = embedding.embedding_norm
    words = torch.nn.functional.layer_norm(own(embedding, tokens()["input_ids"]), (16,), *norm.parameters(), norm.eps)
    assert torch.equal(output(model), output(reference, inputs_embeds=words))
    assert not torch.allclose(output(model), before)
    add_embedding_norm(model)  # twice is once
    assert torch.equal(output(model), output(reference, inputs_embeds=words))
    output_of_all = model(**tokens())[0].square().sum()
    output_of_all.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in embedding.embedding_norm.parameters())
    handle.remove()
    assert torch.equal(output(model), before) and set(model.state_dict()) == set(reference.state_dict())
    assert not hasattr(model.config, "hf_longctx_embedding_norm")


@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_model_comes_back_with_its_norm(tmp_path, shards):
    model = build()
    add_embedding_norm(model)
    stir(model)
    model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if shards else {}))
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not torch.allclose(output(load()), output(model))
    again = load()
    add_embedding_norm(again)
    assert torch.allclose(output(again), output(model), atol=1e-12)
    adapted = load()
    adapted.set_attn_implementation("packed")
    adapt(adapted, SequenceMesh.build()).remove()
    assert torch.allclose(output(adapted), output(model), atol=1e-12)
    again.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float64).eval()
    add_embedding_norm(second)
    assert torch.allclose(output(second), output(model), atol=1e-12)


def test_a_base_model_finds_the_norm_of_a_task_model_and_copies_keep_theirs(tmp_path):
    model = build()
    add_embedding_norm(model)
    stir(model)
    assert torch.equal(output(copy.deepcopy(model)), output(model))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    add_embedding_norm(base)
    assert torch.allclose(output(base), output(model.model), atol=1e-12)


def test_a_model_of_several_modalities_has_a_configuration_of_its_own_in_every_part(tmp_path):
    """And what is loaded of it for words alone has the norm, too."""
    text = {**SMALL, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14}}
    shared = AutoConfig.for_model("gemma3", **fields, mm_tokens_per_image=4, image_token_id=63)
    model, other = (AutoModelForImageTextToText.from_config(shared).double().eval() for _ in range(2))
    add_embedding_norm(model)
    stir(model)
    assert other.config is shared and not hasattr(shared.text_config, "hf_longctx_embedding_norm")
    held = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert held == {id(each) for each in (model.config, model.config.text_config, model.config.vision_config)}
    model.save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64).eval()
    words = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for again in (whole, words):
        follow_embedding_norm(again)
        assert torch.allclose(output(again), output(model), atol=1e-12)
    handle = add_embedding_norm(model)
    handle.remove()
    assert not any(hasattr(each, "hf_longctx_embedding_norm") for each in (model.config, model.config.text_config))


def test_a_run_trains_the_norm_resumes_and_is_loaded_by_a_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (8, 9)).tolist()]
    settings = {"use_cpu": True, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2}

    def trainer(model):
        args = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, **settings)
        return LongContextTrainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)

    models = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build()
        model.set_attn_implementation("packed")
        add_embedding_norm(model)
        trainer(model.train()).train(resume_from_checkpoint=resume)
        models.append(model)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["model.embed_tokens.embedding_norm.weight"], torch.ones(16, dtype=torch.float64))
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4", attn_implementation="packed", dtype=torch.float64
    )
    trainer(saved)
    assert torch.allclose(output(saved.eval()), output(models[0].eval()), atol=1e-12)


def test_lora_trains_beside_a_norm_whenever_it_is_put_on_and_loses_nothing(tmp_path):
    model = build()
    add_embedding_norm(model)
    stir(model)
    model.save_pretrained(tmp_path)
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for is_before in (True, False):
        base = load()
        if is_before:
            add_embedding_norm(base)
        wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        add_embedding_norm(wrapped)
        assert not any("embedding_norm" in name for name, each in wrapped.named_parameters() if each.requires_grad)
        assert torch.allclose(output(wrapped.eval()), output(model), atol=1e-12)
    for fields in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        wrapped = get_peft_model(load(), LoraConfig(**{"target_modules": ["q_proj"], **fields}))
        with pytest.raises(NotImplementedError, match="PEFT has a `.*` in place of the word embedding"):
            add_embedding_norm(wrapped)


def test_shares_of_rows_meet_the_same_norm():
    model = build()
    add_embedding_norm(model)
    stir(model)
    embedding, whole = model.get_input_embeddings(), tokens()
    parts = [embedding(cut_batch(whole, 2, rank)["input_ids"]) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1)[:, :9], embedding(whole["input_ids"]))


def test_models_that_cannot_have_one_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    pretrained = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (pretrained, pretrained.double()):
        with pytest.raises(ValueError, match="are pretrained .*build the model with `from_config`"):
            add_embedding_norm(model)
    loaded = build()
    trained = {name: value + 0.01 * torch.randn_like(value) for name, value in build().state_dict().items()}
    loaded.load_state_dict(trained)
    with pytest.raises(ValueError, match=r"are pretrained \(by `load_state_dict`, or by training\)"):
        add_embedding_norm(loaded)
    loaded.config.hf_longctx_embedding_norm = True  # what a checkpoint's configuration says
    with pytest.raises(ValueError, match="were loaded before it had one: call `add_embedding_norm` before"):
        add_embedding_norm(loaded)
    scratch = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))  # knows the name, not the weights
    add_embedding_norm(scratch)
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_head=4))
    with pytest.raises(ValueError, match="has a norm behind its embedding already"):
        add_embedding_norm(bloom)
    with pytest.raises(ValueError, match="`Linear` is not a model of transformers"):
        add_embedding_norm(torch.nn.Linear(2, 2))
    t5 = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(NotImplementedError, match="has an encoder and a decoder"):
        add_embedding_norm(AutoModel.from_config(t5))
    headless = build()
    headless.model.embed_tokens = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="has no `torch.nn.Embedding` of words"):
        add_embedding_norm(headless)


def test_lost_weights_of_a_norm_are_named(tmp_path):
    model = build()
    add_embedding_norm(model).remove()
    model.config.hf_longctx_embedding_norm = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no `model.embed_tokens.embedding_norm.weight` in safetensors"):
        add_embedding_norm(AutoModelForCausalLM.from_pretrained(tmp_path))
