"""DPO on shared rows: its step against one process, the bytes of its gather, and what flattened rows gain.

    python recipes/bench/preference.py --tokens 512 --layers 6

One process with as many threads as there are ranks, against ranks of one thread each. The model has the sizes of
SmolLM2-135M and random weights; loss and gradients are compared before anything is measured. Times are the smallest of
the repeats, taken in turn, so that other programs disturb all ways alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from preference_worker import measure
from versions import versions_of

from hf_longctx.proof.ranks import Ranks


PACKAGES = ("torch", "transformers", "trl")


def attention_bytes(settings: dict, ranks: int) -> int:
    """What a rank sends in the all-to-alls of one policy step and one reference forward, 4 bytes a number."""
    config = settings["config"]
    size = config["hidden_size"] // config["num_attention_heads"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    share = 2 * settings["tokens"] // ranks * (ranks - 1) // ranks
    return 3 * 4 * config["num_hidden_layers"] * heads * size * share


def page(settings: dict, results: dict, ranks: int, command: str) -> str:
    found = ", ".join(f"{name} {number}" for name, number in versions_of(PACKAGES).items())
    layers = settings["config"]["num_hidden_layers"]
    lines = [
        "# DPO on shared rows, on a CPU",
        "",
        f"`{command}`; {found}. {layers} layers with the sizes of SmolLM2-135M, one pair, rows of "
        f"{settings['tokens']:,} tokens, fp32, {ranks} ranks of one thread against one process of {ranks} threads. A "
        "step is both forwards, the backward and the mean of gradients.",
        "",
        "| lengths of a pair | real tokens of padded ones | one process | shared | shared, flattened | shared / one | "
        "flattened / shared | gather / attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        times = row["seconds"]
        share = row["gather_bytes"] / attention_bytes(settings, ranks)
        lines.append(
            f"| {name} | {row['real']:,} of {row['padded']:,} | {times['alone']:.2f} s | {times['shared']:.2f} s | "
            f"{times['flattened']:.2f} s | {times['shared'] / times['alone']:.2f} | "
            f"{times['flattened'] / times['shared']:.2f} | {100 * share:.3f} % |"
        )
    errors = [abs(row["norms"][way] / row["norms"]["alone"] - 1) for row in results.values() for way in row["norms"]]
    lines += [
        "",
        f"Before anything is measured, norms of the gradient agree to {max(errors):.0e} in fp32.",
        "",
    ]
    lines.append("When not to use it: where a row fits one process, data parallel groups need no exchange in a layer;")
    lines.append("where the rows of a batch are about as long, flattening gains nothing.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="page to write; next to it the numbers, as JSON")
    args = parser.parse_args()
    config = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    settings = {"config": config, "tokens": args.tokens, "repeats": args.repeats}
    with Ranks(args.ranks) as ranks:
        results = ranks.run(measure, settings)[0]
    for row in results.values():
        loss = row["losses"]["alone"]
        if any(abs(value - loss) > 1e-4 * max(1.0, abs(loss)) for value in row["losses"].values()):
            raise SystemExit(f"losses differ: {row['losses']}")
    command = f"python recipes/bench/preference.py --tokens {args.tokens} --layers {args.layers} --ranks {args.ranks}"
    text = page(settings, results, args.ranks, command)
    print(text)
    if args.out is not None:
        args.out.write_text(text)
        args.out.with_suffix(".json").write_text(
            json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
