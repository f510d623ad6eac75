"""The architecture, kept by reading the source: imports point down, torch has one door.

A module of skaipo is known here by its *unit*: the top-level module or subpackage it is in, so
``skaipo/flows/_glow.py`` is in the unit ``flows``.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "skaipo"

# From the bottom up. A unit imports from the layers below its own, and from its peers as long as
# no cycle comes of it.
LAYERS = (
    ("_validation", "_progress", "_handle", "_padding", "_keywords", "_fingerprint", "metrics"),
    ("operators", "noise", "flows", "objective"),
    ("_training", "_messages", "_reconstruct", "_checkpoint", "priors", "solvers", "datasets"),
    ("estimators",),
    ("model_selection", "plotting", "testing"),
    ("__init__", "__main__"),
)

# Arrays enter and leave torch in `_validation`. Elsewhere only for what is no user's batch of data:
ALLOWED_CROSSINGS = {
    "_validation": "the door itself",
    "operators": "an operator's own parameters: matrix, mask, kernel",
    "noise": "a noise model's own parameters",
    "_handle": "trained weights as one flat array",
    "datasets": "arrays and weights that come with the package",
}

# What `import skaipo` must neither load nor need.
OPTIONAL = ("matplotlib", "rich", "pandas", "dask", "pylops", "deepinv", "torchvision")
OPTIONAL += ("normflows", "zuko", "nflows", "FrEIA")


# --------------------------------------------------------------------- reading the source


def parse_modules(root):
    """The syntax tree of every module under ``root``, a package's folder, by dotted name.

    A package goes by its own name: ``skaipo.flows`` is ``skaipo/flows/__init__.py``.
    """
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return modules


def packages_of(modules):
    """The names that are packages: those with another module inside, and the root."""
    return {name.rpartition(".")[0] for name in modules if "." in name} | {
        name for name in modules if "." not in name
    }


def unit_of(name):
    """``skaipo.flows._glow`` -> ``flows``; ``skaipo`` itself -> ``__init__``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(name, modules):
    """Yield ``(line, imported module)`` for every import of the package by one of its modules.

    Imports inside functions and under ``TYPE_CHECKING`` count: hiding one does not turn it round.
    """
    root = name.split(".")[0]
    package = name if name in packages_of(modules) else name.rpartition(".")[0]
    for node in ast.walk(modules[name]):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name`: a module where there is one, else a name the package has.
            targets = [
                inner if (inner := f"{base}.{alias.name}") in modules else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("skaipo.x") and __import__("skaipo.x")
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            argument = getattr(node.args[0], "value", None)
            if function in ("import_module", "__import__") and isinstance(argument, str):
                targets = [package + argument if argument.startswith(".") else argument]
        for target in targets:
            if target.split(".")[0] == root:
                yield node.lineno, target


def find_cycle(graph):
    """A cycle of ``graph`` (name -> names) as a list that ends where it starts, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for successor in sorted(graph.get(node, ())):
            if cycle := visit(successor):
                return cycle
        done.add(path.pop())
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), None)


def layer_problems(root, layers=LAYERS):
    """What is wrong with the imports of the package in the folder ``root``: a list of messages."""
    modules = parse_modules(root)
    layer_of = {unit: number for number, units in enumerate(layers) for unit in units}
    problems = [
        f"{unit}: not in LAYERS of tests/test_layers.py; add it there, to the lowest layer that "
        f"is above everything it imports"
        for unit in sorted({unit_of(name) for name in modules} - set(layer_of))
    ]

    by_module = {name: set() for name in modules}
    by_unit = {unit_of(name): set() for name in modules}
    for name in modules:
        unit = unit_of(name)
        for line, target in imports_of(name, modules):
            # Importing a.b.c runs a and a.b first; what the importer is inside of runs already.
            parts = target.split(".")
            for end in range(1, len(parts) + 1):
                ancestor = ".".join(parts[:end])
                inside = f"{name}.".startswith(f"{ancestor}.")
                if ancestor in modules and (ancestor == target or not inside):
                    by_module[name].add(ancestor)
            target_unit = unit_of(target)
            if target_unit == unit:
                continue
            by_unit[unit].add(target_unit)
            if target_unit not in layer_of:
                if target not in modules:
                    problems.append(f"{name}:{line}: imports {target}, which does not exist")
            elif unit in layer_of and layer_of[target_unit] > layer_of[unit]:
                problems.append(
                    f"{name}:{line}: layer {layer_of[unit]} ({unit}) imports {target} of layer "
                    f"{layer_of[target_unit]}; imports point down only"
                )

    for graph in (by_module, by_unit):
        if cycle := find_cycle(graph):
            problems.append("import cycle: " + " -> ".join(cycle))
            break
    return problems


def crossing_problems(root, allowed=ALLOWED_CROSSINGS):
    """Where a module of the package in ``root`` goes between numpy and torch unasked."""
    problems = []
    for name, tree in parse_modules(root).items():
        if unit_of(name) in allowed:
            continue
        nodes = list(ast.walk(tree))
        aliases = {
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "torch"
        }
        for node in nodes:
            what = None
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                if {alias.name for alias in node.names} & {"from_numpy", "as_tensor"}:
                    what = "from torch import from_numpy / as_tensor"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", None)
                if node.func.attr == "numpy":
                    what = ".numpy()"
                elif node.func.attr in ("from_numpy", "as_tensor") and owner in aliases:
                    what = f"torch.{node.func.attr}()"
            if what:
                problems.append(
                    f"{name}:{node.lineno}: {what}; arrays enter and leave torch in _validation.py"
                )
    return problems


# ------------------------------------------------------------------------------ the package


def test_imports_point_down():
    problems = layer_problems(ROOT / PACKAGE)
    assert not problems, "\n".join(problems)


def test_arrays_cross_into_torch_at_one_door():
    problems = crossing_problems(ROOT / PACKAGE)
    assert not problems, "\n".join(problems)


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_and_needs_no_optional_package():
    # scikit-learn itself loads pandas and rich where they are installed: those do not count.
    assert not run_python(
        "import sys\n"
        "import torch, safetensors.torch, sklearn.datasets, sklearn.model_selection\n"
        "before = set(sys.modules)\n"
        f"import {PACKAGE}\n"
        f"print(*sorted(set({OPTIONAL}) & (set(sys.modules) - before)))\n"
        # Once more, where there is none of them.
        f"for name in [n for n in sys.modules if n.partition('.')[0] == {PACKAGE!r}]:\n"
        "    del sys.modules[name]\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        f"import {PACKAGE}\n"
    )


# ------------------------------------------------------------- the checks, on made-up packages


def make_package(folder, files):
    """A package named ``skaipo`` with an empty ``__init__`` and the given files."""
    root = folder / PACKAGE
    for path, source in {"__init__.py": "", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source, encoding="utf-8")
    return root


def test_checker_passes_what_is_right(tmp_path):
    root = make_package(
        tmp_path,
        {
            "__init__.py": "from .estimators import A\nfrom . import operators, solvers\n",
            "__main__.py": "import skaipo\nfrom skaipo import A\n",
            "_validation.py": "import numpy as np\nimport torch\n",
            "operators.py": "from . import _validation\nfrom ._validation import check\n",
            "noise.py": "from skaipo.operators import as_operator\n",
            "flows/__init__.py": "from ._glow import Glow\n__all__ = ['Glow']\n",
            "flows/_base.py": "from .._validation import check\n",
            "flows/_glow.py": "from . import _base\nfrom ._base import Flow\n",
            "solvers/__init__.py": "from ._mle import mle\n",
            "solvers/_mle.py": "import skaipo.flows._base\nfrom ..operators import as_operator\n",
            "priors.py": "def f():\n    from skaipo.flows import Glow\n",
            "estimators.py": "from .solvers import mle\nfrom .solvers._mle import mle as g\n",
        },
    )
    assert layer_problems(root) == []


@pytest.mark.parametrize(
    ("path", "source", "target"),
    [
        ("operators.py", "import skaipo.priors\n", "skaipo.priors"),
        ("operators.py", "import skaipo.priors as p, numpy\n", "skaipo.priors"),
        ("operators.py", "from skaipo.priors import FlowPrior\n", "skaipo.priors"),
        ("operators.py", "from skaipo import priors\n", "skaipo.priors"),
        ("operators.py", "from skaipo import FlowPrior\n", "skaipo"),
        ("operators.py", "import skaipo\n", "skaipo"),
        ("operators.py", "from .priors import FlowPrior\n", "skaipo.priors"),
        ("operators.py", "from . import priors\n", "skaipo.priors"),
        ("operators.py", "from . import FlowPrior\n", "skaipo"),
        ("operators.py", "from . import _validation, priors\n", "skaipo.priors"),
        ("operators.py", "def f():\n    from .priors import FlowPrior\n", "skaipo.priors"),
        (
            "operators.py",
            "import_module('skaipo.priors')\n",
            "skaipo.priors",
        ),
        ("flows/__init__.py", "from ..priors import FlowPrior\n", "skaipo.priors"),
        ("flows/_glow.py", "from ..priors import FlowPrior\n", "skaipo.priors"),
        ("flows/_glow.py", "from .. import priors\n", "skaipo.priors"),
        ("metrics.py", "from .flows._glow import Glow\n", "skaipo.flows._glow"),
        ("priors.py", "if TYPE_CHECKING:\n    from .estimators import A\n", "skaipo.estimators"),
    ],
)
def test_checker_finds_an_upward_import(tmp_path, path, source, target):
    files = {"_validation.py": "", "priors.py": "", "estimators.py": "", "operators.py": ""}
    files |= {"flows/__init__.py": "", "flows/_glow.py": "", path: source}
    (problem,) = layer_problems(make_package(tmp_path, files))
    assert "imports point down only" in problem
    assert f"imports {target} of layer" in problem


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        (
            {"operators.py": "from .noise import N\n", "noise.py": "from . import operators\n"},
            "skaipo.noise -> skaipo.operators -> skaipo.noise",
        ),
        (
            {
                "operators.py": "from .noise import N\n",
                "noise.py": "def f():\n    from .objective import O\n",
                "objective.py": "import skaipo.operators\n",
            },
            "skaipo.noise -> skaipo.objective -> skaipo.operators -> skaipo.noise",
        ),
        (
            {
                "flows/__init__.py": "from ._a import A\n",
                "flows/_a.py": "from ._b import B\n",
                "flows/_b.py": "from ._a import A\n",
            },
            "skaipo.flows._a -> skaipo.flows._b -> skaipo.flows._a",
        ),
        (
            {"flows/__init__.py": "from ._a import A\n", "flows/_a.py": "from . import A\n"},
            "skaipo.flows -> skaipo.flows._a -> skaipo.flows",
        ),
        (  # no module twice, but the unit
            {
                "solvers/__init__.py": "",
                "solvers/_a.py": "from ..priors import P\n",
                "solvers/_b.py": "",
                "priors.py": "from .solvers._b import B\n",
            },
            "priors -> solvers -> priors",
        ),
    ],
)
def test_checker_finds_a_cycle(tmp_path, files, cycle):
    (problem,) = layer_problems(make_package(tmp_path, files))
    assert problem == f"import cycle: {cycle}"


@pytest.mark.parametrize("path", ["extra.py", "extra/__init__.py", "extra/_module.py"])
def test_checker_asks_for_a_new_module_to_be_listed(tmp_path, path):
    (problem,) = layer_problems(make_package(tmp_path, {path: ""}))
    assert problem.startswith("extra: not in LAYERS")
    assert "add it" in problem


def test_checker_finds_an_import_of_nothing(tmp_path):
    (problem,) = layer_problems(make_package(tmp_path, {"noise.py": "import skaipo.operator\n"}))
    assert "skaipo.operator, which does not exist" in problem


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.from_numpy(a)\n",
        "import torch as t\nx = t.as_tensor(a)\n",
        "from torch import from_numpy\n",
        "def f(x):\n    return x.detach().cpu().numpy()\n",
        "def f(x):\n    return x.numpy(force=True)\n",
    ],
)
def test_checker_finds_a_second_door(tmp_path, source):
    assert crossing_problems(make_package(tmp_path / "a", {"_validation.py": source})) == []
    (problem,) = crossing_problems(make_package(tmp_path / "b", {"solvers/_mle.py": source}))
    assert problem.startswith("skaipo.solvers._mle:")


def test_checker_knows_validations_own_as_tensor(tmp_path):
    source = "from ._validation import as_tensor\nimport torch\nx = as_tensor(a) + torch.ones(3)\n"
    assert crossing_problems(make_package(tmp_path, {"objective.py": source})) == []
