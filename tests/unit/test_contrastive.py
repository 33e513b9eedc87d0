"""The tiled contrastive loss equals sentence-transformers' own, without its matrices, and under its wrappers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx.losses.contrastive import contrastive_loss
from hf_longctx.losses.contrastive_rules import ContrastiveRule, Duplicates
from hf_longctx.losses.contrastive_tiles import RowTiles
from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.planner.simulate import enable_checkpointing


pytest.importorskip("sentence_transformers")
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as st

from hf_longctx.embedding.text_hashes import text_hashes
from hf_longctx.embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss, bind_losses, check_losses

from ..embedders import WIDTH, batch, flat, padded, random_texts, tiny_embedder


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = ("query_to_doc", "doc_to_query")
RULES = [
    {},
    {"directions": SYMMETRIC, "partition_mode": "per_direction"},
    {"directions": SYMMETRIC},
    {"directions": ALL},
    {"directions": ("query_to_doc", "doc_to_doc"), "hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
]


def embeddings(rows: int, columns: int, dtype=torch.float64, width: int = 7, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(columns)]
    return [x.to(dtype).requires_grad_() for x in made]


def stock_loss(columns, similarity=util.cos_sim, scale=20.0, **rule) -> torch.Tensor:
    loss = st.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=scale, similarity_fct=similarity, **rule)
    return loss.compute_loss_from_embeddings(columns, None)


def assert_same(actual, expected, tolerance: float) -> None:
    """Every tensor, relative to the largest entry of its expectation."""
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max().clamp_min(1e-3)


# The numbers


@pytest.mark.parametrize("rows", [1, 63, 130])
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())) or "default")
def test_loss_and_gradients_equal_the_host(rule, columns, rows):
    for similarity, scale in ((util.cos_sim, 20.0), (util.dot_score, 1.0)):
        ours = embeddings(rows, columns)
        theirs = [x.detach().clone().requires_grad_() for x in ours]
        expected = stock_loss(theirs, similarity, scale, **rule)
        actual = contrastive_loss(
            ours, scale=scale, rule=ContrastiveRule(**rule), normalize=similarity is util.cos_sim, tile_size=32
        )
        # fp64: sums in another order.
        assert_same([actual], [expected], 1e-12)
        (0.3 * actual).backward()
        (0.3 * expected).backward()
        # A single pair without negatives has no gradient but rounding: hence the absolute floor of `assert_same`.
        assert_same([x.grad for x in ours], [x.grad for x in theirs], 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_lower_precision_is_summed_in_fp32(dtype, tolerance):
    """Against fp64 of the same numbers: what is left is fp32, and for bfloat16 the rounding of the gradient itself."""
    ours = embeddings(130, 3, dtype, width=32)
    exact = [x.detach().double().requires_grad_() for x in ours]
    actual, expected = contrastive_loss(ours, tile_size=32), stock_loss(exact)
    assert actual.dtype == torch.float32
    assert_same([actual.double()], [expected], 2e-6)
    actual.backward()
    expected.backward()
    assert all(x.grad.dtype == dtype for x in ours)
    assert_same([x.grad.double() for x in ours], [x.grad for x in exact], tolerance)


def test_a_scale_of_any_size_neither_overflows_nor_vanishes():
    """Every negative beats the positive by two, at a scale at which `exp` overflows fp32."""
    query = torch.tensor([[1.0, 0.0]] * 40)
    columns = [query.requires_grad_(), torch.tensor([[-1.0, 0.0]] + [[1.0, 0.1 + i] for i in range(39)])]
    exact = [x.detach().double() for x in columns]
    actual = contrastive_loss(columns, scale=1000.0, tile_size=16)
    assert_same([actual.double()], [stock_loss(exact, scale=1000.0)], 1e-6)
    actual.backward()
    assert columns[0].grad.isfinite().all()


def test_a_gradient_reaches_only_what_asks_for_it():
    for learned in ([True, False, False], [False, True, True], [False, False, True]):
        columns = [x.detach().requires_grad_(need) for x, need in zip(embeddings(40, 3), learned)]
        theirs = [x.detach().clone().requires_grad_(need) for x, need in zip(columns, learned)]
        contrastive_loss(columns, rule=ContrastiveRule(directions=ALL), tile_size=16).backward()
        stock_loss(theirs, directions=ALL).backward()
        assert [x.grad is not None for x in columns] == learned
        assert_same([x.grad for x in columns if x.requires_grad], [x.grad for x in theirs if x.requires_grad], 1e-11)


def test_zero_embeddings_have_the_gradient_of_the_host():
    columns = embeddings(5, 2)
    with torch.no_grad():
        columns[0][2] = 0
    theirs = [x.detach().clone().requires_grad_() for x in columns]
    contrastive_loss(columns).backward()
    stock_loss(theirs).backward()
    assert_same([x.grad for x in columns], [x.grad for x in theirs], 1e-11)


@pytest.mark.parametrize("rule", [RULES[1], RULES[6]], ids=["per_direction", "all"])
def test_the_gradient_of_the_scale(rule):
    """Against differences of sentence-transformers' loss: its own gradient is NaN where it multiplies `-inf` by the
    scale."""
    columns, scale, step = embeddings(63, 3), torch.tensor(5.0, dtype=torch.float64, requires_grad=True), 1e-4
    contrastive_loss(columns, scale=scale, rule=ContrastiveRule(**rule), tile_size=16).backward()
    above, below = (stock_loss(columns, scale=5.0 + sign * step, **rule).detach() for sign in (1, -1))
    assert_same([scale.grad], [(above - below) / (2 * step)], 1e-7)  # the error of a central difference is O(step^2)


def test_block_by_block_equals_at_once():
    """What `negatives="ring"` does, without other ranks: sums first, then gradients with scores computed again."""
    from hf_longctx.losses.contrastive_tiles import Block

    columns = [torch.nn.functional.normalize(x.detach()) for x in embeddings(50, 3)]
    results = []
    for cuts in ([0, 50], [0, 17, 18, 50]):
        gradients = [torch.zeros_like(x) for x in columns]
        softmaxes = ContrastiveRule(**RULES[6]).softmaxes(3)
        tiles = RowTiles(
            columns[:2], gradients[:2], 0, softmaxes, scale=20.0, tile_size=16, duplicates=None, with_scale=True
        )
        blocks = [
            Block(a, [x[a:b] for x in columns], [g[a:b] for g in gradients]) for a, b in zip(cuts[:-1], cuts[1:])
        ]
        if len(blocks) == 1:
            tiles.strip_pass(blocks[0])
        else:
            for block in blocks:
                tiles.sum_pass(block)
            for block in blocks:
                tiles.gradient_pass(block)
        scale_gradient = tiles.finish(Block(0, columns, gradients), 1.0)
        results.append([tiles.total(), scale_gradient, *gradients])
    assert_same(results[1], results[0], 1e-12)


# Memory


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation made, in entries."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("rule", [{}, RULES[6]], ids=["default", "all"])
@pytest.mark.parametrize("repeats", [False, True])
def test_no_tensor_grows_with_the_square_of_the_rows(rule, repeats):
    largest = {}
    for rows in (128, 512):
        columns = embeddings(rows, 3, torch.float32)
        hashes = [torch.arange(rows) // (2 if repeats else 1) + 10_000 * i for i in range(3)]
        with Recorder() as seen:
            contrastive_loss(columns, rule=ContrastiveRule(**rule), hashes=hashes, tile_size=16).backward()
        largest[rows] = seen.largest
    assert largest[512] == 4 * largest[128]
    # Sixteen rows of scores: of two columns of documents, or of these, queries, queries and documents.
    assert largest[512] == 16 * 512 * (2 if not rule else 6)


def test_without_a_gradient_one_tile_is_enough():
    columns = [x.detach() for x in embeddings(1024, 2, torch.float32, width=1)]
    with Recorder() as seen:
        contrastive_loss(columns, tile_size=16)
    assert seen.largest == 1024


# Duplicates


def masked_by_the_rule(hashes: list[torch.Tensor], row: int, column: int, candidate: int) -> bool:
    """The rule of `Duplicates`, a candidate at a time."""
    query, positive = hashes[0], hashes[1]
    if column > 1:
        return bool(hashes[column][candidate] == positive[row])
    if row == candidate:
        return False
    return bool(query[row] == query[candidate] or positive[row] == positive[candidate])


def loss_without_duplicates(columns, hashes, rule: ContrastiveRule, scale: float) -> torch.Tensor:
    """The slow reference: every logit of every row on its own."""
    unit = [torch.nn.functional.normalize(x) for x in columns]
    rows, losses = len(unit[0]), []
    for i in range(rows):
        logs = []
        for interactions in rule.softmaxes(len(columns)):
            logits = []
            for it in interactions:
                for j in range(rows):
                    hardness = it.own if i == j else it.others
                    if hardness is None or masked_by_the_rule(hashes, i, it.column, j):
                        continue
                    score = unit[it.row][i] @ unit[it.column][j]
                    logits.append(scale * score + hardness * score.detach())
            logs.append(torch.stack(logits).logsumexp(0))
        losses.append(sum(logs) / len(logs) - scale * (unit[0][i] @ unit[1][i]))
    return sum(losses) / rows


@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[6]], ids=["default", "per_direction", "all"])
def test_duplicates_are_left_out_by_the_rule(rule):
    rule, rows = ContrastiveRule(**rule), 14
    generator = torch.Generator().manual_seed(3)
    hashes = [torch.randint(0, 9, (rows,), generator=generator) for _ in range(3)]
    hashes[0] += 100
    hashes[2][4] = hashes[1][4]  # an own hard negative that is the positive
    ours = embeddings(rows, 3)
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    actual = contrastive_loss(ours, rule=rule, hashes=hashes, tile_size=4)
    expected = loss_without_duplicates(theirs, hashes, rule, 20.0)
    assert_same([actual], [expected], 1e-12)
    assert abs(actual - contrastive_loss(ours, rule=rule)) > 1e-3  # the rule did something
    actual.backward()
    expected.backward()
    assert_same([x.grad for x in ours], [x.grad for x in theirs], 1e-11)


def test_tiles_without_duplicates_are_not_compared():
    hashes = torch.arange(300).view(3, 100).clone()
    hashes[0, 3] = hashes[0, 80]
    found = Duplicates(hashes)
    assert found.mask(0, slice(0, 10), slice(0, 100)) is not None
    assert found.mask(0, slice(10, 20), slice(0, 100)) is None
    assert found.mask(1, slice(0, 10), slice(20, 40)) is None
    assert found.mask(2, slice(0, 100), slice(0, 100)) is None


def test_only_positives_that_are_all_the_same_text_leave_nothing_to_learn():
    columns = embeddings(6, 2)
    loss = contrastive_loss(columns, hashes=[torch.arange(6), torch.zeros(6, dtype=torch.long)])
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in columns)


# Digests


def test_digests_of_a_text_are_the_same_padded_and_flat():
    texts = random_texts(40, seed=1) + [[5], [5, 6], [6, 5], [5, 5], [5, 6]]
    hashes = text_hashes(padded(texts))
    assert torch.equal(hashes, text_hashes(padded(texts, "left")))
    assert torch.equal(hashes, text_hashes(flat(texts)))
    assert not torch.equal(hashes, text_hashes({"input_ids": padded(texts)["input_ids"]}))
    different = {tuple(text) for text in texts}
    assert len(hashes.unique()) == len(different) < len(texts)
    assert hashes[-1] == hashes[-4] and hashes[-3] != hashes[-4]


def test_digests_of_a_collator_win():
    given = torch.tensor([3, 3])
    assert text_hashes({"text_hashes": given, "pixel_values": torch.zeros(2, 4)}) is given


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3)}, r"this batch has `pixel_values`: set `mask_duplicates=False`"),
        ({"attention_mask": torch.ones(2, 3)[:0].long()}, r"this batch has no `input_ids`"),
        (
            {"input_ids": torch.zeros(1, 4).long(), "cu_seq_lens_q": torch.tensor([0, 3, 8])},
            r"`cu_seq_lens_q` ends at 8 and `input_ids` has 4 tokens",
        ),
    ],
)
def test_batches_whose_texts_cannot_be_told_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        text_hashes(features)


# The module on a model


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return tiny_embedder(tmp_path_factory.mktemp("embedder"), dropout=0.2)


def step(loss: torch.nn.Module, model, features, divide: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one step with the random numbers of one seed."""
    model.zero_grad()
    torch.manual_seed(11)
    value = loss(copy.deepcopy(features), None)
    (value / divide).backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_without_mini_batches_it_is_the_host_with_its_dropout(embedder):
    features = batch(13, columns=3)
    ours = TiledMultipleNegativesRankingLoss(embedder, mini_batch_size=None, loss_tile_size=8)
    actual, expected = (step(x, embedder, features) for x in (ours, st.MultipleNegativesRankingLoss(embedder)))
    assert_same([actual[0]], [expected[0]], 1e-6)
    assert_same(actual[1], expected[1], 1e-5)  # fp32, and gradients of biases that cancel


