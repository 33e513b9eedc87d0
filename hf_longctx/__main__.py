"""`python -m hf_longctx`: the `hf-longctx` command, for launchers that start a module on every process."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
