"""Rows on which a small model learns to recall, and how much it does.

A row is a stream of single tokens. Some bind a key to a value; all the others ask for the value of a key that was
bound before. Every question counts in the loss, the early ones with few keys to choose from, which is why a model of
two layers learns the task within a minute on a CPU. What a question needs is one token, at any distance: attention
that does not reach it can only guess.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback


class RecallRows(Dataset):
    """Rows of bindings and questions, made at once.

    Args:
        num_rows, row_tokens (`int`): of the data set, and of each row.
        num_keys, num_values (`int`): every row binds all keys, in its first half.
        seed (`int`): of the rows.

    Attributes:
        distances (`torch.Tensor` of shape `(rows, row_tokens)`): how many tokens back a question's answer stands; 0 at
            a binding.

    Raises:
        ValueError: the first half of a row is too short for all keys.
    """

    def __init__(self, num_rows: int, row_tokens: int, num_keys: int, num_values: int, seed: int) -> None:
        if not 0 < num_keys <= row_tokens // 2:
            raise ValueError(
                f"`num_keys` ({num_keys}) are bound in the first half of {row_tokens} tokens: set it to 1 up to "
                f"{row_tokens // 2}, or raise `row_tokens`."
            )
        generator = torch.Generator().manual_seed(seed)
        shape = (num_rows, row_tokens)
        keys = torch.rand(num_rows, num_keys, generator=generator).argsort(1)
        values = torch.randint(num_values, (num_rows, num_keys), generator=generator)
        places = torch.rand(num_rows, row_tokens // 2 - 1, generator=generator).argsort(1)[:, : num_keys - 1] + 1
        places = torch.cat([torch.zeros(num_rows, 1, dtype=torch.long), places.sort(1).values], 1)
        binds = torch.zeros(shape, dtype=torch.bool).scatter_(1, places, True)
        bound = binds.cumsum(1)
        asked = (torch.rand(shape, generator=generator) * bound).long()
        which = torch.where(binds, bound - 1, asked)
        key, value = keys.gather(1, which), values.gather(1, which)
        self.input_ids = torch.where(binds, num_keys + key * num_values + value, key)
        self.answers = torch.where(binds, -100, value)
        self.distances = torch.arange(row_tokens) - places.gather(1, which)

    @staticmethod
    def vocab_size(num_keys: int, num_values: int) -> int:
        """Questions, and bindings of every key to every value; an answer is one of the first tokens."""
        return max(num_keys + num_keys * num_values, num_values)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        answers = self.answers[index]
        labels = torch.cat([answers.new_full((1,), -100), answers[:-1]])  # models compare with the next label
        return {"input_ids": self.input_ids[index], "labels": labels}

    def accuracy(self, model: torch.nn.Module, beyond: int = 0) -> float:
        """The share of questions that are answered right, of those whose answer stands further back than `beyond`."""
        asked = self.distances > beyond
        with torch.no_grad():
            chosen = torch.cat([model(input_ids=ids, use_cache=False).logits.argmax(-1) for ids in self.batches()])
        return (chosen == self.answers)[asked].double().mean().item()

    def batches(self, num_rows: int = 16) -> tuple[torch.Tensor, ...]:
        """Tokens of a few rows at a time."""
        return self.input_ids.split(num_rows)


def copy_model(
    model: torch.nn.Module, attention: str, weights: Mapping[str, torch.Tensor] | None = None, **changes: int
) -> torch.nn.Module:
    """A new model of the same weights on another attention, with fields of the configuration changed.

    Args:
        model (`transformers.PreTrainedModel`): left as it is.
        attention (`str`): for `attn_implementation`; `"eager"` is transformers' own computation.
        weights (`Mapping[str, torch.Tensor]`, *optional*): instead of the model's.
    """
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    new = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    new.load_state_dict(model.state_dict() if weights is None else weights)
    return new.eval()


class AtStep(TrainerCallback):
    """Calls a function with the step and the model after some steps of a run."""

    def __init__(self, steps: Collection[int], function: Callable) -> None:
        self.steps, self.function = steps, function

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in self.steps:
            self.function(state.global_step, getattr(model, "module", model))
