"""`adapt` on one process, and what the attention layers refuse in a loop that never called it."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import transformers as tf

from hf_longctx import SequenceMesh, adapt, shard_batch
from hf_longctx.adapters import tile_loss
from hf_longctx.parallel.adapted import find_adapted, is_marked

from ..models import VOCAB, build, config_of


MESH = SequenceMesh.build(1)
IDS = torch.arange(11, 21)[None]
LENGTHS = (4, 1, 5)
RESTARTING = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 4, 5, 10], dtype=torch.int32)
FLAT = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 5, "max_length_k": 5}
_SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 6, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def hybrid(attention: str):
    """A decoder with a layer of convolution before one of attention."""
    config = tf.Lfm2Config(**_SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def roberta(attention: str, seed: int = 0):
    torch.manual_seed(seed)
    config = tf.RobertaConfig(**_SMALL, max_position_embeddings=64, hidden_dropout_prob=0.0, is_decoder=True)
    config.attention_probs_dropout_prob = 0.0
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


def alone(model, lengths=LENGTHS) -> torch.Tensor:
    """Logits of each document of `IDS` in a forward of its own."""
    pieces = [model(input_ids=piece).logits for piece in IDS.split(list(lengths), dim=1)]
    return torch.cat(pieces, dim=1)


# The mark and the handle


def test_adapt_marks_the_instance_and_the_handle_takes_everything_off():
    model = build("bart", "ulysses")
    saved = list(model.state_dict())
    handle = adapt(model, MESH)
    assert find_adapted(model).shifts_labels is False and all(map(is_marked, model.modules()))
    assert handle.modules and list(model.state_dict()) == saved
    handle.remove()
    assert find_adapted(model) is None and not any(map(is_marked, model.modules())) and not handle.modules


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_adapted_model_is_adapted(copied):
    model = copied(adapt(build("bert", "ulysses"), MESH).model)
    share = shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model)
    assert "shift_labels" not in share and torch.isfinite(model(**share).loss)


def test_a_model_that_is_refused_is_left_as_it_was():
    model = build("llama", "ulysses")
    model.get_input_embeddings().weight.data[:] = 0  # nothing is wrong yet
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        adapt(model, MESH)
    assert find_adapted(model) is None


def test_a_model_whose_loss_is_tiled_already_is_adapted():
    model, plain = build("llama", "ulysses", torch.float64), build("llama", "sdpa", torch.float64)
    tile_loss(model, 3)
    adapt(model, MESH)
    share = shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model)
    outputs = model(**share)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, plain(input_ids=IDS, labels=IDS).loss, check_dtype=False)


def test_a_model_on_another_attention_is_taken_as_it_is_on_one_process():
    model = build("llama", "sdpa")
    adapt(model, MESH)
    share = shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model)
    torch.testing.assert_close(model(**share).loss, model(input_ids=IDS, labels=IDS).loss)


# shard_batch(batch, mesh, model)


def test_shard_batch_refuses_a_model_that_was_not_adapted():
    with pytest.raises(RuntimeError, match=r"`model` \(LlamaForCausalLM\) was not adapted: call `hf_longctx.adapt"):
        shard_batch({"input_ids": IDS}, MESH, build("llama", "ulysses"))


def test_shard_batch_refuses_a_model_of_another_mesh():
    model = build("llama", "ulysses")
    adapt(model, MESH)
    other = SequenceMesh(1, 2, 0, 0)
    with pytest.raises(RuntimeError, match=r"adapted for 1 rank\(s\) a row, but `mesh` has 2"):
        shard_batch({"input_ids": IDS}, other, model)


@pytest.mark.parametrize("argument", [{"inner_attention": "eager"}, {"shift_labels": False}])
def test_shard_batch_refuses_what_is_not_the_models(argument):
    model = build("llama", "ulysses")
    adapt(model, MESH)
    with pytest.raises(ValueError, match="is not what the model was adapted with"):
        shard_batch({"input_ids": IDS}, MESH, model, **argument)


def test_a_model_without_a_loss_leaves_the_labels_to_the_caller():
    model = tf.AutoModel.from_config(config_of("llama"), attn_implementation="ulysses")
    adapt(model, MESH)
    assert "shift_labels" in shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model)
    assert "shift_labels" not in shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model, shift_labels=False)


# Batches of a loop


def test_labels_that_were_cut_in_the_other_way_are_refused():
    for name, shifts in (("llama", False), ("bert", True)):
        model = build(name, "ulysses")
        adapt(model, MESH)
        share = shard_batch({"input_ids": IDS, "labels": IDS}, MESH, shift_labels=shifts)
        with pytest.raises(ValueError, match="the labels were cut"):
            model(**share)


def test_a_loss_that_is_a_mean_over_its_tokens_is_counted_over_the_step():
    model = build("bert", "ulysses", torch.float64)
    adapt(model, MESH)
    share = shard_batch({"input_ids": IDS, "labels": IDS}, MESH, model)
    share["num_items_in_batch"] = 40
    expected = model(input_ids=IDS, labels=IDS).loss * IDS.numel() / 40
    torch.testing.assert_close(model(**share).loss, expected.float())
    with pytest.raises(NotImplementedError, match="cannot be replaced in a tuple"):
        model(**share, return_dict=False)


def test_a_share_of_another_mesh_is_refused():
    model = build("llama", "ulysses")
    adapt(model, MESH)
    share = shard_batch({"input_ids": IDS}, SequenceMesh(1, 2, 0, 0), check_rows=False)
    with pytest.raises(RuntimeError, match=r"cut for 2 rank\(s\) a row, but `LlamaForCausalLM` was adapted for 1"):
        model(**share)


# Positions


def test_bounds_without_positions_get_those_of_their_documents():
    """GPT-2 has a table of positions, so counting on across documents shows."""
    model = build("gpt2", "packed", torch.float64).eval()
    expected = alone(model)
    with pytest.raises(ValueError, match="positions of `GPT2Attention` count on across them"):
        model(input_ids=IDS, use_cache=False, **FLAT)
    share = shard_batch({"input_ids": IDS, **FLAT}, MESH)
    assert share["position_ids"].tolist() == RESTARTING.tolist()
    torch.testing.assert_close(model(**share).logits, expected)
    adapt(model, MESH)
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False, **FLAT).logits, expected)


def test_rotary_positions_may_count_on():
    model = build("llama", "packed", torch.float64).eval()
    # Their angles are computed in float32, so positions 5 and 0 are not the same to the bit.
    actual = model(input_ids=IDS, use_cache=False, **FLAT).logits
    torch.testing.assert_close(actual, alone(model), rtol=1e-4, atol=1e-5)


def test_on_one_process_a_model_counts_the_tokens_of_its_rows_itself():
    model = roberta("ulysses").eval()
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(model(**shard_batch({"input_ids": IDS}, MESH)).logits, expected)


def test_documents_of_a_model_that_counts_from_padding():
    model = roberta("packed").eval()
    batch = {"input_ids": IDS, "position_ids": RESTARTING + 2, "use_cache": False}
    torch.testing.assert_close(model(**batch).logits, alone(model))
    with pytest.raises(ValueError, match=r"`roberta` does not count from 0 but from `pad_token_id` \+ 1 \(2\)"):
        model(**shard_batch({"input_ids": IDS, **FLAT}, MESH), use_cache=False)
    adapt(model, MESH)
    share = shard_batch({key: batch[key] for key in ("input_ids", "position_ids")}, MESH, model)
    torch.testing.assert_close(model(**share, use_cache=False).logits, alone(model))
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False, **FLAT).logits, alone(model))
    from_zero = {"input_ids": IDS, "position_ids": RESTARTING}
    for batch in (shard_batch(from_zero, MESH, model), from_zero):
        with pytest.raises(ValueError, match="begin below 2.*position_ids_start=2"):
            model(**batch, use_cache=False)


# Layers that mix tokens


def test_packed_rows_of_a_hybrid_are_refused_until_an_adapter_carries_its_state(monkeypatch):
    model = hybrid("packed").eval()
    packed = {"input_ids": IDS, "position_ids": RESTARTING, "use_cache": False}
    expected = hybrid("sdpa").eval()(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    with pytest.raises(NotImplementedError, match="layers of type conv.*hf_longctx.adapt"):
        model(**packed)
    handle = adapt(model, MESH)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    bounds = [*(RESTARTING[0] == 0).nonzero().flatten().tolist(), IDS.shape[1]]
    plain = hybrid("sdpa").eval()
    alone = [plain(input_ids=IDS[:, a:b]).logits for a, b in zip(bounds, bounds[1:])]
    torch.testing.assert_close(model(**packed).logits, torch.cat(alone, dim=1))
    handle.remove()
    monkeypatch.setattr("hf_longctx.adapters.recurrent.layers.RULES", {})
    adapt(model, MESH)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    with pytest.raises(NotImplementedError, match="cannot take packed rows: documents packed in one row see each"):
        model(**packed)


def test_nothing_is_logged_on_one_process(caplog):
    with caplog.at_level(logging.WARNING):
        shard_batch({"input_ids": IDS}, MESH)
    assert not [record for record in caplog.records if record.name.startswith("hf_longctx")]


def test_a_loop_on_shares_without_an_adapted_model_is_warned_once(caplog):
    mesh = SequenceMesh(1, 2, 0, 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            shard_batch({"input_ids": IDS}, mesh, check_rows=False)
    (record,) = [record for record in caplog.records if record.name.startswith("hf_longctx")]
    assert "no model was adapted for rows of 2 ranks" in record.getMessage()
