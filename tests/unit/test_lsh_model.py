"""Models on LSH attention: settings, ties, checkpoints, generation, packed rows, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_longctx import (
    LongContextConfig,
    LongContextTrainer,
    LSHConfig,
    SequenceMesh,
    adapt,
    assert_no_cross_document,
    explain_attention,
    tie_query_key,
    use_lsh,
)
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.config.lsh_settings import LSH_KEY

from ..hashed import SETTINGS, build_hashed, random_tokens, relative


def tiny(kind: str = "llama", auto=AutoModelForCausalLM, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": 97, "num_key_value_heads": 2, **changes})
    return auto.from_config(config, attn_implementation=changes.get("attention", "lsh"))


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": random_tokens(1, sum(lengths)), "position_ids": positions}


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("layout", "bar"), [("causal", 1e-12), ("reformer", 1e-10)])
def test_packed_rows_are_documents_alone(layout, bar):
    model, lengths = build_hashed(layout=layout), (9, 1, 14)
    batch = packed(*lengths)
    logits = model(**batch, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * upstream).sum().backward()
    gradients = gradients_of(model)
    pieces = [x.split(lengths, 1) for x in (batch["input_ids"], upstream)]
    alone = [model(ids, use_cache=False).logits for ids in pieces[0]]
    sum((out * weights).sum() for out, weights in zip(alone, pieces[1])).backward()
    assert relative(logits, torch.cat(alone, 1)) <= bar
    for name, expected in gradients_of(model).items():
        assert relative(gradients[name], expected) <= bar, name
    assert_no_cross_document(model, batch)


def test_generation_sees_what_training_saw():
    model, ids = build_hashed().eval(), random_tokens(2, 30)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :17], use_cache=True)
        cache, parts = {OUTPUT_NAME: first[OUTPUT_NAME]}, [first.logits]
        for start, stop in ((17, 22), *((i, i + 1) for i in range(22, 30))):
            parts.append(model(ids[:, start:stop], use_cache=True, **cache).logits)
    assert relative(torch.cat(parts, 1), whole) <= 1e-12
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    scores = []
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        scores.append(torch.stack(out.logits))
    alone = model.generate(
        ids[:1, 7:], max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for other in scores[1:]:
        assert relative(other, scores[0]) <= 1e-12
    assert relative(scores[0][:, :1], torch.stack(alone.logits)) <= 1e-12


def test_a_static_cache_counts_in_place_after_the_mask_is_described():
    """transformers 5.24 hands the mask function the counter itself, which the first layer moves on."""
    model, ids = build_hashed("packed", ties=False).eval(), random_tokens(1, 9)
    scores = []
    for settings in ({}, {"cache_implementation": "static"}):
        out = model.generate(
            ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings
        )
        scores.append(torch.stack(out.logits))
    assert relative(scores[1], scores[0]) <= 1e-12


def test_the_name_and_both_others_compute_the_same():
    model, batch = build_hashed(), packed(9, 1, 14)
    expected = model(**batch, use_cache=False).logits
    for attention in ("packed", "ulysses"):
        model.set_attn_implementation(attention)
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
        single = model(batch["input_ids"], use_cache=False).logits
        model.set_attn_implementation("lsh")
        assert torch.equal(model(batch["input_ids"], use_cache=False).logits, single)


def test_settings_and_ties_travel_with_a_checkpoint(tmp_path):
    model, ids = build_hashed("ulysses", num_hashes=3, hash_seed=5), random_tokens(1, 20)
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "k_proj" in name}
    assert len(weights) == 2  # as in any checkpoint of the class
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lsh", dtype=torch.float64)
    for mine, theirs in zip(model.modules(), loaded.modules()):
        if "RMSNorm" in type(theirs).__name__:
            theirs.forward = mine.forward
    assert LSHConfig.of_model(loaded.config) == LSHConfig(**{**SETTINGS, "num_hashes": 3, "hash_seed": 5})
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="`q_proj` and `k_proj` of `LlamaAttention` have weights .*`hf_longctx.tie_q"):
        loaded(ids)  # a step would part them
    adapt(loaded, SequenceMesh.build(1))  # which ties what is equal
    layer = loaded.model.layers[0].self_attn
    assert layer.k_proj.weight is layer.q_proj.weight
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = copied.model.layers[1].self_attn
        assert layer.k_proj.weight is layer.q_proj.weight
        assert torch.equal(copied(ids, use_cache=False).logits, expected)
        states = copied.state_dict()
        assert len({tensor.data_ptr() for tensor in states.values()}) == len(states)


def test_a_step_keeps_keys_and_queries_together():
    model = build_hashed()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids = random_tokens(1, 20)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(list(model.parameters())) == len(set(model.parameters()))
    layer = model.model.layers[0].self_attn
    assert torch.equal(layer.q_proj.weight, layer.k_proj.weight)


def test_encoders_hash_without_causality():
    model = tiny("bert", AutoModelForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    tie_query_key(model)
    use_lsh(model, LSHConfig(**SETTINGS))
    ids = random_tokens(1, 12)
    changed = ids.clone()
    changed[0, -1] = 3
    outputs = [model(x).logits for x in (ids, changed)]
    assert (outputs[0] - outputs[1])[0, 0].abs().max() > 0 or (outputs[0] - outputs[1])[0, :6].abs().max() > 0
    explained = str(explain_attention(model, {"input_ids": ids}))
    assert explained == (
        "bidirectional, the nearest 4 tokens of a bucket: lsh, one document of 12 tokens a row: 2 rounds of 4 "
        "buckets, one at a time, no mask"
    )


def test_explain_attention_says_what_it_does():
    batch = packed(9, 1, 14)
    model = build_hashed(layout="reformer", num_hashes=1)
    assert str(explain_attention(model, batch)) == (
        "causal, chunks of 4 and the one before: lsh, 3 segments of 1 to 14 tokens: 1 round of 4 buckets, one at a "
        "time, no mask"
    )


def test_a_handle_takes_settings_off():
    model = build_hashed()
    before = getattr(model.config, LSH_KEY)
    handle = use_lsh(model, LSHConfig(num_hashes=1))
    assert LSHConfig.of_model(model.config).num_hashes == 1
    assert model.model.layers[0].self_attn.config is model.config
    handle.remove()
    assert getattr(model.config, LSH_KEY) == before
    other = build_hashed(ties=False)
    use_lsh(other).remove()
    assert not hasattr(other.config, LSH_KEY)


# What is refused


def refused(model, ids=None, **inputs) -> str:
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        model(random_tokens(1, 9) if ids is None else ids, **inputs)
    return str(caught.value)


def test_keys_that_are_no_queries_are_refused():
    assert "call `hf_longctx.tie_query_key(model)`" in refused(build_hashed(ties=False))
    model = build_hashed(ties=False).eval()
    with torch.no_grad():
        assert "the keys of `LlamaAttention` are not its queries" in refused(model)
    # Tied weights, and a forward that changes one of both.
    gpt = tiny("opt", ffn_dim=16, word_embed_proj_dim=16)
    tie_query_key(gpt)
    assert "changes one of both" in refused(gpt)
    with pytest.raises(
        NotImplementedError, match="has 1 key/value heads for 2 query heads, so `k_proj` cannot be tied"
    ):
        tie_query_key(tiny(num_key_value_heads=1))
    assert "`num_key_value_heads` 2" in refused(tiny(num_key_value_heads=1).requires_grad_(False))
    with pytest.raises(NotImplementedError, match="`GPTNeoXAttention` has no two matrices"):
        tie_query_key(tiny("gpt_neox"))
    with pytest.raises(ValueError, match="`Linear` is not a model of transformers"):
        tie_query_key(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no attention layer on transformers' interface"):
        tie_query_key(tiny("mamba", attention=None))


def test_adapters_of_peft_on_one_of_both_are_refused():
    peft = pytest.importorskip("peft")
    model = build_hashed()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert "tie_query_key" in refused(adapted)
    with pytest.raises(NotImplementedError, match="have different parameters .* `target_modules`"):
        tie_query_key(adapted)
    both = peft.get_peft_model(build_hashed(), peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    assert "tie_query_key" in refused(both)
    tie_query_key(both)
    both(random_tokens(1, 9), labels=random_tokens(1, 9)).loss.backward()


def test_masks_and_inputs_that_lsh_does_not_know_are_refused():
    window = build_hashed()
    window.config.sliding_window = 4
    mistral = tiny("mistral", sliding_window=4)
    tie_query_key(mistral)
    assert "a sliding window of 4 tokens" in refused(mistral)
    long = tiny("mistral", sliding_window=4096)  # before step 1, not at the first long row
    tie_query_key(long)
    assert "a sliding window of 4096 tokens" in refused(long)
    gemma = tiny("gemma2", head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"])
    tie_query_key(gemma)
    assert "capped scores (`softcap`)" in refused(gemma)
    sinks = tiny("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"])
    tie_query_key(sinks)
    assert "attention sinks (`s_aux`)" in refused(sinks)
    chunked = tiny("llama4_text", head_dim=8, num_local_experts=1, no_rope_layers=[1], attention_chunk_size=4)
    tie_query_key(chunked)
    assert "chunks of 4 tokens" in refused(chunked)
    own = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    assert "under transformers' own masks only" in refused(build_hashed(), attention_mask=own)


def test_the_papers_layout_keeps_no_cache():
    model = build_hashed(layout="reformer").eval()
    words = "`layout` ('reformer') of the model's `LSHConfig` places tokens by those that come later"
    with torch.no_grad(), pytest.raises(ValueError) as caught:
        model.generate(random_tokens(1, 9), max_new_tokens=3)
    assert words in str(caught.value)
    model.generate(random_tokens(1, 9), max_new_tokens=3, use_cache=False)
    with pytest.raises(ValueError, match="a cache holds one document a row"):
        build_hashed()(**packed(4, 5), use_cache=True)
    trained = build_hashed(attention_dropout=0.1)
    first = trained(random_tokens(1, 9), use_cache=True)
    assert "with dropout" in refused(trained, random_tokens(1, 1), **{OUTPUT_NAME: first[OUTPUT_NAME]})


def test_settings_that_do_not_fit_a_model_are_refused():
    with pytest.raises(ValueError, match="attn_implementation='sdpa', which knows nothing of LSH"):
        use_lsh(build_hashed("sdpa", ties=False))
    with pytest.raises(ValueError, match="`Linear` is not a model of transformers"):
        use_lsh(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is no `LSHConfig`"):
        use_lsh(build_hashed(), {"num_hashes": 2})
    with pytest.raises(NotImplementedError, match="1 key/value heads for 2 query heads"):
        use_lsh(tiny(num_key_value_heads=1))
    model = build_hashed()
    for stored, words in (
        ({"num_hashes": 2}, "must have the fields"),
        ({**LSHConfig().to_dict(), "num_buckets": 7}, "cannot be used: `num_buckets` .7."),
        (True, "must have the fields"),
    ):
        setattr(model.config, LSH_KEY, stored)
        with pytest.raises(ValueError, match=words):
            model(random_tokens(1, 9))
        with pytest.raises(ValueError, match=words):
            adapt(model, SequenceMesh.build(1))


def test_runs_on_another_kernel_than_the_model_names_are_refused():
    model = build_hashed("packed")
    with pytest.raises(ValueError, match="`inner_attention` .'sdpa'. is not the LSH attention"):
        adapt(model, SequenceMesh.build(1), inner_attention="sdpa")
    other = build_hashed("sdpa", ties=False)
    with pytest.raises(ValueError, match="is to run LSH attention .*attn_implementation='sdpa'"):
        adapt(other, SequenceMesh.build(1), inner_attention="lsh")


def trainer_of(model, tmp_path, **settings):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], per_device_train_batch_size=1, use_cpu=True, logging_steps=1, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(4, 12)]
    return LongContextTrainer(model=model, args=arguments, train_dataset=rows)


def test_trainers_tie_check_and_write_down(tmp_path):
    model = build_hashed(dtype=torch.float32, ties=False)
    with pytest.raises(ValueError, match="`hf_longctx.tie_query_key.model.`"):
        trainer_of(model, tmp_path)
    tie_query_key(model)
    trainer = trainer_of(model, tmp_path)
    assert LSHConfig.of_model(model.config) == LSHConfig()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="lsh")
    assert LSHConfig.of_model(loaded.config) == LSHConfig()
    layer = loaded.model.layers[0].self_attn
    assert torch.equal(layer.q_proj.weight, layer.k_proj.weight)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="is to run LSH attention"):
        trainer_of(model, tmp_path)
    with pytest.raises(ValueError, match="`hf_longctx.use_lsh.model, .....remove"):
        LongContextTrainer(
            model=build_hashed("packed"),
            long_context=LongContextConfig(inner_attention="eager"),
            args=trainer.args,
        )


def test_encoder_decoders_are_refused():
    from hf_longctx.adapters.hashed import refuse_unhashable

    with pytest.raises(NotImplementedError, match="is an encoder-decoder"):
        refuse_unhashable(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(
                    "llama",
                    num_hidden_layers=0,
                    vocab_size=5,
                    hidden_size=8,
                    num_attention_heads=2,
                    is_encoder_decoder=True,
                )
            )
        )
    with pytest.raises(NotImplementedError, match="has no attention layer"):
        refuse_unhashable(tiny(num_hidden_layers=0))
