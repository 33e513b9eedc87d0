"""A run of two processes that ends with `end_training`. Started by `test_ending.py` with torchrun."""

import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_longctx import LongContextConfig, LongContextTrainer, end_training
from tests.models import build
from tests.training import Rows, arguments, gloo_threads, pad_right


def main():
    torch.set_num_threads(1)
    trainer = LongContextTrainer(
        model=build("llama", "ulysses"),
        args=arguments(sys.argv[1], max_steps=2),
        train_dataset=Rows(),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=2),
    )
    trainer.train()
    wrapper = weakref.ref(trainer.model_wrapped)
    assert wrapper().reducer is not None and gloo_threads() > 0
    destroy, wrappers = dist.destroy_process_group, []

    def look_and_destroy(group=None):
        wrappers.append(wrapper())
        destroy(group)

    dist.destroy_process_group = look_and_destroy
    end_training(trainer)
    assert wrappers == [None], "the group was not destroyed once, after the wrapper was gone"
    assert gloo_threads() == 0, "a thread of a group is left to the end of the interpreter"


main()
