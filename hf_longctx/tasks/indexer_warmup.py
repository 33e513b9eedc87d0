"""The stages in which a dense model becomes a sparse one, on a toy that recalls: dense, warm-up, sparse.

    python recipes/indexer_warmup.py --config recipes/indexer_warmup_tiny.yaml

A DeepSeek-V3.2 of two layers learns to recall while its indexers pick everything, so that attention is dense. Then
they pick `index_topk` tokens: first they alone learn what that attention weighs, then everything is trained. After
each stage transformers itself measures, on rows that no stage saw. Arguments are those of `TrainingArguments` (of the
last two stages, which are one run), of `LongContextConfig`, `MemoryConfig` and `IndexerConfig`, and the few below; the
command line overrides the YAML file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..config.indexer import IndexerConfig
from ..config.memory import MemoryConfig
from ..config.run import LongContextConfig
from ..trainer.causal_lm import LongContextTrainer
from ..trainer.ending import end_training
from .inputs import check_output_dir
from .recall_rows import AtStep, RecallRows, copy_model
from .recipe_file import parse_recipe


STAGES_FILE = "stages.json"


@dataclass
class IndexerWarmupArguments:
    """Of the toy, and of its first stage."""

    row_tokens: int = field(default=96, metadata={"help": "Tokens of a row."})
    num_keys: int = field(default=16, metadata={"help": "Keys that a row binds to values, and asks for."})
    num_values: int = field(default=8, metadata={"help": "Values of a key: a guess is right once in as many."})
    index_topk: int = field(default=8, metadata={"help": "Tokens that an indexer picks once the model is sparse."})
    base_steps: int = field(default=300, metadata={"help": "Steps of the dense stage, before there is a pick."})
    base_learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate of the dense stage."})
    num_eval_rows: int = field(default=64, metadata={"help": "Rows that each stage is measured on."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into `output_dir` though it is not empty; same names are replaced."}
    )

    def rows(self, count: int, seed: int) -> RecallRows:
        return RecallRows(count, self.row_tokens, self.num_keys, self.num_values, seed)


ARGUMENTS = (IndexerWarmupArguments, TrainingArguments, LongContextConfig, MemoryConfig, IndexerConfig)


def tiny_config(toy: IndexerWarmupArguments) -> object:
    """A DeepSeek-V3.2 whose indexers pick all tokens of a row; with 16 heads, hardly a score is 0 for all of them."""
    return AutoConfig.for_model(
        "deepseek_v32",
        vocab_size=RecallRows.vocab_size(toy.num_keys, toy.num_values),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=24,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=toy.row_tokens,
        max_position_embeddings=2 * toy.row_tokens,
        initializer_range=0.1,
    )


def attention_and_picks(dense: torch.nn.Module, rows: RecallRows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer and a few rows: the attention of all heads, and the tokens in the order in which they are picked.

    Args:
        dense (`transformers.PreTrainedModel`): on `"eager"`, with indexers that pick everything.

    Returns:
        Pairs of `torch.Tensor`s of shape `(rows, T, T)`; attention adds up to 1.
    """
    picks: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda *call: picks.append(call[-1].long()))
        for layer in dense.model.layers
    ]
    try:
        for ids in rows.batches():
            with torch.no_grad():
                weights = dense(input_ids=ids, use_cache=False, output_attentions=True).attentions
            yield from zip([layer.mean(1) for layer in weights], picks)
            picks.clear()
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: torch.nn.Module, rows: RecallRows, topk: int) -> dict[str, float]:
    """What transformers makes of a model's weights: how much it recalls, dense and sparse, and what its picks hold.

    Args:
        model (`transformers.PreTrainedModel`): a DeepSeek-V3.2, on any attention.
        topk (`int`): tokens that are picked.

    Returns:
        `dense_accuracy` and `sparse_accuracy`: the share of questions that are answered right. `recall`: the share of
        dense attention that the picks of a query hold, and `best`: that its `topk` largest weights hold, averaged
        over queries that see more than `topk` tokens and over layers; `share` is the ratio of the two.
    """
    dense = copy_model(model, "eager", index_topk=rows.input_ids.shape[1])
    sparse = copy_model(model, "eager", index_topk=topk)
    held, best = [], []
    for attention, picks in attention_and_picks(dense, rows):
        held.append(attention.gather(2, picks[..., :topk]).sum(-1)[:, topk:].mean())
        best.append(attention.topk(topk).values.sum(-1)[:, topk:].mean())
    recall, most = torch.stack(held).mean().item(), torch.stack(best).mean().item()
    return {
        "dense_accuracy": rows.accuracy(dense),
        "sparse_accuracy": rows.accuracy(sparse),
        "recall": recall,
        "best": most,
        "share": recall / most,
    }


