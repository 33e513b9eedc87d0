"""Tiny random sentence-transformers, padded as sentence-transformers has them or for packing, and texts of ragged
lengths."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from .models import config_of
from .tokenizer import tiny_tokenizer, words


def embedder_config(name: str):
    """The config of a named encoder or decoder; `"... both ways"` turns a decoder's causal mask off."""
    kind = name.removesuffix(" both ways")
    if kind == "roberta":
        settings = config_of("bert").to_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        settings = {key: settings[key] for key in (*kept, "hidden_dropout_prob", "attention_probs_dropout_prob")}
        config = tf.RobertaConfig(**settings, max_position_embeddings=258, pad_token_id=0, type_vocab_size=1)
    elif kind == "embeddinggemma":  # looks 3 tokens to both sides in its odd layers, everywhere in the others
        settings = config_of("llama").to_diff_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        config = tf.Gemma3TextConfig(
            **{key: settings[key] for key in kept if key in settings},
            num_hidden_layers=2,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=6,
            use_bidirectional_attention=True,
            pad_token_id=0,
        )
    elif kind == "eurobert":
        config = tf.EuroBertConfig(**config_of("llama").to_diff_dict() | {"pad_token_id": 0})
    else:
        config = config_of(kind)
    if name != kind:
        config.is_causal = False
    return config


@functools.cache
def _folder(name: str) -> str:
    """A checkpoint of the named model, the same weights whenever it is asked for."""
    folder = tempfile.mkdtemp()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModel.from_config(embedder_config(name), dtype=torch.float64)
    for parameter in model.parameters():  # norms and biases too, so that a lost one shows
        parameter.data += 0.02 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter)
    # By hand: sentence-transformers writes on the first rank of a world only.
    Path(folder, "config.json").write_text(model.config.to_json_string())
    save_file(model.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None  # texts are texts, not turns of a chat
    tokenizer.save_pretrained(folder)
    return folder


def embedder(
    name: str,
    attention: str = "sdpa",
    pooling: str | tuple[str, ...] = "mean",
    dtype: torch.dtype = torch.float64,
    normalize: bool = False,
    include_prompt: bool = True,
) -> SentenceTransformer:
    """A sentence-transformer on the CPU; `attention="sdpa"` is sentence-transformers' padded one."""
    module = Transformer(_folder(name), model_kwargs={"attn_implementation": attention, "dtype": dtype})
    modules = [module, Pooling(module.get_embedding_dimension(), pooling, include_prompt=include_prompt)]
    if normalize:  # and all that may follow pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            modules += [Dense(modules[-1].get_embedding_dimension(), 24).to(dtype), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[str]:
    """One text a length, in words, which are tokens."""
    return [words(length, seed + index) for index, length in enumerate(lengths)]


def columns(model: SentenceTransformer, *lengths: tuple[int, ...]) -> list[dict[str, object]]:
    """The features of one batch, a column for each tuple of lengths."""
    return [model.preprocess(texts(column, 100 * index)) for index, column in enumerate(lengths)]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, zeros where there is none, and none left behind."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = torch.zeros_like(parameter) if grad is None else grad.detach().clone()
        parameter.grad = None
    return found
