"""PEFT adapters whose effect depends on which tokens a process sees: refused by name, sharded and packed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_longctx import LongContextConfig, PackingCollator, SequenceMesh, adapt
from hf_longctx.adapters.peft_kinds import check_peft
from hf_longctx.trainer.checks import check_model
from hf_longctx.trainer.gradient_check import zeros_drawn
from hf_longctx.trainer.packed_rows import check_collator

from ..models import build


peft = pytest.importorskip("peft")

LINEAR = {"target_modules": ["q_proj", "v_proj"]}
REFUSED = {
    "aLoRA": ("LoraConfig", {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6], **LINEAR}, "alora_invo"),
    "prompt": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}, "virtual tokens"),
    "prefix": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}, "virtual tokens"),
    "Lily": ("LilyConfig", {"r": 4, **LINEAR}, "mean over the tokens"),
    "Shadow": ("ShadowConfig", {}, "a model of its own"),
    "Poly": ("PolyConfig", {"r": 4, **LINEAR}, "one `task_ids` entry a row"),
    "VeLoRA": ("LoraConfig", {"velora_config": {"init_type": "batch_average_once"}, **LINEAR}, "velora_config"),
}


def with_config(name: str):
    """A model that claims an adapter; whether PEFT can build it with this transformers does not matter."""
    kind, values, _ = REFUSED[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    try:
        config = getattr(peft, kind)(**values)
    except TypeError:
        pytest.skip("this PEFT does not know the field")
    model = build("llama", "ulysses")
    model.peft_config = {"default": config}
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_read_more_than_one_token_are_refused_by_name(name):
    model, reason = with_config(name), REFUSED[name][2]
    with pytest.raises(NotImplementedError, match=f"{REFUSED[name][0]}.*{reason}.*on a share of a row.*use LoRA"):
        check_model(model, LongContextConfig(sequence_parallel_size=2))
    check_model(model, LongContextConfig(sequence_parallel_size=1))  # unpacked on one process it is PEFT's own
    trainer = SimpleNamespace(model=model, data_collator=PackingCollator(max_tokens=16), shifts_labels=True)
    with pytest.raises(NotImplementedError, match=f"{reason}.*in a row of several documents.*pad documents"):
        check_collator(trainer)


@pytest.mark.parametrize(
    "kind", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig", "LNTuningConfig", "OFTConfig"]
)
def test_adapters_that_change_one_token_at_a_time_are_not(kind):
    values = {"IA3Config": {"feedforward_modules": []}, "LNTuningConfig": {"target_modules": ["norm"]}}.get(kind, {})
    values = values if "target_modules" in values else {**LINEAR, **values}
    check_peft(SimpleNamespace(peft_config={"default": getattr(peft, kind)(**values)}), "anywhere", "nothing")


def test_a_loop_of_ones_own_may_not_pack_with_such_an_adapter_but_may_train_whole_rows():
    config = peft.LilyConfig(r=4, **LINEAR) if hasattr(peft, "LilyConfig") else pytest.skip("this PEFT has no Lily")
    model = peft.get_peft_model(build("llama", "packed"), config)
    adapt(model, SequenceMesh.build(1))
    batch = {"input_ids": torch.arange(6)[None] + 5, "use_cache": False}
    assert model(**batch).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match="mean over the tokens of the batch.*several documents"):
        model(**batch, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_adapter_weights_that_start_at_zero_have_values_for_the_time_of_a_check():
    model = peft.get_peft_model(build("llama", "ulysses"), peft.LoraConfig(r=4, **LINEAR))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    zeros = [name for name, parameter in before.items() if not parameter.any()]
    assert len(zeros) == 4 and all("lora_B" in name for name in zeros)
    batch = {"input_ids": torch.arange(5)[None], "use_cache": False}
    model.eval()
    plain = model(**batch).logits
    with pytest.raises(RuntimeError, match="inside"), zeros_drawn(model):
        assert not torch.allclose(model(**batch).logits, plain)
        for name, parameter in model.named_parameters():
            assert (name in zeros) != torch.equal(parameter, before[name])
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(**batch).logits, plain)
    with zeros_drawn(build("llama", "ulysses")) as nothing:  # a zero of the model itself is the model's own
        assert nothing is None
