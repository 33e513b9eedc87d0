"""Packed sentence-transformers equal padded ones: embeddings, losses, every gradient; and what is refused."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch


pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from hf_longctx import TiledMultipleNegativesRankingLoss, encode_spans
from hf_longctx.embedding.packed_model import is_packed, pack_embeddings, unpack_embeddings
from hf_longctx.embedding.spans import WITH_OFFSETS, mark_spans

from ..embedding import columns, embedder, gradients_of, texts


MODELS = ("bert", "roberta", "modernbert", "llama", "qwen3", "llama both ways", "eurobert", "embeddinggemma")
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
QUERIES, DOCUMENTS = (5, 1, 9, 3), (17, 4, 2, 30)
# Both run in float64; what is left is the order of sums.
TOLERANCE = 1e-9


def tolerance_of(name: str) -> float:
    """Gemma's norms compute in single precision, whatever the model's is."""
    return 1e-7 if name == "embeddinggemma" else TOLERANCE


def assert_same_gradients(expected, actual, tolerance: float = TOLERANCE) -> None:
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert largest > 0
    for name, grad in expected.items():
        assert float((actual[name] - grad).abs().max()) <= tolerance * largest, name


def loss_of(kind: str, model):
    kinds = {
        "mnrl": lambda: losses.MultipleNegativesRankingLoss(model),
        "cached": lambda: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
        "cached by tokens": lambda: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=20),
        "cosent": lambda: losses.CoSENTLoss(model),
        "matryoshka": lambda: losses.MatryoshkaLoss(
            model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[288, 100]
        ),
        "cached matryoshka": lambda: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), matryoshka_dims=[288, 100]
        ),
        "ours": lambda: TiledMultipleNegativesRankingLoss(model, mini_batch_num_tokens=20, loss_tile_size=3),
        "stock for ours": lambda: losses.MultipleNegativesRankingLoss(model),
    }
    return kinds[kind]()


def step(model, kind: str):
    """Loss and gradients of one batch of ragged pairs."""
    model.eval()
    labels = torch.tensor([0.1, 0.9, 0.4, 0.7], dtype=torch.float64) if kind == "cosent" else None
    loss = loss_of(kind, model)(columns(model, QUERIES, DOCUMENTS), labels)
    loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_packed_embeddings_and_gradients_equal_padded_ones(name, mode):
    expected_loss, expected = step(embedder(name, "sdpa", mode), "mnrl")
    model = pack_embeddings(embedder(name, "packed", mode))
    assert "attention_mask" not in columns(model, QUERIES)[0]
    loss, actual = step(model, "mnrl")
    assert torch.allclose(loss, expected_loss, rtol=tolerance_of(name))
    assert_same_gradients(expected, actual, tolerance_of(name))


KINDS = ("cached", "cached by tokens", "cosent", "matryoshka", "cached matryoshka", "ours")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS[:4])
def test_every_loss_takes_packed_rows_pooled_in_every_mode(name, kind):
    expected_loss, expected = step(embedder(name, "sdpa", MODES), "stock for ours" if kind == "ours" else kind)
    loss, actual = step(pack_embeddings(embedder(name, "ulysses", MODES)), kind)
    assert torch.allclose(loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_encoding_equals_the_padded_model_with_prompts_and_two_poolings(include_prompt):
    settings = {"pooling": ("mean", "cls", "max", "lasttoken"), "normalize": True, "include_prompt": include_prompt}
    padded = embedder("roberta", "sdpa", **settings)
    packed = pack_embeddings(embedder("roberta", "packed", **settings))
    inputs = texts((5, 1, 40, 12, 3, 7))
    for prompt in (None, "w1 w2 "):
        expected = padded.encode(inputs, prompt=prompt, batch_size=4, convert_to_tensor=True)
        actual = packed.encode(inputs, prompt=prompt, batch_size=4, convert_to_tensor=True)
        assert torch.allclose(actual, expected, atol=TOLERANCE)


def test_pairs_of_texts_keep_their_token_types():
    pairs = [["w1 w2 w3", "w4 w5"], ["w6", "w7 w8 w9"]]
    tokens = {"text": {"return_token_type_ids": True}}
    padded, packed = embedder("bert"), pack_embeddings(embedder("bert", "packed"))
    for model in (padded, packed):
        model[0].tokenizer.backend_tokenizer.post_processor = _pair_types()
        model[0].tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    expected = padded.encode(pairs, convert_to_tensor=True, processing_kwargs=tokens)
    assert "token_type_ids" in packed.preprocess(pairs, processing_kwargs=tokens)
    assert torch.allclose(packed.encode(pairs, convert_to_tensor=True, processing_kwargs=tokens), expected)


def _pair_types():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A", pair="$A:0 $B:1", special_tokens=[])


def test_token_embeddings_are_handed_out_text_by_text():
    padded, packed = embedder("modernbert"), pack_embeddings(embedder("modernbert", "packed"))
    inputs = texts((5, 1, 9))
    expected = padded.encode(inputs, output_value="token_embeddings")
    actual = packed.encode(inputs, output_value="token_embeddings")
    assert [len(rows) for rows in actual] == [5, 1, 9]
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(actual, expected))
    assert is_packed(packed)


def test_evaluators_use_the_packed_path(monkeypatch):
    packed = pack_embeddings(embedder("bert", "packed"))
    left, right, scores = texts((5, 9, 3, 7)), texts((6, 2, 8, 4), 50), [0.1, 0.9, 0.3, 0.5]
    seen = []
    collator = packed[0].data_collator
    monkeypatch.setattr(packed[0], "data_collator", lambda rows: seen.append(len(rows)) or collator(rows))
    result = EmbeddingSimilarityEvaluator(left, right, scores)(packed)
    expected = EmbeddingSimilarityEvaluator(left, right, scores)(embedder("bert"))
    assert seen == [4, 4]
    assert result == pytest.approx(expected)


def test_what_is_saved_is_a_vanilla_checkpoint(tmp_path):
    from sentence_transformers import SentenceTransformer

    packed = pack_embeddings(embedder("bert", "packed", dtype=torch.float32))
    packed.save(str(tmp_path / "packed"))
    embedder("bert", dtype=torch.float32).save(str(tmp_path / "padded"))
    files = {file.name for file in (tmp_path / "padded").rglob("*") if file.is_file()}
    assert {file.name for file in (tmp_path / "packed").rglob("*") if file.is_file()} == files
    for name in ("modules.json", "sentence_bert_config.json", "config.json"):
        assert (tmp_path / "packed" / name).read_text() == (tmp_path / "padded" / name).read_text()
    again = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert again[0].config._attn_implementation == "sdpa"
    inputs = texts((5, 1, 9))
    assert torch.allclose(
        again.encode(inputs, convert_to_tensor=True), packed.encode(inputs, convert_to_tensor=True), atol=1e-6
    )


def test_copies_and_pickles_embed_alike():
    packed = pack_embeddings(embedder("bert", "packed"))
    inputs = texts((5, 1, 9))
    expected = packed.encode(inputs, convert_to_tensor=True)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.allclose(other.encode(inputs, convert_to_tensor=True), expected, atol=1e-14)


def test_a_forward_that_was_wrapped_on_the_instance_is_kept_packed_and_unpacked():
    """Somebody's whitening of token vectors, put on the loaded transformer, is part of the model."""

    def wrap(model):
        inner = model[0].forward

        def forward(features, **kwargs):
            features = inner(features, **kwargs)
            features["token_embeddings"] = 1.0 - 3.0 * features["token_embeddings"] ** 3
            return features

        model[0].forward = forward
        return model

    inputs = texts((5, 1, 9))
    plain = embedder("bert").encode(inputs, convert_to_tensor=True)
    expected = wrap(embedder("bert")).encode(inputs, convert_to_tensor=True)
    assert (expected - plain).abs().max() > 1
    model = pack_embeddings(wrap(embedder("bert", "packed")))
    assert torch.allclose(model.encode(inputs, convert_to_tensor=True), expected, atol=TOLERANCE)
    assert "cu_seq_lens_q" in columns(model, QUERIES)[0]
    unpack_embeddings(model)
    assert torch.allclose(model.encode(inputs, convert_to_tensor=True), expected, atol=TOLERANCE)
    assert "attention_mask" in columns(model, QUERIES)[0] and not is_packed(model)


