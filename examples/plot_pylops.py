"""
A PyLops operator
=================

`PyLops <https://pylops.readthedocs.io>`_ has linear operators for imaging and geophysics, which are
combined like matrices, and solvers for them. Its operators go into skaipo as they are. This one is
a scanner that sees a digit from four sides only, and what PyLops' solvers make of the measurements
is compared with a reconstruction that knows digits.
"""

# %%
# The scanner adds up the grey levels along columns, along rows, and along both kinds of diagonals:
# 46 sums, of 64 pixels. PyLops has the sums along an axis; those along diagonals are sparse
# matrices, and ``VStack`` puts all of them on top of each other.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pylops
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score, reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import as_operator

row, column = np.indices((8, 8)).reshape(2, -1)
pixel, ones = np.arange(64), np.ones(64)
falling = sp.csr_array((ones, (row - column + 7, pixel)))
rising = sp.csr_array((ones, (row + column, pixel)))
scanner = pylops.VStack(
    [
        pylops.Sum((8, 8), axis=0),
        pylops.Sum((8, 8), axis=1),
        pylops.MatrixMult(falling),
        pylops.MatrixMult(rising),
    ]
)
print(scanner)

# %%
# Measure 30 digits, and 12 of the training set to choose the weights of the baseline. Estimators
# take the operator itself; :func:`~skaipo.operators.as_operator` makes it callable on a batch.

X_train, X_test, _, _ = load_digits_split()
X_tune, X = X_train[:12], X_test[:30]
noise = GaussianNoise(1.0)
Y = noise.add_noise(as_operator(scanner)(X), random_state=0)
Y_tune = noise.add_noise(as_operator(scanner)(X_tune), random_state=1)

# %%
# PyLops' own way: the image of smallest norm that fits, by LSQR, and one with few bright pixels, by
# FISTA, whose penalty on the absolute values has the weight that suits the training digits best.
# (A penalty on the gradient, to make it smooth, gains nothing over the smallest norm.)


def smallest(Y):
    return np.stack([pylops.lsqr(scanner, y, np.zeros(64), niter=60)[0] for y in Y])


def sparse(Y, weight):
    return np.stack([pylops.fista(scanner, y, niter=100, eps=weight)[0] for y in Y])


weights = np.geomspace(0.1, 10, 5)
weight = min(weights, key=lambda w: reconstruction_error(X_tune, sparse(Y_tune, w)))

# %%
# skaipo's: the same object, and the prior of the digits. Gradients are products with the operator
# and with its adjoint; the start, an image that explains the sums exactly, takes conjugate
# gradients. Before, the operator is tried once on random images. (Some digits stop at 100
# evaluations; the warning that says so is not needed here.)

warnings.simplefilter("ignore", ConvergenceWarning)
prior = load_digits_prior(device="cpu")
model = AIPORegressor(scanner, 1.0, prior=prior, noise=noise, max_evals=100)
pictures = {
    "truth": X,
    "smallest norm": smallest(Y),
    "sparse": sparse(Y, weight),
    "AIPO": model.predict(Y),
}
psnr = {name: psnr_score(X, pictures[name], data_range=16) for name in list(pictures)[1:]}
for name, value in psnr.items():
    print(f"{name:14s} {value:5.2f} dB")

# %%
# What the scanner saw, all sums of a digit as a strip (columns, rows, diagonals), and the images.
# Four views leave streaks where the sums do not tell what is where along a line. That few pixels
# are bright removes most of them, and greys with them; a prior of digits knows what a stroke is.

shown = 10
figure, grid = plt.subplots(
    len(pictures) + 1,
    shown,
    figsize=(9.5, 5.0),
    layout="constrained",
    height_ratios=[0.55, *[1] * len(pictures)],
)
parts = np.cumsum([8, 8, 15])
for axes, sums in zip(grid[0], Y, strict=False):
    axes.bar(np.arange(46), sums, 1.0, color="#5d7fa8")
    for edge in parts:
        axes.axvline(edge - 0.5, color="#b0b0b0", linewidth=0.5)
    axes.set(xticks=[], yticks=[], ylim=(0, Y[:shown].max()))
    axes.spines[:].set_visible(False)
grid[0, 0].set_ylabel("sums", rotation=0, ha="right", va="center")
for axes_row, (name, images) in zip(grid[1:], pictures.items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()
