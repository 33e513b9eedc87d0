"""A run in which rank 1 fails in its second step. Started by `test_failures.py` with torchrun."""

import os
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_longctx import LongContextConfig, LongContextTrainer
from tests.models import build
from tests.training import Rows, arguments, pad_right


class FailInSecondStep(TrainerCallback):
    def __init__(self, how):
        self.how = how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and os.environ["RANK"] == "1":
            print(f"failing at {time.time()}", flush=True)
            if self.how == "raise":
                raise ValueError("rank 1 lost its disk")
            if self.how == "kill":
                os.kill(os.getpid(), 9)
            time.sleep(600)  # hang


@record
def main():
    folder, how = sys.argv[1:]
    torch.set_num_threads(1)
    LongContextTrainer(
        model=build("llama", "ulysses"),
        args=arguments(folder, ddp_timeout=6),
        train_dataset=Rows(),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=2),
        callbacks=[FailInSecondStep(how)],
    ).train()


main()
