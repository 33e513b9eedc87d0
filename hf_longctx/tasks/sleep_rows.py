"""Rows whose answers need thought over what was read before: an automaton, hops in a cycle, sums.

All are made of numbers, at once, with exact labels. A row is a stretch that sleeps, then questions. A label stands at
the token behind the one that predicts it, as for any causal language model; what an answer needs stands in windows
that are forgotten by then, so attention alone can only guess.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class ThoughtRows(Dataset):
    """Rows made at once: `input_ids`, `labels`, and which question each label belongs to.

    Attributes:
        vocab_size (`int`): of the tokens.
        window (`int`): tokens after which a row is forgotten.
        guess (`float`): share of questions that are right by chance.
    """

    vocab_size: int
    window: int
    guess: float
    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def right(self, logits: torch.Tensor, rows: slice) -> dict[str, float]:
        """How many rows are right in every label, and the share of right labels."""
        labels = self.labels[rows, 1:]
        asked = labels != -100
        hit = (logits[:, :-1].argmax(-1) == labels) & asked
        return {
            "exact": float((hit == asked).all(dim=1).double().sum()),
            "labels": float(hit.sum() / asked.sum()),
        }


def step_rule110(bits: torch.Tensor) -> torch.Tensor:
    """One step of Rule 110 on rings of bits: 1 unless left, own and right bit are 111, 100 or 000."""
    left, right = bits.roll(1, -1), bits.roll(-1, -1)
    return (bits | right) & ~(left & bits & right)


class Rule110Rows(ThoughtRows):
    """Random rings of bits, which sleep; then tokens that ask for bits after some steps of Rule 110.

    Args:
        num_rows, num_bits, num_states (`int`): a state is a ring of `num_bits` bits, and a window.
        steps (`int`): of the automaton.
        seed (`int`): of the rows.
        asks_all (`bool`): all bits of every state are asked for, or the first of each.
    """

    def __init__(
        self, num_rows: int, num_bits: int, steps: int, seed: int, num_states: int = 1, asks_all: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        states = torch.randint(2, (num_rows, num_states, num_bits), generator=generator).bool()
        later = states
        for _ in range(steps):
            later = step_rule110(later)
        answers = (later if asks_all else later[..., :1]).flatten(1).long()
        count = answers.shape[1]
        questions = torch.arange(2, 2 + count).expand(num_rows, -1)
        end = torch.full((num_rows, 1), 2 + count)
        self.input_ids = torch.cat([states.flatten(1).long(), questions, end], dim=1)
        self.labels = torch.full_like(self.input_ids, -100)
        self.labels[:, -count:] = answers
        self.vocab_size, self.window, self.guess = 3 + count, num_bits, 0.5**count


class DepoRows(ThoughtRows):
    """A cycle of nodes as edges in random order, which sleep; then questions: who is `k` edges behind a node?

    A node has a name of two tokens, an edge two names, a question six tokens: how many hops, the node, its answer,
    and an end. Rows of fewer nodes are padded to `4 * num_nodes` tokens, so that questions stand where they always do.

    Args:
        num_rows, num_nodes (`int`): each row has a cycle of 3 up to `num_nodes` nodes.
        most_hops (`int`): `k` is 1 up to this.
        num_questions (`int`): of a row.
        window (`int`): a multiple of 4 makes no edge stand in two windows; the paper's 75 is none.
        seed (`int`): of the rows.
    """

    def __init__(
        self, num_rows: int, num_nodes: int, most_hops: int, num_questions: int, window: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = int(num_nodes**0.5) + 2  # first and second token are each one of as many
        draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
        first_hop, pad = 2 * names, 2 * names + most_hops
        end = pad + 1
        ids = torch.full((num_rows, 4 * num_nodes + 6 * num_questions), pad)
        labels = torch.full_like(ids, -100)
        self.hops = torch.zeros(num_rows, num_questions, dtype=torch.long)
        for row in range(num_rows):
            size = int(draw(num_nodes - 2, 1)) + 3
            order = torch.randperm(names * names, generator=generator)[:size]
            pairs = torch.stack([order // names, names + order % names], dim=1)
            edges = torch.cat([pairs, pairs.roll(-1, 0)], dim=1)[torch.randperm(size, generator=generator)]
            ids[row, : 4 * size] = edges.flatten()
            for question in range(num_questions):
                node, hops = int(draw(size, 1)), int(draw(most_hops, 1)) + 1
                place = 4 * num_nodes + 6 * question
                answer = pairs[(node + hops) % size]
                ids[row, place : place + 6] = torch.tensor(
                    [first_hop + hops - 1, *pairs[node].tolist(), *answer.tolist(), end]
                )
                labels[row, place + 3 : place + 5] = answer
                self.hops[row, question] = hops
        self.input_ids, self.labels = ids, labels
        self.vocab_size, self.window, self.guess = end + 1, window, 1 / num_nodes**num_questions


class SumRows(ThoughtRows):
    """Two-step arithmetic: `(a + b) * c mod 10` first, noise between, the answer last.

    Args:
        num_rows (`int`): of the data set.
        num_noise (`int`): tokens between question and answer; at least the window, so that the question is forgotten.
        window (`int`): tokens after which a row is forgotten.
        seed (`int`): of the rows.
    """

    def __init__(self, num_rows: int, num_noise: int, window: int, seed: int) -> None:
        if num_noise < window:
            raise ValueError(
                f"`num_noise` ({num_noise}) leaves the question in a `window` ({window}) with its answer: raise it."
            )
        generator = torch.Generator().manual_seed(seed)
        digits = torch.randint(10, (num_rows, 3), generator=generator)
        plus, times, ask, first = 10, 11, 12, 13
        noise = torch.randint(first, first + 8, (num_rows, num_noise), generator=generator)
        mark = lambda token: torch.full((num_rows, 1), token)
        one, two, three = digits.split(1, dim=1)
        answer = (one + two) * three % 10
        self.input_ids = torch.cat([one, mark(plus), two, mark(times), three, noise, mark(ask), answer], dim=1)
        self.labels = torch.full_like(self.input_ids, -100)
        self.labels[:, -1:] = answer
        self.vocab_size, self.window, self.guess = first + 8, window, 0.1
