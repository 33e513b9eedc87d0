"""Preference losses on shared rows equal TRL's in one process: numbers, every gradient, runs and what they log."""

from __future__ import annotations

import pytest


pytest.importorskip("trl")

from ..preference import all_scored_by_ranks, average, scored, trainer_of, worst


CASES = {
    "odd": {"lengths": [17, 11, 6]},
    "left": {"lengths": [17, 11, 6], "padding": "left"},
    "short": {"lengths": [3, 2]},
    "one rank": {"lengths": [24, 24]},
    "windows": {"lengths": [19, 13], "model": "mistral"},
    "table": {"lengths": [13, 9], "model": "gpt2", "padding": "left"},
    "experts": {"lengths": [13, 9], "model": "gpt_oss", "attention": "eager", "router": True},
}


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    """By case, the numbers of one process for the rows of two groups."""
    return {name: [scored({**case, "group": group}) for group in range(2)] for name, case in CASES.items()}


@pytest.mark.parametrize("flatten", [False, True], ids=["padded", "flattened"])
@pytest.mark.parametrize("size", [2, 4])
def test_numbers_and_gradients_of_whole_rows(world4, alone, size, flatten):
    cases = [{**case, "flatten": flatten} for case in CASES.values()]
    for rank, results in enumerate(world4.run(all_scored_by_ranks, cases, size)):
        for name, (numbers, ours) in zip(CASES, results, strict=True):
            groups = alone[name][: world4.size // size]
            gradients = {key: sum(g[key] for _, g in groups) / len(groups) for key in groups[0][1]}
            # The model is float64; TRL computes its head, and transformers its softmax, in float32.
            assert worst(numbers, groups[rank // size][0]) <= 1e-6, name
            assert worst(ours, gradients) <= 1e-6, name


LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
SETTINGS = [
    *({"loss_type": [loss], "label_smoothing": 0.1 if loss in ("exo_pair", "robust") else 0.0} for loss in LOSSES),
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "weights": (0.8, 0.2, 1.0)},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    *({"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
]


def test_every_loss_of_dpo(world4):
    """Losses to 1e-6, gradients to 5.5e-6, on 4 ranks and on 2 groups of 2."""
    expected = losses_of(0, SETTINGS)
    for size in (4, 2):
        for results in world4.run(losses_of, size, SETTINGS):
            assert_same_losses(results, expected, SETTINGS, 5.5e-6)
    # The gradient of discopop cancels, so it moves where attention adds up keys in another order: by as much as
    # between transformers' own two kernels, which is twice the others' bound.
    cancels = SETTINGS.index({"loss_type": ["discopop"], "label_smoothing": 0.0})
    ((_, moved),) = losses_of(0, [SETTINGS[cancels]], {"attention": "eager"})
    noise = worst(moved, expected[cancels][1])
    assert 5.5e-6 < noise < 2e-5
    for results in world4.run(losses_of, 2, SETTINGS, {"flatten": True}):
        rest = [[*part[:cancels], *part[cancels + 1 :]] for part in (results, expected, SETTINGS)]
        assert_same_losses(*rest, 5.5e-6)
        assert_same_losses(results[cancels:][:1], expected[cancels:][:1], SETTINGS[cancels:][:1], noise)


@pytest.mark.parametrize("task", ["kto", "margin"])
def test_losses_of_kto_and_rewards(world4, task):
    kinds = [{"loss_type": kind} for kind in ("kto", "apo_zero_unpaired")]
    settings = kinds if task == "kto" else [{}, {"center_rewards_coefficient": 0.1}]
    expected = losses_of(0, settings, {"task": task})
    for size in (4, 2):
        for results in world4.run(losses_of, size, settings, {"task": task}):
            assert_same_losses(results, expected, settings, 5.5e-6)


def assert_same_losses(results: list, expected: list, settings: list[dict], tolerance: float) -> None:
    for setting, (loss, ours), (value, theirs) in zip(settings, results, expected, strict=True):
        assert abs(loss - value) <= 1e-6 * max(1.0, abs(value)), setting
        assert worst(ours, theirs) <= tolerance, setting


def losses_of(size: int, settings: list[dict], options: dict | None = None) -> list[tuple[float, dict]]:
    """The loss and the gradients of one batch, for each of these settings of one trainer."""
    options = {"use_weighting": True} | (options or {}) if "task" not in (options or {}) else options
    trainer, results = trainer_of(size, **options), []
    columns = [name for name in trainer.train_dataset.column_names if name.endswith("_ids") or name in KEPT]
    batch = trainer.data_collator([{name: trainer.train_dataset[i][name] for name in columns} for i in range(4)])
    for setting in settings:
        for name, value in {**DEFAULTS, **setting}.items():
            setattr(trainer, "loss_types" if isinstance(value, list) else name, value)
        if hasattr(trainer, "loss_types"):
            trainer.loss_weights = setting.get("weights") or [1.0] * len(trainer.loss_types)
        trainer.args.center_rewards_coefficient = setting.get("center_rewards_coefficient")
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, {**batch})
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        if size:
            average(gradients)
        results.append((float(loss), gradients))
    return results


KEPT = ("label", "margin")
DEFAULTS = {
    "loss_type": ["sigmoid"],
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "use_weighting": False,
    "f_divergence_type": "reverse_kl",
}
