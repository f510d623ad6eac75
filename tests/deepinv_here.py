"""deepinv, also where torchvision cannot be used: a stand-in for the little it takes to import it.

torchvision's compiled operators must match torch's build. Where they do not (a build for CUDA
beside torch for the CPU), ``import torchvision``, and with it deepinv, fails over operators that
no physics uses: declaring their names is enough.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

INSTALLED = importlib.util.find_spec("deepinv") is not None
_KEPT = []  # a library's declarations last as long as it does


def _declare_torchvision_operators():
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    names = re.findall(r"torchvision::(\w+)", source) + re.findall(
        r'register_meta\("(\w+)"', source
    )
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(names)):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    _KEPT.append(library)


def import_deepinv():
    """``deepinv``; the test is skipped where it is not installed."""
    if not INSTALLED:
        pytest.skip("deepinv is not installed")
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_torchvision_operators()
    return importlib.import_module("deepinv")
