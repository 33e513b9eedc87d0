"""A small hybrid learns rows that need thought over what it forgets, with one pass of sleep and with more.

python recipes/sleep.py --config recipes/sleep_rule110_cpu.yaml
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("sleep"))
