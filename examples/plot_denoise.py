"""
Remove noise from digits
========================

Every pixel is measured, and every pixel is wrong: ``y = x + noise``. A clean image has to be
guessed from what clean images look like, and the methods below differ in how they know that.
:class:`~skaipo.AIPORegressor` knows it from a normalizing flow that was trained on clean digits,
without any noise. It is compared with what a user of scikit-learn or scipy would try first.

All parameters, lambda as well, are chosen in the same way: by the error on training digits.
"""

# %%
# Held-out digits, grey levels 0 to 16, with Gaussian noise of three sizes. At the largest one the
# standard deviation is a quarter of the whole range.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score, reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising

X_train, X_test, _, _ = load_digits_split()
X_tune, X_test = X_train[:16], X_test[:40]
prior = load_digits_prior(device="cpu")
sigmas = [2.0, 3.0, 4.0]

# %%
# The methods, each a function of noisy digits ``Y``, the noise and one parameter.
#
# - A Gaussian filter averages neighbouring pixels. It knows nothing of digits.
# - PCA keeps the part of the image that lies in the span of the first components of clean digits.
# - Nearest neighbours returns the average of the clean digits that are closest to ``Y``. The
#   training digits are left out of their own neighbours, or the choice of ``k`` would be absurd.
# - Ridge regression learns the best linear map from noisy digits to clean ones. It needs pairs at
#   the right level of noise, and is fitted again for each.
# - AIPO. It stops at 50 evaluations of the flow for each digit, before the gradient has vanished
#   to the last digits; the warning that says so is not needed here.

warnings.simplefilter("ignore", ConvergenceWarning)


def gaussian(Y, noise, width):
    blurred = gaussian_filter(Y.reshape(-1, 8, 8), (0, width, width))
    return blurred.reshape(len(Y), 64)


def pca(Y, noise, n_components):
    model = PCA(n_components, svd_solver="full").fit(X_train)
    return model.inverse_transform(model.transform(Y))


def neighbours(Y, noise, k):
    others = X_train[len(X_tune) :]
    return KNeighborsRegressor(k).fit(others, others).predict(Y)


def ridge(Y, noise, alpha):
    others = X_train[len(X_tune) :]
    return RidgeCV([alpha]).fit(noise.add_noise(others, random_state=2), others).predict(Y)


def aipo(Y, noise, lam):
    model = AIPORegressor(Denoising(), lam, prior=prior, noise=noise, max_evals=50)
    return model.predict(Y)


methods = {
    "Gaussian filter": (gaussian, [0.4, 0.5, 0.6, 0.7]),
    "PCA": (pca, [8, 12, 16, 20, 25, 30]),
    "nearest neighbours": (neighbours, [3, 5, 10, 20]),
    "ridge regression": (ridge, [1.0, 100.0, 1000.0]),
    "AIPO": (aipo, [0.5, 1.0]),
}

# %%
# For each method and level of noise: choose the parameter on noisy training digits, then denoise
# the held-out ones.

psnr = {name: [] for name in ["noisy", *methods]}
pictures = {}
for sigma in sigmas:
    noise = GaussianNoise(sigma)
    Y_tune = noise.add_noise(X_tune, random_state=1)
    Y = noise.add_noise(X_test, random_state=0)
    psnr["noisy"].append(psnr_score(X_test, Y, data_range=16))
    pictures[sigma] = {"truth": X_test, "noisy": Y}
    for name, (method, grid) in methods.items():
        errors = [reconstruction_error(X_tune, method(Y_tune, noise, p)) for p in grid]
        best = grid[int(np.argmin(errors))]
        denoised = method(Y, noise, best)
        psnr[name].append(psnr_score(X_test, denoised, data_range=16))
        pictures[sigma][name] = denoised
        print(f"sigma {sigma:g}  {name:20s} parameter {best:<7g} {psnr[name][-1]:5.2f} dB")

# %%
# At the middle level of noise. The filter has to choose between noise and blur, for the strokes
# are about two pixels wide. PCA and ridge regression are linear, and cannot know that a stroke in
# one place excludes one in another. Neighbours are real digits, so
# their average looks clean, but it is the average of *other* digits, and details of this one are
# lost. The flow is a non-linear density, and the reconstruction still has to explain ``Y``.

shown, sigma = 10, sigmas[1]
figure, grid = plt.subplots(len(pictures[sigma]), shown, figsize=(8.4, 5.6), layout="constrained")
figure.suptitle(f"Held-out digits, noise of standard deviation {sigma:g} of 16 grey levels")
for axes_row, (name, images) in zip(grid, pictures[sigma].items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")

# %%
# All levels of noise. Neighbours hardly gain from a better measurement, since they use it only to
# look up other digits. Where noise drowns the details there is no more to be had, and their average
# is as good as what the flow makes of it. Ridge regression is the best that a linear method can do,
# and runs below in parallel.

figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
colors = ["#b0b0b0", "#7aa6c2", "#6b8e6b", "#9a7fb8", "#c2a14d", "#d1603d"]
for (name, values), color in zip(psnr.items(), colors, strict=True):
    width = 3 if name == "AIPO" else 1.8
    axes.plot(sigmas, values, "o-", color=color, linewidth=width, label=name)
axes.set(xlabel="standard deviation of the noise (grey levels of 16)", xticks=sigmas)
axes.set(ylabel="PSNR (dB, higher is better)")
axes.spines[["top", "right"]].set_visible(False)
axes.grid(axis="y", alpha=0.3)
figure.legend(loc="outside right upper", frameon=False)
plt.show()
