"""Which tests one worker of pytest-xdist runs together: those that share ranks, a device, or what a file makes once.

Two workers would start every world twice, and make what a fixture of a file makes twice. The groups are read from
the paths, not from marks: pytest-xdist 3.8 puts marks where pytest 9.2 no longer looks, and says nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling


ROOT = Path(__file__).parents[1]


class GroupScheduling(LoadScopeScheduling):
    """A group goes to the first worker that is free, the largest first; a test that shares nothing is its own."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """The folder, the file, or the test itself."""
    path = nodeid.partition("::")[0]
    folder = Path(path).parent
    if folder.name in ("world", "launch", "gpu"):
        return str(folder)
    return path if _makes_something_once(path) else nodeid


@functools.cache
def _makes_something_once(path: str) -> bool:
    return 'scope="module"' in (ROOT / path).read_text()
