"""What the names of a configuration's fields do not tell: one line a model type, for its tiny version.

Fields are set as written after everything else was made small.
"""

from __future__ import annotations


HINTS: dict[str, dict[str, object]] = {}
