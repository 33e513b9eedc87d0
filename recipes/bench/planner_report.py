"""The columns and sentences of `planner.py`."""

from __future__ import annotations

from page import Page, bullets, fill
from transformers import PretrainedConfig


COLUMNS = {
    "shape": "{shape}",
    "tokens": "{tokens:,}",
    "memory": "{preset}",
    "fullest": "{phase}",
    "states MiB": lambda row: f"{row['states'] / 2**20:,.0f}",
    "planned MiB": lambda row: f"{row['planned'] / 2**20:,.0f}",
    "measured MiB": lambda row: f"{row['measured'] / 2**20:,.0f}",
    "error": "{error:+.1%}",
    "step only": lambda row: f"{(row['planned'] - row['states']) / (row['measured'] - row['states']) - 1:+.1%}",
}
READING = """\
- *states*: weights, gradients and AdamW's two moments, which any formula gets right. *planned*, *measured*: the
  fullest moment of the step, states included. *error*: planned over measured, less one.
- *step only*: the same error for what is left without the states, that is activations, logits and buffers. It is the
  harder figure, and large in percent where there is little left.
- *fullest*: the part of the step in which the plan is fullest; `backward -1` is that of the last layer.
- Measured is the largest resident set of a process of its own, less what it held before there was a model. A plan
  counts tensors; whatever else a process takes in a step (buffers inside kernels, rounding of the allocator, code that
  is read in late) is measured and not planned.
"""
ON_CUDA = """\
- Measured is the most bytes that torch's allocator had given out during the step. A plan counts tensors.
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


def summary(result: dict) -> str:
    """The worst of all cells, in one sentence."""
    rows = result["rows"]
    at = max(rows, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= 0.1 for row in rows)
    return (
        f"{within} of {len(rows)} plans are within 10 % of the measured peak; the worst is {at['error']:+.1%} "
        f"({at['shape']}, {at['tokens']:,} tokens, `{at['preset']}`)."
    )


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    on_cpu = settings.get("device", "cpu") == "cpu"
    device, dtype = ("a CPU", "fp32") if on_cpu else ("CUDA", "bfloat16")
    return Page(
        title=f"The memory planner on {device}: planned and measured peak of a training step",
        intro=[
            f"One row a step, {dtype}, {settings['optimizer']}; tiles of {settings['tile_tokens']} tokens where a "
            "preset has any.",
            bullets(f"*{name}*: {words}" for name, words in result["shapes"].items()),
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[summary(result)],
        reading=READING if on_cpu else READING[: READING.index("- Measured is")] + ON_CUDA,
        sections={"When not to trust a plan": WHEN_NOT if on_cpu else WHEN_NOT[: WHEN_NOT.index("- **A GPU**")]},
        raw="numbers",
    )
