"""What models with fast weights do not take, each in a sentence that names the value and the way out."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments, default_data_collator

from hf_longctx import (
    LongContextConfig,
    LongContextTrainer,
    MemoryConfig,
    PackingCollator,
    SequenceMesh,
    TTTCache,
    TTTConfig,
    TTTForCausalLM,
    adapt,
)
from hf_longctx.adapters import tile_loss, tile_mlp
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.ttt import TTTModelConfig
from tests.fast_weights import loss_and_gradients, tiny_base, tiny_ttt, tokens, worst


@pytest.fixture(scope="module")
def model():
    return tiny_ttt(torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 4, "chunk_tokens": 5}, r"`chunk_tokens` \(5\) must be at most `window` \(4\)"),
        ({"window": 0}, r"`window` \(0\) must be a positive integer"),
        ({"window": True}, r"`window` \(True\) must be"),
        ({"chunk_tokens": 0}, r"`chunk_tokens` \(0\) must be"),
        ({"chunk_tokens": None}, r"`chunk_tokens` \(None\) must be"),
        ({"chunk_tokens": 1.5}, r"`chunk_tokens` \(1.5\) must be"),
        ({"suffix_layers": 0}, r"`suffix_layers` \(0\) must be a positive integer"),
        ({"fast_intermediate_size": -1}, r"`fast_intermediate_size` \(-1\) must be"),
        ({"inner_learning_rate": -1.0}, r"`inner_learning_rate` \(-1.0\) must be a finite number, 0 or more"),
        ({"inner_learning_rate": math.inf}, r"`inner_learning_rate` \(inf\)"),
        ({"inner_learning_rate": math.nan}, r"`inner_learning_rate` \(nan\)"),
        ({"inner_learning_rate": "1"}, r"`inner_learning_rate` \('1'\)"),
        ({"inner_max_grad_norm": 0}, r"`inner_max_grad_norm` \(0\) must be a finite number above 0"),
        ({"inner_max_grad_norm": math.nan}, r"`inner_max_grad_norm` \(nan\)"),
        ({"meta_gradient": "none"}, r"`meta_gradient` \('none'\) must be one of exact, first_order"),
        ({"learn_while_generating": 1}, r"`learn_while_generating` \(1\) must be True or False"),
        ({"suffix_attention": "flash_attention_2"}, r"`suffix_attention` \('flash_attention_2'\) must be 'eager'"),
        ({"suffix_attention": "kernels-community/flash-attn"}, r"must be 'eager' or 'sdpa'"),
        ({"suffix_attention": "packed"}, r"must be 'eager' or 'sdpa'"),
    ],
)
def test_settings_that_no_model_could_use(settings, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"chunk_tokens": 4}, "`window` is unset and `llama` attends to all tokens"),
        (
            "llama",
            {"window": 8, "chunk_tokens": 4, "suffix_layers": 3},
            r"`suffix_layers` \(3\) must be below",
        ),
        ("llama", {"window": 8, "chunk_tokens": 4, "suffix_layers": 9}, r"`suffix_layers` \(9\) must be below"),
        ("mistral", {"window": 8, "chunk_tokens": 4}, r"`window` \(8\) is wider than the window of `mistral` \(5\)"),
        ("mistral", {"chunk_tokens": 6}, r"`chunk_tokens` \(6\) must be at most `window` \(5\)"),
    ],
)
def test_settings_that_the_base_does_not_allow(name, settings, message):
    with pytest.raises(ValueError, match=message):
        TTTForCausalLM.from_base(tiny_base(name, torch.float32), TTTConfig(**settings))


def test_a_configuration_without_a_base():
    with pytest.raises(ValueError, match="has no `base_config` and `ttt`"):
        TTTForCausalLM(TTTModelConfig())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}, "`position_ids` do not count up from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, r"packs documents \(`cu_seq_lens_q`\)"),
        ({"seq_idx": torch.zeros(2, 6, dtype=torch.int32)}, r"packs documents \(`seq_idx`\)"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)}, "begins with padding or has gaps"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)}, "begins with padding or has gaps"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "`attention_mask` has 4 dimensions"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 48)}, "`inputs_embeds` cannot be read"),
        ({"output_hidden_states": True}, "`output_hidden_states` is not collected"),
        ({"output_attentions": True}, "`output_attentions` is not collected"),
    ],
)
def test_rows_that_are_not_one_document_each(model, inputs, message):
    with pytest.raises(NotImplementedError, match=message):
        model(**{"input_ids": tokens(2, 6), **inputs})


def test_shards_and_unknown_arguments(model):
    from hf_longctx import shard_batch

    mesh, ids = SequenceMesh.build(1), tokens(2, 6)
    share = shard_batch({"input_ids": ids}, mesh)
    with pytest.raises(NotImplementedError, match=r"packs documents \(`sequence_shard`\)"):
        model(ids, sequence_shard=share["sequence_shard"])
    import dataclasses

    half = dataclasses.replace(share["sequence_shard"], size=2)
    with pytest.raises(NotImplementedError, match="a share of one of 2 processes"):
        model(ids, sequence_shard=half)
    with pytest.raises(ValueError, match="`pixel_values` is no argument"):
        model(ids, pixel_values=ids)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": tokens(1, 6)[0]}, r"`input_ids` \(\(6,\)\) must be a tensor of rows"),
        ({"input_ids": [[1, 2]]}, r"`input_ids` \(list\) must be a tensor of rows"),
        ({"input_ids": tokens(1, 6)[:, :0]}, "with 1 tokens or more each"),
        ({"attention_mask": torch.ones(1, 6)}, r"`attention_mask` has shape \(1, 6\), but `input_ids` \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` has shape \(2, 5\)"),
        ({"labels": tokens(2, 5)}, r"`labels` has shape \(2, 5\)"),
        ({"shift_labels": tokens(2, 7)}, r"`shift_labels` has shape \(2, 7\)"),
    ],
)
def test_shapes_that_do_not_fit(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(2, 6), **inputs})


def test_what_is_read_must_be_rows(model):
    for wrong in (tokens(1, 6)[0], [[1, 2]]):
        with pytest.raises(ValueError, match="must be a tensor of rows"):
            model.read(wrong)
    memory = model.read(tokens(2, 6))
    assert model.read(tokens(2, 6)[:, :0], memory).seen == 6


def test_prompts_cut_by_generate(model):
    with pytest.raises(NotImplementedError, match=r"`prefill_chunk_size` \(4\) cuts prompts"):
        model.generate(tokens(1, 9), prefill_chunk_size=4, max_new_tokens=2)


def test_a_penalty_on_gradients_of_what_is_recomputed():
    model = tiny_ttt(torch.float32, tiny_base(dtype=torch.float32, attention="eager")).train()
    model.gradient_checkpointing, ids = True, tokens(1, 20)
    embedding = model.get_input_embeddings().weight
    loss = model(ids, labels=ids).loss
    with pytest.raises(NotImplementedError, match="`create_graph=True` asks for a gradient of gradients"):
        torch.autograd.grad(loss, [embedding], create_graph=True)


def test_rows_without_a_next_token(model):
    with pytest.raises(ValueError, match="a row has 1 tokens, and a next token needs 2"):
        model(tokens(2, 1), labels=tokens(2, 1))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="a row has 1 tokens"):
        model(tokens(2, 3), labels=tokens(2, 3), attention_mask=mask)


def test_inference_mode(model):
    with torch.inference_mode():
        for call in (model, model.read, model.generate):
            with pytest.raises(RuntimeError, match="`torch.inference_mode\\(\\)` forbids gradients"):
                call(tokens(1, 8))
        assert model(tokens(1, 8), learn=False).logits.shape == (1, 8, 97)


def test_caches_of_another_kind(model):
    prompt = tokens(1, 8)
    with pytest.raises(ValueError, match="`cache` is a `DynamicCache`, which has no place for fast weights"):
        model(prompt, **{OUTPUT_NAME: DynamicCache()})
    with pytest.raises(ValueError, match="`cache` is a `DynamicCache`"):
        model.generate(prompt, cache=DynamicCache())
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(NotImplementedError, match=f"`cache_implementation` \\('{kind}'\\) has no place"):
            model.generate(prompt, cache_implementation=kind)
    settings = copy.deepcopy(model.generation_config)
    settings.cache_implementation = "static"
    with pytest.raises(NotImplementedError, match="'static'"):
        model.generate(prompt, generation_config=settings)
    other = tiny_ttt(torch.float32, chunk_tokens=4).read(prompt)
    with pytest.raises(ValueError, match="made with `chunk_tokens` 4, but the model has 6"):
        model.generate(prompt, cache=other)
    with pytest.raises(ValueError, match="made with `chunk_tokens` 4"):
        model(prompt, **{OUTPUT_NAME: other})


def test_assisted_decoding(model):
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(NotImplementedError, match="takes back tokens"):
            model.generate(tokens(1, 8), **options)


def test_prompts_of_unequal_length(model):
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    for padded in (mask, mask.flip(1)):
        with pytest.raises(NotImplementedError, match=r"in 1 of 2 rows, and rows of unequal length in one `generate"):
            model.generate(tokens(2, 8), attention_mask=padded)


def test_continuations_that_would_share_one_cache(model):
    memory, question = model.read(tokens(1, 20)), tokens(1, 4)
    for options in ({"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}):
        with pytest.raises(ValueError, match=r"1 rows, but 1 prompts with 3 .*`cache=memory.repeat\(3\)`"):
            model.generate(question, cache=memory, learn=True, **options)
    with pytest.raises(ValueError, match="the cache holds 1 rows, but 2 are given"):
        model.read(tokens(2, 4), memory)


def test_reading_on_after_tokens_that_nothing_was_learned_from(model):
    memory = model.read(tokens(1, 20), learn=False)
    with pytest.raises(RuntimeError, match="its unfinished chunk has a gap"):
        model.read(tokens(1, 3), memory)


def test_a_cache_in_training(model):
    trains = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="no loss can be trained through it"):
        trains(tokens(1, 8), **{OUTPUT_NAME: trains.make_cache()})
    with pytest.raises(ValueError, match="no loss can be trained through it"):
        model(tokens(1, 8), labels=tokens(1, 8), **{OUTPUT_NAME: model.make_cache()})


def test_files_of_caches(model, tmp_path):
    with pytest.raises(RuntimeError, match="the cache has read nothing"):
        model.make_cache().save(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no `TTTCache`"):
        TTTCache.load(tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "old", metadata={"ttt_cache": json.dumps({"window": 8})})
    with pytest.raises(ValueError, match="is a `TTTCache` of format 1, and this version reads format 2"):
        TTTCache.load(tmp_path / "old")


def test_tiled_layers_before_the_suffix_are_exact_and_in_it_refused():
    ids, plain, tiled = tokens(), tiny_ttt(torch.float32), tiny_ttt(torch.float32)
    handle = tile_mlp(tiled.base, 4)
    with pytest.raises(NotImplementedError, match=r"`base.model.layers.1.mlp` is a tiled MLP"):
        loss_and_gradients(tiled, ids)
    handle.remove()
    tile_mlp(tiled.base.model.layers[0], 4)
    (loss, gradients), (same, others) = loss_and_gradients(plain, ids), loss_and_gradients(tiled, ids)
    assert abs(loss - same) < 1e-5 and worst(others, gradients) < 1e-4


def test_a_tiled_loss(model):
    with pytest.raises((NotImplementedError, ValueError), match="TTTForCausalLM"):
        tile_loss(copy.deepcopy(model), 8)


def test_compiled_models():
    """The whole runs as it is, under `torch.compile`; parts of the suffix are refused."""
    model, ids = tiny_ttt(torch.float32), tokens()
    expected = model(ids).logits
    assert torch.equal(torch.compile(model, backend="eager")(ids).logits, expected)
    mlp = model.base.model.layers[2].mlp
    model.base.model.layers[2].mlp = torch.compile(mlp, backend="eager")
    for reads in (model, model.read, model.read_losses):
        with pytest.raises(
            NotImplementedError, match="`base.model.layers.2.mlp` is compiled, and `torch.compile` cannot"
        ):
            reads(ids)
    model.base.model.layers[2].mlp = mlp
    model.compile(backend="eager")
    with pytest.raises(NotImplementedError, match="`TTTForCausalLM` is compiled"):
        model(ids)


def test_weights_of_zero_3():
    model = tiny_ttt(torch.float32)
    next(model.primes.parameters()).ds_id = 0
    with pytest.raises(NotImplementedError, match="DeepSpeed ZeRO-3"):
        model(tokens())


def arguments(tmp_path, **changes):
    chosen = {"max_steps": 1, "report_to": "none", "use_cpu": True, **changes}
    return TrainingArguments(output_dir=str(tmp_path), **chosen)


@pytest.mark.parametrize(
    ("configs", "changes", "message"),
    [
        (
            {"long_context": LongContextConfig(sequence_parallel_size=2)},
            {},
            "cannot be shared, .* use data parallelism",
        ),
        ({"memory": MemoryConfig(memory="loss")}, {}, r"`memory` \('loss'\) tiles losses or MLPs"),
        ({"memory": MemoryConfig(memory="mlp")}, {}, r"`memory` \('mlp'\) tiles losses or MLPs"),
        ({"memory": MemoryConfig(loss_tile_size=8)}, {}, r"`loss_tile_size` \(8\) tiles losses"),
        ({"memory": MemoryConfig(mlp_tile_size=8)}, {}, r"`mlp_tile_size` \(8\) tiles losses"),
        ({}, {"torch_compile": True}, r"`torch_compile` \(True\) cannot train fast weights"),
        ({"data_collator": PackingCollator(max_tokens=64)}, {}, r"`data_collator` \(PackingCollator\) packs"),
    ],
)
def test_runs_that_would_be_inexact(tmp_path, configs, changes, message):
    configs.setdefault("data_collator", default_data_collator)
    with pytest.raises(NotImplementedError, match=message):
        LongContextTrainer(
            model=tiny_ttt(torch.float32), args=arguments(tmp_path, **changes), train_dataset=[], **configs
        )


def test_a_run_under_deepspeed_is_refused(tmp_path):
    from types import SimpleNamespace

    from hf_longctx.trainer import inner_checks

    args = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(NotImplementedError, match="`deepspeed` .* cannot train fast weights"):
        inner_checks.refuse_arguments(args, MemoryConfig())
    with pytest.raises(NotImplementedError, match="DeepSpeed is configured for a model with fast weights"):
        inner_checks.refuse_built(SimpleNamespace(is_deepspeed_enabled=True))


def test_packed_sft_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    from hf_longctx import LongContextSFTTrainer
    from tests.tokenizer import tiny_tokenizer

    args = trl.SFTConfig(output_dir=str(tmp_path), packing=True, use_cpu=True, report_to="none", bf16=False)
    with pytest.raises(NotImplementedError, match=r"`packing` \(True\) packs documents"):
        LongContextSFTTrainer(
            model=tiny_ttt(torch.float32), args=args, train_dataset=[], processing_class=tiny_tokenizer()
        )


def test_adapting_for_a_loop(model):
    with pytest.raises(NotImplementedError, match="there is nothing to adapt"):
        adapt(model, SequenceMesh.build(1))


def test_packed_rows_under_any_trainer(tmp_path, model):
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9)), "position_ids": [0, 1, 2, 0, 1, 2]}] * 2
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows, data_collator=default_data_collator)
    with pytest.raises(NotImplementedError, match="`position_ids` do not count up"):
        run.train()


def test_the_configuration_holds_what_was_decided(tmp_path, model):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "hf_longctx_ttt_e2e" and saved["ttt"]["suffix_layers"] == 2
    assert saved["base_config"]["model_type"] == "llama"
