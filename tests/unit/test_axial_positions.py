"""Axial positions: those of transformers' Reformer, for any row up to the grid, packed, saved and loaded."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings

from hf_longctx import AxialPositionEmbedding, SequenceMesh, adapt, use_axial_positions

from ..models import VOCAB, build


def batch(tokens: int = 13) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def test_it_equals_reformers_whole_grid_and_every_part_of_it():
    shape, dims = (3, 4, 2), (5, 1, 2)
    config = tf.ReformerConfig(axial_pos_shape=shape, axial_pos_embds_dim=dims, hidden_size=8, hidden_dropout_prob=0.0)
    theirs, ours = AxialPositionEmbeddings(config).train(), AxialPositionEmbedding(shape, dims)
    for mine, weight in zip(ours.weights, theirs.weights):
        mine.data.copy_(torch.nn.init.normal_(weight.data).view_as(mine))
    positions = torch.arange(24).expand(2, -1)
    expected = theirs(positions)
    assert torch.equal(ours(positions), expected)
    parts = torch.randint(0, 24, (2, 3, 7))
    assert torch.equal(ours(parts), expected[0][parts])
    assert ours(parts[..., :0]).shape == (2, 3, 0, 8)


@pytest.mark.parametrize(
    ("shape", "dims", "message"),
    [
        ((3, 4), (2, 2, 4), "has 2 axes and `dims` \\(2, 2, 4\\) has 3"),
        ((3, 0), (2, 2), "`shape` \\(\\(3, 0\\)\\) must be positive integers"),
        (12, (2, 2), "`shape` \\(12\\) must be"),
        ((3, 4), (2, 2.0), "`dims` \\(\\(2, 2.0\\)\\) must be"),
    ],
)
def test_grids_that_do_not_fit_are_refused(shape, dims, message):
    with pytest.raises(ValueError, match=message):
        AxialPositionEmbedding(shape, dims)


def test_longer_rows_than_the_grid_are_refused_with_both_numbers():
    message = "a row has 13 positions, but the axial grid \\(3, 4\\) has 12"
    with pytest.raises(ValueError, match=message):
        AxialPositionEmbedding((3, 4), (2, 2))(torch.arange(13))
    model = build("gpt2", "packed")
    use_axial_positions(model, (3, 4))
    with pytest.raises(ValueError, match=message):
        model(**batch())
    assert model(**batch(12)).loss.isfinite()


def test_rows_far_beyond_the_entries_and_packed_rows():
    model = build("gpt2", "packed", torch.float64).train()
    use_axial_positions(model, (8, 32), (40, 8))
    assert model.transformer.wpe.weight.shape == (40, 48) and model.config.n_positions == 40
    whole = batch(200)
    model(**whole).loss.backward()
    gradient = model.transformer.wpe.weight.grad
    assert gradient[:6, :40].all() and gradient[8:, 40:].all() and not gradient[8:, :40].any()
    one, two = batch(100)["input_ids"][0], batch(60)["input_ids"][1]
    flat = {
        "input_ids": torch.cat((one, two))[None],
        "position_ids": torch.cat((torch.arange(100), torch.arange(60)))[None],
    }
    expected = torch.cat([model(ids[None]).logits[0] for ids in (one, two)])
    torch.testing.assert_close(model(**flat, use_cache=False).logits[0], expected, rtol=0, atol=1e-12)


def test_a_saved_model_looks_up_the_same_positions_again(tmp_path):
    model = build("gpt2", "packed").eval()
    keys = model.state_dict().keys()
    use_axial_positions(model, (4, 32))
    expected = model(**batch(90)).logits
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packed")
    assert again.state_dict().keys() == keys
    with pytest.raises(ValueError, match="was trained with axial positions"):
        again(**batch(20))
    with pytest.raises(ValueError, match="has axial positions of shape \\(4, 32\\) and dims"):
        use_axial_positions(again, (8, 32))
    handle = adapt(again, SequenceMesh.build())
    assert torch.equal(again(**batch(90)).logits, expected)
    handle.remove()
    assert torch.equal(again(**batch(90)).logits, expected)
    answer = again.generate(
        batch(60)["input_ids"], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(answer[:, 61:], again(answer).logits.argmax(-1)[:, 60:-1])
    with pytest.raises(NotImplementedError, match="cannot be removed"):
        use_axial_positions(again, (4, 32)).remove()


def test_models_without_such_a_table_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="has no table of learned positions named `wpe`"):
        use_axial_positions(build("llama", "packed"), (4, 4))
    config = tf.GPTNeoConfig(
        hidden_size=8,
        num_heads=2,
        num_layers=2,
        attention_types=[[["global"], 2]],
        vocab_size=VOCAB,
        max_position_embeddings=32,
    )
    with pytest.raises(NotImplementedError, match="keeps a tensor as long as its 32 positions"):
        use_axial_positions(tf.GPTNeoForCausalLM(config), (4, 4))
    model = build("gpt2", "packed")
    with pytest.raises(ValueError, match="sum up to 8, but a token"):
        use_axial_positions(model, (4, 4), (4, 4))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="were trained, and axial ones are other numbers"):
        use_axial_positions(tf.AutoModelForCausalLM.from_pretrained(tmp_path), (4, 4))
