"""The tasks that have a command, with its help; imports nothing, so that help costs nothing."""

from __future__ import annotations


TRAINERS = {
    "sft": "fine-tune on documents or conversations",
    "pretrain": "train on rows of an exact length",
    "dpo": "train on preferred and rejected answers",
    "reward": "train a model that scores answers",
    "kto": "train on answers marked as good or bad",
    "embed": "train an embedding model on many sources",
}
TOYS = {
    "sleep": "a toy: a hybrid learns rows that need thought",
    "indexer_warmup": "a toy: a dense model becomes a sparse one",
    "recall_sparse": "a toy: which sparse layers recall beyond their window",
    "pretrain_alibi": "a toy: ALiBi past the length of training",
    "lsh_pretrain": "a toy: a model of bytes from scratch, on LSH attention",
    "lsh_duplication": "a toy: the duplication task of the Reformer paper",
}
TASKS = TRAINERS | TOYS
# `hf-longctx ttt train`, beside `ttt convert` and `ttt eval`.
COMMANDS = {**{name: name for name in TRAINERS}, "ttt": "ttt train"}
