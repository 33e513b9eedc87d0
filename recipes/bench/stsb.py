"""Score a sentence-transformer on a csv file of the STS benchmark: padded, packed, or with rows shared by processes.

    torchrun --standalone --nproc_per_node 2 recipes/bench/stsb.py --way shared --file stsb-en-dev.csv --model MODEL

The benchmark is not part of this repository (its texts have terms of their own): sentence, sentence and a score from
0 to 5 a line, without a header. Prints the Spearman correlation of cosines with scores as JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from hf_longctx import SequenceMesh, pack_embeddings


WAYS = {"padded": "sdpa", "packed": "packed", "shared": "ulysses"}


def read_stsb(file: Path) -> tuple[list[str], list[str], list[float]]:
    with file.open(encoding="utf-8", newline="") as lines:
        first, second, scores = zip(*csv.reader(lines))
    return list(first), list(second), [float(score) for score in scores]


def score(model_name: str, file: Path, way: str, mesh: SequenceMesh | None = None) -> float:
    """The Spearman correlation on all rows of `file`."""
    model = SentenceTransformer(model_name, model_kwargs={"attn_implementation": WAYS[way]}, device="cpu")
    if way != "padded":
        pack_embeddings(model, mesh)
    evaluator = EmbeddingSimilarityEvaluator(*read_stsb(file), write_csv=False)
    return evaluator(model)["spearman_cosine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    args = parser.parse_args()
    mesh = None
    if args.way == "shared":
        dist.init_process_group("gloo")
        mesh = SequenceMesh.build(dist.get_world_size())
    spearman = score(args.model, args.file, args.way, mesh)
    if mesh is None or dist.get_rank() == 0:
        print(json.dumps({"spearman": spearman}))
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
