"""The right noise model against a Gaussian one, on scikit-learn's digits with the prior that ships.

    python benchmarks/noise.py                       # a quarter of an hour on one core
    python benchmarks/noise.py --tasks poisson --images 20
    python benchmarks/noise.py --parts estimate

Laplace, Student's t, low counts, one bit and stripes (with a flow trained on samples of them); the
Gaussian model has the true standard deviation of the noise, taken on the validation images where it
depends on the image. Lambda is chosen for either model by the mean squared error on 40 validation
digits, on a grid that is extended while the best is at an end of it. Rows with means and paired
95 % bootstrap intervals over the test digits go to ``benchmarks/results/noise.csv``.

"estimate" measures ``GaussianNoise("estimate")``: white noise of several sizes on the digits
(estimated by wavelets, and by least squares where there are twice as many measurements as pixels)
and on scikit-learn's two photographs, where pillow is installed.
"""

import argparse
import csv
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning

import skaipo
from skaipo import AIPORegressor, FlowPrior
from skaipo.__main__ import paired_interval
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import (
    BernoulliNoise,
    CorrelatedGaussianNoise,
    FlowNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonNoise,
    StudentTNoise,
)
from skaipo.operators import Denoising, MatrixOperator

RESULTS = Path(__file__).resolve().parent / "results" / "noise.csv"
SHAPE, PEAK = (1, 8, 8), 16.0
LAMS = (0.25, 0.354, 0.5, 0.707, 1.0, 1.41, 2.0)
N_VALIDATION = 40


# ------------------------------------------------------------------------------------- the tasks
# Each gives, for clean images (n, 64) and a seed, the measurements and what each model makes of
# them: {model: (operator, noise, measurements)}. The right model comes first, the Gaussian second.


def added(noise, sigma, matrix=None):
    """Noise that is added to the image, or to its products with a matrix."""
    op = Denoising() if matrix is None else MatrixOperator(matrix)

    def make(validation):
        def measure(x, seed):
            y = noise.add_noise(x if matrix is None else x @ matrix.T, random_state=seed)
            return {
                repr(noise): (op, noise, y),
                "Gaussian": (op, GaussianNoise(sigma), y),
            }

        return measure

    return make


def counts(gain):
    def make(validation):
        # The variance of a count is its mean.
        sigma = float(np.sqrt(gain * validation.mean()) / gain)
        noise = PoissonNoise(gain)

        def measure(x, seed):
            y = noise.add_noise(x, random_state=seed)
            return {
                repr(noise): (Denoising(), noise, y),
                "Gaussian": (Denoising(), GaussianNoise(sigma), y / gain),
            }

        return measure

    return make


def bits(m, scale, seed=0):
    """One bit of each of ``m`` random projections, against the mean digit's."""

    def make(validation):
        matrix = projections(m, seed)
        op, threshold = MatrixOperator(matrix), matrix @ load_digits_split()[0].mean(0)
        noise = BernoulliNoise(scale, threshold)
        # The best that a Gaussian can do with a bit: as far from the threshold as it is on average.
        clean = validation @ matrix.T
        sign = 2 * noise.add_noise(clean, random_state=seed + 1) - 1
        step = float((sign * (clean - threshold)).mean())
        sigma = float((threshold + step * sign - clean).std())

        def measure(x, seed):
            y = noise.add_noise(x @ matrix.T, random_state=seed)
            return {
                f"BernoulliNoise(scale={scale:g})": (op, noise, y),
                "Gaussian": (op, GaussianNoise(sigma), threshold + step * (2 * y - 1)),
            }

        return measure

    return make


def draw_stripes(n, rng):
    """Three rows in ten are offset, up or down, by about six grey levels; a little white noise."""
    size = rng.choice([-1.0, 1.0], (n, 8, 1)) * rng.normal(6, 1, (n, 8, 1))
    rows = np.where(rng.random((n, 8, 1)) < 0.3, size, 0.0)
    return (rows + rng.normal(0, 0.7, (n, 8, 8))).reshape(n, 64)


