"""Train a small language model of bytes from scratch on LSH attention; on one process or several a row.

python recipes/lsh_pretrain.py --config recipes/lsh_pretrain_stdlib.yaml
"""

from hf_longctx.tasks.lsh_pretrain import main


if __name__ == "__main__":
    main()
