"""Train the digits prior that ships with the package, and compare it with Gaussian mixtures.

    python benchmarks/train_digits_prior.py            # train, compare, write the weights
    python benchmarks/train_digits_prior.py --compare  # compare the shipped weights only

Both see the same training digits and the same dequantisation noise. The mixture's number of
components (1..30) and ``reg_covar`` are chosen on a validation tenth of the training digits, then
it is refitted on all of them. The held-out digits are scored once, at the end.
"""

import argparse
import math
import platform
from pathlib import Path

import numpy as np
import sklearn
import torch
from joblib import Parallel, delayed
from sklearn.mixture import GaussianMixture

from skaipo import FlowPrior
from skaipo.datasets import load_digits_prior, load_digits_split

WEIGHTS = Path(__file__).resolve().parent.parent / "skaipo" / "data" / "digits_glow.safetensors"
SETTINGS = dict(
    flow="glow",
    n_steps=8,
    n_levels=2,
    hidden_channels=32,
    bound=1.0,
    dropout=0.2,
    max_epochs=160,
    n_iter_no_change=160,
    learning_rate=3e-3,
    batch_size=64,
    random_state=0,
)


def dequantized(X, seed):
    return X + np.random.default_rng(seed).uniform(-0.5, 0.5, X.shape)


def tuned_mixture(X):
    """Best full-covariance mixture by validation, refitted on all of ``X``."""
    order = np.random.default_rng(0).permutation(len(X))
    n_val = len(X) // 10
    train, val = dequantized(X[order[n_val:]], 1), dequantized(X[order[:n_val]], 2)

    def fit(n_components, reg_covar):
        model = GaussianMixture(n_components, reg_covar=reg_covar, random_state=0).fit(train)
        return model.score(val), n_components, reg_covar

    grid = [(n, r) for n in range(1, 31) for r in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
    score, n_components, reg_covar = max(Parallel(n_jobs=-1)(delayed(fit)(*g) for g in grid))
    model = GaussianMixture(n_components, reg_covar=reg_covar, random_state=0)
    return model.fit(dequantized(X, 1)), score


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="use the shipped weights")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    X_train, X_test, _, _ = load_digits_split()
    if args.compare:
        prior = load_digits_prior(device="cpu")
    else:
        prior = FlowPrior(**SETTINGS, device="cpu", verbose=1).fit(X_train.reshape(-1, 1, 8, 8))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        prior.save(args.out)
        print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")
    mixture, validation = tuned_mixture(X_train)
    X = dequantized(X_test, 3)
    scores = {
        "FlowPrior (Glow)": prior.score_samples(X),
        f"GaussianMixture({mixture.n_components}, reg_covar={mixture.reg_covar})": (
            mixture.score_samples(X)
        ),
    }
    print(
        f"mean log-likelihood of {len(X)} held-out digits, nats (validation of the mixture: "
        f"{validation:.2f})"
    )
    for name, values in scores.items():
        print(f"  {name:40s} {values.mean():9.2f} +- {values.std() / math.sqrt(len(X)):.2f}")
    print(
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, seed {SETTINGS['random_state']}"
    )


if __name__ == "__main__":
    main()