def test_padding_can_be_switched_on_again():
    packed = pack_embeddings(embedder("bert", "packed"))
    packed[0].unpad_inputs = False
    assert not is_packed(packed)
    assert "attention_mask" in columns(packed, QUERIES)[0]
    with pytest.raises(ValueError, match="`unpad_inputs` is False"):
        pack_embeddings(packed)


# Refusals


def test_a_model_that_is_no_sentence_transformer_is_refused():
    with pytest.raises(TypeError, match="packing is for a `SentenceTransformer`"):
        pack_embeddings(embedder("bert")[0])


def test_a_kernel_that_would_leak_is_refused_before_and_after_packing():
    with pytest.raises(ValueError, match="would let the texts of a flat row see each other"):
        pack_embeddings(embedder("bert", "sdpa"))
    packed = pack_embeddings(embedder("bert", "packed"))
    packed[0].model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="lets them see each other"):
        packed.encode(texts((3, 4)))


def test_a_text_without_tokens_is_refused_by_number():
    packed = pack_embeddings(embedder("bert", "packed"))
    with pytest.raises(ValueError, match="text 1 of a batch of 3 has no token, and 0 more"):
        packed.preprocess(["w1 w2", "", "w3"])


def test_a_model_that_reads_across_texts_is_refused_by_the_proof():
    model = embedder("bert", "packed")
    inner, own = model[0].model, type(model[0].model).forward

    def leaking(**kwargs):
        output = own(inner, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
        return output

    inner.forward = leaking
    with pytest.raises(NotImplementedError, match="embeds texts packed in one row otherwise than alone"):
        pack_embeddings(model)


def test_wrong_positions_are_refused_by_the_proof(monkeypatch):
    model = embedder("roberta", "packed")
    monkeypatch.setattr(model[0], "_infer_flatten_position_offset", lambda: 0)
    with pytest.raises(NotImplementedError, match="counts positions itself"):
        pack_embeddings(model)


# Late chunking


DOCS = texts((12, 5, 30), 7)


def whole_words(text: str, *numbers: tuple[int, int]) -> list[tuple[int, int]]:
    """Character spans of the words from one number up to another."""
    starts, at = [], 0
    for word in text.split(" "):
        starts.append((at, at + len(word)))
        at += len(word) + 1
    return [(starts[first][0], starts[last - 1][1]) for first, last in numbers]


WORDS = [[(0, 4), (4, 12)], [(1, 3)], [(0, 1), (10, 20), (20, 30)]]
SPANS = [whole_words(text, *numbers) for text, numbers in zip(DOCS, WORDS)]


@pytest.mark.parametrize("mode", ["mean", "max", "cls", "lasttoken"])
@pytest.mark.parametrize("prompt", [None, "w1 w2 "])
def test_spans_pool_the_tokens_of_a_whole_document(mode, prompt):
    padded = embedder("modernbert", "sdpa", mode)
    tokens = padded.encode(DOCS, output_value="token_embeddings", prompt=prompt)
    before = 2 if prompt else 0
    pooled = {
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.amax(0),
        "cls": lambda x: x[0],
        "lasttoken": lambda x: x[-1],
    }
    packed = pack_embeddings(embedder("modernbert", "packed", mode))
    actual = encode_spans(packed, DOCS, SPANS, prompt=prompt, batch_size=2)
    assert [len(vectors) for vectors in actual] == [2, 1, 3]
    for vectors, states, words in zip(actual, tokens, WORDS):
        expected = [pooled[mode](states[before + first : before + last]) for first, last in words]
        assert torch.allclose(vectors, torch.stack(expected), atol=TOLERANCE)


def test_a_span_that_is_the_document_is_its_embedding():
    packed = pack_embeddings(embedder("bert", "packed"))
    spans = [[(0, len(text))] for text in DOCS]
    expected = packed.encode(DOCS, convert_to_tensor=True)
    assert torch.allclose(torch.cat(encode_spans(packed, DOCS, spans)), expected, atol=TOLERANCE)
    assert packed.encode(DOCS[0], convert_to_tensor=True).shape == (48,)


BAD_SPANS = {
    "must lie inside the document and behind the span before it (which ends at 9)": [[(0, 9), (5, 12)], [(0, 1)]],
    "(2 characters) must lie inside the document": [[(0, 2)], [(1, 5)]],
    "document 1 has no span: give it at least one": [[(0, 2)], []],
    "there are 2 documents but `spans` of 1: give each document a list": [[(0, 2)]],
}


@pytest.mark.parametrize(("message", "spans"), BAD_SPANS.items())
def test_bad_spans_are_refused(message, spans):
    packed = pack_embeddings(embedder("bert", "packed"))
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_spans(packed, ["w1 w2 w3 w4 w5", "w6"], spans)


def test_a_span_behind_the_last_kept_token_is_refused():
    packed = pack_embeddings(embedder("bert", "packed"))
    packed.max_seq_length = 3
    with pytest.raises(
        ValueError, match=r"has no token: the tokenizer keeps 8 characters; raise `model.max_seq_length`"
    ):
        encode_spans(packed, ["w1 w2 w3 w4 w5"], [[(0, 2), (9, 14)]])


def spaced(kind: str):
    """A packed model whose tokenizer counts the space before a word to the word, as Qwen's, GPT-2's and Gemma's do."""
    from tokenizers import Regex, pre_tokenizers

    packed = pack_embeddings(embedder("bert", "packed"))
    backend = packed[0].tokenizer.backend_tokenizer
    splits = {
        "space before": (Regex(r"\s*[^\s]+"), "isolated"),
        "alone": (Regex(r"\s+|[^\s]+"), "isolated"),
    }
    backend.pre_tokenizer = pre_tokenizers.Split(*splits[kind])
    return packed


@pytest.mark.parametrize("prompt", [None, "w1 w2 ", "w1:"])
@pytest.mark.parametrize("kind", ["space before", "alone"])
def test_spaces_that_belong_to_a_token_do_not_move_it_out_of_its_span(kind, prompt):
    """Every word of the spans is marked with its span, whatever stands before it."""
    document = "w1 w2  w3\nw4 w5"
    spans = [(0, 5), (7, 12), (13, 15)]  # w1 w2 | w3 w4 | w5
    packed = spaced(kind)
    features = packed.preprocess([document], prompt=prompt, processing_kwargs=WITH_OFFSETS)
    marks = mark_spans(features, [document], [spans], prompt)[0].tolist()
    text, shift = (prompt or "") + document, len(prompt or "")
    words = {}
    for (start, end), mark in zip(features["offset_mapping"].tolist(), marks):
        if text[start:end].strip() and end > shift:
            words[text[max(start, shift) : end].strip()] = mark
    assert words == {"w1": 0, "w2": 0, "w3": 1, "w4": 1, "w5": 2} or prompt == "w1:", words
    assert [words[word] for word in ("w2", "w3", "w4", "w5")] == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_real_kinds_of_offsets_keep_the_first_word_of_every_span(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers

    document, spans = "alpha beta gamma delta", [[(0, 10), (11, 22)]]
    letters = "abcdefghijklmnopqrstuvwxyz"
    if kind == "gpt2":
        vocabulary = {character: index for index, character in enumerate([*letters, "\u0120"])}
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = ["\u2581alpha", "\u2581beta", "\u2581gamma", "\u2581delta"]
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    encoded = backend.encode(document)
    offsets = torch.tensor(encoded.offsets)
    features = {"modality": "text", "offset_mapping": offsets, "cu_seq_lens_q": torch.tensor([0, len(offsets)])}
    marks = mark_spans(features, [document], spans)[0].tolist()
    for (start, end), mark in zip(encoded.offsets, marks):
        if document[start:end].strip():
            assert mark == int(end > 11), (start, end, mark)


def test_offsets_that_are_all_empty_are_refused():
    features = {"modality": "text", "offset_mapping": torch.zeros(3, 2).long(), "cu_seq_lens_q": torch.tensor([0, 3])}
    with pytest.raises(NotImplementedError, match="empty offsets for all 3 tokens of document 0"):
        mark_spans(features, ["w1 w2 w3"], [[(0, 2)]])


def test_spans_of_a_padded_model_are_refused():
    with pytest.raises(NotImplementedError, match="spans need a packed model with a fast tokenizer"):
        encode_spans(embedder("bert"), ["w1 w2"], [[(0, 2)]])


# Refusals of models


def changed(change):
    model = embedder("bert", "packed")
    change(model)
    return model


def static_model():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(embedder("bert")[0].tokenizer.backend_tokenizer, embedding_dim=8)
    return SentenceTransformer(modules=[static], device="cpu")


REFUSED = {
    "is a `StaticEmbedding`, which runs no transformers model, so there is no padding to remove": static_model,
    "is loaded for the task 'fill-mask' with text: only text embeddings can be packed": lambda: changed(
        lambda model: setattr(model[0], "transformer_task", "fill-mask")
    ),
    "runs on the backend 'onnx' through forward: packing needs the torch model's own `forward`": lambda: changed(
        lambda model: setattr(model[0], "backend", "onnx")
    ),
    "does not call transformers' attention interface, so no kernel of ours is asked": lambda: changed(
        lambda model: setattr(model[0].model, "is_backend_compatible", lambda: False)
    ),
}


@pytest.mark.parametrize(("message", "build"), REFUSED.items())
def test_models_that_cannot_be_packed_are_refused(message, build):
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        pack_embeddings(build())
