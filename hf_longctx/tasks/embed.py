"""Train an embedder on pairs or triplets from many sources, on documents that several processes share if need be.

    torchrun --standalone --nproc_per_node 8 recipes/embed.py --config recipes/embed_allnli.yaml

Arguments are those of `SentenceTransformerTrainingArguments`, of `LongContextConfig`, `SourcesConfig`,
`TextsConfig` and `WatchConfig`, and the few of `embed_model.EmbeddingModelArguments`, `embed_sources.SourceArguments`
and `EmbedArguments`; the command line overrides the YAML file. Nothing is padded. Unavailable sources are logged, with
their rows and weight, and left out. What is saved is an ordinary sentence-transformer.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record


try:
    import trl  # noqa: F401  it reads the arguments
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
except ImportError as error:
    raise ImportError(
        "The recipe `embed` needs sentence-transformers, datasets and trl: `pip install hf-longctx[embedding]`."
    ) from error

from ..config.run import LongContextConfig
from ..config.sources import SourcesConfig
from ..config.texts import TextsConfig
from ..config.watches import WatchConfig
from ..data.sources.rows import LABEL_COLUMNS
from ..embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss
from ..embedding.trainer import LongContextSentenceTransformerTrainer
from ..reporting.embedding_report import EmbeddingReport
from ..reporting.origin import hub_datasets
from .embed_model import EmbeddingModelArguments, load_embedder
from .embed_sources import (
    SourceArguments,
    choose_texts,
    describe_absent,
    list_sources,
    open_source,
    open_sources,
    present_weights,
)
from .inputs import check_output_dir, make_watches, train_and_save
from .recipe_file import parse_recipe


SYMMETRIC = ("query_to_doc", "doc_to_query")


@dataclass
class EmbedArguments:
    """The loss and the output."""

    scale: float = field(default=20.0, metadata={"help": "Cosines are multiplied by it; 1 / temperature."})
    learnable_scale: bool = field(default=False, metadata={"help": "Train the logarithm of the scale."})
    symmetric: bool = field(
        default=False, metadata={"help": "Find the query of a document too, in the same softmax as its documents."}
    )
    mini_batch_num_tokens: int | None = field(
        default=None, metadata={"help": "GradCache: tokens that the model sees at a time; unset: all of a batch."}
    )
    negatives: str = field(default="gather", metadata={"help": "gather, or ring where embeddings fill the memory."})
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Widths of the embedding that shall work on their own."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the trained model, for its card: an identifier of the Hub, such as apache-2.0."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into `output_dir` though it is not empty; same names are replaced."}
    )


_OWN = (EmbedArguments, EmbeddingModelArguments, SourceArguments)
ARGUMENTS = (*_OWN, SentenceTransformerTrainingArguments, LongContextConfig, SourcesConfig, TextsConfig, WatchConfig)


def build_loss(recipe: EmbedArguments, model):
    loss = TiledMultipleNegativesRankingLoss(
        model,
        scale=recipe.scale,
        learnable_scale=recipe.learnable_scale,
        directions=SYMMETRIC if recipe.symmetric else SYMMETRIC[:1],
        partition_mode="per_direction" if recipe.symmetric else "joint",
        mini_batch_size=None,
        mini_batch_num_tokens=recipe.mini_batch_num_tokens,
        negatives=recipe.negatives,
    )
    return MatryoshkaLoss(model, loss, recipe.matryoshka_dims) if recipe.matryoshka_dims else loss


def read_sources(args: SourceArguments, config: SourcesConfig, seed: int):
    """Training sources, rows for evaluation, settings with the weights of what is here, and facts for the card."""
    wanted = list_sources(args)
    present, absent = open_sources(wanted, args)
    eval_rows = hold_out(present, args, seed)
    facts = describe_absent(wanted, absent)
    facts["present"] = {name: None if args.streaming else len(rows) for name, rows in present.items()}
    facts["datasets"] = hub_datasets(source.place for source in wanted if source.name in present)
    weights = present_weights(wanted, present, config.source_weights)
    return present, eval_rows, dataclasses.replace(config, source_weights=weights), facts


def hold_out(present: dict, args: SourceArguments, seed: int) -> list[dict] | None:
    """The rows that are searched, which are taken out of the training source where it is one."""
    if args.eval_source is None:
        return None
    name, count = args.eval_source, args.num_eval_rows
    if name in present:
        if args.streaming:
            raise ValueError(
                f"`eval_source` ({name!r}) is a stream, out of which no rows can be held: give the place of "
                "other pairs."
            )
        parts = present[name].train_test_split(test_size=count, seed=seed)
        present[name] = parts["train"]
        return parts["test"].to_list()
    rows = choose_texts(open_source(name, name, dataclasses.replace(args, streaming=False)), None, args.num_texts)
    numbers = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[number] for number in sorted(numbers)]


def build_evaluator(rows: list[dict] | None, batch_size: int) -> InformationRetrievalEvaluator | None:
    """Find the second text of every row by its first, among the second texts of all."""
    if rows is None:
        return None
    query, document = [column for column in rows[0] if column not in LABEL_COLUMNS][:2]
    documents = {text: str(number) for number, text in enumerate(dict.fromkeys(row[document] for row in rows))}
    relevant: dict[str, set[str]] = {}
    for row in rows:
        relevant.setdefault(row[query], set()).add(documents[row[document]])
    return InformationRetrievalEvaluator(
        queries={text: text for text in relevant},
        corpus={number: text for text, number in documents.items()},
        relevant_docs=relevant,
        batch_size=batch_size,
        name="held_out",
        write_csv=False,
    )


def show_sources(facts: dict, console: Console) -> None:
    """What is trained on, and everything that is missing."""
    table = Table(title="Sources", title_justify="left")
    for name, justify in (("source", "left"), ("rows", "right")):
        table.add_column(name, justify=justify, overflow="fold")
    for name, rows in facts["present"].items():
        table.add_row(name, "a stream" if rows is None else f"{rows:,}")
    console.print(table)
    if not facts["num_absent"]:
        return
    share = facts["absent_weight_share"]
    known = "" if share is None else f", {facts['absent_rows']:,} rows and {share:.1%} of the weight"
    console.print(f"[yellow]{facts['num_absent']} of {facts['num_sources']} sources are absent{known}:[/yellow]")
    for name, reason in list(facts["absent"].items())[:10]:
        console.print(f"  {name}: {reason}", soft_wrap=True, highlight=False)
    if facts["num_absent"] > 10:
        console.print(f"  and {facts['num_absent'] - 10} more, listed in metrics.json")


@record
def main() -> None:
    recipe, model_args, source_args, args, long_context, sources, texts, watch = parse_recipe(ARGUMENTS)
    check_output_dir(recipe, args)
    size = long_context.sequence_parallel_size
    with args.main_process_first(desc="reading sources"):
        present, eval_rows, sources, facts = read_sources(source_args, sources, args.seed)
    if args.process_index == 0:
        show_sources(facts, Console())
    model = load_embedder(model_args, size, args.seed)
    single = len(present) == 1
    if single:
        sources = dataclasses.replace(sources, source_weights=None)
    trainer = LongContextSentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=next(iter(present.values())) if single else present,
        loss=build_loss(recipe, model),
        evaluator=build_evaluator(eval_rows, args.per_device_eval_batch_size),
        long_context=long_context,
        sources=sources,
        texts=texts,
        callbacks=make_watches(watch),
    )
    report = EmbeddingReport(
        sequence_parallel_size=size,
        row_tokens=model.max_seq_length,
        base_model=model_args.base_model,
        dataset=", ".join(list(present)[:5]) + (", ..." if len(present) > 5 else ""),
        sources=facts,
        score="eval_held_out_cosine_mrr@10" if eval_rows else None,
        datasets=facts["datasets"],
        license=recipe.license,
    )
    train_and_save(trainer, report, args)
