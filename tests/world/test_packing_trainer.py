"""Trainers on packed rows: the trajectories of padded ones, whatever the split into groups and shards.

Tolerances are those of [`assert_same_trajectory`]: sums over some hundred tokens in another order, four steps long.
"""

from __future__ import annotations

import tempfile

import datasets
import pytest
import torch

from hf_longctx import LongContextConfig, LongContextTrainer, PackingCollator

from ..models import build
from ..training import Rows, Stream, arguments, assert_same_trajectory, reset_state, steps, train
from .test_sft import dataset_of, fit


FLAT = {"data_collator": PackingCollator()}
BUDGET = {"data_collator": PackingCollator(max_tokens=48)}


def run_here(size, options):
    return train(size, **options)


# Same rows, same steps: flattened instead of padded


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("attention", ["packed", "ulysses"])
def test_flattened_batches_train_like_padded_ones(name, attention):
    expected = train(0, model=name)
    actual = train(1, model=name, attention=attention, trainer_options=FLAT)
    assert_same_trajectory(actual, expected)
    assert abs(steps(actual[0])[-1][0] - steps(expected[0])[-1][0]) < 1e-4


@pytest.mark.parametrize(("world_size", "size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_flattened_batches_train_like_padded_ones_on_several_ranks(worlds, world_size, size):
    options = {"gradient_accumulation_steps": 2}
    expected = train(0, per_device_train_batch_size=2 * world_size // size, **options)
    options |= {"trainer_options": FLAT, "attention": "packed" if size == 1 else "ulysses"}
    for actual in worlds(world_size).run(run_here, size, options):
        assert_same_trajectory(actual, expected)


def test_dropout_free_encoder_trains_on_packed_rows():
    """BERT's stock loss averages over the tokens it sees; one batch a step makes that the padded run's mean."""
    collator = {"data_collator": PackingCollator(mask_first_label=False)}
    expected = train(0, model="bert", learning_rate=0.1)
    assert_same_trajectory(train(1, model="bert", learning_rate=0.1, trainer_options=collator), expected)


def test_decoder_that_numbers_its_tokens_itself_trains_on_packed_rows():
    """BART: its documents are numbered anew, and its own mean is that of the one batch a step."""
    collator = {"data_collator": PackingCollator(mask_first_label=False)}
    assert_same_trajectory(train(1, model="bart", trainer_options=collator), train(0, model="bart"))


# A token budget: rows are built, assigned and counted


@pytest.mark.parametrize("kind", ["rows", "stream", "split stream"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 1), (2, 2), (4, 2)])
def test_budget_rows_do_not_depend_on_the_split(worlds, kind, world_size, size):
    groups = world_size // size
    if kind == "split stream" and groups == 1:
        pytest.skip("one group reads everything")
    data = {"rows": Rows(40), "stream": Stream(Rows(40)), "split stream": hub_stream(1)}[kind]
    expected = train(1, rows=data, trainer_options=BUDGET, per_device_train_batch_size=groups)
    assert len(steps(expected[0])) == 4
    options = {"rows": data, "trainer_options": BUDGET, "per_device_train_batch_size": 1}
    options["attention"] = "packed" if size == 1 else "ulysses"
    for actual in worlds(world_size).run(run_here, size, options):
        assert_same_trajectory(actual, expected)


def hub_stream(shards: int):
    return datasets.Dataset.from_list(Rows(40).rows).to_iterable_dataset(num_shards=shards)


def rows_of_first_pass(shards: int):
    """The packed rows of a group, as the trainer's loader gives them, until the first one comes again."""
    reset_state()
    trainer = LongContextTrainer(
        model=build("llama", "packed"),
        args=arguments(tempfile.mkdtemp(), per_device_train_batch_size=1),
        train_dataset=hub_stream(shards),
        **BUDGET,
    )
    rows = []
    for batch in trainer.get_train_dataloader():
        if rows and batch["input_ids"].tolist() == rows[0]:
            return rows
        rows.append(batch["input_ids"].tolist())


def test_stream_with_shards_is_dealt_before_it_is_packed(world2):
    mine, other = world2.run(rows_of_first_pass, 2)
    half = 20
    documents = [row["input_ids"] for row in Rows(40).rows]
    for rows, wanted in ((mine, documents[:half]), (other, documents[half:])):
        tokens = sorted(token for row in rows for token in row[0])
        assert tokens == sorted(token for document in wanted for token in document)


@pytest.mark.parametrize("collator", [PackingCollator(), PackingCollator(max_tokens=48)])
@pytest.mark.parametrize("attention", ["packed", "ulysses"])
@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_only_the_collator_reads_are_not_removed(attention, collator, stream):
    """Transformers drops what the model does not take: masks of trained tokens and the documents inside a row."""
    marked, labelled = [], []
    for index in range(16):
        ids = list(range(5 + index, 15 + index))
        marked.append({"input_ids": ids, "completion_mask": [0] * 6 + [1] * 4, "seq_lengths": [7, 3]})
        labels = [-100] * 6 + ids[6:7] + [-100] + ids[8:]  # the second document's first token is not predicted
        labelled.append({"input_ids": ids, "labels": labels, "seq_lengths": [7, 3], "domain": "tales"})
    options = {"attention": attention, "trainer_options": {"data_collator": collator}}

    def run(rows, **changes):
        dataset = datasets.Dataset.from_list(rows)
        return train(1, rows=dataset.to_iterable_dataset() if stream else dataset, **options, **changes)

    expected = run(labelled)
    assert_same_trajectory(run(marked, remove_unused_columns=True), expected)
    assert_same_trajectory(run(labelled, remove_unused_columns=True), expected)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_an_epoch_trains_every_document_once(attention):
    rows = Rows(40)
    _, _, extra = train(
        1, rows=rows, attention=attention, trainer_options=BUDGET, max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=1, include_num_input_tokens_seen="all",
    )  # fmt: skip
    total = sum(len(row["input_ids"]) for row in rows.rows)
    assert extra["state"]["num_input_tokens_seen"] == total
    assert extra["state"]["global_step"] == len(PackingCollator(max_tokens=48).pack(rows))


def test_evaluation_counts_every_token_once(world2):
    evaluation = {"eval_dataset": Rows(7)}
    expected = train(0, trainer_options=evaluation, after="evaluate", per_device_eval_batch_size=1)
    stock_loss = mean_over_tokens(expected[1], Rows(7))
    options = {"trainer_options": {**evaluation, **BUDGET}, "after": "evaluate", "learning_rate": 0.0}
    for size in (1, 2):
        results = world2.run(run_here, size, {**options, "attention": "packed" if size == 1 else "ulysses"})
        for _, weights, extra in results:
            wanted = mean_over_tokens(weights, Rows(7))
            assert extra["after"]["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert stock_loss != pytest.approx(wanted, rel=1e-3), "the weights do not matter"


def mean_over_tokens(weights, rows) -> float:
    model = build("llama", "sdpa").eval()
    model.load_state_dict(weights, strict=False)
    total = count = 0
    with torch.no_grad():
        for row in rows.rows:
            labels = torch.tensor([row["labels"]])
            valid = int((labels[:, 1:] != -100).sum())
            if valid:
                total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * valid
                count += valid
    return total / count


def test_resumed_run_draws_the_same_rows():
    folder = tempfile.mkdtemp()
    options = {"rows": Rows(40), "trainer_options": BUDGET, "attention": "packed", "per_device_train_batch_size": 2}
    whole = train(1, **options, max_steps=8)
    train(1, **options, max_steps=8, output_dir=folder, save_strategy="steps", save_steps=3)
    resumed = train(1, **options, max_steps=8, resume=f"{folder}/checkpoint-6")
    assert steps(resumed[0]) == steps(whole[0])
    for name, weight in whole[1].items():
        assert torch.equal(resumed[1][name], weight), name


def test_rows_of_one_step_cost_the_same():
    """With two groups, the two rows of every step are neighbours in cost; a plain shuffle's are not."""
    reset_state()
    generator = torch.Generator().manual_seed(0)
    lengths = [2000] * 40 + [40] * 2000
    rows = Rows(0)
    rows.rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in lengths]
    trainer = LongContextTrainer(
        model=build("llama", "packed"),
        args=arguments(tempfile.mkdtemp(), per_device_train_batch_size=2),
        train_dataset=rows,
        data_collator=PackingCollator(max_tokens=2000),
    )
    loader = trainer.get_train_dataloader()
    costs = loader.dataset.packing.costs(12 * 48)

    def spread(batches) -> float:
        """By how much a step takes longer than its mean row, on average."""
        return sum(costs[list(batch)].max() / costs[list(batch)].mean() for batch in batches) / len(costs) * 2 - 1

    shuffled = torch.randperm(len(costs), generator=generator)
    assert spread(shuffled[: len(costs) // 2 * 2].view(-1, 2).tolist()) > 0.2
    assert spread(list(loader.batch_sampler)) < 0.05


def test_sorting_by_length_beside_a_budget_is_refused():
    with pytest.raises(ValueError, match="'group_by_length'.*use 'random'"):
        train(1, rows=Rows(40), trainer_options=BUDGET, train_sampling_strategy="group_by_length")


# Documents that see each other are refused before the first step


@pytest.mark.parametrize("collator", [PackingCollator(), PackingCollator(max_tokens=48)])
@pytest.mark.parametrize("name", ["bert", "gpt_oss"])
def test_stock_kernel_that_leaks_is_refused_by_name(name, collator):
    with pytest.raises(NotImplementedError, match="cannot train on this packed batch.*attn_implementation='packed'"):
        train(1, model=name, attention="eager", trainer_options={"data_collator": collator})


def train_leaky(size: int, check: bool):
    """Train a model with a layer that mixes a rank's tokens, as a foreign layer would."""
    model = build("llama", "packed" if size == 1 else "ulysses")

    def mix(module, inputs, output):
        rolled = torch.zeros_like(output)
        rolled[:, 1:] = output[:, :-1]
        return output + 0.1 * rolled

    model.model.layers[0].register_forward_hook(mix)
    reset_state()
    trainer = LongContextTrainer(
        model=model,
        args=arguments(tempfile.mkdtemp(), max_steps=1),
        train_dataset=Rows(40),
        long_context=LongContextConfig(sequence_parallel_size=size, check_packing=check),
        **FLAT,
    )
    try:
        trainer.train()
    except NotImplementedError as error:
        return str(error)


def test_layer_that_mixes_documents_is_refused_unless_told_not_to_look():
    assert "outputs of others moved by" in train_leaky(1, True)
    assert train_leaky(1, False) is None


def test_check_runs_once(monkeypatch):
    from hf_longctx.trainer import packed_rows

    calls = []
    original = packed_rows.assert_no_cross_document
    monkeypatch.setattr(packed_rows, "assert_no_cross_document", lambda *a, **k: calls.append(1) or original(*a, **k))
    train(1, attention="packed", trainer_options=FLAT)
    train(1, attention="packed")  # padded rows: nothing to check
    assert calls == [1]


def test_label_of_a_first_token_in_a_causal_run_is_refused():
    with pytest.raises(ValueError, match="`mask_first_label` .* last token of the document before"):
        train(1, attention="packed", trainer_options={"data_collator": PackingCollator(mask_first_label=False)})


# TRL


@pytest.mark.parametrize(
    "choice", [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}]
)
def test_sft_on_one_process_with_packed_attention(choice):
    assert_same_trajectory(fit(1, **choice, attention="packed"), fit(0, **choice), 2e-5)


@pytest.mark.parametrize(("kind", "choice"), [("completion", {}), ("chat", {"assistant_only_loss": True})])
def test_sft_with_the_collator_keeps_completion_masks(world2, kind, choice):
    """Same rows padded by TRL and flattened by us."""
    expected = fit(0, kind=kind, **choice)
    flat = {"kind": kind, "collator": PackingCollator(), **choice}
    assert_same_trajectory(fit(1, attention="packed", **flat), expected, 2e-5)
    for actual in world2.run(run_sft, 2, {**flat}):
        assert_same_trajectory(actual, expected, 2e-5)


def run_sft(size, options):
    return fit(size, **options)


def test_sft_with_a_budget_trains_every_completion_token():
    """One epoch of packed rows in one step has the loss of one padded batch of all rows."""
    data = dataset_of("completion")
    options = {"kind": "completion", "max_steps": 4, "learning_rate": 0.05}
    expected = fit(0, per_device_train_batch_size=len(data), **options)
    collator = PackingCollator(max_tokens=64)
    actual = fit(1, attention="packed", collator=collator, per_device_train_batch_size=len(data), **options)
    assert_same_trajectory(actual, expected, 2e-5)
