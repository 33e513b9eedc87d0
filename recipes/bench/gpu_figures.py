"""What of the results of `gpu.py` is a figure, how it is found, and the goal that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


Results = Mapping[str, dict]  # of the parts that have one, by name
LAYERS_8B, SHORT_8B, LONG_8B = 32, 2, 4


@dataclass(frozen=True)
class Figure:
    """A number of the results, and what it should reach.

    Args:
        what (`str`): in words.
        find (`Callable[[Results], float | None]`): takes it out; what it does not find was not measured.
        form (`str`, *optional*, defaults to `"{:.2f}"`): how it is shown, its goal likewise.
        least, most (`float`, *optional*): the goal; without one the figure is published as it is.
    """

    what: str
    find: Callable[[Results], float | None]
    form: str = "{:.2f}"
    least: float | None = None
    most: float | None = None

    @property
    def goal(self) -> str:
        limits = (("at least ", self.least), ("at most ", self.most))
        return " and ".join(words + self.form.format(limit) for words, limit in limits if limit is not None)

    def is_met(self, value: float) -> bool | None:
        """`None` without a goal."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def row_of(results: Results, part: str, **facts: object) -> dict | None:
    """The first measured row of a part with these facts."""
    rows = results[part]["rows"] if part in results else ()
    return next(
        (row for row in rows if all(row.get(k) == v for k, v in facts.items()) and not row.get("failed")), None
    )


def number(part: str, key: str, **facts: object) -> Callable[[Results], float | None]:
    """Finds `key` in the row of `part` with these facts."""
    return lambda results: (row_of(results, part, **facts) or {}).get(key)


def ratio(part: str, key: str, above: dict, below: dict) -> Callable[[Results], float | None]:
    """Finds `key` of one row over that of another."""

    def find(results: Results) -> float | None:
        values = [number(part, key, **facts)(results) for facts in (above, below)]
        return None if None in values else values[0] / values[1]

    return find


def worst(part: str, key: str, **facts: object) -> Callable[[Results], float | None]:
    """Finds the largest magnitude of `key` in all measured rows of `part`."""

    def find(results: Results) -> float | None:
        rows = results[part]["rows"] if part in results else ()
        mine = [abs(r[key]) for r in rows if r.get(key) is not None and all(r.get(k) == v for k, v in facts.items())]
        return max(mine, default=None)

    return find


def total(part: str, key: str) -> Callable[[Results], float | None]:
    return lambda results: sum(row[key] for row in results[part]["rows"]) if part in results else None


def of_preset(part: str, preset: str, key: str) -> Callable[[Results], float | None]:
    """Finds what follows from the line of a memory preset."""

    def find(results: Results) -> float | None:
        presets = results[part]["presets"] if part in results else ()
        return next((row[key] for row in presets if row["label"] == f'"{preset}"'), None)

    return find


def extrapolated(preset: str) -> Callable[[Results], float | None]:
    """KB a token of the whole 8B model, from the lines of two short ones."""

    def find(results: Results) -> float | None:
        short, long = (of_preset(f"ladder_8b_{n}", preset, "kilobytes_a_token")(results) for n in (SHORT_8B, LONG_8B))
        if short is None or long is None:
            return None
        return long + (LAYERS_8B - LONG_8B) * (long - short) / (LONG_8B - SHORT_8B)

    return find


def loss_is_flat(results: Results) -> float | None:
    rows = [row for row in results["tiled_loss"]["rows"] if row["name"] == "ours" and not row["failed"]]
    return rows[-1]["above_gb"] / rows[0]["above_gb"] if len(rows) > 1 and rows[0]["above_gb"] else None


def step_figures(tokens: int) -> list[Figure]:
    rows = {name: {"name": name, "tokens": tokens} for name in ("stock", "ulysses", "packed")}
    shown = f"1B shape, {tokens // 1024}K tokens"
    mfu = {name: number("step", "mfu", **facts) for name, facts in rows.items()}
    figures = [Figure(f'{shown}, `"ulysses"`: MFU', mfu["ulysses"], "{:.1%}", least=0.45 if tokens == 65536 else None)]
    figures += [Figure(f"{shown}, {name}: MFU", mfu[name], "{:.1%}") for name in ("stock", "packed")]
    figures += [
        Figure(f"{shown}, {name}: {words}", number("step", key, **facts), form)
        for name, facts in rows.items()
        for key, words, form in (("tokens_per_second", "tokens/s", "{:,.0f}"), ("peak_gb", "peak GB", "{:.1f}"))
    ]
    return figures


