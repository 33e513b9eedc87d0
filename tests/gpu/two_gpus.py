"""Trains on two GPUs with the trainer's own DDP or FSDP2 path and compares with unsharded rows. Started by "
"torchrun."""

import sys

import torch
import torch.distributed as dist

from hf_longctx import LongContextConfig, LongContextTrainer
from tests.models import build
from tests.training import Rows, arguments, pad_right, steps


def losses_of(size: int, rows_per_rank: int, folder: str, wrapper: str) -> list[tuple[float, float]]:
    fsdp = {}
    if wrapper == "fsdp2":
        wrap = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        fsdp = {"fsdp": True, "fsdp_config": wrap}
    trainer = LongContextTrainer(
        model=build("llama", "ulysses", hidden_size=96, head_dim=16),
        args=arguments(folder, use_cpu=False, per_device_train_batch_size=rows_per_rank, **fsdp),
        train_dataset=Rows(),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=size),
    )
    trainer.train()
    return steps(trainer.state.log_history)


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, wrapper = sys.argv[1:]
    sharded = losses_of(2, 2, folder, wrapper)
    whole_rows = losses_of(1, 1, folder, "ddp")  # the same two rows a step, one whole row on each rank
    for (loss, norm), (other_loss, other_norm) in zip(sharded, whole_rows):
        assert abs(loss - other_loss) < 1e-4 * other_loss, (sharded, whole_rows)
        assert abs(norm - other_norm) < 1e-4 * other_norm, (sharded, whole_rows)
    dist.destroy_process_group()


main()
