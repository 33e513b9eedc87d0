"""The sentence-transformers of a proof, and their texts: tiny and random with every way of pooling, or as they are.

sentence-transformers loads from a folder only, so a tiny one is written to a temporary folder: weights, a
configuration, and a tokenizer whose words are the numbers of its tokens.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..adapters.instance_forward import InstancePatch
from ..adapters.rotary_lengths import forget_lengths
from ..parallel.pooling import POOLING_MODES
from .build import build_model, loading_options, turn_dropout_off
from .model_under_test import ModelUnderTest, read_config
from .tiny import FIRST_TOKEN, VOCABULARY


# Tokens of the texts of one group: one of a single token, and documents that cross ranks.
LENGTHS = ((5, 1, 9, 3), (17, 4, 2, 30))
TEXTS_OF_A_GROUP = sum(map(len, LENGTHS))


def build_embedder(tested: ModelUnderTest, attention: str | None, dtype: torch.dtype) -> SentenceTransformer:
    """The model in training mode, without dropout; weights depend on the tested alone.

    Args:
        attention (`str`, *optional*): `None`: the default of transformers.
    """
    options = {**loading_options(tested.config, attention, dtype), "dtype": dtype}
    with _no_progress_bar():
        model = _tiny(tested, options) if tested.weights is None else _as_it_is(tested, tested.weights, options)
    turn_dropout_off(model)
    return model.to(dtype).train()


def _tiny(tested: ModelUnderTest, options: dict[str, object]) -> SentenceTransformer:
    inner = build_model(tested, None, torch.float32)
    with tempfile.TemporaryDirectory(prefix="hf_longctx_") as folder:
        tokenizer = _write(inner, folder)
        module = Transformer(folder, model_kwargs=options)
    module.processor = tokenizer  # for some model types another kind of tokenizer is loaded
    pooling = Pooling(module.get_embedding_dimension(), POOLING_MODES)
    return SentenceTransformer(modules=[module, pooling], device="cpu")


def _as_it_is(tested: ModelUnderTest, weights: str, options: dict[str, object]) -> SentenceTransformer:
    """Its own size, weights and pooling; of the configuration, only dropout and the causal mask are the tested's."""
    given = read_config(weights).to_dict()
    config: Any = tested.config
    changed = {name: value for name, value in config.to_dict().items() if given.get(name, given) != value}
    return SentenceTransformer(weights, model_kwargs=options, config_kwargs=changed, device="cpu")


class OneByOne(InstancePatch):
    """On a `Transformer` that reads the length of its rows: every text of a padded batch alone, as if it were first.

    A padded batch would give its short texts the length of the longest.
    """

    name = "texts one by one"

    def call(self, module: Transformer, own: Callable, features: dict, **kwargs):
        mask, name = features["attention_mask"].bool(), module.module_output_name
        rows = []
        for row, valid in enumerate(mask):
            forget_lengths(module)
            text = {key: features[key][row : row + 1, valid] for key in ("input_ids", "attention_mask")}
            rows.append(own({**features, **text}, **kwargs)[name][0])
        padded = rows[0].new_zeros(*mask.shape, rows[0].shape[-1])
        return {**features, name: padded.masked_scatter(mask[..., None], torch.cat(rows))}


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A block in which transformers shows none for loading weights, one on each rank."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def texts_of_group(group: int) -> list[list[str]]:
    """The texts of a data-parallel group, queries and documents."""
    generator = torch.Generator().manual_seed(group)
    words = lambda length: torch.randint(FIRST_TOKEN, VOCABULARY, (length,), generator=generator).tolist()
    return [[" ".join(f"w{number}" for number in words(length)) for length in lengths] for lengths in LENGTHS]


def num_tokens_of(model: SentenceTransformer, texts: list[str]) -> int:
    """Tokens of some texts."""
    return int(model.preprocess(texts)["attention_mask"].sum())


def num_modes_of(tested: ModelUnderTest) -> int:
    """How many embeddings of a text are concatenated in the one that the model gives."""
    return len(POOLING_MODES) if tested.weights is None else 1


def _write(model: torch.nn.Module, folder: str) -> PreTrainedTokenizerFast:
    # By hand: `save_pretrained` writes on the first rank of a world only.
    Path(folder, "config.json").write_text(model.config.to_json_string())
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer = _tokenizer(model.config)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """One word a token: `w12` is token 12. Those below the first of ordinary text are special, such as `[3]`."""
    text = config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and 0 <= padding < text.vocab_size else 0
    special = [f"[{number}]" for number in range(min(FIRST_TOKEN, text.vocab_size))]
    words = special + [f"w{number}" for number in range(len(special), text.vocab_size)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[padding]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=words[padding], extra_special_tokens=special, model_max_length=256
    )
