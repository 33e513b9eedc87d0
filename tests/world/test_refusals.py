"""Refusals that need real ranks: sanity checks, disagreeing rows, world sizes."""

from __future__ import annotations

import dataclasses
import tempfile

import pytest
import torch
import transformers
from transformers import AttentionInterface

from hf_longctx import SequenceMesh, shard_batch
from hf_longctx.proof.ranks import RanksError

from ..models import _BASE, VOCAB, build, config_of
from ..training import Rows, pad_right, train


def build_mesh(size):
    SequenceMesh.build(size)


def test_world_size_must_be_divisible(world4):
    with pytest.raises(RanksError, match=r"\(3\) must divide the number of processes \(4\): start 3 processes"):
        world4.run(build_mesh, 3)


def other_rows_on_each_rank():
    mesh = SequenceMesh.build(2)
    ids = torch.full((1, 8), 7 + mesh.sequence_parallel_rank)
    shard_batch({"input_ids": ids}, mesh)


def test_ranks_that_drew_different_rows_are_told(world2):
    with pytest.raises(RanksError, match="drew different rows.*data_parallel_rank"):
        world2.run(other_rows_on_each_rank)


class RankRows(Rows):
    """A data set that wrongly depends on the process."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        shift = torch.distributed.get_rank()
        return {**row, "input_ids": [3 + (i + shift) % 90 for i in row["input_ids"]]}


def train_on_rank_rows():
    train(2, rows=RankRows())


def test_the_trainer_notices_rows_that_differ_within_a_group(world2):
    with pytest.raises(RanksError, match="drew different rows"):
        world2.run(train_on_rank_rows)


def without_labels(rows):
    batch = pad_right(rows)
    del batch["labels"]
    return batch


def train_without_labels():
    train(2, trainer_options={"data_collator": without_labels})


def test_missing_labels_are_told(world2):
    with pytest.raises(RanksError, match="no `labels`.*DataCollatorForLanguageModeling"):
        world2.run(train_without_labels)


def blind_attention(module, query, key, value, attention_mask, sequence_shard=None, **kwargs):
    return transformers.integrations.sdpa_attention.sdpa_attention_forward(module, query, key, value, None, **kwargs)


def train_a_model_that_hides_the_shard():
    class Hiding(transformers.LlamaForCausalLM):
        def forward(self, *args, sequence_shard=None, **kwargs):
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    model = Hiding(build("llama", "ulysses").config)
    train(2, model=model)


def test_an_attention_that_never_sees_the_shard_is_found_by_the_probe(world2):
    with pytest.raises(RanksError, match="never received the shard.*sequence_parallel_size` to 1"):
        world2.run(train_a_model_that_hides_the_shard)


def train_a_model_with_a_layer_that_mixes_tokens():
    model = build("llama", "ulysses")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 0.1 * x.cumsum(dim=1)
    train(2, model=model)


def test_a_layer_that_mixes_tokens_by_itself_is_found_by_the_probe(world2):
    with pytest.raises(RanksError, match="gives other outputs when its rows are sharded"):
        world2.run(train_a_model_with_a_layer_that_mixes_tokens)


def train_a_model_with_a_layer_that_needs_whole_rows():
    model = build("llama", "ulysses")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    positions = torch.zeros(7, 1)  # a row of the sanity check has 7 tokens
    mlp.forward = lambda x: plain(x) + positions
    train(2, model=model)


def test_an_error_of_the_models_own_code_on_a_share_becomes_a_sentence(world2):
    with pytest.raises(
        RanksError, match=r"`LlamaForCausalLM` cannot run on a share of a row \(RuntimeError: The size"
    ):
        world2.run(train_a_model_with_a_layer_that_needs_whole_rows)


def train_on_what_padding_predicts(label_of_the_first):
    config = config_of("bert")
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel._from_config(config, attn_implementation="ulysses")

    def pad_left(rows):
        batch = {name: value.flip(1) for name, value in pad_right(rows).items()}
        first = (batch["attention_mask"].cumsum(1) == 1) & (batch["attention_mask"] == 1)
        batch["labels"] = batch["labels"].masked_fill(first, label_of_the_first)
        return batch

    return train(2, model=model, trainer_options={"data_collator": pad_left})


def test_a_target_of_padding_is_refused_where_kernels_disagree_about_padding(world2):
    with pytest.raises(RanksError, match="padding on the left has a target.*first real token to -100"):
        world2.run(train_on_what_padding_predicts, 5)
    world2.run(train_on_what_padding_predicts, -100)


def train_recurrent():
    config = transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    model = transformers.RwkvForCausalLM(config)
    model.config._attn_implementation = "ulysses"
    train(2, model=model)


def test_a_recurrent_model_without_an_adapter_is_refused(world2):
    with pytest.raises(RanksError, match="NotImplementedError.*Rwkv"):
        world2.run(train_recurrent)


def train_a_model_with_another_loss():
    model = build("llama", "ulysses")
    model.loss_function = lambda logits, labels, **kwargs: logits.pow(2).mean()
    train(2, model=model)


def test_a_loss_that_is_not_a_token_mean_is_refused(world2):
    with pytest.raises(RanksError, match="is not the mean cross entropy of its tokens"):
        world2.run(train_a_model_with_another_loss)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def unshifted_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits.flatten(0, 1), labels.flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def train_with_loss(function):
    train(2, trainer_options={"compute_loss_func": function})


@pytest.mark.parametrize(
    ("function", "message"),
    [(mean_loss, "divided by `num_items_in_batch`"), (unshifted_loss, "does not shift labels")],
)
def test_a_compute_loss_func_that_cannot_be_exact_is_refused(world2, function, message):
    with pytest.raises(RanksError, match=message):
        world2.run(train_with_loss, function)


def mean_of_logits(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def train_modernbert():
    train(2, model="modernbert", trainer_options={"compute_loss_func": mean_of_logits})


def test_a_masked_language_models_loss_is_proven_too(world2):
    with pytest.raises(RanksError, match="divided by `num_items_in_batch`"):
        world2.run(train_modernbert)


def train_a_pair_classifier(size):
    config = build("bert", "ulysses").config
    model = transformers.BertForNextSentencePrediction._from_config(config, attn_implementation="ulysses")
    train(size, model=model)


def test_a_head_that_pools_rows_and_is_no_row_classifier_is_refused(world2):
    with pytest.raises(RanksError, match="not one vector a token: a head that pools a row cannot be sharded"):
        world2.run(train_a_pair_classifier, 2)
    with pytest.raises(NotImplementedError, match="a head that pools a row would pool the documents.*'sdpa'"):
        train_a_pair_classifier(1)


def positions_from_the_ids(with_positions):
    config = transformers.RobertaConfig(
        **{
            **_BASE,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    )
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM._from_config(config, attn_implementation="ulysses")

    def collate(rows):
        batch = pad_right(rows)
        if with_positions:
            mask = batch["attention_mask"]
            batch["position_ids"] = (mask.cumsum(1) * mask) + 1
        return batch

    return train(2, model=model, trainer_options={"data_collator": collate})


def test_a_model_that_derives_positions_asks_for_them(world2):
    with pytest.raises(RanksError, match="add `position_ids` of shape"):
        world2.run(positions_from_the_ids, False)
    world2.run(positions_from_the_ids, True)


def predict():
    from hf_longctx import LongContextConfig, LongContextTrainer

    from ..training import arguments, reset_state

    reset_state()
    trainer = LongContextTrainer(
        model=build("llama", "ulysses"),
        args=arguments(tempfile.mkdtemp()),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=2),
    )
    trainer.predict(Rows(4))


def test_predicting_logits_is_refused(world2):
    with pytest.raises(RanksError, match="prediction_loss_only=True"):
        world2.run(predict)


def shard_twice():
    mesh = SequenceMesh.build(2)
    shard_batch(shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh), mesh)


def test_a_sharded_batch_is_not_sharded_again(world2):
    with pytest.raises(RanksError, match="already sharded"):
        world2.run(shard_twice)


def registered_names():
    return AttentionInterface()["ulysses"].__name__, dataclasses.is_dataclass(SequenceMesh.build(2))


def test_every_rank_has_the_name_registered(world2):
    assert world2.run(registered_names) == [("ulysses_attention", True)] * 2
