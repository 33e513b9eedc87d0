"""Python runs this file when it starts under `hf-longctx run`: our attention names are known before any other code.

The folder stands first in `PYTHONPATH`, so processes that a launcher starts get the names too. It is no part of the
package's imports; another `sitecustomize`, which this one hides, runs afterwards.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys


_HERE = os.path.dirname(os.path.abspath(__file__))

if importlib.util.find_spec("hf_longctx") is None:  # started from a checkout that is not installed
    sys.path.append(os.path.dirname(os.path.dirname(_HERE)))
importlib.import_module("hf_longctx")  # registers the names when transformers loads its models


_others = [path for path in sys.path if os.path.abspath(path) != _HERE]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
