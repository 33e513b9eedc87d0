"""`hf-longctx`: look before a run. `env` prints what is installed, `check` says whether and how a model is sharded,
`pack` what packing would do to a data set, `plan` what fits on which GPUs, `verify` proves that sharding is exact."""

from __future__ import annotations

import argparse


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-longctx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, whether the tests have seen them, devices and attention kernels")
    check = commands.add_parser("check", help="say whether a model can be sharded, and who gets which heads")
    check.add_argument("model", help="hub id or folder; only its configuration is read")
    check.add_argument("--sequence_parallel_size", type=int, default=2, help="processes that share one sequence")
    check.add_argument("--inner_attention", default="auto", help="kernel that `ulysses` runs on its heads")
    check.add_argument("--trust_remote_code", action="store_true", help="run the code a hub model brings")
    _add_pack(commands)
    _add_plan(commands)
    _add_verify(commands)
    options = parser.parse_args(arguments)
    if options.command == "env":
        from .env import run_env

        return run_env()
    if options.command == "pack":
        from .pack import run_pack

        return run_pack(options)
    if options.command == "plan":
        from .plan import run_plan

        return run_plan(options)
    if options.command == "verify":
        from .verify import run_verify

        return run_verify(options)
    return _check(options)


def _add_pack(commands: argparse._SubParsersAction) -> None:
    pack = commands.add_parser("pack", help="say what packing would do to a data set")
    pack.add_argument("dataset", help="folder of documents, jsonl or parquet file, or dataset on the Hub")
    pack.add_argument("--max_tokens", type=int, default=8192, help="tokens of a packed row")
    pack.add_argument("--split", default="train", help="split of the data set")
    pack.add_argument("--config_name", help="configuration of a dataset on the Hub")
    pack.add_argument("--text_field", default="text", help="column of the text, where no column tells lengths")
    pack.add_argument("--model_name_or_path", help="hub id or folder of the tokenizer that counts the text's tokens")
    pack.add_argument("--streaming", action="store_true", help="read the data set without downloading it first")
    pack.add_argument("--limit", type=int, help="look at the first documents only")
    pack.add_argument("--batch_size", type=int, default=8, help="rows of a padded batch, to compare with")
    pack.add_argument("--hidden_size", type=int, default=1024, help="of the model, for the estimate")
    pack.add_argument("--long_documents", default="split", help="for one over --max_tokens: error, split or truncate")
    pack.add_argument("--output", default="packing.png", help="picture to draw, .png or .svg")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser("plan", help="say which rows fit on which GPUs, and write the file of the run")
    plan.add_argument("model", help="hub id, folder or config.json; only the configuration is read")
    plan.add_argument("--gpus", type=int, default=1, help="all GPUs of the run; hosts have 8")
    plan.add_argument("--gpu_memory", type=float, default=80, help="GiB of one GPU")
    plan.add_argument("--cpu_memory", type=float, help="GiB of one host, for checkpoints that are offloaded")
    plan.add_argument("--target_tokens", help="tokens of a row that must fit, such as 131072, 128K or 1M")
    plan.add_argument("--optimizer", default="adamw", help="adamw, adafactor, sgd, or lora: AdamW on adapters")
    plan.add_argument("--wrapper", help="fsdp2 (default for several GPUs), ddp, or none (default for one)")
    plan.add_argument("--peak_tflops", type=float, default=989, help="of one GPU in bf16, for the estimated time")
    plan.add_argument("--utilisation", type=float, default=0.4, help="share of that peak that is reached")
    plan.add_argument("--measure", action="store_true", help="run one short step here and correct the plan by it")
    plan.add_argument("--output", help="picture to draw, .png or .svg")
    plan.add_argument("--write", help="YAML file to write for recipes/sft.py; never written over")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser("verify", help="prove that a model shared by processes is the model of one process")
    verify.add_argument("model", help="hub id, folder or model type such as qwen3")
    verify.add_argument("--sequence_parallel_size", type=int, default=2, help="processes that share one sequence")
    verify.add_argument("--data_parallel_size", type=int, default=1, help="groups of them")
    verify.add_argument("--inner_attention", default="auto", help="kernel that `ulysses` runs on its heads")
    verify.add_argument("--packed", action="store_true", help="packed rows too, against their documents one by one")
    verify.add_argument("--wrapper", default="none", help="none, ddp or fsdp2: who averages gradients")
    verify.add_argument("--dtype", default="float32", help="float32 (doubts are settled in float64) or float64")
    verify.add_argument("--task", help="causal-lm, masked-lm or encoder, for a type that is several; or embedding")
    verify.add_argument("--bidirectional", action="store_true", help="with --task embedding: no causal mask")
    verify.add_argument("--full", action="store_true", help="the model's own size and weights, not a tiny random one")
    verify.add_argument("--json", help="file to write the result to")


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(soft_wrap=True)
    try:
        split = _split_of(options)
    except KeyError as error:  # a model that looks its attention up in a list of its own
        reason = f"{options.model} looks up attn_implementation={error} in a list of its own and does not find it"
        console.print(f"[bold red]refused[/]: {reason}: set `sequence_parallel_size` to 1.", highlight=False)
        return 2
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        console.print(f"[bold red]refused[/]: {error}", highlight=False)
        return 2
    from rich.table import Table

    table = Table("rank", "query heads", "key/value heads")
    for rank, (query, key_value) in enumerate(zip(split.query, split.key_value)):
        table.add_row(str(rank), f"{query[0]}..{query[1] - 1}", f"{key_value[0]}..{key_value[1] - 1}")
    console.print(f"[bold green]can be sharded[/] over {options.sequence_parallel_size} processes", highlight=False)
    console.print(table)
    console.print(f"key/value heads are sent {split.replication():.2f} times each", highlight=False)
    console.print("A tiny forward is compared with one process when a trainer starts.", highlight=False)
    return 0


def _split_of(options: argparse.Namespace):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..config.run import LongContextConfig
    from ..parallel.heads import split_heads
    from ..trainer.checks import check_model

    size = options.sequence_parallel_size
    wanted = LongContextConfig(sequence_parallel_size=size, inner_attention=options.inner_attention)
    remote = {"trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(options.model, **remote)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="ulysses", **remote)
    check_model(model, wanted)
    text = config.get_text_config()
    heads = text.num_attention_heads
    return split_heads(heads, getattr(text, "num_key_value_heads", None) or heads, size)
