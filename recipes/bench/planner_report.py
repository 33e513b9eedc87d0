"""How `planner.py` shows its numbers: a table in the terminal, and a Markdown page with the raw JSON next to it."""

from __future__ import annotations

from pathlib import Path

from page import markdown_table, write_page
from transformers import PretrainedConfig


HEADERS = ("shape", "tokens", "memory", "fullest", "states MiB", "planned MiB", "measured MiB", "error", "step only")
READING = """\
- *states*: weights, gradients and AdamW's two peaks, which any formula gets right. *planned*, *measured*: the
  fullest moment of the step, states included. *error*: planned over measured, less one.
- *step only*: the same error for what is left without the states, that is activations, logits and buffers. It is the
  harder figure, and large in percent where there is little left.
- *fullest*: the part of the step in which the plan is fullest; `backward -1` is that of the last layer.
- Measured is the largest resident set of a process of its own, less what it held before there was a model. A plan
  counts tensors; whatever else a process takes in a step (buffers inside kernels, rounding of the allocator, code that
  is read in late) is measured and not planned.
"""
WHEN_NOT = """\
- **Attention with `T x T` weights** (softcap or sinks without a flash kernel, attention dropout on a CPU): the plan is
  for a kernel that keeps none.
- **Rows of a few hundred tokens**: fixed costs that no plan has (buffers of matrix products, late code) weigh as much
  as activations.
- **A GPU**: nothing on this page was measured there. 8 % of the device are left to its context and the gaps of its
  allocator.
"""


def describe(config: PretrainedConfig, parameters: int) -> str:
    """One shape in words."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tied = "tied" if config.tie_word_embeddings else "untied"
    return (
        f"`{type(config).__name__}`, {parameters / 1e6:.0f} million parameters, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {config.num_attention_heads} query and {kv_heads} key/value heads, "
        f"{config.vocab_size:,} words, {tied}"
    )


def cells(row: dict) -> list[str]:
    """One row of the table, in the order of `HEADERS`."""
    mib = [row[key] / 2**20 for key in ("states", "planned", "measured")]
    step = (row["planned"] - row["states"]) / (row["measured"] - row["states"]) - 1
    return [
        row["shape"],
        f"{row['tokens']:,}",
        row["preset"],
        row["phase"],
        *(f"{number:,.0f}" for number in mib),
        f"{row['error']:+.1%}",
        f"{step:+.1%}",
    ]


def summary(result: dict) -> str:
    """The worst of all cells, in one message."""
    rows = result["rows"]
    at = max(rows, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= 0.1 for row in rows)
    return (
        f"{within} of {len(rows)} plans are within 10 % of the measured peak; the worst is {at['error']:+.1%} "
        f"({at['shape']}, {at['tokens']:,} tokens, `{at['preset']}`)."
    )


def write_report(result: dict, path: Path) -> None:
    """Write `path` (Markdown), and the raw JSON next to it."""
    settings = result["settings"]
    lines = [
        "# The memory planner on a CPU: planned and measured peak of a training step",
        "",
        f"One row a step, fp32, {settings['optimizer']}; tiles of {settings['tile_tokens']} tokens where a preset has "
        "any.",
        "",
        *(f"- *{name}*: {words}" for name, words in result["shapes"].items()),
        "",
        markdown_table(HEADERS, map(cells, result["rows"])),
        "",
        summary(result),
        "",
        "## How to read it",
        "",
        READING,
        "## When not to trust a plan",
        "",
        WHEN_NOT,
    ]
    write_page(path, result, lines, raw="numbers")