def packing_figures(lengths: str, goal: float) -> list[Figure]:
    ours = {"case": f"{lengths}, 1B shape", "attention": "packed"}
    return [
        Figure(f"{lengths} lengths: tokens/s over padded", number("packing", "vs_padded", **ours), least=goal),
        Figure(f"{lengths} lengths: tokens/s over packed with a mask", number("packing", "vs_trl", **ours)),
    ]


def loss_figures(name: str) -> list[Figure]:
    return [
        Figure(f"loss, 32K tokens, {name}: {words}", number("tiled_loss", key, name=name, tokens=32768), form)
        for key, words, form in (("seconds", "seconds", "{:.3f}"), ("above_gb", "GB above gradients", "{:.2f}"))
    ]


def plan_error(part: str) -> tuple:
    """What finds the worst error of a plan, how it is shown, and its goal."""
    return worst(part, "plan_error"), "{:.1%}", None, 0.1


def ladder_figures(part: str, words: str) -> list[Figure]:
    figures = [
        Figure(f"{words}, `{preset}`: KB a token", of_preset(part, preset, "kilobytes_a_token"), "{:,.0f}")
        for preset in ("off", "loss", "mlp", "checkpoint", "max")
    ]
    return [*figures, Figure(f"{words}: worst error of the plan", *plan_error(part))]


SLEEP_FIGURES = [
    Figure(
        f"sleep: seconds of a {what} with 4 passes over 1",
        ratio("sleep", "seconds", {"kind": kind, "passes": 4}, {"kind": kind, "passes": 1}),
    )
    for what, kind in (("training step", "step"), ("prompt", "prompt"), ("token", "token"))
]


def pairs_figures(pairs: int) -> list[Figure]:
    """Of the ranking loss in tiles over so many pairs."""
    what, which = f"tiled ranking loss, {pairs // 1024}K pairs", {"label": "ours", "pairs": pairs}
    return [
        Figure(f"{what}: seconds", number("contrastive_loss", "seconds", **which), "{:.3f}"),
        Figure(f"{what}: peak bytes", number("contrastive_loss", "peak_bytes", **which), "{:,.0f}"),
    ]


OURS = 'ours, "packed"'
SHAPES_FIGURES = [
    Figure(
        f"{shape}: speed-up of packed over {label}",
        ratio("embed_shapes", "seconds", {"shape": shape, "label": label}, {"shape": shape, "label": OURS}),
    )
    for shape in ("MiniLM", "ModernBERT-base")
    for label in ("padded, sdpa", "padded, flash_attention_2")
]
LSH_FIGURES = [
    *(
        Figure(
            f"attention alone, {tokens // 1024}K tokens: {what} of flash over {label}",
            ratio("lsh", key, {"tokens": tokens, "label": "sdpa"}, {"tokens": tokens, "label": label}),
        )
        for tokens in (8192, 65536, 262144)
        for label in ("causal LSH, 4 rounds", "LSH, 4 rounds")
        for what, key in (("seconds", "seconds"), ("peak", "peak_bytes"))
    ),
    Figure(
        "attention alone, 1M tokens: seconds of causal LSH, 4 rounds",
        number("lsh", "seconds", tokens=2**20, label="causal LSH, 4 rounds"),
    ),
]

LONG_LSH_FIGURES = [
    Figure("LSH, reversible, tiles: longest row that was run", worst("long_row_lsh", "tokens"), "{:,.0f}"),
    Figure("LSH, reversible, tiles: seconds of its step", worst("long_row_lsh", "seconds")),
    Figure("LSH, reversible, tiles: GB of its step", worst("long_row_lsh", "step_gb")),
    Figure("LSH, reversible, tiles: worst error of the plan", *plan_error("long_row_lsh")),
]
PREFERENCE_FIGURES = [
    Figure(
        f"DPO, a pair of lengths {lengths}: {what} of flattened over padded rows",
        ratio(
            "preference",
            key,
            {"lengths": lengths, "label": "one process, flattened"},
            {"lengths": lengths, "label": "one process"},
        ),
        most=0.65 if lengths == "1:4" and key == "seconds" else None,
    )
    for lengths in ("1:1", "1:4")
    for what, key in (("seconds", "seconds"), ("activations", "activation_bytes"))
]
