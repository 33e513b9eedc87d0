"""ALiBi in the place of a rotation: the numbers, caches, saving, undoing, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

from hf_longctx import LongContextConfig, LongContextTrainer, SequenceMesh, adapt, use_alibi
from hf_longctx.adapters.instance_forward import patches_on
from hf_longctx.attention.alibi import alibi_slopes
from hf_longctx.attention.packed import packed_attention
from hf_longctx.parallel.shard import cut_batch

from ..own_attention import difference, forward, gradients_of


SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 4},
    "stablelm": {},
    "gpt_neox": {},
}


def config_of(kind: str, **fields):
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS.get(kind, {}), **fields})
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, None
    return config


def build(kind: str, attention: str = "packed", **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **fields), attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().double() if kind != "gemma2" else model.eval()


def rows(count: int = 2, tokens: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(2, 128, (count, tokens), generator=generator)}


def by_definition(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """The same weights under transformers' eager attention, with the distances in a mask that the test makes."""
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    slopes = alibi_slopes(6).double()

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **_):
        key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        scores = scores - (slopes[:, None, None] * distance.abs()).to(scores)
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    reference = copy.deepcopy(model)
    vars(reference.config).pop("hf_longctx_alibi", None)
    for module in reference.modules():
        vars(module).pop("forward", None)
        if "Rotary" in type(module).__name__:
            module.inv_freq = torch.zeros_like(module.inv_freq)
    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping
    mapping["by_definition"] = attend
    try:
        reference.config._attn_implementation_internal = "by_definition"
        return forward(reference, batch)
    finally:
        del mapping["by_definition"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_packed_rows_are_those_of_the_definition(kind):
    model = build(kind)
    use_alibi(model)
    adapt(model, SequenceMesh.build())
    tolerance = 1e-5 if kind == "gemma2" else 1e-10
    plain = rows()
    assert difference(forward(model, plain), by_definition(model, plain)) <= tolerance
    batch = rows(1)
    documents = batch["input_ids"].split([4, 1, 6], dim=1)
    expected = torch.cat([by_definition(model, {"input_ids": document}) for document in documents], 1)
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None]
    for given in (batch, cut_batch(batch, 1, 0)):
        assert difference(forward(model, given), expected) <= tolerance


def test_positions_do_not_matter_and_lengths_are_not_bounded():
    model = build("llama")
    use_alibi(model)
    batch = rows(1, 100)
    expected = forward(model, batch)
    assert torch.equal(forward(model, {**batch, "position_ids": 7 + torch.arange(100)[None]}), expected)


@pytest.mark.parametrize("kind, cache", [("llama", None), ("llama", "static"), ("mistral", None), ("gemma2", None)])
def test_generation_with_a_cache_is_that_without(kind, cache):
    model = build(kind)
    use_alibi(model)
    batch = rows(2, 7)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **settings, use_cache=False)
    chosen = {} if cache is None else {"cache_implementation": cache}
    actual = model.generate(**batch, **settings, **chosen)
    assert torch.equal(actual.sequences, expected.sequences)
    for one, two in zip(actual.logits, expected.logits):
        assert difference(one, two) <= 1e-4


def test_saved_models_come_back_on_alibi_or_are_refused(tmp_path):
    model = build("qwen3")
    use_alibi(model)
    expected = forward(model, rows())
    model.save_pretrained(tmp_path)
    load = lambda attention: AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=attention, dtype=torch.float64
    ).eval()
    again = load("packed")
    with pytest.raises(ValueError, match="`config.hf_longctx_alibi`.* call `hf_longctx.use_alibi"):
        forward(again, rows())
    handle = adapt(again, SequenceMesh.build())
    assert difference(forward(again, rows()), expected) <= 1e-12
    handle.remove()
    assert not any(patches_on(module) for module in again.modules())
    use_alibi(again)
    assert difference(forward(again, rows()), expected) <= 1e-12
    args = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer = LongContextTrainer(model=load("packed"), args=args, long_context=LongContextConfig())
    assert difference(forward(trainer.model.eval(), rows()), expected) <= 1e-12
    with pytest.raises(ValueError, match="attn_implementation='sdpa' does not compute"):
        use_alibi(load("sdpa"))
    with pytest.raises(ValueError, match="attn_implementation='sdpa' does not compute"):
        LongContextTrainer(model=load("sdpa"), args=args, long_context=LongContextConfig())
    with pytest.raises(ValueError, match="attn_implementation='sdpa' does not compute"):
        adapt(load("sdpa"), SequenceMesh.build())


def test_undoing_gives_the_rotation_back_and_copies_keep_alibi():
    model = build("llama")
    rotated = forward(model, rows())
    handle = use_alibi(model)
    expected = forward(model, rows())
    assert difference(expected, rotated) > 1e-2
    assert use_alibi(model).modules == handle.modules
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward(copied, rows()), expected)
    adapt(model, SequenceMesh.build()).remove()
    assert torch.equal(forward(model, rows()), expected)  # it was on ALiBi before
    handle.remove()
    assert torch.equal(forward(model, rows()), rotated)
    assert "hf_longctx_alibi" not in model.config.to_dict()


