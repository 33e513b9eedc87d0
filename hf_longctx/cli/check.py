"""`hf-longctx check`: whether a model can be sharded, and who gets which heads; only its configuration is read."""

from __future__ import annotations

import argparse
from functools import partial

from ..config.lsh_settings import LSH


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser("check", help="say whether a model can be sharded, and who gets which heads")
    parser.add_argument("model", help="hub id, folder or model type; only its configuration is read")
    parser.add_argument("--sequence_parallel_size", type=int, default=2, help="processes that share one sequence")
    parser.add_argument("--inner_attention", default="auto", help="kernel that `ulysses` runs on its heads")
    parser.add_argument("--sleep", action="store_true", help="say whether the model can sleep instead, and where")
    parser.add_argument("--window", type=int, default=2048, help="with --sleep: tokens of a window")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code a hub model brings")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print who gets which heads and return the exit code: 2, with the message, if the model is refused."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if options.sleep:
        return _check_sleep(console, options)
    try:
        split, gathering = _split_of(options)
    except KeyError as error:  # a model that looks its attention up in a list of its own
        reason = f"{options.model} looks up attn_implementation={error} in a list of its own and does not find it"
        console.print(f"[bold red]refused[/]: {reason}: set `sequence_parallel_size` to 1.", highlight=False)
        return 2
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        console.print(f"[bold red]refused[/]: {error}", highlight=False)
        return 2
    console.print(f"[bold green]can be sharded[/] over {options.sequence_parallel_size} processes", highlight=False)
    if split is not None:
        _print_heads(console, split)
    if gathering:
        console.print(
            f"{gathering} layers attend to what an indexer picks or a compressor makes: they gather keys or entries "
            "of the whole row and keep all their heads",
            highlight=False,
        )
    if options.inner_attention == LSH:
        console.print("LSH attention: call `hf_longctx.tie_query_key(model)` on a new model", highlight=False)
    console.print("A tiny forward is compared with one process when a trainer starts.", highlight=False)
    return 0


def _print_heads(console, split) -> None:
    from rich.table import Table

    counts = {(query[1] - query[0], key[1] - key[0]) for query, key in zip(split.query, split.key_value)}
    if len(counts) == 1:
        query, key_value = counts.pop()
        heads = f"{query} of {split.num_query_heads} query heads and {key_value} of {split.num_key_value_heads}"
        console.print(f"each gets {heads} key/value heads, which are sent {split.replication():.2f} times each")
        return
    table = Table("rank", "query heads", "key/value heads")
    for rank, (query, key_value) in enumerate(zip(split.query, split.key_value)):
        table.add_row(str(rank), f"{query[0]}..{query[1] - 1}", f"{key_value[0]}..{key_value[1] - 1}")
    console.print(table)
    console.print(f"key/value heads are sent {split.replication():.2f} times each", highlight=False)


def _check_sleep(console, options: argparse.Namespace) -> int:
    """Say whether a model type, folder or hub id can sleep: its own configuration, and a tiny model of it."""
    import torch
    from rich.markup import escape
    from transformers import AutoModelForCausalLM

    from ..config.sleep import SleepConfig
    from ..proof.model_under_test import read_config
    from ..proof.sleeping import check_tiny
    from ..sleep.sleepers import check_sleeper, state_layers

    try:
        config = read_config(options.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = SleepConfig(window=options.window)
        check_sleeper(model, wanted)
        check_tiny(config, wanted)
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        console.print(f"[bold red]refused[/]: {escape(str(error))}", highlight=False)
        return 2
    states = state_layers(model)
    console.print(
        f"[bold green]can sleep[/]: {len(states)} of {len(model.base_model.layers)} layers hold a recurrent state "
        f"({', '.join(map(str, states))}).",
        highlight=False,
    )
    console.print(f"`hf-longctx verify {options.model} --sleep` proves it on a tiny model.", highlight=False)
    return 0


def _split_of(options: argparse.Namespace):
    import torch
    from transformers import AutoConfig

    from ..adapters.sparse.sparse_layers import count_sparse_layers, keeps_all_heads
    from ..config.run import LongContextConfig
    from ..data.model_files import check_model_files
    from ..families import query_heads, values_of
    from ..parallel.heads import split_heads
    from ..proof.build import AUTO_CLASSES
    from ..proof.model_under_test import read_config, task_of
    from ..trainer.checks import check_model

    size = options.sequence_parallel_size
    wanted = LongContextConfig(sequence_parallel_size=size, inner_attention=options.inner_attention)
    remote = {"trust_remote_code": options.trust_remote_code}
    if options.trust_remote_code:
        check_model_files(options.model)
        config, kind = AutoConfig.from_pretrained(options.model, **remote), "causal-lm"
    else:
        config = read_config(options.model)
        kind = task_of(config)
    build = partial(AUTO_CLASSES[kind].from_config, attn_implementation="ulysses", **remote)
    with torch.device("meta"):
        model = _built(options.model, build, config, kind, size)
    check_model(model, wanted)
    config = model.config
    heads, gathering = query_heads(config), count_sparse_layers(model)
    if heads is None or keeps_all_heads(model):  # no layer of it trades heads
        return None, gathering
    counts = zip(values_of(config, "num_attention_heads"), values_of(config, "num_key_value_heads"))
    key_value = next((theirs for mine, theirs in counts if mine == heads and theirs), heads)
    return split_heads(heads, key_value, size), gathering


def _built(name: str, build, config, kind: str, size: int):
    """The model of a configuration; of a type that is only named and whose defaults build none, a tiny one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from ..attention.registry import name_that_shards
    from ..proof.model_under_test import ModelUnderTest

    try:
        return build(config)
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (name_that_shards(),):
            raise
        if name not in CONFIG_MAPPING_NAMES:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"`{name}` builds no model from its configuration ({type(error).__name__}: {reason}): check the file, "
                "or the installed version of transformers."
            ) from error
    tested = ModelUnderTest.of(config, kind, size)
    if tested.config is None:
        raise ValueError(f"the defaults of type `{name}` build no model to look at, and {tested.problem}")
    return build(tested.config)
