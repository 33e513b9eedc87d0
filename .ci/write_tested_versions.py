"""Writes `hf_longctx/tested_versions.txt` from `pip freeze`, read from standard input. `make constraints` calls it."""

import re
import sys


HEADER = """\
# What the tests last passed with: `make demo` and `make test` install these versions (pip's option `-c`), and
# `hf-longctx env` says which installed library is newer. `make constraints` writes this file. torch is capped and not
# pinned, so that a GPU machine may take an older one; what torch brings for GPUs is left to torch.
"""
# Compared in lower case with "-" for "_". Torch's companions differ from machine to machine; build tools are pip's.
LEFT_OUT = re.compile(r"hf-longctx|nvidia-.*|cuda-.*|triton|pip|setuptools|wheel")


def constraints(frozen: str) -> str:
    """The constraints file of an environment that `pip freeze` lists."""
    lines = []
    for line in frozen.splitlines():
        name, equal, version = line.partition("==")
        if not equal or line.startswith(("#", "-")) or LEFT_OUT.fullmatch(name.lower().replace("_", "-")):
            continue
        if name == "torch":
            line = f"torch<={version.partition('+')[0]}"  # whatever the build: +cpu, +cu130
        lines.append(line)
    return HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n"


if __name__ == "__main__":
    sys.stdout.write(constraints(sys.stdin.read()))
