"""`assert_no_cross_document` finds a leak in either direction, and passes what keeps documents apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from hf_longctx import PackingCollator, SequenceMesh, assert_no_cross_document
from hf_longctx.parallel.adapted import MARK
from hf_longctx.tiny_check import evaluation_mode

from ..models import MASKED_LM, VOCAB, build
from .test_packed import documents_of


BATCH = PackingCollator()(documents_of((9, 1, 13, 5)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss", "llama4", "bert", "modernbert"])
def test_our_attention_passes(name):
    assert_no_cross_document(build(name, "packed"), BATCH)
    assert_no_cross_document(build(name, "ulysses"), BATCH, SequenceMesh.build(1))


def test_the_loss_of_routers_in_front_of_the_logits_is_not_taken_for_them():
    assert_no_cross_document(build("gpt_oss", "packed", output_router_logits=True), BATCH)


@pytest.mark.parametrize("name", MASKED_LM)
def test_stock_encoder_leaks(name):
    with pytest.raises(AssertionError, match="outputs of others moved by .*attn_implementation='packed'"):
        assert_no_cross_document(build(name, "sdpa"), BATCH)


def test_stock_decoder_that_is_given_a_mask_leaks():
    """The common mistake: a mask of ones beside positions, which hides the documents from transformers."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama", "sdpa")
            self.config = self.model.config

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, input_ids, **kwargs):
            return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    assert_no_cross_document(build("llama", "sdpa"), BATCH)
    with pytest.raises(AssertionError, match="see each other"):
        assert_no_cross_document(Masked(), BATCH)


class Toy(torch.nn.Module):
    """Outputs are embeddings, plus whatever `leak` adds from the documents before or after."""

    def __init__(self, leak: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 4)
        self.config = SimpleNamespace(vocab_size=VOCAB, get_text_config=lambda: self.config)
        self.leak, self.scale = leak, scale

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids, **kwargs):
        hidden = self.embedding(input_ids)
        documents = (position_ids == 0).cumsum(1)
        chosen = (int(documents.max()) - 1) // 2 + 1
        if self.leak == "out of it":
            extra = hidden[documents == chosen].sum(0) * (documents != chosen)[..., None]
        elif self.leak == "into it":
            extra = hidden[documents != chosen].sum(0) * (documents == chosen)[..., None]
        elif self.leak == "pooled":
            return (hidden.mean(1),)
        elif self.leak == "constant":
            return (hidden * 0 + position_ids[..., None],)
        else:
            extra = 0
        return (hidden + self.scale * extra,)


def test_each_direction_is_found():
    assert_no_cross_document(Toy(), BATCH)
    with pytest.raises(AssertionError, match="outputs of others moved"):
        assert_no_cross_document(Toy("out of it"), BATCH)
    with pytest.raises(AssertionError, match="send gradients of"):
        assert_no_cross_document(Toy("into it"), BATCH)
    assert_no_cross_document(Toy("into it"), BATCH, check_gradients=False)  # the half that outputs cannot see


def test_small_leak_is_found_and_rounding_is_allowed():
    for leak in ("out of it", "into it"):
        with pytest.raises(AssertionError, match="see each other"):
            assert_no_cross_document(Toy(leak, scale=1e-3), BATCH)
        assert_no_cross_document(Toy(leak, scale=1e-9), BATCH)


def test_check_that_proves_nothing_says_so():
    with pytest.raises(AssertionError, match="the check proves nothing"):
        assert_no_cross_document(Toy("constant"), BATCH)


def test_pooled_head_and_rows_of_one_document_are_refused():
    with pytest.raises(ValueError, match="not with one vector a token: check the model without its pooled head"):
        assert_no_cross_document(Toy("pooled"), BATCH)
    with pytest.raises(ValueError, match="no row with two documents"):
        assert_no_cross_document(Toy(), PackingCollator()(documents_of((9,))))
    with pytest.raises(ValueError, match="no row with two documents"):
        assert_no_cross_document(Toy(), {"input_ids": BATCH["input_ids"]})


def test_model_is_left_as_it_was():
    model = build("llama", "packed").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)  # as under LoRA
    assert_no_cross_document(model, {**BATCH, "labels": BATCH["labels"]})
    assert model.training and not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_evaluation_mode_gives_every_module_its_own_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model[0].training
        raise KeyError
    assert model.training and model[0].training and not model[1].training


def test_padding_and_single_rows_are_left_out():
    """Two rows by positions, one of them a single document: only the other is checked, and it is checked."""
    positions = torch.stack([torch.arange(12), torch.cat([torch.arange(5), torch.arange(7)])])
    batch = {"input_ids": torch.randint(10, VOCAB, (2, 12)), "position_ids": positions}
    assert_no_cross_document(build("llama", "packed"), batch)
    with pytest.raises(AssertionError, match="see each other"):
        assert_no_cross_document(build("modernbert", "sdpa"), batch)


def test_a_hybrid_that_runs_our_attention_is_not_told_to_use_it():
    config = transformers.Lfm2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM._from_config(config, attn_implementation="packed")
    for module in model.modules():  # as a trainer that is about to check it
        vars(module)[MARK] = True
    batch = {"input_ids": torch.arange(10, 22)[None], "position_ids": torch.arange(12)[None] % 6}
    with pytest.raises(
        AssertionError, match="keeps them apart, so layers of type conv carry a state.*: pad documents"
    ):
        assert_no_cross_document(model, batch)
    for module in model.modules():
        del vars(module)[MARK]
    with pytest.raises(NotImplementedError, match=r"layers of type conv.*call `hf_longctx.adapt\(model, mesh\)`"):
        assert_no_cross_document(model, batch)