def stripes(n_samples=6000, seed=0):
    def make(validation):
        samples = draw_stripes(n_samples, np.random.default_rng(seed))
        start = time.perf_counter()
        flow = FlowPrior(
            "realnvp",
            event_shape=(64,),
            dequantize=None,
            n_steps=8,
            hidden_channels=128,
            max_epochs=60,
            device="cpu",
            random_state=seed,
        ).fit(samples)
        held_out = draw_stripes(2000, np.random.default_rng(seed + 1))
        gaussian = CorrelatedGaussianNoise(np.cov(samples.T))
        normal = np.linalg.slogdet(2 * np.pi * np.cov(samples.T))[1] / 2
        zero = torch.zeros(len(held_out), 64, dtype=torch.float64)
        correlated = gaussian.nll(zero, torch.tensor(held_out)).mean().item() + normal
        print(
            f"flow of the stripes: {-flow.score(held_out):.1f} nats on held-out samples, a "
            f"Gaussian with their covariance {correlated:.1f}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        sigma = float(samples.std())

        def measure(x, seed):
            y = x + draw_stripes(len(x), np.random.default_rng(1000 + seed))
            return {
                "FlowNoise": (Denoising(), FlowNoise(flow), y),
                "Gaussian": (Denoising(), GaussianNoise(sigma), y),
                "CorrelatedGaussianNoise": (Denoising(), gaussian, y),
            }

        return measure

    return make


def projections(m, seed=0):
    """A random matrix with rows of about unit length."""
    return np.random.default_rng(seed).normal(size=(m, 64)) / 8


def exposures(k):
    """Every pixel ``k`` times, each with its own noise."""
    return np.tile(np.eye(64), (k, 1))


TASKS = {
    "laplace": added(LaplaceNoise(2.0), 2.0 * np.sqrt(2)),
    "laplace, 128 projections": added(LaplaceNoise(2.0), 2.0 * np.sqrt(2), projections(128)),
    "laplace, 4 exposures": added(LaplaceNoise(2.0), 2.0 * np.sqrt(2), exposures(4)),
    "laplace, 16 exposures": added(LaplaceNoise(2.0), 2.0 * np.sqrt(2), exposures(16)),
    "student": added(StudentTNoise(1.5, df=3.0), 1.5 * np.sqrt(3)),
    "student, df 2.1": added(StudentTNoise(1.5, df=2.1), 1.5 * np.sqrt(21)),
    "poisson": counts(0.5),
    "bit": bits(256, 0.5),
    "stripes": stripes(),
}


# ------------------------------------------------------------------------------------ the solves


def solve(prior, op, noise, y, lam, max_evals):
    model = AIPORegressor(op, lam, prior=prior, noise=noise, max_evals=max_evals, smoothing=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.predict(y)


def tune(prior, problem, x, max_evals):
    """The lambda of lowest mean squared error."""

    def cost(lam):
        return float(((solve(prior, *problem, lam, max_evals) - x) ** 2).mean())

    costs = {lam: cost(lam) for lam in LAMS}
    for end, factor in ((min, 0.707), (max, 1.414)):
        while len(costs) < len(LAMS) + 4:
            best = min(costs, key=costs.get)
            if best != end(costs):
                break
            costs[factor * best] = cost(factor * best)
    return min(costs, key=costs.get)


def compare(task, prior, validation, test, args):
    """CSV rows of one task, a row for each model."""
    measure = TASKS[task](validation)
    tuning, problems = measure(validation, args.seed + 1), measure(test, args.seed)
    found = {}
    for model, problem in problems.items():
        lam = tune(prior, tuning[model], validation, args.max_evals)
        start = time.perf_counter()
        x = solve(prior, *problem, lam, args.max_evals)
        found[model] = dict(
            lam=lam,
            psnr=psnr_score(test, x, data_range=PEAK, per_image=True),
            mse=((x - test) ** 2).mean(1),
            seconds=time.perf_counter() - start,
        )
    rows, baseline = [], found["Gaussian"]
    for model, numbers in found.items():
        row = dict(task=task, model=model, lam=numbers["lam"], seconds=numbers["seconds"])
        for name in ("psnr", "mse"):
            row |= {name: numbers[name].mean(), f"{name}_std": numbers[name].std(ddof=1)}
            gain = paired_interval(numbers[name] - baseline[name], seed=args.seed)
            row |= dict(zip((f"{name}_gain", f"{name}_low", f"{name}_high"), gain, strict=True))
        row["win"] = float((numbers["mse"] < baseline["mse"]).mean())
        rows.append(row)
        print(
            f"{task:26s}{model:34.34s} lambda {row['lam']:<6g}{row['psnr']:6.2f} dB  gain "
            f"{row['psnr_gain']:5.2f} [{row['psnr_low']:5.2f}, {row['psnr_high']:5.2f}]  MSE "
            f"{row['mse']:6.3f} change {row['mse_gain']:6.3f} [{row['mse_low']:6.3f}, "
            f"{row['mse_high']:6.3f}]  better in {row['win']:.0%}",
            flush=True,
        )
    return rows


def estimates(test, args):
    """CSV rows of ``GaussianNoise("estimate")``: mean and spread of ten draws."""
    tall = projections(128)
    cases = [
        ("digits, wavelets", Denoising(), SHAPE, test),
        ("digits, 128 projections, least squares", MatrixOperator(tall), SHAPE, test),
    ]
    try:
        from sklearn.datasets import load_sample_images

        photographs = [image.mean(2) for image in load_sample_images().images]
    except ImportError:
        print("no pillow: without the photographs")
    else:
        for name, image in zip(("temple", "flower"), photographs, strict=True):
            shape = (1, *image.shape)
            cases.append((f"{name} (0..255), wavelets", Denoising(), shape, image.reshape(1, -1)))
    rows = []
    for name, op, shape, x in cases:
        op = op.bind(shape)
        clean = np.asarray(op(x))
        for sigma in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
            sigma = sigma * (4 if "255" in name else 1)
            found = []
            for seed in range(10):
                y = torch.tensor(GaussianNoise(sigma).add_noise(clean, random_state=seed))
                found.append(GaussianNoise("estimate").estimate(y, op).sigma / sigma)
            rows.append(
                dict(
                    task="estimate",
                    model=name,
                    sigma=sigma,
                    ratio=np.mean(found),
                    ratio_std=np.std(found, ddof=1),
                )
            )
            print(f"{name:40s} sigma {sigma:<6g} estimate / sigma {np.mean(found):.3f}", flush=True)
    return rows


def write(rows):
    """Replace the rows of the same tasks and budgets."""
    old = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            old = list(csv.DictReader(file))
    done = {(row["task"], str(row["max_evals"])) for row in rows}
    rows = [row for row in old if (row["task"], row["max_evals"]) not in done] + [
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["models", "estimate"], default=None)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--validation", type=int, default=N_VALIDATION)
    parser.add_argument("--max-evals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    parts = args.parts or ["models", "estimate"]
    held_out = load_digits_split()[1]
    validation = held_out[: args.validation]
    test = held_out[N_VALIDATION : N_VALIDATION + args.images]
    about = dict(
        images=len(test),
        validation=len(validation),
        max_evals=args.max_evals,
        seed=args.seed,
        python=platform.python_version(),
        skaipo=skaipo.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        sklearn=sklearn.__version__,
        device=f"{platform.machine()} CPU",
    )
    prior = load_digits_prior(device="cpu")
    if "models" in parts:
        for task in args.tasks:
            write([row | about for row in compare(task, prior, validation, test, args)])
    if "estimate" in parts:
        write([row | about for row in estimates(test, args)])
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
