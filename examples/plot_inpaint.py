"""
Fill in missing pixels
======================

Some pixels of each digit are missing, and those that were measured are noisy. scikit-learn's
imputers fill in the former and leave the latter as they are; :class:`~skaipo.AIPORegressor` looks
for the one image that explains what was measured and is probable as a whole.

There are two kinds of holes here, and the second kind shows a limit of the method.
"""

# %%
# Missing pixels are NaN, as everywhere in scikit-learn. Either 16 of the 64 are missing, scattered
# and others in each digit, or a block of 3 x 3 pixels near the middle, where most strokes cross.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import KNNImputer, SimpleImputer

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.noise import GaussianNoise
from skaipo.operators import Inpainting

X_train, X_test, _, _ = load_digits_split()
X = X_test[:40]
noise = GaussianNoise(1.0)
noisy = noise.add_noise(X, random_state=0)

scattered = np.random.default_rng(0).random(X.shape).argsort(axis=1) < 16
block = np.zeros((len(X), 8, 8), dtype=bool)
block[:, 2:5, 2:5] = True
holes = {"scattered": scattered, "block": block.reshape(X.shape)}

# %%
# The imputers learn from the same clean training digits as the prior did: the mean of each pixel,
# or the average of the five digits that agree best with the pixels that are there. Lambda is
# not tuned: 1 is the Bayesian value. The optimisation stops at 60 evaluations per digit, close
# enough; the warning that says so is not needed here.

warnings.simplefilter("ignore", ConvergenceWarning)
prior = load_digits_prior(device="cpu")
methods = {
    "mean": SimpleImputer(keep_empty_features=True).fit(X_train).transform,
    "5 neighbours": KNNImputer(n_neighbors=5, weights="distance").fit(X_train).transform,
    "AIPO": AIPORegressor(Inpainting(), 1.0, prior=prior, noise=noise, max_evals=60).predict,
}
pictures, errors = {}, {}
for kind, missing in holes.items():
    Y = np.where(missing, np.nan, noisy)
    pictures[kind] = {"truth": X, "measured": Y}
    for name, fill_in in methods.items():
        filled = fill_in(Y)
        pictures[kind][name] = filled
        squared = (filled - X) ** 2
        inside, outside = squared[missing].mean() ** 0.5, squared[~missing].mean() ** 0.5
        errors[kind, name] = inside, outside
        print(
            f"{kind:10s} {name:14s} error in holes {inside:.2f}, of measured pixels {outside:.2f}"
        )

# %%
# Blue pixels were not measured. The mean leaves the shadow of an average digit in each hole.
# Neighbours fill in something plausible and keep the noise around it. AIPO's backgrounds are black
# again, and its strokes go on where the holes were, not always where they should.

shown = 7
n_rows = len(methods) + 2
figure = plt.figure(figsize=(10.5, 4.1), layout="constrained")
greys = plt.colormaps["gray"].with_extremes(bad="#9db7d5")
parts = figure.subfigures(1, 2, width_ratios=[1.17, 1])
for part, (kind, rows) in zip(parts, pictures.items(), strict=True):
    part.suptitle({"scattered": "16 pixels missing", "block": "a block missing"}[kind])
    grid = part.subplots(n_rows, shown)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image.reshape(8, 8), cmap=greys, vmin=0, vmax=16)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        if kind == "scattered":
            axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")

# %%
# The errors, apart for pixels in the holes and measured ones. On measured pixels only AIPO is
# better than the noise (the dotted line), because only it knows of the noise. In scattered holes it
# is about as good as the neighbours. In the block it is worse: little that was measured tells
# which of several strokes goes through it. The most probable image decides for one of them, and a
# wrong stroke costs more squared error than a grey smear; the average of five neighbours hedges.
# If holes are large and what counts is the mean squared error, averages are hard to beat.

figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
titles = ["in the holes", "of measured pixels"]
for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    for i, name in enumerate(methods):
        values = [errors[kind, name][k] for kind in holes]
        places = np.arange(len(holes)) + 0.27 * (i - 1)
        color = ["#c6ced9", "#93a5bf", "#e0805f"][i]
        bars = axes.bar(places, values, 0.25, color=color, label=name if k == 0 else None)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, label_type="center")
    axes.set(title=f"Error {title}", xticks=range(len(holes)), xticklabels=holes)
    axes.spines[["top", "right"]].set_visible(False)
panels[1].axhline(noise.sigma, color="black", linestyle=":", linewidth=1)
panels[1].text(1.45, noise.sigma + 0.1, "the noise", ha="right", va="bottom", fontsize=9)
panels[0].set_ylabel("root mean square (grey levels of 16)")
figure.legend(loc="outside right upper", frameon=False)
plt.show()
