"""
Images from fewer numbers than pixels
=====================================

Each measurement is the sum of all pixels with random weights, and there are fewer measurements
than pixels: infinitely many images explain them exactly. Compressed sensing chooses among them by
sparsity, and a user of scikit-learn would take :class:`~sklearn.linear_model.Lasso`, as its example
on tomography does; here with cosines as features. :class:`~skaipo.AIPORegressor` chooses by the
density of a normalizing flow that was trained on clean digits.
"""

# %%
# The operator holds the random matrix, so that it can measure and reconstruct.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from scipy.fft import idctn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, RidgeCV

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score, reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing

X_train, X_test, _, _ = load_digits_split()
X_tune, X = X_train[:20], X_test[:40]
noise = GaussianNoise(0.5)
prior = load_digits_prior(device="cpu")
warnings.simplefilter("ignore", ConvergenceWarning)  # some stop at 60 evaluations, close enough

# %%
# Four methods, from knowing nothing of digits to knowing their density.
#
# - The image of least norm that explains the measurements, by the pseudo-inverse.
# - Lasso in the basis of the discrete cosine transform; its ``alpha`` is chosen on training digits.
# - Ridge regression from measurements to images, trained on 1417 pairs that were simulated with
#   this very matrix; another matrix would need another training.
# - AIPO at the Bayesian lambda, 1. The flow knows nothing of the matrix; the same one serves all.

cosines = idctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)


def least_norm(Y, op):
    return Y @ np.linalg.pinv(op.matrix_).T


def lasso(Y, op):
    features = op.matrix_ @ cosines.T

    def fit(Y, alpha):
        model = Lasso(alpha=alpha, fit_intercept=False, max_iter=5000)
        return np.array([model.fit(features, y).coef_ @ cosines for y in Y])

    Y_tune = noise.add_noise(op(X_tune), random_state=1)
    alphas = np.geomspace(0.003, 0.3, 5)
    errors = [reconstruction_error(X_tune, fit(Y_tune, alpha)) for alpha in alphas]
    return fit(Y, alphas[np.argmin(errors)])


def ridge(Y, op):
    Y_train = noise.add_noise(op(X_train), random_state=1)
    return RidgeCV(np.geomspace(1, 1e4, 9)).fit(Y_train, X_train).predict(Y)


def aipo(Y, op):
    return AIPORegressor(op, lam=1.0, prior=prior, noise=noise, max_evals=60).predict(Y)


methods = {"least norm": least_norm, "Lasso, cosines": lasso, "ridge": ridge, "AIPO": aipo}
counts = [8, 16, 24, 40]
psnr, pictures = {name: [] for name in methods}, {}
for m in counts:
    op = CompressedSensing(m).bind((1, 8, 8))
    Y = noise.add_noise(op(X), random_state=0)
    pictures[m] = {"truth": X}
    for name, method in methods.items():
        pictures[m][name] = method(Y, op)
        psnr[name].append(psnr_score(X, pictures[m][name], data_range=16))
    print(m, "measurements:", ", ".join(f"{k} {v[-1]:.1f} dB" for k, v in psnr.items()))

# %%
# Why does Lasso do so badly, where the theory of compressed sensing promises so much? Because the
# promise is for images with far fewer coefficients than measurements, and digits of 64 pixels have
# no such basis among the cosines. This many coefficients hold 99 % of a digit's energy:

energy = np.sort((X @ cosines.T) ** 2, axis=1)[:, ::-1].cumsum(axis=1)
needed = (energy < 0.99 * energy[:, -1:]).sum(axis=1) + 1
print(f"coefficients for 99 % of the energy: {np.median(needed):.0f} of 64 in the median")

# %%
# The images are what all methods make of 24 measurements, and the best two of 8. Eight numbers
# often do not tell which digit it is. Ridge regression then returns something blurred, and the blur
# shows that it does not know; AIPO returns a clean digit, and now and then a wrong one. A
# reconstruction that looks convincing is no proof. The density pays most from 16 measurements on.

shown = 9
rows = {"truth": X, **{f"{name}, 24": pictures[24][name] for name in methods}}
rows |= {f"{name}, 8": pictures[8][name] for name in ("ridge", "AIPO")}
figure = plt.figure(figsize=(10.5, 4.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1.4, 1])
grid = left.subplots(len(rows), shown)
for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
axes = right.subplots()
colors = ["#b8c2cf", "#7aa6c2", "#c2a14d", "#d1603d"]
for (name, values), color in zip(psnr.items(), colors, strict=True):
    axes.plot(counts, values, "o-", color=color, linewidth=2)
    axes.annotate(
        name, (counts[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=color
    )
axes.set(xlabel="measurements of 64 pixels", ylabel="PSNR (dB, higher is better)", xlim=(6, 55))
axes.set_xticks(counts)
axes.spines[["top", "right"]].set_visible(False)
axes.grid(axis="y", alpha=0.3)
plt.show()