@pytest.mark.parametrize("width", [{"mini_batch_size": 5}, {"mini_batch_num_tokens": 40, "mini_batch_size": None}])
def test_gradient_cache_is_the_host_with_its_dropout(embedder, width):
    features = batch(13, columns=3)
    ours = TiledMultipleNegativesRankingLoss(embedder, directions=ALL, loss_tile_size=8, **width)
    stock = st.CachedMultipleNegativesRankingLoss(embedder, directions=ALL, **width | {"mini_batch_size": 5})
    actual, expected = (step(x, embedder, features, divide=3.0) for x in (ours, stock))
    assert_same([actual[0]], [expected[0]], 1e-6)
    assert_same(actual[1], expected[1], 1e-5)
    with torch.no_grad():
        torch.manual_seed(11)
        assert_same([ours(features, None)], [expected[0]], 1e-6)


def test_gradient_cache_equals_direct(embedder):
    """Without dropout the two see the same embeddings, so only the order of sums differs."""
    features, model = batch(13), embedder.eval()
    try:
        results = [
            step(TiledMultipleNegativesRankingLoss(model, mini_batch_size=size, learnable_scale=True), model, features)
            for size in (None, 4)
        ]
    finally:
        embedder.train()
    assert_same([results[1][0], *results[1][1]], [results[0][0], *results[0][1]], 1e-5)


