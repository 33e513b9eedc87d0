"""A word-level tokenizer of 97 words with a chat template, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .models import VOCAB


TEMPLATE = (
    "{% for message in messages %}{{ 'user ' if message['role'] == 'user' else 'bot ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' [EOS]' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[BOS]", "[EOS]", "user", "bot", *(f"w{i}" for i in range(VOCAB - 5))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", model_max_length=256
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """It splits numbers into digits, and knows the words of a needle."""
    needle = "What is the pass key? The key is . Remember it."
    vocabulary = ["[PAD]", "[BOS]", "[EOS]", "w", *"0123456789", *dict.fromkeys(needle.split())]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[PAD]"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", model_max_length=256
    )


def words(count: int, seed: int) -> str:
    return " ".join(f"w{(seed * 31 + i * i * 7 + i) % (VOCAB - 5)}" for i in range(count))
