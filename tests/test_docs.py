"""What the documentation shows runs: doctests of every module, code blocks of README and pages."""

import doctest
import functools
import importlib
import pkgutil
import re
import textwrap
import warnings
from pathlib import Path

import joblib
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


# A block, and the text block right after it, which is what it prints; both may be indented.
BLOCK = re.compile(
    r"^( *)```python\n(.*?)^\1```$(?:\n\n\1```text\n(.*?)^\1```$)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
GENERATED = {"_build", "auto_examples", "generated", "gen_modules"}
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if not GENERATED & set(page.relative_to(ROOT).parts) and BLOCK.search(page.read_text())
]


def same_output(printed, shown):
    """Equal words, and numbers that differ by no more than another processor's rounding may do."""
    texts = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, shown)]
    return texts[0] == texts[1] and all(
        abs(a - b) <= 0.2 + 0.05 * abs(b) for a, b in zip(*numbers, strict=True)
    )


def run_page(name, capsys, **namespace):
    """Run all Python blocks, in order, in one namespace, as a reader would paste them."""
    text, printed = (ROOT / name).read_text(), ""
    # Threads where a page asks for processes: those import torch, which takes longer than the rest.
    with warnings.catch_warnings(), joblib.parallel_config(backend="threading"):
        warnings.simplefilter("ignore")
        for block in BLOCK.finditer(text):
            # Lines as in the page, so that a traceback points there.
            lines = "\n" * text.count("\n", 0, block.start(2))
            code = compile(lines + textwrap.dedent(block[2]), str(ROOT / name), "exec")
            exec(code, namespace)
            output = capsys.readouterr().out
            printed += output
            if block[3] is not None:
                assert same_output(output, block[3]), f"{name} shows {block[3]}, got {output}"
    return printed


@pytest.fixture
def cluster(monkeypatch):
    """Clusters of threads in place of processes, and one that is there already."""
    distributed = pytest.importorskip("dask.distributed")
    quick = functools.partial(
        distributed.LocalCluster,
        processes=False,
        dashboard_address=None,
        worker_dashboard_address=None,
    )
    monkeypatch.setattr(distributed, "LocalCluster", quick)
    with quick(n_workers=2, threads_per_worker=1) as running:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", running.scheduler_address)
        yield


def test_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCK.findall((ROOT / "README.md").read_text())) >= 3
    printed = run_page("README.md", capsys)
    assert "Reconstruction of 20 samples at lam=1" in printed
    # The ten lines do reconstruct: 24 noisy numbers for 64 pixels, to better than 20 dB.
    assert float(printed.splitlines()[1]) > 20
    assert (tmp_path / "prior.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKAIPO_KERNELS", raising=False)
    if page != "docs/cluster.md":
        run_page(page, capsys)
        return
    request.getfixturevalue("cluster")
    printed = run_page(page, capsys, __name__="__main__")
    assert "the same as in this process: True" in printed
    assert "Reconstruction of 16 samples" in printed.splitlines()[-1]


def test_outputs_are_compared():
    assert same_output("best: 1.0\n[12.31 3.9]", "best:  1.0\n[12.3 4.0]\n")
    assert not same_output("best: 1.0", "best: 3.2")
    assert not same_output("{'converged': 24}", "{'stalled': 24}")
