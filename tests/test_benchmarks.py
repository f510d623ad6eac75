"""The benchmark of the paper's experiments: what it computes, and that it goes on where it was."""

import csv
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import convolve2d

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("paper")


@pytest.fixture
def report(paper):
    return importlib.import_module("report")


def tiny(tmp_path, *more):
    """A command line that takes a second: five digits, two tasks."""
    words = (
        "--data digits --tasks denoising inpainting --lams 1 --images 5 --evals 9 --chunk 3 "
        "--validation 2 --rates 0.05 0.2 --n-jobs 1 --store"
    )
    return [*words.split(), str(tmp_path / "cells"), "--out", str(tmp_path / "paper.csv"), *more]


def test_a_second_run_solves_nothing_again(paper, report, tmp_path, monkeypatch, capsys):
    solved, power = [], 10
    solve = paper.Cell.solve

    def counted(cell):
        if len(solved) == power:
            raise KeyboardInterrupt
        solved.append(cell)
        return solve(cell)

    monkeypatch.setattr(paper.Cell, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        paper.main(tiny(tmp_path))
    assert len(solved) == 10 and not (tmp_path / "paper.csv").exists()
    power = None
    paper.main(tiny(tmp_path))
    once = len(solved)
    assert len(set(solved)) == once
    rows = paper.read_rows(tmp_path / "paper.csv")
    assert len(rows) == 2 * 6
    first = (tmp_path / "paper.csv").read_text()
    paper.main(tiny(tmp_path))
    paper.main(tiny(tmp_path, "--cached"))
    assert len(solved) == once
    assert (tmp_path / "paper.csv").read_text() == first

    # Equal budgets, a tenth for the default, and only as much for denoising as is left without MLE.
    for row in rows:
        whole = {"denoising": 6, "inpainting": 9}[row["task"]]
        assert float(row["n_evals"]) == (whole if row["method"] in paper.PAPERS else 4)
        assert row["images"] == "5" and row["failed"] == "0"

    # One image's result is its own: in a chunk of another size it is the same.
    (cell,) = [c for c in solved if c.method == paper.OURS and c.task == "denoising" and c.start]
    alone = paper.Cell(**{**vars(cell), "start": 4})
    assert alone.solve()["objective"] == cell.cached(tmp_path / "cells")["objective"][1:]

    report.main(["--rows", str(tmp_path / "paper.csv"), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "inpainting, half missing" in text and "flows realnvp" in text
    assert "--tasks denoising inpainting" in text

    capsys.readouterr()
    paper.main(tiny(tmp_path, "--plan"))
    plan = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert plan["evaluations"] == str(5 * (4 * 6 + 2 * 4 + 4 * 9 + 2 * 4))
    assert plan["files"] == str(2 * 6 * 2) and plan["table_cells"] == "12"


def test_arithmetic_of_the_table(paper, report):
    """Two seeds of three images, by hand."""

    def method(objective, psnr):
        objective = np.array(objective, dtype=float)
        numbers = {name: np.zeros_like(objective) for name in paper.METRICS}
        return numbers | dict(objective=objective, psnr=np.array(psnr, dtype=float))

    flat = [[20, 20, 20], [20, 20, 20]]
    results = {
        paper.AIPO: method([[1, 2, 3], [3, 4, 5]], flat),
        "Adam, mle": method([[2, 3, 4], [4, 5, 6]], [[21, 22, 23], [23, 24, 25]]),
        "Adam, zero": method([[0, 4, 2], [0, 4, 2]], flat),
        "Adam, random": method([[9, math.nan, 9], [9, 9, 9]], flat),
        paper.OURS: method([[0, 0, 0], [0, 0, 0]], [[23, 23, 23], [23, 23, 23]]),
        paper.EXACT: method([[0, 0, 0], [0, 0, 0]], [[21, 21, 21], [21, 21, 21]]),
    }
    rows = paper.summarise(results)
    assert rows[paper.AIPO]["objective"] == 3
    assert rows[paper.AIPO]["objective_std"] == pytest.approx(math.sqrt(2))
    mle = rows["Adam, mle"]
    assert (mle["gap"], mle["gap_low"], mle["gap_high"], mle["win"]) == (1, 1, 1, 1)
    # Per image and averaged over its seeds: 23 - 22, 23 - 23, 23 - 24.
    assert mle["gain"] == 0 and -1 <= mle["gain_low"] < 0 < mle["gain_high"] <= 1
    zero = rows["Adam, zero"]
    # Gaps of -2, 1 and -2; AIPO lower in one pair of six, a tie is no win.
    assert zero["gap"] == pytest.approx(-1)
    assert zero["win"] == pytest.approx(1 / 6)
    assert zero["gap_median"] == pytest.approx(-2)
    # What failed is lost to AIPO, counted, and left out of the means.
    assert rows["Adam, random"]["failed"] == 1
    assert rows["Adam, random"]["win"] == 1
    assert rows["Adam, random"]["objective"] == 9
    assert rows["Adam, random"]["gap"] == pytest.approx(6)

    def verdict(low, high):
        return report.verdict(dict(gap_low=str(low), gap_high=str(high)))

    assert verdict(0.1, 0.2) == "reproduced"
    assert verdict(-0.1, 0.2) == "not reproduced: undecided"
    assert verdict(-0.2, -0.1) == "not reproduced: AIPO is higher"
    group = {name: {k: str(v) for k, v in row.items()} for name, row in rows.items()}
    assert report.best_of(group) == "Adam, mle"
    assert report.reached(group["Adam, mle"]) == "yes, within the interval"
    assert rows["Adam, mle"]["gain_exact"] == -2 and rows[paper.EXACT]["gain"] == 2
    assert report.reached(group["Adam, mle"], "gain_exact") == "no"
    assert report.reached(group["Adam, zero"]) == "yes"


def test_ssim(paper):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (2, 3, 32, 32))
    assert paper.ssim(x, x, 255) == pytest.approx(1)
    # Two constant images differ in luminance alone.
    a, b, c = 100.0, 150.0, (0.01 * 255) ** 2
    flat = np.ones((1, 16, 16))
    assert paper.ssim(a * flat, b * flat, 255) == pytest.approx(
        (2 * a * b + c) / (a * a + b * b + c)
    )
    # The definition, with a window written out.
    k = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(k, k) / k.sum() ** 2

    def mean(image):
        return convolve2d(np.pad(image, 5, mode="symmetric"), window, mode="valid")

    values = []
    for p, q in zip(x, y, strict=True):
        mp, mq = mean(p), mean(q)
        vp, vq, vpq = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
        c1, c2 = 2.55**2, 7.65**2
        values.append((2 * mp * mq + c1) * (2 * vpq + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert paper.ssim(x, y, 255) == pytest.approx(np.mean(values))


def test_the_tasks_are_the_papers(paper):
    """Numbers of measurements at 32 x 32, and what is masked."""
    shape = (3, 32, 32)
    measurements = [
        paper.TASKS[f"cs{m}"].operator(shape, 0).n_measurements for m in (500, 1000, 2500)
    ]
    assert measurements == [125, 250, 625]
    half = paper.TASKS["inpainting"].operator(shape, 0).bind(shape).measured_
    assert half.mean() == 0.5
    box = paper.TASKS["box"].operator(shape, 0).bind(shape).measured_.reshape(shape)
    assert (~box).sum() == 3 * 10 * 10 and not box[:, 11:21, 11:21].any()
    assert paper.budget("denoising", 1500) == 1000 and paper.budget("box", 1500) == 1500


def test_noise_rows(monkeypatch, tmp_path):
    """Three digits, two of validation: rows of both models, paired, and other tasks' rows kept."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    noise = importlib.import_module("noise")
    monkeypatch.setattr(noise, "RESULTS", tmp_path / "noise.csv")
    monkeypatch.setattr(noise, "LAMS", (0.5, 1.0))
    words = "--parts models --images 3 --validation 2 --max-evals 4 --tasks"
    for task in ("poisson", "bit", "poisson"):
        noise.main([*words.split(), task])
    with (tmp_path / "noise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["bit", "bit", "poisson", "poisson"]
    for right, gaussian in (rows[:2], rows[2:]):
        assert gaussian["model"] == "Gaussian" and float(gaussian["psnr_gain"]) == 0
        gain = float(right["psnr"]) - float(gaussian["psnr"])
        assert float(right["psnr_gain"]) == pytest.approx(gain, abs=1e-3)
        assert float(right["psnr_low"]) <= gain <= float(right["psnr_high"])
        assert right["images"] == "3" and 0 <= float(right["win"]) <= 1
