"""A training loop that never calls `adapt`: is it exact, refused by the attention layers, or wrong unnoticed?

What trainers and `adapt` refuse they find by running the model. A loop without them has only the attention layers,
which see a configuration and a batch. The models that slip through are listed on the conformance page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..families import first_position
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import share_of_group
from .build import build_model
from .compare import Pair
from .model_under_test import ModelUnderTest, Setting
from .numbers import Numbers, loss_of_share, mean_gradients, mean_of_ranks, of_one_process, worst_gradient
from .outcomes import Outcome, least_of_ranks
from .random_rows import Rows
from .result import EXACT, REFUSED, WRONG, tolerance


# Without float64 to settle rounding; what slips through is off by a tenth and more.
_MARGIN = 100.0
_Step = tuple[torch.Tensor, dict[str, torch.Tensor]]  # loss and gradients


def prove_bare_loop(tested: ModelUnderTest, setting: Setting) -> str:
    """The worst outcome of loops on shares and on packed rows. Every rank of a world of `setting.world_size` calls it.

    Returns:
        `str`: `"exact"`; `"refused"`: the forward raises; `"wrong"`: numbers differ and nothing says so;
        `"unbuildable"`: there is nothing to compare with.
    """
    try:
        pair = Pair(tested, setting, setting.dtype)
        outcomes = [_on_shares(pair, kind) for kind in ("even", "packed")] + [_packed_alone(pair)]
    except Outcome as ended:
        return ended.outcome
    worst_first = (WRONG, REFUSED, EXACT)
    return worst_first[int(least_of_ranks(min(worst_first.index(outcome) for outcome in outcomes)))]


def _on_shares(pair: Pair, kind: str) -> str:
    """`model(**shard_batch(batch, mesh)).loss`, and nothing else."""
    tested, setting, rows = pair.tested, pair.setting, _rows(pair, kind)
    theirs = of_one_process(pair.unsharded, tested.task, rows)
    mesh = SequenceMesh.build(setting.sequence_parallel_size)
    batch = rows.of_group(mesh.data_parallel_rank)

    def run(model: torch.nn.Module) -> _Step:
        share = share_of_group(batch, mesh, inner_attention=setting.inner_attention, shift_labels=tested.shifts_labels)
        share["num_items_in_batch"] = rows.num_items / setting.world_size
        loss = loss_of_share(model, tested.task, share, rows)[1]
        loss.backward()
        return mean_of_ranks(loss), mean_gradients(model, "none")

    return _outcome(pair, "ulysses", run, theirs, rows.batch["input_ids"].numel())


def _packed_alone(pair: Pair) -> str:
    """`model(**batch)` on one packed row of one process, with its bounds, as `PackingCollator` makes it."""
    rows = _flat(_rows(pair, "packed"))
    theirs = of_one_process(pair.unsharded, pair.tested.task, rows)
    lengths = torch.tensor([stop - start for _, start, stop in rows.documents])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    facts = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    whole = dataclasses.replace(rows, kind="dense", batch={**rows.batch, **facts}, documents=(), counts_itself=False)

    def run(model: torch.nn.Module) -> _Step:
        ours = of_one_process(model, pair.tested.task, whole)
        return ours.loss, ours.gradients

    return _outcome(pair, "packed", run, theirs, rows.batch["input_ids"].numel())


def _flat(rows: Rows) -> Rows:
    """All rows as one."""
    count = rows.batch["input_ids"].shape[1]
    documents = tuple((0, row * count + start, row * count + stop) for row, start, stop in rows.documents)
    batch = {name: value.reshape(1, -1) for name, value in rows.batch.items()}
    return dataclasses.replace(rows, batch=batch, documents=documents)


def _rows(pair: Pair, kind: str) -> Rows:
    """Random rows; packed documents begin where the model begins to count."""
    rows, first = pair.rows(kind), first_position(pair.unsharded.config)
    return rows.with_positions(first) if kind == "packed" and first else rows


def _outcome(pair: Pair, attention: str, run: Callable[..., _Step], theirs: Numbers, num_tokens: int) -> str:
    try:
        model = build_model(pair.tested, attention, getattr(torch, pair.dtype))
        model.load_state_dict(pair.unsharded.state_dict())
        loss, gradients = run(model)
    except Exception:  # whatever it is, it stops the loop before the optimizer's step
        return REFUSED
    errors = float((loss - theirs.loss).abs() / theirs.scale), worst_gradient(gradients, theirs.gradients)[0]
    return EXACT if max(errors) <= _MARGIN * tolerance(num_tokens) else WRONG