@pytest.mark.parametrize("size", [None, 4])
def test_matryoshka_and_a_learned_scale(embedder, size):
    """Every width has its weight, in the model and in the temperature, and the upstream gradient reaches both."""
    features, model = batch(9), embedder.eval()
    try:
        ours = TiledMultipleNegativesRankingLoss(model, scale=7.0, mini_batch_size=size, learnable_scale=True)
        wrapped = st.MatryoshkaLoss(model, ours, [WIDTH, 8], [1.0, 0.25])
        stock = st.MatryoshkaLoss(model, st.MultipleNegativesRankingLoss(model, scale=7.0), [WIDTH, 8], [1.0, 0.25])
        actual, expected = (step(x, model, features, divide=2.0) for x in (wrapped, stock))
        columns = [model(dict(column))["sentence_embedding"].detach() for column in features]
    finally:
        embedder.train()
    assert_same([actual[0], *actual[1]], [expected[0], *expected[1]], 1e-5)
    log_scale = torch.tensor(math.log(7.0), requires_grad=True)
    reference = sum(
        w * stock_loss([x[:, :d] for x in columns], scale=log_scale.exp()) for d, w in ((WIDTH, 1), (8, 0.25))
    )
    (reference / 2).backward()
    assert_same([ours.log_scale.grad], [log_scale.grad], 1e-5)


