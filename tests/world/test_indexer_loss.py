"""Indexers of rows that ranks share get the gradient of one process, in loops and in trainers, in both stages.

Tolerance 1e-5 of the largest gradient: transformers' indexers score in float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_longctx import IndexerConfig, LongContextConfig, LongContextTrainer, SequenceMesh, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.sparse.indexer_objective import IndexerObjective
from hf_longctx.adapters.sparse.sparse_layers import first_queries, indexers_of, set_objective

from ..sparse import TRAINED, build_trained, packed_rows
from ..training import arguments, reset_state


TOKENS = ((9, 1, 13), (2, 18, 3))


def of_one_step(name: str, is_dense: bool, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of a packed batch, averaged over ranks, and what the indexers found, added up over ranks."""
    attention, objective = "ulysses" if size > 1 else "packed", IndexerObjective()
    model = build_trained(name, attention, dtype=torch.float64)
    attach_adapters(model)
    set_objective(model, objective)
    objective.weights, objective.is_dense = dict.fromkeys(first_queries(model), 0.01 * size), is_dense
    mesh = SequenceMesh.build(size) if size > 1 else None
    rows = packed_rows(TOKENS) if mesh is None else shard_batch(packed_rows(TOKENS), mesh)
    loss = model(**rows, use_cache=False).loss
    loss.backward()
    found = objective.take_found()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if mesh is not None:
        dist.all_reduce(found, group=mesh.sp_group)
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=mesh.sp_group)
            gradient /= size
    return gradients, found


def check(ours, theirs) -> None:
    for (gradients, found), (expected, expected_found) in zip(ours, theirs):
        assert gradients.keys() == expected.keys()
        # A router that a table of tokens overrules gets nothing but rounding.
        floor = 1e-7 * max(value.abs().max() for value in expected.values())
        for key, value in expected.items():
            assert (gradients[key] - value).abs().max() <= 1e-5 * value.abs().max() + floor, key
        assert torch.allclose(found[:2], expected_found[:2], rtol=1e-5)


CASES = [(name, is_dense) for name in TRAINED for is_dense in (False, True)]


def all_cases(size: int) -> list:
    return [of_one_step(name, is_dense, size) for name, is_dense in CASES]


@pytest.fixture(scope="module")
def one_process():
    return all_cases(1)


def test_two_ranks(world2, one_process):
    check(world2.run(all_cases, 2)[0], one_process)


def test_four_ranks(world4, one_process):
    check(world4.run(all_cases, 4)[0], one_process)


def of_sharded_weights(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The sparse stage of a model whose weights FSDP2 shards layer by layer; it averages gradients itself."""
    model, objective = build_trained(name, "ulysses", dtype=torch.float64), IndexerObjective()
    attach_adapters(model)
    set_objective(model, objective)
    objective.weights = dict.fromkeys(first_queries(model), 0.01 * 2)
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
    mesh = SequenceMesh.build(2)
    model(**shard_batch(packed_rows(TOKENS), mesh), use_cache=False).loss.backward()
    found = objective.take_found()
    dist.all_reduce(found, group=mesh.sp_group)
    return {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}, found


@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4"])
def test_sharded_weights(world2, one_process, name):
    check(world2.run(of_sharded_weights, name)[:1], [one_process[CASES.index((name, False))]])


class Documents(torch.utils.data.Dataset):
    """Rows of 24 tokens of several documents."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        lengths = (index % 7 + 1, 11, 24 - 12 - index % 7)
        return {key: value[0] for key, value in packed_rows((lengths,)).items()}


def stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def train_stages(size: int, folder: str, resume: str | None = None, steps: int = 4, **changes):
    """Two dense steps, then sparse ones, with two batches a step. Returns weights before and after, and the log."""
    reset_state()
    model = build_trained("deepseek_v32", "ulysses" if size > 1 else "packed")
    args = arguments(
        folder,
        **{
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            **changes,
        },
    )
    config = IndexerConfig(loss="dense", dense_steps=2, indexer_learning_rate=1e-2)
    trainer = LongContextTrainer(
        model=model,
        args=args,
        train_dataset=Documents(),
        data_collator=stack,
        indexer=config,
        long_context=LongContextConfig(sequence_parallel_size=size),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    reset_state()
    return before, {key: value.clone() for key, value in model.state_dict().items()}, log


def indexer_keys(name: str = "deepseek_v32") -> set[str]:
    model = build_trained(name, "eager")
    known = {id(parameter) for indexer in indexers_of(model) for parameter in indexer.parameters()}
    return {key for key, parameter in model.named_parameters() if id(parameter) in known}


def test_stages_of_a_trainer_equal_those_of_one_process(world2, tmp_path):
    before, after, log = train_stages(1, str(tmp_path / "one"))
    _, shared, shared_log = world2.run(train_stages, 2, str(tmp_path / "two"))[0]
    assert all(torch.allclose(shared[key], after[key], atol=2e-5) for key in after)
    for ours, theirs in zip(shared_log, log):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
        assert ours["indexer_kl"] == pytest.approx(theirs["indexer_kl"], rel=1e-3)
    assert all(entry["indexer_learning_rate"] == 1e-2 and 0 < entry["indexer_recall"] <= 1 for entry in log)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert indexer_keys() <= changed and len(changed) > len(indexer_keys())


def test_the_dense_stage_changes_nothing_but_indexers(tmp_path):
    before, after, _ = train_stages(1, str(tmp_path), steps=2, weight_decay=0.1)
    assert {key for key in after if not torch.equal(before[key], after[key])} == indexer_keys()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_at_either_side_of_the_switch_is_the_uninterrupted_one(step, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1}
    _, expected, log = train_stages(1, str(tmp_path), **saved)
    _, weights, again = train_stages(1, str(tmp_path), resume=str(tmp_path / f"checkpoint-{step}"), **saved)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert [entry["indexer_kl"] for entry in again][-(4 - step) :] == [entry["indexer_kl"] for entry in log][step:]
