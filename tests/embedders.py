"""A tiny SentenceTransformer, random or seeded, and batches for it in both forms that its losses know."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from .models import VOCAB
from .tokenizer import tiny_tokenizer


WIDTH = 32


def tiny_embedder(folder, dropout: float = 0.0, seed: int = 0) -> SentenceTransformer:
    """Two layers of BERT and mean pooling; `folder` keeps what the model is loaded from."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    # Not `save_pretrained`, which writes on the first rank only.
    config.to_json_file(f"{folder}/config.json")
    save_file(BertModel(config).state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=64)
    return SentenceTransformer(modules=[transformer, Pooling(WIDTH)], device="cpu").train()


def padded(texts: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        pad = [0] * (longest - len(text))
        rows.append(text + pad if side == "right" else pad + text)
        masks.append([1] * len(text) + pad if side == "right" else pad + [1] * len(text))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def flat(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    bounds = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
    return {"input_ids": torch.tensor([sum(texts, [])]), "cu_seq_lens_q": bounds}


def random_texts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def batch(count: int, columns: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Columns of random texts, padded; no text occurs twice with these sizes and seeds."""
    return [padded(random_texts(count, seed * 100 + column)) for column in range(columns)]
