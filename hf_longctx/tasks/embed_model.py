"""The sentence-transformer of a recipe: loaded as it is, or built from a transformer, and configured."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, set_seed


try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError as error:
    raise ImportError("`load_embedder` needs sentence-transformers: `pip install hf-longctx[embedding]`.") from error

from ..data.model_files import check_model_files
from .document_places import PACKAGE, model_folder


@dataclass
class EmbeddingModelArguments:
    """Which model, and what it is turned into."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "On the Hub, a folder, or `package:NAME/folder` inside an installed package."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file inside the model's folder."})
    base_model: str | None = field(
        default=None, metadata={"help": "Name on the Hub of a model that is loaded from a folder, for the model card."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Unset: ulysses where processes share documents, else packed."}
    )
    pooling_mode: str | None = field(
        default=None,
        metadata={"help": "Build a new embedder on a transformer: mean, cls, lasttoken, weightedmean or max."},
    )
    normalize: bool = field(default=True, metadata={"help": "Of a new embedder: vectors of length 1."})
    is_causal: bool | None = field(
        default=None, metadata={"help": "false lets every token of a decoder see the whole text."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "0 switches dropout off, so that one and several processes compute the same."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens beyond it are cut off."})
    stretch_positions: int | None = field(
        default=None,
        metadata={"help": "Interpolate a learned table of positions to so many rows; the model then needs training."},
    )


def load_embedder(args: EmbeddingModelArguments, size: int, seed: int) -> SentenceTransformer:
    """The model, on `"ulysses"` if `size` processes share a document, else on `"packed"`, unless told otherwise."""
    set_seed(seed)
    source = _source(args.model_name_or_path)
    check_model_files(source, weights=True)
    attention = args.attn_implementation or ("ulysses" if size > 1 else "packed")
    model_kwargs = {"attn_implementation": attention, "dtype": getattr(torch, args.dtype)}
    config_kwargs: dict[str, Any] = {} if args.is_causal is None else {"is_causal": args.is_causal}
    if args.gguf_file:
        source = _unpack_gguf(source, args.gguf_file)
    if args.dropout is not None:
        config_kwargs |= dict.fromkeys(_dropouts(source, args.model_revision), args.dropout)
    revision = {} if args.model_revision == "main" else {"revision": args.model_revision}
    if args.pooling_mode is None:
        options = {"model_kwargs": model_kwargs, "config_kwargs": config_kwargs}
        model = SentenceTransformer(source, **options, **revision)
    else:
        options = {key: {**value, **revision} for key, value in (("model_kwargs", model_kwargs),)}
        options |= {"config_kwargs": {**config_kwargs, **revision}, "processor_kwargs": {**revision}}
        module = Transformer(source, **options)
        pooling = Pooling(module.get_embedding_dimension(), args.pooling_mode)
        model = SentenceTransformer(modules=[module, pooling, *([Normalize()] if args.normalize else [])])
    if model.tokenizer.pad_token is None:  # nothing is padded, but sentence-transformers asks for one
        model.tokenizer.pad_token = model.tokenizer.eos_token
    if args.stretch_positions is not None:
        stretch_positions(model, args.stretch_positions)
    if args.max_seq_length is not None:
        model.max_seq_length = args.max_seq_length
    if args.base_model:
        model.model_card_data.base_model = args.base_model
        model[0].model.config._name_or_path = args.base_model
    return model


def stretch_positions(model: SentenceTransformer, num_positions: int) -> None:
    """Interpolate the learned positions of a BERT to `num_positions`, and let texts be so long.

    Position `i` gets what stood, between two rows, at `i * (old - 1) / (num_positions - 1)`. Embeddings change, also
    those of short texts: it is a start for training on long documents, not a model by itself.

    Raises:
        ValueError: the model has no such table, or one with an offset, or it would shrink.
    """
    inner = model[0].model
    embeddings: Any = getattr(inner, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, torch.nn.Embedding) or table.padding_idx is not None or num_positions < len(table.weight):
        raise ValueError(
            f"`stretch_positions` ({num_positions}) needs a learned table of at most so many positions, counted from "
            f"0 as BERT's, which `{type(inner).__name__}` has not: leave it out."
        )
    with torch.no_grad():
        rows = table.weight.T[None].float()
        longer = torch.nn.functional.interpolate(rows, num_positions, mode="linear", align_corners=True)[0].T
        embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(
            longer.to(table.weight.dtype), freeze=False
        )
    for name in ("position_ids", "token_type_ids"):
        buffer = getattr(embeddings, name, None)
        if buffer is not None:
            new = torch.arange(num_positions)[None] if name == "position_ids" else torch.zeros(1, num_positions).long()
            embeddings.register_buffer(name, new.to(buffer.device), persistent=False)
    inner.config.max_position_embeddings = num_positions
    model.tokenizer.model_max_length = num_positions
    model.max_seq_length = num_positions


def _dropouts(source: str, revision: str) -> list[str]:
    """The names that the model's configuration has for dropout."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "mlp_dropout")
    return [name for name in (*names, "embedding_dropout") if hasattr(config, name)]


def _source(name: str | None) -> str:
    if name and name.startswith(PACKAGE):
        package, _, rest = name.partition("/")
        return f"{model_folder(package)}/{rest}".rstrip("/")
    return model_folder(name)


def _unpack_gguf(folder: str, file: str) -> str:
    """An ordinary checkpoint of a GGUF file, in a temporary folder."""
    options = {"gguf_file": file}
    if hasattr(transformers, "GgufConfig"):  # without it, weights may stay packed and frozen
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    unpacked = tempfile.mkdtemp()
    AutoModel.from_pretrained(folder, **options).save_pretrained(unpacked)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.chat_template = None  # texts are texts, not turns of a chat
    tokenizer.save_pretrained(unpacked)
    return unpacked
