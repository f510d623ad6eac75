"""Chunks of rows in two processes, in two threads, or one after the other with two torch threads.

    python benchmarks/parallel.py

The ways take turns, so that a slow moment of the machine hits all of them; pools are started
beforehand. Rows are solved in chunks of ``batch_size`` whatever ``n_jobs`` is, and the answers
are compared bit by bit. Measure on a quiet machine: torch's own threads wait by spinning, and one
process with several of them is many times slower while other programs use the cores.
"""

import argparse
import csv
import os
import platform
import statistics
import time
from pathlib import Path

import joblib
import numpy as np
import sklearn
import torch

import skaipo
from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing

RESULTS = Path(__file__).resolve().parent / "results" / "parallel.csv"


def ways(cores):
    """Name, backend, n_jobs and torch threads of the main process."""
    return [
        (f"one process, {cores} torch threads", None, 1, cores),
        ("one process, 1 torch thread", None, 1, 1),
        # joblib gives each of the worker processes its share of the cores: one.
        (f"{cores} processes (loky)", "loky", cores, 1),
        (f"{cores} threads (threading)", "threading", cores, 1),
    ]


def run(model, Y, backend, n_jobs, threads):
    torch.set_num_threads(threads)
    model.set_params(n_jobs=n_jobs)
    start = time.perf_counter()
    if backend is None:
        x = model.reconstruct(Y).x
    else:
        with joblib.parallel_config(backend=backend):
            x = model.reconstruct(Y).x
    return x, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--max-evals", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    X = load_digits_split()[1][: args.images]
    op, noise = CompressedSensing(24), GaussianNoise(0.5)
    Y = op(X)
    Y = Y + noise.sigma * np.random.default_rng(args.seed).standard_normal(Y.shape)
    model = AIPORegressor(
        op,
        prior=load_digits_prior(device="cpu"),
        noise=noise,
        solver="lbfgs",
        space="latent",
        max_evals=args.max_evals,
        batch_size=args.batch_size,
    )
    seconds, answers = {}, {}
    for _, *how in ways(args.cores):
        run(model, Y[: 2 * args.batch_size], *how)
    for _ in range(args.repeats):
        for name, *how in ways(args.cores):
            x, spent = run(model, Y, *how)
            seconds.setdefault(name, []).append(spent)
            print(f"  {name}: {spent:.2f} s", flush=True)
            answers.setdefault(name, x)
    about = dict(
        images=len(X),
        batch_size=args.batch_size,
        max_evals=args.max_evals,
        seed=args.seed,
        skaipo=skaipo.__version__,
        sklearn=sklearn.__version__,
        torch=torch.__version__,
        joblib=joblib.__version__,
        machine=platform.machine(),
        cpus=os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
    )
    first = next(iter(seconds))
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], values, strict=True)]
        rows.append(
            dict(
                way=name,
                seconds=statistics.median(values),
                seconds_min=min(values),
                seconds_max=max(values),
                speedup=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                bitwise_equal=bool((answers[name] == answers[first]).all()),
                **about,
            )
        )
        row = rows[-1]
        print(
            f"{name:30s} {row['seconds']:6.2f} s ({row['seconds_min']:.2f} to "
            f"{row['seconds_max']:.2f}), {row['speedup']:.2f} times as fast as the first "
            f"({row['speedup_min']:.2f} to {row['speedup_max']:.2f}), bitwise equal: "
            f"{row['bitwise_equal']}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
