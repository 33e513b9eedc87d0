"""QLoRA: 4-bit layers keep their backward, 8-bit ones that mix tokens are refused, a recipe that saves adapters."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_longctx import LongContextConfig, SequenceMesh, adapt
from hf_longctx.adapters.peft_kinds import PACKED_ROWS, check_peft
from hf_longctx.tasks import reward, sft
from hf_longctx.tasks.few_bit_base import read_quantization
from hf_longctx.tasks.inputs import RecipeArguments, load_model
from hf_longctx.trainer.checks import check_model

from ..few_bits import qlora, quantized
from ..models import build
from ..tokenizer import tiny_tokenizer, words
from ..training import reset_state


ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="needs the extra `qlora`")


def asked(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"load_in_4bit": True, "load_in_8bit": False, "use_peft": True, **changes})


def test_keys_that_do_not_go_with_weights_of_few_bits_are_refused():
    assert read_quantization(asked(load_in_4bit=False), "model.gguf", True) == {}
    with pytest.raises(ValueError, match=r"`load_in_4bit` \(True\).*`from_scratch`"):
        read_quantization(asked(), from_scratch=True)
    with pytest.raises(ValueError, match=r"`load_in_8bit` \(True\).*`gguf_file` \(m.gguf\).*whole weights"):
        read_quantization(asked(load_in_4bit=False, load_in_8bit=True), "m.gguf")
    with pytest.raises(ValueError, match="freezes the base model, so nothing would train: set `use_peft: true`"):
        read_quantization(asked(use_peft=False))
    recipe, args = RecipeArguments(prepare_kbit=True), SimpleNamespace(seed=0)
    with pytest.raises(ValueError, match="`prepare_kbit`.*set `load_in_4bit: true`"):
        load_model(recipe, args, asked(load_in_4bit=False), LongContextConfig())


def test_a_missing_bitsandbytes_is_named_with_its_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ImportError, match=r"`load_in_4bit` \(True\) needs bitsandbytes: `pip install hf-longctx\[ql"):
        read_quantization(asked())


def with_eight_bits(threshold: float, device: str):
    """A model of which one layer is what bitsandbytes makes in 8 bits; it cannot run."""
    layer_class = type("Linear8bitLt", (torch.nn.Linear,), {})
    model, layer = build("llama", "ulysses"), layer_class(48, 64, bias=False, device=device)
    layer.state = SimpleNamespace(threshold=threshold)
    model.model.layers[1].mlp.up_proj = layer
    return model.requires_grad_(False)


def test_eight_bit_layers_that_look_at_all_tokens_are_refused_shared_and_packed():
    model = with_eight_bits(6.0, "meta")
    with pytest.raises(NotImplementedError, match=r"up_proj.*`llm_int8_threshold` \(6.0\).*on a share of a row: load"):
        check_model(model, LongContextConfig(sequence_parallel_size=2))
    with pytest.raises(NotImplementedError, match="in a row of several documents.*=0.0.*in 4 bits, or pad"):
        check_peft(model, *PACKED_ROWS)
    check_model(model, LongContextConfig(sequence_parallel_size=1))  # whole rows on one process are the library's own
    for exact in (with_eight_bits(0.0, "meta"), with_eight_bits(6.0, "cpu")):
        check_model(exact, LongContextConfig(sequence_parallel_size=2))
        check_peft(exact, *PACKED_ROWS)


def gradient_of_first_layer(model) -> torch.Tensor:
    model.zero_grad()
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return next(p.grad for name, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in name)


@needs_bitsandbytes
def test_an_evaluation_does_not_cost_four_bit_layers_their_gradient():
    """On a CPU with bfloat16 instructions; on others the library has no second layout."""
    ids = torch.arange(3, 15)[None]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # that layout is in blocks of 32
    expected = gradient_of_first_layer(qlora(build("llama", "sdpa", **sizes), "packed").train()).clone()
    model = qlora(build("llama", "sdpa", **sizes), "packed")
    adapt(model, SequenceMesh.build(1))  # its own checks evaluate
    with torch.no_grad():
        model.eval()(input_ids=ids)
    torch.testing.assert_close(gradient_of_first_layer(model.train()), expected, rtol=1e-5, atol=1e-7)


def test_a_model_that_an_evaluation_has_cost_its_gradient_is_refused():
    model = build("llama", "packed")
    model.model.layers[1].mlp.up_proj.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(RuntimeError, match=r"`model.layers.1.mlp.up_proj` was evaluated on this CPU before.*load the"):
        adapt(model, SequenceMesh.build(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of `recipes/sft_qlora.yaml`, made small and for a CPU, next to its base model."""
    folder = tmp_path_factory.mktemp("qlora")
    build("llama", "sdpa").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": words(4, i) + " ", "completion": words(5 + i % 9, i + 50)} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = (
        f"--model_name_or_path {folder / 'base'} --dataset_name {folder / 'rows.jsonl'} --output_dir {folder}/run"
    )
    changes += " --use_cpu true --bf16 false --dtype float32 --bnb_4bit_quant_storage uint8 --sequence_parallel_size 1"
    changes += " --max_length 32 --max_steps 3 --learning_rate 0.05 --save_strategy no --prepare_kbit true"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sft", "--config", str(ROOT / "recipes" / "sft_qlora.yaml"), *changes.split()])
        reset_state()
        sft.main()
    return folder


