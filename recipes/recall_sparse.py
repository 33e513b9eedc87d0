"""Which kinds of sparse layers can recall: four DeepSeek-V4 of two layers learn the same rows, some minutes on a core.

python recipes/recall_sparse.py --output_dir runs/recall_sparse
"""

from hf_longctx.tasks.recall_sparse import main


if __name__ == "__main__":
    main()
