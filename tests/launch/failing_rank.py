"""A run in which one rank dies in its second step. Started by `test_failures.py` with torchrun."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_longctx import LongContextConfig, LongContextTrainer
from tests.models import build
from tests.training import Rows, arguments, pad_right


class DieInSecondStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and os.environ["RANK"] == "1":
            if sys.argv[2] == "raise":
                raise RuntimeError("rank 1 lost its disk")
            os.kill(os.getpid(), 9)


@record
def main():
    torch.set_num_threads(1)
    LongContextTrainer(
        model=build("llama", "ulysses"),
        args=arguments(sys.argv[1], ddp_timeout=20),
        train_dataset=Rows(),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=2),
        callbacks=[DieInSecondStep()],
    ).train()


main()