def test_recomputed_layers_are_the_same():
    model = build("mistral").train()
    use_alibi(model)
    expected = gradients_of(model, forward(model, rows()).square().mean())
    model.gradient_checkpointing_enable()
    actual = gradients_of(model, forward(model, rows()).square().mean())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_name_of_transformers_is_refused_after_a_change():
    model = build("llama")
    use_alibi(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="does not compute"):
        forward(model, rows())


def test_a_rotary_embedding_of_another_kind_is_refused():
    model = build("llama")
    rotary = model.model.rotary_emb
    halves = lambda self, x, position_ids: (torch.ones(1, position_ids.shape[-1], 8),) * 2
    rotary.__class__ = type("OddRotary", (type(rotary),), {"forward": halves})
    with pytest.raises(
        NotImplementedError, match="`OddRotary` of `LlamaForCausalLM` does not return cosines and sines"
    ):
        use_alibi(model)


def test_models_without_a_rotation_are_refused_by_name():
    for kind, fields in (("gpt2", {"n_head": 6, "n_embd": 48, "n_layer": 1}), ("bloom", {"n_head": 6})):
        config = AutoConfig.for_model(kind, vocab_size=64, **fields)
        config.hidden_size = 48
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
        with pytest.raises(ValueError, match=f"`{type(model).__name__}` has no rotary embedding"):
            use_alibi(model)
        assert not getattr(model.config, "hf_longctx_alibi", False)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
def test_how_a_rotation_was_stretched_changes_nothing(kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 8}
    plain, stretched = build("llama"), build("llama", rope_parameters=rope)
    batch = {**rows(1), "position_ids": torch.cat([torch.arange(n) for n in (2, 9)])[None]}
    for model in (plain, stretched):
        use_alibi(model)
        adapt(model, SequenceMesh.build())
    for given in (rows(), batch, cut_batch(batch, 1, 0)):
        assert torch.equal(forward(plain, given), forward(stretched, given))


def test_a_rotation_by_complex_numbers_in_chunks():
    """Against Llama 4 under transformers' own attention, at positions that are all 0."""
    fields = {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 4, "num_hidden_layers": 4}
    config = config_of("llama4_text", **fields, pad_token_id=0)
    models = []
    for attention in ("eager", "packed"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        models.append(model.eval().double())
    reference, model = models
    use_alibi(model)
    batch, distance = rows(), torch.arange(11)[:, None] - torch.arange(11)
    masks = {}
    for kind in set(config.layer_types):
        seen = distance >= 0
        if kind == "chunked_attention":
            seen = seen & (torch.arange(11)[:, None] // 4 == torch.arange(11) // 4)
        masks[kind] = (-alibi_slopes(6).double()[:, None, None] * distance.abs()).masked_fill(~seen, -1e4)[None]
    expected = reference(
        **batch, attention_mask=masks, position_ids=torch.zeros_like(batch["input_ids"]), use_cache=False
    )
    actual = model(**batch, use_cache=False)
    assert difference(actual.logits, expected.logits) <= 1e-6  # eager softmax is taken in float32


def test_another_model_of_the_same_configuration_is_left_alone():
    config = config_of("llama")
    config._attn_implementation = "packed"
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    expected = forward(second, rows())
    handle = use_alibi(first)
    assert torch.equal(forward(second, rows()), expected) and not hasattr(config, "hf_longctx_alibi")
    assert all(module.config is first.config for module in first.modules() if hasattr(module, "config"))
    handle.remove()
    assert not hasattr(first.config, "hf_longctx_alibi")


def test_layers_of_another_kind_are_refused():
    config = AutoConfig.for_model("falcon", hidden_size=48, num_attention_heads=6, num_hidden_layers=1, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    with pytest.raises(NotImplementedError, match="`FalconAttention` of `FalconForCausalLM` rotates"):
        use_alibi(model)


def test_more_than_text_is_refused():
    config = AutoConfig.for_model("t5", d_model=16, num_layers=1, num_heads=2, vocab_size=64, d_ff=16, d_kv=8)
    from transformers import AutoModelForSeq2SeqLM

    with pytest.raises(NotImplementedError, match="more than a language model"):
        use_alibi(AutoModelForSeq2SeqLM.from_config(config))


def test_a_model_without_layers_on_the_interface_is_refused():
    class Bare(LlamaForCausalLM):
        pass

    model = Bare(AutoConfig.for_model("llama", **SMALL))
    model.set_attn_implementation("packed")
    for layer in model.model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="`Bare` has no layer on transformers' attention interface"):
        use_alibi(model)


def test_a_cache_under_a_mask_of_the_models_own_is_refused():
    layer, query, key = torch.nn.Module(), torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="attends from 1 to 5 tokens under a mask of its own"):
        packed_attention(layer, query, key, key, torch.zeros(1, 1, 1, 5), alibi_slopes=alibi_slopes(2))


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match="`Linear` is not a model of transformers"):
        use_alibi(torch.nn.Linear(2, 2))
