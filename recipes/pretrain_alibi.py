"""A toy that shows what ALiBi is for: three tiny models learn rows of 64 bytes and read rows of 256.

    python recipes/pretrain_alibi.py --config recipes/pretrain_alibi_toy.yaml

One model has ALiBi (`hf_longctx.use_alibi` on a Llama), one rotary embeddings (the same Llama), one learned positions
(GPT-2). They read the same bytes of the Python standard library's sources. Each is then scored on the same bytes of
files that none has seen, with 64, 128 and 256 bytes up to the last of them. Writes `alibi.json` and `alibi.png`.
"""

from hf_longctx.tasks.pretrain_alibi import main


if __name__ == "__main__":
    main()
