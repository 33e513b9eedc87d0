"""The name `"ulysses"` wherever a user may write it, and beside other models. Without a shard it is its inner "
"kernel."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from hf_longctx import SequenceMesh, shard_batch

from ..models import VOCAB, build, config_of


def random_ids(tokens: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": random_ids(), "attention_mask": mask}


ORACLES = {"llama": "sdpa", "mistral": "sdpa", "gemma2": "eager", "gpt_oss": "eager", "llama4": "sdpa", "bert": "sdpa"}


@pytest.mark.parametrize("name", list(ORACLES))
def test_without_a_shard_it_is_bit_for_bit_the_inner_kernel(name):
    stock, ours = build(name, ORACLES[name]).eval(), build(name, "ulysses").eval()
    for batch in ({"input_ids": random_ids()}, padded()):
        assert torch.equal(stock(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_gives_the_same_tokens(name, cache):
    stock, ours = build(name, ORACLES[name]).eval(), build(name, "ulysses").eval()
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(stock.generate(**padded(), **options), ours.generate(**padded(), **options))


def test_from_pretrained_config_and_set_attn_implementation(tmp_path):
    build("llama", "sdpa").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ulysses")
    assert loaded.config._attn_implementation == "ulysses"
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="ulysses")
    assert transformers.AutoModelForCausalLM.from_config(config).config._attn_implementation == "ulysses"
    model = build("llama", "sdpa").eval()
    before = model(random_ids()).logits
    model.set_attn_implementation("ulysses")
    share = shard_batch({"input_ids": random_ids()}, SequenceMesh.build())
    assert torch.equal(model(**share).logits, before)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(random_ids()).logits, before)
    loaded.save_pretrained(tmp_path / "again")
    assert "ulysses" not in (tmp_path / "again" / "config.json").read_text()


def test_a_submodel_alone_may_be_on_ulysses():
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=32),
        text_config=config_of("llama"),
        image_token_id=VOCAB - 1,
    )
    chosen = {"text_config": "ulysses", "vision_config": "sdpa"}
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=chosen).eval()
    assert model.config.text_config._attn_implementation == "ulysses"
    assert model.config.vision_config._attn_implementation == "sdpa"
    share = shard_batch({"input_ids": random_ids()}, SequenceMesh.build())
    with torch.no_grad():
        torch.testing.assert_close(model(**share).logits, model(random_ids()).logits, rtol=1e-5, atol=1e-6)


def test_models_with_other_head_counts_live_beside_each_other():
    first, second = build("llama", "ulysses").eval(), build("qwen3", "ulysses", num_attention_heads=4).eval()
    stock_first, stock_second = build("llama", "sdpa").eval(), build("qwen3", "sdpa", num_attention_heads=4).eval()
    share = shard_batch({"input_ids": random_ids()}, SequenceMesh.build())
    for _ in range(2):
        assert torch.equal(first(**share).logits, stock_first(random_ids()).logits)
        assert torch.equal(second(**share).logits, stock_second(random_ids()).logits)


def test_a_forward_changes_nothing_in_the_model():
    model = build("llama", "ulysses").eval()
    before = [copy.deepcopy({k: v for k, v in vars(m).items() if not k.startswith("_")}) for m in model.modules()]
    model(**shard_batch(padded(), SequenceMesh.build()))
    after = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    assert [sorted(b) for b in before] == [sorted(a) for a in after]
    assert [str(b) for b in before] == [str(a) for a in after]
