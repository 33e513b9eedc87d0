"""What a model with fast weights is made from and loaded from: nothing is lost on the way, or it is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_longctx import LongContextTrainer, TTTConfig, TTTForCausalLM
from hf_longctx.data.model_files import check_model_files
from hf_longctx.proof.model_under_test import read_config
from hf_longctx.ttt import TTTModelConfig, complete_settings
from hf_longctx.ttt.base_settings import window_of
from tests.fast_weights import tiny_base, tiny_ttt, tokens


SETTINGS = TTTConfig(window=8, chunk_tokens=6, suffix_layers=2, fast_intermediate_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    tiny_ttt(torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suffix_layers": 1}, "`suffix_layers` 2, but this model has `suffix_layers` 1"),
        ({"base": (dict(layers=4), "layers")}, "`layers` 3, but this model has `layers` 4"),
        ({"fast_intermediate_size": 8}, "`fast_intermediate_size` 16, but this model has .* 8"),
        ({"inner_learning_rate": 0.1}, "`inner_learning_rate` 1.0, but this model has `inner_learning_rate` 0.1"),
        ({"inner_max_grad_norm": 2}, "`inner_max_grad_norm` 1.0, but this model has `inner_max_grad_norm` 2"),
        ({"meta_gradient": "first_order"}, "`meta_gradient` 'exact', but this model has .* 'first_order'"),
    ],
)
def test_weights_of_other_settings_are_refused_by_name(changes, message):
    """In both directions, and after a cast that rounds numbers."""
    layers = changes.pop("base", None)
    one = tiny_ttt(torch.float32).to(torch.bfloat16)
    other = tiny_ttt(torch.float32, base=layers and tiny_base(dtype=torch.float32, **layers[0]), **changes)
    with pytest.raises(ValueError, match=f"the checkpoint was trained with {message}"):
        other.load_state_dict(one.state_dict(), strict=False)
    with pytest.raises(ValueError, match="the checkpoint was trained with"):
        one.load_state_dict(other.state_dict(), strict=False)
    same = tiny_ttt(torch.float32, base=layers and tiny_base(dtype=torch.float32, **layers[0]), **changes)
    same.load_state_dict(other.to(torch.bfloat16).state_dict())


def test_a_configuration_may_change_the_steps_and_not_what_they_are_taken_of(folder):
    config = TTTModelConfig.from_pretrained(folder)
    config.ttt = {**config.ttt, "inner_learning_rate": 0.5}
    model = TTTForCausalLM.from_pretrained(folder, config=config)
    assert model.inner_learning_rate == 0.5
    tiny_ttt(torch.float32, inner_learning_rate=0.5).load_state_dict(model.state_dict())
    config.ttt = {**config.ttt, "suffix_layers": 1}
    with pytest.raises(ValueError, match="`suffix_layers` 2, but this model has `suffix_layers` 1"):
        TTTForCausalLM.from_pretrained(folder, config=config)


def test_a_checkpoint_in_several_files_is_loaded_file_by_file(tmp_path):
    """As transformers' trainer resumes one: the facts are in one file, matrices in others."""
    model = tiny_ttt(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    parts = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len({index for index, part in enumerate(parts) for name in part if "primes" in name}) > 1
    for chunk_tokens in (6, 4):
        other = tiny_ttt(torch.float32, chunk_tokens=chunk_tokens, zero=True)
        with nullcontext() if chunk_tokens == 6 else pytest.raises(ValueError, match="`chunk_tokens` 6"):
            for part in parts:
                other.load_state_dict(part, strict=False)
            assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_facts_of_another_version():
    model = tiny_ttt(torch.float32)
    state = model.state_dict() | {"primes.prime_facts": torch.tensor([8, 6])}
    with pytest.raises(ValueError, match="`prime_facts` hold 2 numbers, and this version's 8"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base.model.layers.0.mlp.up_proj.weight"), r"no `base.model.layers.0.mlp.up_proj.weight`"),
        (lambda s: s.pop("base.lm_head.weight"), r"no `base.lm_head.weight` of the model's shape \(1 weights"),
        (lambda s: s.update(x=torch.zeros(1)), r"has `x` \(1 weights in all\), for which this model has no place"),
        (lambda s: s.pop("primes.prime_layers.1.prime_up"), "no `primes.prime_layers.1.prime_up`, so a part of them"),
        (lambda s: s.pop("primes.prime_layers.0.prime_norm.weight"), "no `primes.prime_layers.0.prime_norm.weight`"),
    ],
)
def test_checkpoints_that_lack_weights_or_have_others(folder, tmp_path, change, message):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        TTTForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_shape(folder):
    config = TTTModelConfig.from_pretrained(folder)
    config.base_config = {**config.base_config, "intermediate_size": 32}
    with pytest.raises(ValueError, match=r"no `base.model.layers.0.mlp.down_proj.weight` of the model's shape"):
        TTTForCausalLM.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_tokens": 4}, r"`chunk_tokens` \(4\) is a setting of the checkpoint"),
        ({"window": 4}, r"`window` \(4\) is a setting of the checkpoint"),
        ({"ttt": {"window": 4}}, r"`ttt` \(\{'window': 4\}\) is a setting of the checkpoint"),
        ({"num_hidden_layers": 2}, r"`num_hidden_layers` \(2\) is a setting of the checkpoint"),
        ({"use_cache": False}, r"`use_cache` \(False\) is no argument of a model with fast weights"),
    ],
)
def test_settings_as_arguments_of_from_pretrained(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        TTTForCausalLM.from_pretrained(folder, **arguments)


def test_how_the_base_generates_is_kept(tmp_path):
    base = tiny_base(dtype=torch.float32)
    base.generation_config = tf.GenerationConfig(
        eos_token_id=[1, 2], temperature=0.3, do_sample=True, max_new_tokens=7
    )
    base.save_pretrained(tmp_path / "base")
    TTTForCausalLM.from_base(tmp_path / "base", SETTINGS).save_pretrained(tmp_path / "fast")
    found = TTTForCausalLM.from_pretrained(tmp_path / "fast").generation_config
    assert (found.eos_token_id, found.temperature, found.do_sample, found.max_new_tokens) == ([1, 2], 0.3, True, 7)


def test_bases_with_adapters_are_refused_and_merged_ones_taken():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    adapted = peft.get_peft_model(tiny_base(dtype=torch.float32), config)
    for base in (adapted, peft.inject_adapter_in_model(config, tiny_base(dtype=torch.float32))):
        with pytest.raises(ValueError, match=r"has adapters, .* call `merge_and_unload\(\)` first"):
            TTTForCausalLM.from_base(base, SETTINGS)
        with pytest.raises(ValueError, match="has adapters"):
            TTTForCausalLM(tiny_ttt(torch.float32).config, base)
    assert TTTForCausalLM.from_base(adapted.merge_and_unload(), SETTINGS)(tokens()).logits.shape == (2, 29, 97)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, r"`base` \(`NoneType`\) must be a hub id, a folder or a causal language model"),
        (lambda: tiny_base(dtype=torch.float32).config, r"`base` \(`LlamaConfig`\) must be a hub id, a folder"),
        (lambda: torch.compile(tiny_base(dtype=torch.float32)), r"`base` \(`OptimizedModule`\) must be"),
        (lambda: tiny_base(dtype=torch.float32).model, r"`base` \(`LlamaModel`\) has no head that predicts"),
        (lambda: tiny_ttt(torch.float32), r"`base` \(`TTTForCausalLM`\) already has fast weights: train it as it is"),
    ],
)
def test_what_is_no_base(make, message):
    with pytest.raises(ValueError, match=message):
        TTTForCausalLM.from_base(make(), SETTINGS)