def run_stages(toy, args, long_context, memory, indexer) -> tuple[LongContextTrainer, list[dict]]:
    """All stages, one after the other.

    Returns:
        The trainer of the last two, and what was measured, one row a stage.

    Raises:
        ValueError: `indexer` has not both stages, or indexers pick as many tokens as a row has.
    """
    if not 0 < (indexer.dense_steps or 0) < args.max_steps:
        raise ValueError(
            f"`dense_steps` ({indexer.dense_steps}) must be 1 or more and below `max_steps` ({args.max_steps}): the "
            "steps after it are the sparse stage."
        )
    if not 0 < toy.index_topk < toy.row_tokens:
        raise ValueError(
            f"`index_topk` ({toy.index_topk}) must be 1 or more and below `row_tokens` ({toy.row_tokens}): indexers "
            "that pick everything have nothing to learn."
        )
    set_seed(args.seed)
    attention = "ulysses" if long_context.sequence_parallel_size > 1 else "packed"
    options = {"data_collator": default_data_collator, "long_context": long_context, "memory": memory}
    eval_rows, stages = toy.rows(toy.num_eval_rows, args.seed + 2), []
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def add(stage: str, model: torch.nn.Module) -> None:
        stages.append({"stage": stage, **measure(model, eval_rows, toy.index_topk)})

    base_args = replace(
        args, max_steps=toy.base_steps, learning_rate=toy.base_learning_rate, save_strategy="no", eval_strategy="no"
    )
    # Indexers that pick everything are a causal mask to transformers' own attention.
    base = AutoModelForCausalLM.from_config(tiny_config(toy), attn_implementation="sdpa")
    rows = toy.rows(toy.base_steps * batch, args.seed)
    trainer = Trainer(model=base, args=base_args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    add("dense model, untrained indexers", base)

    model = copy_model(base, attention, index_topk=toy.index_topk)
    warmed = AtStep([indexer.dense_steps], lambda _, trained: add("indexers warmed up", trained))
    rows = toy.rows(args.max_steps * batch, args.seed + 1)
    trainer = LongContextTrainer(
        model=model, args=args, train_dataset=rows, indexer=indexer, callbacks=[warmed], **options
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    add("sparse model", trainer.accelerator.unwrap_model(trainer.model))
    return trainer, stages


@record
def main() -> None:
    toy, args, long_context, memory, indexer = parse_recipe(ARGUMENTS)
    check_output_dir(toy, args)
    trainer, stages = run_stages(toy, args, long_context, memory, indexer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        path = Path(args.output_dir, STAGES_FILE)
        path.write_text(json.dumps({"stages": stages, "log": trainer.state.log_history}, indent=1) + "\n")
        _show(stages, path)
    end_training(trainer)


def _show(stages: list[dict], path: Path) -> None:
    console, table = Console(), Table()
    for header in ("after", "right, dense", "right, sparse", "attention in the picks", "in the best", "share"):
        table.add_column(header, overflow="fold")
    for row in stages:
        table.add_row(row["stage"], *(f"{value:.1%}" for key, value in row.items() if key != "stage"))
    console.print(table)
    console.print(f"Numbers: {path}", soft_wrap=True)
