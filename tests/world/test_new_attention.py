"""A new attention name, defined in this file: one function and one entry of the registry. Sharded and packed it trains
as one process on padded rows does, losses, gradients of its per-head input and weights.

What it computes is ALiBi with learned slopes: scores minus slope times distance, the slopes a parameter of each layer
that reaches attention as a keyword argument, as sinks do. The reference is transformers' own trainer on an attention
function that knows nothing of this package. Tolerances are those of [`assert_same_trajectory`].
"""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_longctx import PackingCollator, SequenceMesh, explain_attention, shard_batch
from hf_longctx.attention import AttentionEntry, attend_sharded, deferred_mask, register_attention

from ..models import VOCAB, build
from ..training import assert_same_trajectory, train


def attend_with_slopes(call, shard):
    """Whole rows of some heads."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (call.key, call.value))
    index = torch.arange(key.shape[2])
    bias = call.per_head["slopes"][:, None, None] * (index[:, None] - index).abs()
    scores = call.query @ key.transpose(2, 3) * call.scaling - bias + call.additive_mask(shard)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def sloped_attention(*args, sequence_shard=None, **kwargs):
    return attend_sharded(SLOPED.call(*args, **kwargs), sequence_shard, attend_with_slopes)


SLOPED = AttentionEntry(
    "sloped", sloped_attention, deferred_mask, shards_rows=True, packs_rows=True, per_head=("slopes",)
)
register_attention(SLOPED)


# The reference: another formula, registered with transformers alone


def reference_attention(module, query, key, value, attention_mask, scaling, slopes, **_):
    behind = torch.ones(query.shape[2], query.shape[2]).tril(-1).flip(1).cumsum(1).flip(1).tril()
    mask = attention_mask - torch.einsum("n,qk->nqk", slopes, behind)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register("sloped_reference", reference_attention)
AttentionMaskInterface.register("sloped_reference", eager_mask)


def pass_slopes(layer, args, kwargs):
    return args, {**kwargs, "slopes": layer.slopes}


def with_slopes(model):
    for number, block in enumerate(model.model.layers):
        layer = block.self_attn
        layer.slopes = torch.nn.Parameter(torch.linspace(0.1, 0.9, model.config.num_attention_heads) + 0.1 * number)
        layer.register_forward_pre_hook(pass_slopes, with_kwargs=True)
    return model


FLAT = {"trainer_options": {"data_collator": PackingCollator()}}


def expected_run():
    run = train(0, attention="sloped_reference", prepare=with_slopes)
    before = dict(with_slopes(build("llama", "eager")).named_parameters())
    for name, after in run[1].items():
        if name.endswith("slopes"):  # the slopes of all heads have moved, by more than the tolerance
            assert (after - before[name]).abs().min() > 1e-4, name
    return run


def run_here(size, options):
    return train(size, attention="sloped", prepare=with_slopes, **options)


@pytest.mark.parametrize("options", [{}, FLAT], ids=["padded", "packed"])
def test_shared_rows_train_like_one_process(world2, options):
    expected = expected_run()
    for actual in world2.run(run_here, 2, options):
        assert_same_trajectory(actual, expected)


@pytest.mark.parametrize("options", [{}, FLAT], ids=["padded", "packed"])
def test_one_process_trains_like_the_reference(options):
    assert_same_trajectory(run_here(1, options), expected_run())


# Without a trainer


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    ids = rows(2, 15)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "documents":
        batch["position_ids"] = torch.cat([torch.arange(4), torch.arange(11)]).expand(2, -1)
        batch["labels"][:, 4] = -100
    return batch


def gradients_of_my_share(kind: str, changes: dict) -> dict[str, torch.Tensor]:
    mesh = SequenceMesh.build(2)
    model = with_slopes(build("llama", "sloped", **changes))
    model(**shard_batch(batch_of(kind), mesh), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Nine heads are five and four, and read three key/value heads, the middle one on both ranks.
HEADS = {"even": {}, "uneven": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["one document", "documents"])
def test_every_gradient_is_that_of_one_process(world2, kind, heads):
    """Relative to the largest entry of each: sums of some tens of terms in another order, in fp32."""
    model = with_slopes(build("llama", "sloped_reference", **HEADS[heads]))
    model(**batch_of(kind), use_cache=False).loss.backward()
    ranks = world2.run(gradients_of_my_share, kind, HEADS[heads])
    for name, parameter in model.named_parameters():
        actual, expected = sum(rank[name] for rank in ranks) / 2, parameter.grad
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert expected.abs().max() > 0


# Without a shard


def rows(count: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_plain_rows_are_those_of_the_reference(side):
    ours, theirs = (with_slopes(build("llama", name)).eval() for name in ("sloped", "sloped_reference"))
    batch = {"input_ids": rows(2, 9)}
    if side != "none":
        batch["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
        batch["attention_mask"][1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    real = batch.get("attention_mask", torch.ones(2, 9)).bool()
    torch.testing.assert_close(ours(**batch).logits[real], theirs(**batch).logits[real], rtol=1e-5, atol=1e-5)


def test_documents_are_kept_apart():
    model, ids = with_slopes(build("llama", "sloped")).eval(), rows(1, 14)
    batch = {"position_ids": torch.cat([torch.arange(5), torch.arange(9)])[None], "use_cache": False}
    expected = torch.cat([model(part, use_cache=False).logits for part in ids.split((5, 9), dim=1)], dim=1)
    torch.testing.assert_close(model(ids, **batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_documents_are_kept_apart_in_a_compiled_model():
    """A compiler knows of no documents that hide in positions, unless the function is called untraced."""
    query, key, value = torch.randn(3, 1, 4, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])

    def run(query):
        inputs = {"scaling": 0.3, "slopes": torch.ones(4), "position_ids": positions}
        return sloped_attention(torch.nn.Identity(), query, key, value, None, **inputs)[0]

    changed = torch.cat([torch.zeros(1, 4, 3, 8), query[:, :, 3:]], dim=2)
    torch.testing.assert_close(torch.compile(run, backend="eager")(query), run(query), rtol=0, atol=0)
    assert torch.equal(run(changed)[:, 3:], run(query)[:, 3:]) and not torch.equal(run(changed), run(query))


def test_what_it_does_not_compute_is_refused():
    model = with_slopes(build("llama", "sloped")).eval()
    with pytest.raises(NotImplementedError, match="from 1 to 5 tokens, but attn_implementation='sloped' computes"):
        model.generate(rows(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="runs attn_implementation='sloped', which plans no inner kernel"):
        explain_attention(model, {"input_ids": rows(1, 4)})