def test_arguments_of_from_base_that_would_be_ignored():
    base = tiny_base(dtype=torch.float32)
    for name, value in (("attn_implementation", "eager"), ("dtype", torch.float16)):
        with pytest.raises(ValueError, match=rf"`{name}` \(.*\) is an argument for loading a base model by name"):
            TTTForCausalLM.from_base(base, SETTINGS, **{name: value})
    with pytest.raises(ValueError, match=r"`window` \(8\) is a field of the settings: pass `TTTConfig\(window=...\)`"):
        TTTForCausalLM.from_base("somewhere", window=8)
    with pytest.raises(ValueError, match=r"`settings` \(\{'window': 8\}\) must be a `TTTConfig`"):
        TTTForCausalLM.from_base(base, {"window": 8})


def test_a_configuration_of_another_kind(folder):
    other = tiny_base(dtype=torch.float32).config
    for make in (TTTForCausalLM, lambda config: TTTForCausalLM.from_pretrained(folder, config=config)):
        with pytest.raises(ValueError, match=r"`config` \(`LlamaConfig`\) must be a `TTTModelConfig`"):
            make(other)


def test_folders_with_fast_weights_where_a_base_is_wanted(folder, tmp_path):
    with pytest.raises(ValueError, match="already has fast weights: load it with `TTTForCausalLM.from_pretrained`"):
        TTTForCausalLM.from_base(str(folder), SETTINGS)
    with pytest.raises(ValueError, match="already has fast weights .* use `hf-longctx ttt train` or `eval`"):
        check_model_files(folder)
    check_model_files(folder, fast_weights=True)
    with pytest.raises(ValueError, match="^`[^`]*` already has fast weights"):
        read_config(str(folder))
    args = tf.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"has fast weights, which `AutoModel` does not know: pass `TTTForCausalLM"):
        LongContextTrainer(model=str(folder), args=args)


