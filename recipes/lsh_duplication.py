"""The duplication task of the Reformer paper: train with one attention, run with another. Some minutes on one core.

python recipes/lsh_duplication.py --output_dir runs/lsh_duplication
"""

from hf_longctx.tasks.lsh_duplication import main


if __name__ == "__main__":
    main()
