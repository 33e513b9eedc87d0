"""A toy that shows what ALiBi is for: three tiny models learn rows of 64 bytes and read rows of 256.

    python recipes/pretrain_alibi.py --config recipes/pretrain_alibi_toy.yaml

One model has ALiBi (`hf_longctx.use_alibi` on a Llama), one rotary embeddings (the same Llama), one learned positions
(GPT-2). They read the same bytes of the Python standard library's sources. Each is then scored on the same bytes of
files that none has seen, with 64, 128 and 256 bytes up to the last of them. Writes `alibi.json` and `alibi.png`.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("pretrain_alibi"))