def test_windows_that_a_configuration_turns_off():
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    routed = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = tf.Qwen2MoeConfig(**sizes, **heads, **routed, mlp_only_layers=[1, 2])
    assert config.sliding_window == 0 and complete_settings(SETTINGS, config) == SETTINGS
    model = TTTForCausalLM.from_base(tf.AutoModelForCausalLM.from_config(config), SETTINGS)
    assert model.base.config.sliding_window == 0
    with pytest.raises(ValueError, match="`window` is unset and `qwen2_moe` attends to all tokens"):
        complete_settings(TTTConfig(chunk_tokens=4), config)
    for changes, window in (({}, 5), ({"use_sliding_window": False}, None), ({"max_window_layers": 3}, None)):
        given = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, **changes}
        assert window_of(tf.Qwen2Config(**sizes, **given)) == window
    unused = copy.deepcopy(config)
    unused.sliding_window, unused.use_sliding_window = 5, False
    assert window_of(unused) is None


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"target_modules": [], "target_parameters": ["prime_down"]}, "ParamWrapper"),
        ({"target_modules": [], "target_parameters": ["prime_gate", "prime_up"]}, "ParamWrapper"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["prime_layers.0"]}, "ModulesToSaveWrapper"),
    ],
)
def test_adapters_in_front_of_prime_matrices(changes, kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_ttt(torch.float32), peft.LoraConfig(r=2, **changes))
    with pytest.raises(NotImplementedError, match=rf"`primes.prime_layers.0` is inside an adapter \(`{kind}`\)"):
        model(tokens(), labels=tokens())


def test_adapters_on_parameters_of_slow_layers_are_what_they_merge_to():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=["down_proj.weight"], r=2)
    model = peft.get_peft_model(tiny_ttt(torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model.eval()(tokens()).logits
    assert torch.allclose(model.merge_and_unload()(tokens()).logits, expected, atol=1e-5)


def test_adapters_of_other_settings(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["primes"], r=2)
    peft.get_peft_model(tiny_ttt(torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`suffix_layers` 2, but this model has `suffix_layers` 1"):
        peft.PeftModel.from_pretrained(tiny_ttt(torch.float32, suffix_layers=1), str(tmp_path))
    with pytest.raises(ValueError, match="`chunk_tokens` 6, but this model has .* 4|found no place for `primes.prime"):
        tiny_ttt(torch.float32, chunk_tokens=4).load_adapter(str(tmp_path))


def test_adapters_that_transformers_loads_in_part(monkeypatch):
    """Such as transformers 5.17 does where an adapter saves modules whole."""
    info = SimpleNamespace(unexpected_keys={"primes.prime_facts"})
    monkeypatch.setattr(tf.PreTrainedModel, "load_adapter", lambda self, *args: info)
    with pytest.raises(ValueError, match="found no place for `primes.prime_facts` of the adapter"):
        tiny_ttt(torch.float32).load_adapter("somewhere")


def test_a_rate_of_the_moment_is_no_setting_of_the_weights():
    model = tiny_ttt(torch.float32)
    model.inner_learning_rate = 0.3
    model.load_state_dict(tiny_ttt(torch.float32).state_dict())
    assert model.inner_learning_rate == 0.3
