"""What the documentation shows runs: doctests of every module, code blocks of the README."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest

import skaipo

ROOT = Path(__file__).resolve().parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(skaipo.__path__, "skaipo.")]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_classes_have_examples():
    """So that the test above has something to run."""
    finder = doctest.DocTestFinder(recurse=False)
    for name in skaipo.__all__:
        if name in ("Reconstruction",):
            continue
        assert any(test.examples for test in finder.find(getattr(skaipo, name))), name


def test_readme(tmp_path, monkeypatch, capsys):
    """All Python blocks, in order, in one namespace, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "Reconstruction of 20 samples at lam=1" in printed
    # The ten lines do reconstruct: 24 noisy numbers for 64 pixels, to better than 20 dB.
    assert float(printed.splitlines()[1]) > 20
    assert (tmp_path / "prior.safetensors").is_file()
