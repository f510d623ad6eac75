"""
Phase retrieval
===============

An instrument that measures magnitudes loses the signs of its measurements (in optics, the phases of
the light). What is left, ``y = |A x| + noise``, is not linear, and has many images that nearly
explain it. This example reconstructs digits from the magnitudes of 96 random projections.
"""

# %%
# Measure. Half of what there was is gone: an image and its negative give the same numbers.
# :class:`~skaipo.operators.PhaseRetrieval` takes a matrix, real or complex, or a linear operator;
# other functions of the image go into :class:`~skaipo.operators.NonlinearOperator`.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor, FixedLambdaMAP
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import PhaseRetrieval

_, X, _, _ = load_digits_split()
X = X[:24]
A = np.random.default_rng(0).normal(size=(96, 64)) / 8
op = PhaseRetrieval(A)
noise = GaussianNoise(0.5)
Y = noise.add_noise(op(X), random_state=1)

# %%
# The classical way: guess the signs, solve for the image, cut it to the range that grey levels can
# have, take its signs, and so on (Fienup, 1982). It ends in some image that does not improve any
# more; of 50 random starts the one with the smallest residual is kept.


def alternating_projections(Y, starts=50, steps=200):
    inverse, rng = np.linalg.pinv(A).T, np.random.default_rng(2)
    best, least = np.zeros((len(Y), 64)), np.full(len(Y), np.inf)
    for _ in range(starts):
        x = rng.uniform(0, 16, (len(Y), 64))
        for _ in range(steps):
            x = np.clip((np.sign(x @ A.T) * Y) @ inverse, 0, 16)
        residual = np.linalg.norm(np.abs(x @ A.T) - Y, axis=1)
        best[residual < least] = x[residual < least]
        least = np.minimum(residual, least)
    return best


# %%
# The estimators. A fixed lambda from the prior's central image, by the same solver and with the
# same number of flow evaluations, falls into the next best valley. AIPO begins where the prior
# hardly counts; then it lets a Gaussian with the prior's moments choose between what was found.

warnings.simplefilter("ignore", ConvergenceWarning)
prior = load_digits_prior(device="cpu")
shared = dict(prior=prior, noise=noise, max_evals=100)
fixed = FixedLambdaMAP(op, 1.0, init="zero", solver="hybrid", **shared).reconstruct(Y)
aipo = AIPORegressor(op, 1.0, **shared).reconstruct(Y)
pictures = {
    "truth": X,
    "alternating\nprojections": alternating_projections(Y),
    "fixed lambda": fixed.x,
    "AIPO": aipo.x,
}
psnr = {name: psnr_score(X, x, data_range=16) for name, x in list(pictures.items())[1:]}
for name, value in psnr.items():
    print(f"{' '.join(name.split()):24s} {value:5.2f} dB")
lower, higher = (sign * (aipo.objective - fixed.objective) > 1e-3 for sign in (-1, 1))
print(
    f"AIPO's objective is lower on {lower.mean():.0%} of the digits, higher on {higher.mean():.0%}"
)

# %%
# The objective tells good reconstructions from bad ones, without the truth: those that ended in a
# wrong valley stand out by hundreds of nats.

figure = plt.figure(figsize=(9.5, 3.9), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[2.6, 1])
grid = left.subplots(len(pictures), 9)
for axes_row, (name, images) in zip(grid, pictures.items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
axes = right.subplots()
for name, result in (("fixed lambda", fixed), ("AIPO", aipo)):
    each = psnr_score(X, result.x, data_range=16, per_image=True)
    axes.scatter(result.objective, each, s=18, alpha=0.8, label=name)
axes.set(xscale="log", xlabel="objective in nats", ylabel="PSNR in dB")
axes.legend(frameon=False)
plt.show()
