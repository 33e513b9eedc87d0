"""The loss of indexers: its value, its gradient, and that nothing else of a model gets one from it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.sparse.indexer_objective import IndexerObjective, count_queries
from hf_longctx.adapters.sparse.sparse_layers import first_queries, indexers_of, set_objective
from hf_longctx.config.indexer import IndexerConfig
from hf_longctx.losses.indexer_kl import attention_target, indexer_divergence, inject_gradient

from ..sparse import TRAINED, build_trained, packed_rows


WEIGHT = 0.01


def trained(name: str, is_dense: bool):
    model, objective = build_trained(name, "packed"), IndexerObjective()
    attach_adapters(model)
    set_objective(model, objective)
    objective.weights = dict.fromkeys(first_queries(model), WEIGHT)
    objective.is_dense = is_dense
    return model, objective


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model, rows=None) -> dict[str, torch.Tensor]:
    model(**(rows or packed_rows()), use_cache=False).loss.backward()
    return gradients(model)


def indexer_names(model) -> set[str]:
    known = {id(parameter) for indexer in indexers_of(model) for parameter in indexer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in known}


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    scores, target = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = torch.ones(2, 5, 7).tril().bool()
    seen[1, 3] = False
    target = torch.where(seen, target.masked_fill(~seen, -1e9).softmax(-1), 0.0)
    expected = sum(
        torch.nn.functional.kl_div(scores[r, q][s].log_softmax(-1), target[r, q][s], reduction="sum")
        for r in range(2)
        for q in range(5)
        for s in [seen[r, q]]
        if s.any()
    )
    assert torch.allclose(indexer_divergence(scores, target, seen), expected, atol=1e-12)


def test_target_adds_up_to_one_where_something_is_seen():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 6, 8)
    seen = torch.tensor([[[1, 1, 0, 0, 0, 0], [0] * 6, [1] * 6]]).bool()
    target = attention_target(query, key, seen, 0.3)
    assert torch.allclose(target.sum(-1), torch.tensor([[1.0, 0.0, 1.0]])) and not target[~seen].any()


def test_injected_gradient_does_not_depend_on_the_loss_above():
    x, y = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    (inject_gradient(3 * x, y**2, 0.5) * 7).backward()
    assert (x.grad.item(), y.grad.item()) == (21.0, 2.0)


def test_queries_are_counted_by_their_place_in_a_document():
    segments = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, -1, -1]])
    assert [count_queries(segments, 2, 6, first) for first in (0, 1, 3)] == [10, 6, 1]
    assert count_queries(None, 2, 6, 2) == 8


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_only_indexers_get_a_gradient_from_it(name, is_dense):
    model, objective = trained(name, is_dense)
    with_loss = step(model)
    names = indexer_names(model)
    assert names <= with_loss.keys() and all(with_loss[key].abs().max() > 0 for key in names)
    objective.weights = {}
    without = step(model)
    assert not names & without.keys()
    assert all(torch.equal(with_loss[key], without[key]) for key in without)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4"])
def test_gradient_is_that_of_the_divergence(name, is_dense):
    # A step along the gradient, forth and back, changes the divergence by its squared length.
    model, objective = trained(name, is_dense)
    grads = {key: grad / WEIGHT for key, grad in step(model).items() if key in indexer_names(model)}
    length = sum((grad**2).sum() for grad in grads.values())
    parameters, found = dict(model.named_parameters()), []
    for sign in (1, -2):
        with torch.no_grad():
            for key, grad in grads.items():
                parameters[key] += sign * 0.02 / length * grad
        objective.take_found()
        step(model)
        found.append(objective.take_found()[0])
    # 0.04 of some tens, which are sums of float32 numbers: good to 1e-5.
    assert float(found[0] - found[1]) == pytest.approx(0.04, rel=0.02)


class _Scores(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.topk and args[0].dim() == 3:
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


def test_divergence_is_that_of_transformers_attention_and_scores():
    # transformers' own layers see every earlier token where `index_topk` is the length of the row.
    model, objective = trained("deepseek_v32", is_dense=True)
    rows = packed_rows()
    model(**rows, use_cache=False)
    divergence = objective.take_found()[0]
    theirs, expected = build_trained("deepseek_v32", "eager"), 0.0
    for module in theirs.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 10**6
    for ids, positions in zip(rows["input_ids"], rows["position_ids"]):
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in zip(bounds, bounds[1:]):
            with _Scores() as watch, torch.no_grad():
                found = theirs(input_ids=ids[None, start:stop], use_cache=False, output_attentions=True).attentions
            for scores, attention in zip(watch.found, found):
                log_q = scores.log_softmax(-1)
                p = attention.mean(1)
                expected += torch.where(p > 0, p * (p.clamp(min=1e-30).log() - log_q), 0.0).sum()
    assert float(divergence) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v4"])
def test_checkpointed_layers_give_the_same(name, reentrant):
    model, objective = trained(name, is_dense=False)
    model.train()
    plain, found = step(model), objective.take_found()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = step(model)
    assert all(torch.allclose(again[key], plain[key], rtol=1e-5, atol=1e-8) for key in plain)
    assert torch.allclose(objective.take_found(), found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "warm"}, "must be one of dense, sparse"),
        ({"loss": "sparse", "dense_steps": 3}, "`loss` is 'sparse'"),
        ({"loss": "dense", "dense_steps": 0}, "positive number of steps"),
        ({"loss": "sparse", "indexer_learning_rate": 0.0}, "a number above 0"),
        ({"indexer_learning_rate": 1e-3}, "without `loss` indexers get no gradient"),
        ({"indexer_coefficient": float("nan")}, "a number above 0"),
        ({"loss": "sparse", "indexer_coefficient": None}, "`indexer_coefficient` .None. must be a number above 0"),
        ({"indexer_coefficient": 0.1}, "`indexer_coefficient` .0.1. is set, but without `loss`"),
    ],
)
def test_values_that_no_run_could_use(values, message):
    with pytest.raises(ValueError, match=message):
        IndexerConfig(**values)