@needs_bitsandbytes
def test_the_recipe_saves_adapters_that_merge_into_whole_weights(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = load_file(trained / "run" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert sum(bool(w.any()) for name, w in saved.items() if "lora_B" in name) == 14  # all of them learned
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained / "base"), trained / "run")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        model.merge_and_unload().save_pretrained(trained / "merged")
        merged = AutoModelForCausalLM.from_pretrained(trained / "merged")
        torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (build("llama", "sdpa").eval()(ids).logits - expected).abs().max() > 1e-3
    assert "quantization_config" not in json.loads((trained / "merged" / "config.json").read_text())


@needs_bitsandbytes
@pytest.mark.parametrize("raised", [False, True])
def test_k_bit_preparation(raised):
    from hf_longctx.tasks.few_bit_base import prepare_few_bits

    model = quantized(build("llama", "sdpa").to(torch.bfloat16), "packed")
    prepare_few_bits(model, raise_to_float32=raised, checkpointing=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = torch.float32 if raised else torch.bfloat16
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == expected
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


@pytest.fixture
def reward_run(tmp_path, monkeypatch):
    """Starts the recipe `reward` with adapters, on a tiny model, with more arguments."""
    build("llama", "sdpa").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    pairs = [{"prompt": f"w{i} w3 ", "chosen": f"w{i + 2} w7", "rejected": f"w{i + 1} w5"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    command = f"reward --model_name_or_path {tmp_path / 'base'} --dataset_name {tmp_path / 'pairs.jsonl'} --use_peft"
    command += f" true --output_dir {tmp_path / 'run'} --use_cpu true --bf16 false --max_steps 1 --save_strategy no"
    command += " --report_to none --gradient_checkpointing false "

    def start(more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", (command + more).split())
        reset_state()
        reward.main()
        return list(load_file(tmp_path / "run" / "adapter_model.safetensors"))

    return start


def test_adapters_of_a_reward_model_come_with_its_new_head(reward_run):
    more = " --load_in_4bit true" if INSTALLED else ""
    assert [name for name in reward_run(f"--dtype bfloat16{more}") if "score" in name]


@needs_bitsandbytes
def test_a_head_that_trl_casts_is_refused_next_to_other_hidden_states(reward_run):
    with pytest.raises(NotImplementedError, match=r"`dtype` \(float32\).*casts the new head.*`dtype: bfloat16`"):
        reward_run("--dtype float32 --load_in_4bit true")