def test_the_scale_is_one_number_wherever_it_is_kept(embedder):
    loss = TiledMultipleNegativesRankingLoss(embedder, scale=20.0, learnable_scale=True)
    assert [name for name, _ in loss.named_parameters() if not name.startswith(("model", "loss"))] == ["log_scale"]
    assert loss.scale == pytest.approx(20.0)
    loss.scale = 50.0
    assert loss.scale == pytest.approx(50.0) and loss.temperature == pytest.approx(0.02)
    fixed = TiledMultipleNegativesRankingLoss(embedder)
    fixed.scale = 3.0
    assert fixed.scale == 3.0 == fixed.get_config_dict()["scale"]
    # A number given for one call, as `calculate_loss` takes it, is no parameter, though the loss has one.
    given = [[torch.randn(4, WIDTH, requires_grad=True)] for _ in range(2)]
    mine, its = (x.calculate_loss(given, with_backward=True, scale=3.0) for x in (loss, fixed))
    assert torch.equal(mine, its) and loss.log_scale.grad is None


def test_duplicate_texts_of_a_batch_are_no_negatives(embedder):
    features, model = batch(9), embedder.eval()
    features[1]["input_ids"][5], features[1]["attention_mask"][5] = (features[1][k][2] for k in features[1])
    try:
        masked = TiledMultipleNegativesRankingLoss(model)(features, None)
        kept = TiledMultipleNegativesRankingLoss(model, mask_duplicates=False)(features, None)
        expected = st.MultipleNegativesRankingLoss(model)(features, None)
    finally:
        embedder.train()
    assert_same([kept], [expected], 1e-6)
    assert masked < kept - 0.01


