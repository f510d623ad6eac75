"""AIPORegressorCV, one path, against GridSearchCV over AIPORegressor: same choice, at what cost.

    python benchmarks/cross_validation.py

Both get the same digits, folds and lambdas; the grid search solves anew for every lambda and
fold. Evaluations are flow evaluations, the starts included; those of the grid search are counted
by its scorer. The final refit is left out of both. Three tasks, on training digits: no held-out
digit is used to choose a lambda.
"""

import argparse
import csv
import platform
import time
from pathlib import Path

import joblib
import numpy as np
import sklearn
import torch
from sklearn.model_selection import GridSearchCV, KFold

import skaipo
from skaipo import AIPORegressor, AIPORegressorCV
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import reconstruction_error, reconstruction_error_scorer
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting

RESULTS = Path(__file__).resolve().parent / "results" / "cross_validation.csv"


def tasks(seed):
    mask = np.random.default_rng(seed).permutation(64) < 32
    return {
        "denoising, sigma 2": (Denoising(), GaussianNoise(2.0)),
        "compressed sensing, 24 of 64, sigma 0.5": (CompressedSensing(24), GaussianNoise(0.5)),
        "inpainting, half missing, sigma 1": (
            Inpainting(mask.reshape(1, 8, 8)),
            GaussianNoise(1.0),
        ),
    }


def counting_scorer(estimator, Y, X_true):
    """Score of ``reconstruction_error_scorer``, and what the reconstructions cost."""
    result = estimator.reconstruct(Y)
    return {
        "score": -reconstruction_error(X_true, result.x),
        "n_evals": int(result.n_evals.sum()),
    }


def clock():
    """Seconds on the wall, and of the processor, which a busy machine disturbs less."""
    return np.array([time.perf_counter(), time.process_time()])


def compare(op, noise, X, lams, options, seed):
    Y = op(X)
    Y = Y + noise.sigma * np.random.default_rng(seed).standard_normal(Y.shape)
    folds = KFold(3)
    shared = dict(noise=noise, smoothing=0, **options)
    start = clock()
    path = AIPORegressorCV(
        op, lams=lams, cv=folds, scoring=reconstruction_error_scorer, **shared
    ).fit(Y, X)
    seconds_path, cpu_path = clock() - start
    start = clock()
    grid = GridSearchCV(
        AIPORegressor(op, schedule="geometric", **shared),
        {"lam": lams},
        cv=folds,
        scoring=counting_scorer,
        refit=False,
    ).fit(Y, X)
    seconds_grid, cpu_grid = clock() - start
    results = grid.cv_results_
    scores = np.stack([results[f"split{k}_test_score"] for k in range(3)])
    along = np.stack([path.cv_results_[f"split{k}_test_score"] for k in range(3)])
    n_evals = round(sum(results[f"split{k}_test_n_evals"].sum() for k in range(3)))
    return dict(
        lam_path=path.lam_,
        lam_grid=float(lams[np.argmax(results["mean_test_score"])]),
        max_score_difference=float(np.abs(scores - along).max()),
        n_evals_path=path.n_evals_,
        n_evals_grid=n_evals,
        ratio_evals=n_evals / path.n_evals_,
        seconds_path=seconds_path,
        seconds_grid=seconds_grid,
        cpu_seconds_path=cpu_path,
        cpu_seconds_grid=cpu_grid,
        ratio_cpu_seconds=cpu_grid / cpu_path,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--max-evals", type=int, default=150)
    parser.add_argument("--solver", default="lbfgs")
    parser.add_argument("--space", default="latent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    X = load_digits_split()[0][: args.images]
    lams = np.geomspace(0.03, 10, 12)
    options = dict(
        prior=load_digits_prior(device="cpu"),
        solver=args.solver,
        space=args.space,
        max_evals=args.max_evals,
    )
    about = dict(
        images=len(X),
        solver=args.solver,
        space=args.space,
        max_evals=args.max_evals,
        lams=len(lams),
        folds=3,
        seed=args.seed,
        skaipo=skaipo.__version__,
        sklearn=sklearn.__version__,
        torch=torch.__version__,
        joblib=joblib.__version__,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
    )
    rows = []
    for name, (op, noise) in tasks(args.seed).items():
        row = compare(op, noise, X, lams, options, args.seed)
        rows.append(dict(task=name, **row, **about))
        print(
            f"{name}\n"
            f"  lambda       path {row['lam_path']:.4g}, grid search {row['lam_grid']:.4g}; "
            f"scores differ by at most {row['max_score_difference']:.1e}\n"
            f"  evaluations  path {row['n_evals_path']}, grid search {row['n_evals_grid']}: "
            f"{row['ratio_evals']:.2f} times as many\n"
            f"  seconds      path {row['seconds_path']:.1f}, grid search "
            f"{row['seconds_grid']:.1f}; of the processor {row['cpu_seconds_path']:.1f} and "
            f"{row['cpu_seconds_grid']:.1f}: {row['ratio_cpu_seconds']:.2f} times as long",
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
