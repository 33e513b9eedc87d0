"""A model card as the Hub and a reader take it: metadata that is accepted, files that are there, code that runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_longctx.reporting.card_rules import card_problems


# The least that a card is written from.
METRICS = {
    "name": "x",
    "base_model": None,
    "dataset": None,
    "row_tokens": 8,
    "sequence_parallel_size": 1,
    "data_parallel_size": 1,
    "num_steps": 1,
    "history": [],
    "eval_history": [],
    "train": {},
    "peak_memory": [],
    "settings": {},
    "versions": {},
    "command": "python x.py",
}


def check_card(folder: Path, runs: bool = True) -> dict[str, Any]:
    """The metadata of the card in `folder`, which the Hub would accept; its code was run, its pictures are there."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)  # not `ignore_metadata_errors`: a broken front matter raises
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block, "no front matter"
    metadata = yaml.safe_load(block[1])
    assert card_problems(metadata) == {} and card_problems(card.data.to_dict()) == {}
    assert metadata["library_name"] and metadata["pipeline_tag"] and "hf_longctx" in metadata["tags"]
    for name in (metadata.get("base_model"), *metadata.get("datasets", [])):
        assert name is None or not os.path.exists(name)
    assert str(folder.parent) not in block[1]
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (folder / picture).is_file()
    assert "sentence_transformers_model_id" not in text
    if runs:
        run_usage(text, folder)
    return metadata


def run_usage(text: str, folder: Path) -> None:
    """Run the first block of Python of a card, next to the folder, as who downloaded it does."""
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code, "no code that shows how to use it"
    here = os.getcwd()
    os.chdir(folder.parent)
    try:
        exec(compile(code[1], "card", "exec"), {"__name__": "card"})
    finally:
        os.chdir(here)
