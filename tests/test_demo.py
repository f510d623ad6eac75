"""The command line: the demo's table and figure, help, and what it says about bad options."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import skaipo
from skaipo.__main__ import demo, main, paired_interval

METHODS = [
    "skaipo's default",
    "AIPO as in the paper",
    "fixed lambda, mle start",
    "fixed lambda, zero start",
    "fixed lambda, random start",
]
NUMBER = r"-?\d+(?:\.\d+)?"


def table_rows(text):
    """{method: [numbers]} for each task, in the order of the printed table."""
    tasks = []
    for line in text.splitlines():
        if line.startswith("method "):
            tasks.append({})
        for method in METHODS:
            if line.startswith(method) and tasks:
                tasks[-1][method] = [float(x) for x in re.findall(NUMBER, line[len(method) :])]
    return tasks


def block(monkeypatch, package):
    """Make a package that is installed look as if it were not."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


def test_quick_demo_prints_a_table_and_draws_a_figure(tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    path = tmp_path / "figure.png"
    assert main(["demo", "--quick", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    tasks = table_rows(out)
    assert len(tasks) == 3
    for rows in tasks:
        assert list(rows) == METHODS
        for method, numbers in rows.items():
            psnr, objective, n_evals, seconds, *difference = numbers
            assert 0 < psnr < 60 and seconds >= 0
            assert 0 < n_evals <= 40
            assert len(difference) == (0 if method == METHODS[0] else 3)
            if difference:
                mean, low, high = difference
                assert low <= mean <= high
                assert mean == pytest.approx(rows[METHODS[0]][0] - psnr, abs=0.02)
        # From nowhere to something: the mode of the prior is no reconstruction.
        assert rows[METHODS[0]][0] > rows["fixed lambda, random start"][0]
    for task in ("denoising", "inpainting", "compressed sensing"):
        assert task in out
    assert str(path) in out
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    # Three tasks with six rows of digits each; a blank page is of one colour.
    assert pixels[..., :3].std() > 0.1 and len(np.unique(pixels[..., 0])) > 50


def test_the_demo_is_repeatable_and_returns_its_table(tmp_path, capsys):
    first, second = (demo(2, 4, 4, tmp_path / "a.png", shown=1) for _ in range(2))
    other = demo(2, 4, 5, tmp_path / "a.png", shown=1)
    assert len(first) == 15
    for key in ("task", "method", "psnr", "objective", "n_evals"):
        assert [row[key] for row in first] == [row[key] for row in second], key
    assert [row["psnr"] for row in first] != [row["psnr"] for row in other]
    assert max(row["n_evals"] for row in first) <= 4


def test_without_matplotlib_it_prints_the_table_and_says_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    block(monkeypatch, "matplotlib")
    path = tmp_path / "figure.png"
    args = ["demo", "--images", "1", "--max-evals", "4", "--output", str(path)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert len(table_rows(out)) == 3
    assert re.search(r"No figure: Figures need matplotlib.*pip install 'skaipo\[plot\]'", out)
    assert "Traceback" not in out and not path.exists()


def test_without_rich_progress_is_plain_lines(tmp_path, capsys, monkeypatch):
    block(monkeypatch, "rich")
    path = tmp_path / "figure.png"
    args = ["demo", "--images", "1", "--max-evals", "4", "--output", str(path)]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert len(table_rows(captured.out)) == 3
    assert re.search(r"^Reconstructing: 100%", captured.err, re.MULTILINE)
    assert "\x1b" not in captured.err
    assert "Reconstructing" not in captured.out, "the table can be piped on"


def test_no_command_prints_help(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert "usage: skaipo" in out and "demo" in out


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "skaipo", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(skaipo.__file__))},
    )
    assert run.stdout.startswith("usage: skaipo") and "demo" in run.stdout
    assert not run.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr() == (f"skaipo {skaipo.__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["demo"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    options = ("--quick", "--images", "--max-evals", "--seed", "--output")
    assert all(option in out for option in (options if command else ("--version", "demo")))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "0"], r"--images must lie in 1..360, got 0"),
        (["--images", "361"], r"--images must lie in 1..360, got 361"),
        (["--images", "many"], r"argument --images: invalid int value: 'many'"),
        (["--max-evals", "3"], r"--max-evals must be at least 4, got 3"),
        (["--max-evals", "1e3"], r"argument --max-evals: invalid int value: '1e3'"),
        (["--seed", "-1"], r"--seed must lie in 0..2\*\*32 - 1, got -1"),
        (["--output", "no/such/folder/a.png"], r"--output: there is no folder 'no.such.folder'"),
        (["--output", "figure"], r"--output must end in .png, .pdf or .svg, got 'figure'"),
        (["--output", "figure.xyz"], r"--output must end in .png, .pdf or .svg, got 'figure.xyz'"),
        (["--colour"], r"unrecognized arguments: --colour"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert not captured.out, "nothing is computed before the options are checked"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_paired_interval():
    rng = np.random.default_rng(0)
    difference = rng.normal(2.0, 3.0, 400)
    mean, low, high = paired_interval(difference)
    assert mean == difference.mean()
    # Close to the normal approximation, mean +- 1.96 standard errors.
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(mean - half, abs=0.05)
    assert high == pytest.approx(mean + half, abs=0.05)
    assert paired_interval(np.full(5, 3.0)) == (3.0, 3.0, 3.0)
