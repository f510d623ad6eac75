"""Phase retrieval and clipping: AIPO against fixed lambda, at equal flow evaluations.

    python benchmarks/nonlinear.py                 # some minutes on one core
    python benchmarks/nonlinear.py --images 20 --evals 100

scikit-learn's digits (values 0 to 16, noise of 0.5) with the prior that ships, lambda 1. Phase
retrieval of 96 real random projections, whose signs are lost; of 96 complex ones; and of the
intensities of the latter; clipping to 2..9. AIPO starts as skaipo does by default, and in the
paper's manner: from the MLE, lambda rising in equal steps. Fixed lambda starts from ``G(0)`` and
from ``G`` of random latents. All of them take the same solver (the default; once more L-BFGS in
latent space, and Adam with the paper's projected gradient) and the same number of flow evaluations,
starts included. (What the default's start costs beyond, evaluations of the operator and linear
algebra, is in the seconds.) Rows go to ``benchmarks/results/nonlinear.csv``: mean and median
objective, PSNR, and, of AIPO against each baseline, the share of images on which its objective is
lower, or equal to 0.1 %, with paired 95 % bootstrap intervals of the difference.
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
from skaipo import AIPORegressor, FixedLambdaMAP
from skaipo.__main__ import paired_interval
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import Clipping, PhaseRetrieval

RESULTS = Path(__file__).resolve().parent / "results" / "nonlinear.csv"
PEAK = 16.0
AIPO = ("AIPO", "AIPO, MLE and rising lambda")


def operators(seed):
    rng = np.random.default_rng(seed)
    real, imaginary = rng.normal(size=(2, 96, 64)) / 8
    return {
        "phase retrieval, real": PhaseRetrieval(real),
        "phase retrieval, complex": PhaseRetrieval(real + 1j * imaginary),
        "phase retrieval, intensities": PhaseRetrieval(real + 1j * imaginary, squared=True),
        "clipping": Clipping(2.0, 9.0),
    }


def methods(solver):
    if solver == "adam":
        rest = dict(solver="adam", mle_solver="pgd", smoothing=0)
        yield AIPO[1], AIPORegressor, dict(schedule="linear", init="mle", **rest)
    else:
        rest = dict(solver=solver, mle_solver="lbfgs", smoothing=0)
        if solver == "latent":
            rest = dict(solver="lbfgs", space="latent", mle_solver="lbfgs", smoothing=0)
        yield AIPO[0], AIPORegressor, rest
        yield AIPO[1], AIPORegressor, dict(schedule="linear", init="mle", **rest)
    for start in ("mle", "zero", "random"):
        yield f"fixed lambda, {start}", FixedLambdaMAP, dict(init=start, **rest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--evals", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--solvers", nargs="+", default=["hybrid", "latent", "adam"])
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    X = load_digits_split()[1][: args.images].reshape(-1, 64)
    prior, rows = load_digits_prior(), []
    for task, op in operators(args.seed).items():
        if args.tasks and task not in args.tasks:
            continue
        noise = GaussianNoise(args.sigma)
        Y = noise.add_noise(op(X), random_state=args.seed + 1)
        for solver in args.solvers:
            for evals in args.evals:
                results = {}
                for name, cls, options in methods(solver):
                    model = cls(
                        op, args.lam, prior=prior, noise=noise, max_evals=evals, random_state=0,
                        **options,
                    )  # fmt: skip
                    start = time.perf_counter()
                    result = model.reconstruct(Y)
                    seconds = time.perf_counter() - start
                    psnr = psnr_score(X, result.x, data_range=PEAK, per_image=True)
                    results[name] = result.objective, psnr
                    rows.append(
                        dict(
                            task=task,
                            solver=solver,
                            max_evals=evals,
                            method=name,
                            images=len(X),
                            lam=args.lam,
                            sigma=args.sigma,
                            seed=args.seed,
                            objective=result.objective.mean(),
                            objective_sd=result.objective.std(),
                            objective_median=np.median(result.objective),
                            psnr=psnr.mean(),
                            n_evals=result.n_evals.mean(),
                            seconds=seconds,
                        )
                    )
                    for aipo in AIPO:
                        if aipo not in results or name in AIPO:
                            continue
                        ours, their = results[aipo][0], result.objective
                        gain, low, high = paired_interval(their - ours)
                        key = "aipo" if aipo == AIPO[0] else "mle"
                        rows[-1] |= {
                            f"{key}_at_or_below": np.mean(ours <= their + 1e-3 * np.abs(their)),
                            f"{key}_gain": gain,
                            f"{key}_gain_low": low,
                            f"{key}_gain_high": high,
                        }
                    shown = {k: v for k, v in rows[-1].items() if not isinstance(v, str)}
                    print(task, solver, evals, name, *(
                        f"{k} {shown[k]:.4g}" for k in
                        ("objective", "objective_median", "psnr", "aipo_at_or_below",
                         "mle_at_or_below", "seconds") if k in shown
                    ), sep="  ", flush=True)  # fmt: skip
    versions = dict(
        machine=f"{platform.machine()} CPU", python=platform.python_version(),
        skaipo=skaipo.__version__, torch=torch.__version__, numpy=np.__version__,
        scikit_learn=sklearn.__version__,
    )  # fmt: skip
    names = list(dict.fromkeys(key for row in rows for key in row))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *versions], restval="")
        writer.writeheader()
        for row in rows:
            shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown | versions)


if __name__ == "__main__":
    main()