def test_gradient_checkpointing_changes_nothing(tmp_path):
    features, results = batch(9), []
    for checkpointing in (False, True):
        model = tiny_embedder(tmp_path, dropout=0.2)
        if checkpointing:
            enable_checkpointing(model[0].auto_model, {"use_reentrant": False})
        results.append(step(TiledMultipleNegativesRankingLoss(model, mini_batch_size=4), model, features))
    assert_same([results[1][0], *results[1][1]], [results[0][0], *results[0][1]], 1e-5)


def test_model_cards_can_describe_it(embedder):
    loss = TiledMultipleNegativesRankingLoss(embedder, negatives="ring", learnable_scale=True)
    settings = loss.get_config_dict()
    assert settings["similarity_fct"] == "cos_sim" and settings["mini_batch_size"] == 32
    assert (settings["negatives"], settings["loss_tile_size"], settings["learnable_scale"]) == ("ring", 1024, True)
    assert all(key in loss.citation for key in ("oord2019", "gao2021scaling", "cheng2024breaking"))
    assert "gao2021" not in TiledMultipleNegativesRankingLoss(embedder, mini_batch_size=None).citation


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_tile_size": 0}, ValueError, r"`loss_tile_size` \(0\) must be a positive integer"),
        ({"negatives": "all"}, ValueError, r"`negatives` \('all'\) must be 'gather' or 'ring'"),
        ({"similarity_fct": util.manhattan_sim}, NotImplementedError, r"`similarity_fct` \(manhattan_sim\) must be"),
    ],
)
def test_bad_arguments_are_named(embedder, arguments, error, message):
    with pytest.raises(error, match=message):
        TiledMultipleNegativesRankingLoss(embedder, **arguments)


def test_columns_that_do_not_fit_are_named():
    columns = embeddings(6, 3)
    with pytest.raises(ValueError, match=r"got 1 column\(s\), but it compares at least 2"):
        contrastive_loss(columns[:1])
    with pytest.raises(ValueError, match=r"column 2 has 4 rows, but column 0 has 6"):
        contrastive_loss([*columns[:2], columns[2][:4]])
    with pytest.raises(ValueError, match="got no rows"):
        contrastive_loss([x[:0] for x in columns])


@pytest.mark.parametrize("size", [None, 4])
def test_embeddings_that_are_not_finite_are_named_before_the_gradient(embedder, size, monkeypatch):
    forward = embedder[1].forward

    def broken(features, **kwargs):
        features = forward(features, **kwargs)
        features["sentence_embedding"] = features["sentence_embedding"].masked_fill(
            (features["input_ids"] == 3).any(1, keepdim=True), torch.nan
        )
        return features

    monkeypatch.setattr(embedder[1], "forward", broken)
    features = batch(9)
    features[1]["input_ids"][6, 0] = 3
    with pytest.raises(ValueError, match=r"column 1 \(positives\) are not finite in 1 row\(s\), the first is row 6"):
        TiledMultipleNegativesRankingLoss(embedder, mini_batch_size=size)(features, None)


def test_a_second_backward_is_refused():
    columns = embeddings(6, 2)
    loss = contrastive_loss(columns)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        loss.backward()


def test_losses_are_bound_and_checked_inside_of_wrappers(embedder):
    ours = TiledMultipleNegativesRankingLoss(embedder, mini_batch_size=None)
    wrapped = {"a": st.MatryoshkaLoss(embedder, ours, [WIDTH]), "b": st.CoSENTLoss(embedder)}
    mesh = SequenceMesh(1, 2, 0, 0)
    bind_losses(wrapped, mesh)
    assert ours.mesh is mesh
    check_losses(wrapped, mesh)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        theirs = getattr(st, name)(embedder, gather_across_devices=True)
        check_losses(theirs, SequenceMesh(2, 1, 0, 0))
        with pytest.raises(ValueError, match=rf"`{name}\(gather_across_devices=True\)` gathers from all 2 processes"):
            check_losses({**wrapped, "c": st.MatryoshkaLoss(embedder, theirs, [WIDTH])}, mesh)
