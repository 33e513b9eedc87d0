"""The page of `sleep.py`, from its numbers alone."""

from __future__ import annotations

from page import Page, add_medians, add_ratios, device_of, fill, quietness


COLUMNS = {
    "what": "{label}",
    "passes": "{passes}",
    "s": "{seconds:.3f}",
    "CPU s": "{cpu_seconds:.3f}",
    "CPU time": lambda row: f"{row['cpu_seconds_ratio']:.2f}" if row.get("cpu_seconds_ratio") else "",
    "keys": "{peak_keys}",
    "others": "{other_load:.0%}",
}
READING = """\
- *CPU time*: ratio to one pass of the same kind. Sleeping windows cost as many forwards as there are passes, so a step
  or a prompt comes near that number the more of it sleeps; a token behind it costs the same.
- *keys*: the most keys that a layer attended to: the window, at any length.
- Windows that are not a multiple of 64 tokens are padded to it by the delta rule of transformers in plain torch;
  `chunk_size` in the batch travels on to it, and does nothing for fused kernels.
- When not to use it: rows that attention can hold, and answers that need words of the text: what is forgotten verbatim
  is gone.
"""


def summarize(rows: list[dict], cores: int) -> None:
    """Medians and ratios, from the runs alone."""
    for row in rows:
        add_medians(row, row["runs"], cores, ("peak_keys",))
    for row in rows:
        fewest = min(other["passes"] for other in rows)
        once = next(other for other in rows if (other["kind"], other["passes"]) == (row["kind"], fewest))
        if row is not once:
            add_ratios(row, once)


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title=f"Sleep on {device_of(result)}",
        intro=[
            f"A hybrid of {settings['layers']} layers of {settings['hidden']}, four rows of {settings['windows']} "
            f"windows of {settings['window']} tokens that sleep and one that is awake; {settings['tokens']} tokens "
            f"are generated. {settings['cores']} thread(s), float32."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*", rest="Keys are, and *CPU time* roughly.")],
        reading=READING,
    )
