"""The duplication task of the Reformer paper: train with one attention, run with another. Some minutes on one core.

python recipes/lsh_duplication.py --output_dir runs/lsh_duplication
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("lsh_duplication"))
