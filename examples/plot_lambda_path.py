"""
The path from the measurement to the prior
==========================================

Lambda weighs what was measured against what is probable:

.. math:: x^*(\\lambda) = \\arg\\min_x \\; \\mathrm{nll}(y, f(x)) - \\lambda \\log p_G(x)

:func:`~skaipo.aipo_path` returns the reconstructions along a whole grid of lambdas. It starts at
1, the Bayesian one, and goes to both ends, each solve from where the one before it ended, so that a
path costs far less than as many single solves. Here it shows what lambda does, and how it can be
chosen without knowing the truth.
"""

# %%
# Noisy digits, and their path.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor, aipo_path
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising

X = load_digits_split()[1][:16]
noise = GaussianNoise(3.0)
Y = noise.add_noise(X, random_state=0)
prior = load_digits_prior(device="cpu")
warnings.simplefilter("ignore", ConvergenceWarning)  # budgets are small, for speed

lams, X_path, path, n_evals = aipo_path(
    Y,
    Denoising(),
    prior,
    lams=np.geomspace(0.03, 30, 11),
    noise=noise,
    max_evals=240,
    smoothing=0,  # the exact log-density, which is looked at below
    return_details=True,
)
print(f"{len(lams)} lambdas: {n_evals / len(X):.0f} flow evaluations per digit, all together")

# %%
# What the path tells about each lambda. ``misfit`` is half of the squared residual in units of the
# noise. If the reconstruction were the truth, the residual would be the noise itself, and
# ``2 * misfit / n_observed`` close to one. Morozov's discrepancy principle takes the lambda for
# which that is so: it needs the size of the noise, and no clean image.
# :func:`~skaipo.metrics.discrepancy_scorer` makes the same choice in a grid search.

psnr = np.array([psnr_score(X, x, data_range=16) for x in X_path])
quotient = np.array([2 * result.misfit / result.n_observed for result in path])
log_prob = np.array([result.log_prob.mean() for result in path])
by_discrepancy = int(np.abs(np.log(quotient)).mean(axis=1).argmin())
by_truth = int(psnr.argmax())
print(f"discrepancy principle: lambda {lams[by_discrepancy]:.3g}, {psnr[by_discrepancy]:.2f} dB")
print(f"best PSNR:             lambda {lams[by_truth]:.3g}, {psnr[by_truth]:.2f} dB")

# %%
# On the left the reconstruction is nearly the measurement, noise and all. In the middle it is the
# digit. On the right the data have less and less say, and each image slides towards a mode of the
# prior, where the density is highest: strokes become smooth and even, and small features go. (The
# frames are the two choices from above: red is the best PSNR, blue the discrepancy principle.)

shown = [0, 1, 3, 5, 6]
figure, grid = plt.subplots(len(shown), len(lams) + 2, figsize=(11, 4.4), layout="constrained")
figure.suptitle("Reconstructions along lambda")
for axes_row, row in zip(grid, shown, strict=True):
    images = [Y[row], *X_path[:, row], X[row]]
    for axes, image in zip(axes_row, images, strict=True):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
titles = ["measured", *(f"{lam:.2g}" for lam in lams), "truth"]
for axes, title in zip(grid[0], titles, strict=True):
    axes.set_title(title, fontsize=9)
for k, color in ((by_discrepancy, "#2f7fb8"), (by_truth, "#d1603d")):
    for axes in grid[:, k + 1]:
        axes.spines[:].set(color=color, linewidth=3)
grid[0, by_discrepancy + 1].title.set(color="#2f7fb8", weight="bold")
grid[0, by_truth + 1].title.set(color="#d1603d", weight="bold")

# %%
# PSNR has its maximum where the noise that stays and the detail that goes are in balance. The
# residual (thin lines: single digits) rises through one at a larger lambda. That is no accident:
# even the best reconstruction follows some of the noise, so that its residual is smaller than the
# noise. The discrepancy principle is therefore on the smooth side, and what it costs in PSNR is the
# price of not knowing the truth. The log-density rises, levels off, and does not say where to stop.

figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
panels[0].semilogx(lams, psnr, "o-", color="#444444")
panels[0].set(title="PSNR (dB)", ylabel="needs the truth")
panels[1].loglog(lams, quotient, color="#bbbbbb", linewidth=0.7)
panels[1].loglog(lams, quotient.mean(axis=1), "o-", color="#444444")
panels[1].axhline(1, color="#2f7fb8", linestyle=":")
panels[1].set(title="squared residual / noise variance", ylabel="needs the size of the noise")
panels[2].semilogx(lams, log_prob, "o-", color="#444444")
panels[2].set(title="log-density (nats)", ylabel="needs nothing")
for axes in panels:
    axes.axvline(lams[by_discrepancy], color="#2f7fb8", label="discrepancy principle")
    axes.axvline(lams[by_truth], color="#d1603d", linestyle="--", label="best PSNR")
    axes.set_xlabel("lambda")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].legend(loc="lower center", fontsize=8)
plt.show()

# %%
# A word of caution. A path shares its evaluations among many lambdas, and comes only as close to
# each minimum as that allows. A single solve with the same ``max_evals`` shows how close: at the
# best lambda there is hardly a difference. At the largest one the path is far from the minimum, and
# its images are the better for it, since the minimum itself has next to nothing to do with what was
# measured. Use the path to choose lambda, and a single solve for the result.

for k in (by_truth, len(lams) - 1):
    settings = dict(prior=prior, noise=noise, max_evals=240, smoothing=0)
    model = AIPORegressor(Denoising(), lams[k], **settings)
    result = model.reconstruct(Y)
    print(
        f"lambda {lams[k]:5.2g}: mean objective {path[k].objective.mean():7.1f} on the path, "
        f"{result.objective.mean():7.1f} by a single solve; PSNR {psnr[k]:.1f} and "
        f"{psnr_score(X, result.x, data_range=16):.1f} dB"
    )
