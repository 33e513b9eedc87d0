"""The page of `ttt.py`."""

from __future__ import annotations

from page import Page, fill, quietness


COLUMNS = {
    "what": "{label}",
    "tokens": "{tokens:,}",
    "chunk": "{chunk}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "CPU time": "{cpu_seconds_ratio:.2f}",
    "time": "{seconds_ratio:.2f}",
    "peak MB": "{peak_mb:.0f}",
    "us a token": "{token_us:.0f}",
    "cache MB": "{cache_mb:.3f}",
    "others": "{other_load:.0%}",
}
READING = """\
- *CPU time*, *time*: over those of the step of full attention on as many tokens; for reading, a token's over that of
  the shortest row. A recomputed step keeps what goes into a chunk, or into a group of chunks, and runs it again.
- *reading*: from nothing. A step follows every chunk but the last, so a long row takes more of them a token than a
  short one: 7 after 8 chunks, 127 after 128, which is 1.04 a token by the products of matrices alone. *reading on,
  after*: the same number of further tokens, so every chunk has its step; this is the cost that must not grow.
- Short chunks are bound by calls. The attention of the first suffix layer sees no fast weights and runs once over a
  row, which took a chunk from 2,226 operators to 1,657; what is left are products of a few tokens.
- *peak MB*: what memory grew by during the step; on a CPU, of the process.
- Full attention costs more and more a token, and inner steps cost the same: on short rows E2E is the slower one.
"""


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title="Learning while reading (TTT-E2E)",
        intro=[
            f"A training step of one row, of a Llama of {settings['layers']} layers and width {settings['hidden']}, "
            f"random weights, a window of {settings['window']}, fast weights in the last quarter of the layers; and "
            "reading with a cache."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s* and *time*", rest="*CPU time* is, roughly.")],
        reading=READING,
    )
