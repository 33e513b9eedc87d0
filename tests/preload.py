"""What the ranks of a world would all import, for the process that they are forked from. It must start no thread."""

import gc

import accelerate  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

from . import raises


raises.install()
import hf_longctx.proof.compare  # noqa: E402
import hf_longctx.trainer.causal_lm  # noqa: E402, F401


torch.set_num_threads(1)
gc.collect()
gc.freeze()
