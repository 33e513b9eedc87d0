"""A loop of one's own on two processes: exact after `adapt`, or refused by it or by the forward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers as tf

from hf_longctx import SequenceMesh, adapt, shard_batch

from ..models import build
from ..unit.test_adapt import hybrid, roberta


IDS = torch.arange(11, 24)[None]
LABELS = IDS.roll(3).masked_fill(IDS % 4 == 0, -100)
POSITIONS = torch.arange(IDS.shape[1])[None] + 2


def model_of(name: str, attention: str, dtype=torch.float64):
    if name in ("roberta", "hybrid"):
        return {"roberta": roberta, "hybrid": hybrid}[name](attention).to(dtype)
    return build(name, attention, dtype)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    batch = {"input_ids": IDS, "labels": LABELS}
    return {**batch, "position_ids": POSITIONS} if name == "roberta" else batch


def loop(name: str, order: str):
    """One step as the page on loops writes it: the loss of one process, and every gradient after the mean."""
    mesh = SequenceMesh.build(2)
    model = model_of(name, "ulysses")
    if order == "adapt first":
        adapt(model, mesh)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if order == "wrap first":
        adapt(wrapped, mesh)
    loss = wrapped(**shard_batch(batch_of(name), mesh, wrapped)).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total / 2, gradients


@pytest.mark.parametrize("order", ["adapt first", "wrap first"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "roberta"])
def test_a_loop_equals_one_process(world2, name, order):
    model = model_of(name, "sdpa")
    batch = {key: value for key, value in batch_of(name).items() if key != "position_ids"}
    loss = model(**batch).loss
    loss.backward()
    for actual, gradients in world2.run(loop, name, order):
        torch.testing.assert_close(actual.to(loss.dtype), loss.detach(), rtol=1e-6, atol=0)
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                # BERT-like losses are computed in float32, so gradients have its rounding.
                torch.testing.assert_close(gradients[parameter_name], parameter.grad, rtol=1e-5, atol=1e-6)


def refusals_of(name: str) -> list[str]:
    """What `adapt` says of a type, and what a loop without it meets."""
    mesh, said = SequenceMesh.build(2), []
    cases = {"mamba": (tf.MambaConfig, {"state_size": 4, "hidden_size": 32}), "stablelm": (tf.StableLmConfig, {})}
    cases["bloom"] = (tf.BloomConfig, {"n_head": 4})
    cases["rwkv"] = (tf.RwkvConfig, {"num_hidden_layers": 2, "attention_hidden_size": 32})
    if name in cases:
        kind, changes = cases[name]
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
        config = kind(**{**sizes, **changes})
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="ulysses")
    else:
        model = model_of(name, "ulysses", torch.float32)
    batch = {"input_ids": IDS, "labels": LABELS}
    for step in (lambda: model(**shard_batch(batch, mesh)).loss.backward(), lambda: adapt(model, mesh)):
        try:
            step()
            said.append("")
        except (NotImplementedError, ValueError) as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("name", "by_the_forward", "by_adapt"),
    [
        ("hybrid", "has layers of type conv", ""),
        ("roberta", r"`roberta` does not count from 0 but from `pad_token_id`", ""),
        ("bloom", "edits its attention mask itself", ""),
        # Its attention gets the shard from an adapter.
        ("stablelm", "does not tell its attention whether rows are shared", ""),
        # Its layers never call an attention of ours; docs/conformance.md lists such types.
        ("mamba", "", ""),
        ("rwkv", "", "layers of type rwkv, whose state runs along the sequence"),
    ],
)
def test_what_a_loop_would_get_wrong_is_refused(world2, name, by_the_forward, by_adapt):
    for forward, adapted in world2.run(refusals_of, name):
        for message, expected in ((forward, by_the_forward), (adapted, by_adapt)):
            assert bool(message) == bool(expected), message
            assert expected.replace("`", "").replace("\\", "") in message.replace("`", "")


def adapted_and_then_changed():
    """What each forward says of an adapted model that was changed, or of a share that lost something."""
    mesh, said = SequenceMesh.build(2), []
    model = build("llama", "ulysses")
    adapt(model, mesh)
    share = shard_batch({"input_ids": IDS, "labels": LABELS}, mesh, model)
    del share["num_items_in_batch"]
    bare = roberta("ulysses")
    adapt(bare, mesh)
    without_positions = shard_batch({"input_ids": IDS}, mesh, bare)
    for step in (
        lambda: model(**share),
        lambda: bare(**without_positions),
        lambda: (model.set_attn_implementation("sdpa"), model(**{**share, "num_items_in_batch": 4})),
    ):
        with pytest.raises(ValueError) as raised:
            step()
        said.append(str(raised.value))
    model.set_attn_implementation("ulysses")
    model(**{**share, "num_items_in_batch": 4})  # all layers read it; what they did is not counted for the next
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError) as raised:
        model(**{**share, "num_items_in_batch": 4})
    return [*said, str(raised.value)]


def test_what_changed_after_adapt_is_refused_by_the_forward(world2):
    for counted, positions, attention, layer in world2.run(adapted_and_then_changed):
        assert "the share has `labels` and no `num_items_in_batch`" in counted
        assert "the collated batch has no `position_ids`" in positions
        assert "was changed to attn_implementation='sdpa' after it was adapted" in attention
        assert "1 of 2 attention layers of `LlamaForCausalLM` did not read the `sequence_shard`" in layer
