"""
Bring your own flow
===================

Any invertible map with a known Jacobian can be a prior. This example writes one that needs no
training at all: a copula flow, whose parameters are histograms and a covariance matrix. A user of
scikit-learn would write it as ``make_pipeline(QuantileTransformer(output_distribution="normal"),
PCA(whiten=True))``; a flow is that, differentiable and with its log-determinant.

It is compared with a Gaussian, which is the same without the histograms, and with the Glow that
ships with the package, which was trained by gradient descent.
"""

# %%
# The flow has two layers. The first bends the grey levels of each pixel by themselves. Let ``F`` be
# the distribution function of the pixel in the training digits, its 17 grey levels smoothed by a
# logistic kernel of the given width. Then ``u = log(F / (1 - F))`` has nearly a logistic
# distribution, whatever the pixel's was. The second layer whitens ``u`` by its mean and covariance.
#
# A subclass of :class:`~skaipo.flows.Flow` implements two methods. ``_normalize`` maps images to
# latents, ``_generate`` maps back, and each returns the log-determinant of its own direction.
# There is no formula for the inverse of ``F``, but ``u`` rises with ``x``, and lies between the
# values that the outermost kernels alone would give: bisection starts from there. One
# step of Newton's method then gives the last digits, and, since autograd sees that step, the
# right derivative of the inverse.

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch.nn.functional import logsigmoid

from skaipo import AIPORegressor, FlowPrior, GaussianPrior
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.flows import Flow
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing


class CopulaFlow(Flow):
    """Histograms of single pixels, and the covariance of what they leave.

    Parameters
    ----------
    X : array of shape (n, d)
        Training images, integer grey levels from 0.
    width : float
        Of the kernel that smooths the grey levels.
    """

    def __init__(self, X, width=0.5):
        super().__init__((X.shape[1],))
        self.width = width
        levels = np.arange(X.max() + 1)
        frequencies = (X[..., None] == levels).mean(0)
        # One part in a hundred for levels that happen to be missing.
        frequencies = 0.99 * frequencies + 0.01 / len(levels)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))
        self.register_buffer("log_weights", torch.tensor(np.log(frequencies), dtype=torch.float32))
        # Grey levels are rounded numbers; the density is one of numbers before rounding.
        dequantized = X + np.random.default_rng(0).uniform(-0.5, 0.5, X.shape)
        u = self._bend(torch.tensor(dequantized, dtype=torch.float32))[0].double()
        variances, axes = torch.linalg.eigh(torch.cov(u.T))
        self.register_buffer("mean", u.mean(0).float())
        self.register_buffer("root", (axes * variances.sqrt()).float())
        self.register_buffer("whitener", (axes / variances.sqrt()).float())
        self.log_volume = float(variances.log().sum() / 2)

    def _bend(self, x):
        """u of each pixel, and the logarithm of its derivative."""
        a = (x[..., None] - self.levels) / self.width
        below, above = logsigmoid(a), logsigmoid(-a)
        log_cdf = torch.logsumexp(self.log_weights + below, -1)
        log_survival = torch.logsumexp(self.log_weights + above, -1)
        log_density = torch.logsumexp(self.log_weights + below + above, -1) - math.log(self.width)
        return log_cdf - log_survival, log_density - log_cdf - log_survival

    def _unbend(self, u):
        with torch.no_grad():
            low, high = self.width * u, self.width * u + self.levels[-1]
            for _ in range(14):
                middle = (low + high) / 2
                too_low = self._bend(middle)[0] < u
                low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
            x = (low + high) / 2
            reached, log_slope = self._bend(x)
        return x + (u - reached) * torch.exp(-log_slope)

    def _normalize(self, x):
        u, log_slope = self._bend(x)
        return (u - self.mean) @ self.whitener, log_slope.sum(1) - self.log_volume

    def _generate(self, z):
        x = self._unbend(z @ self.root.T + self.mean)
        return x, self.log_volume - self._bend(x)[1].sum(1)


# %%
# Wrapped in :class:`~skaipo.FlowPrior` it is a fitted prior. Test it before use: the way
# there and back must end at the same image, and the log-determinant must be that of the Jacobian,
# which autograd computes for a single digit.

X_train, X_test, _, _ = load_digits_split()
copula = FlowPrior(flow=CopulaFlow(X_train))
flow = copula.flow_

x = torch.tensor(X_test[:50], dtype=torch.float32)
z, log_det = flow(x)
error = (flow.inverse(z) - x).abs().max()
print(f"there and back:   within {error:.1e} grey levels")
forth = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], x[0])
print(f"log-determinant:  {log_det[0]:.3f}, that of the Jacobian {forth.slogdet()[1]:.3f}")
back = torch.autograd.functional.jacobian(lambda z: flow.inverse(z[None])[0], z[0])
error = (back @ forth - torch.eye(64)).abs().max()
print(f"Jacobians:        their product is the identity within {error:.1e}")

# %%
# How well do the three priors know digits? By their log-density of held-out ones, in bits
# per pixel; higher is better. Half a bit more for each of 64 pixels makes a digit ``2 ** 32``
# times as probable. (The copula was fitted in a fraction of a second, Glow by gradient descent.)

dequantize = np.random.default_rng(1).uniform(-0.5, 0.5, X_train.shape)
gaussian = GaussianPrior().fit(X_train + dequantize)
priors = {"Gaussian": gaussian, "copula": copula, "Glow": load_digits_prior(device="cpu")}
held_out = X_test + np.random.default_rng(2).uniform(-0.5, 0.5, X_test.shape)
bits = {}
for name, prior in priors.items():
    bits[name] = prior.score(held_out) / 64 / math.log(2)
    print(f"{name:10s} {bits[name]:.2f} bits per pixel")

# %%
# Reconstruct digits from 24 noisy measurements with each, at lambda 1.

X = X_test[:40]
op, noise = CompressedSensing(24), GaussianNoise(0.5)
Y = noise.add_noise(op(X), random_state=0)
warnings.simplefilter("ignore", ConvergenceWarning)  # some digits stop at 80 evaluations
reconstructed, psnr = {}, {}
for name, prior in priors.items():
    model = AIPORegressor(op, 1.0, prior=prior, noise=noise, max_evals=80)
    reconstructed[name] = model.predict(Y)
    psnr[name] = psnr_score(X, reconstructed[name], data_range=16)
    print(f"{name:10s} {psnr[name]:.2f} dB")

# %%
# Samples of the Gaussian have the right covariance and nothing else, with a grey haze for
# background. The histograms make the background black, as it is in digits, and that alone brings
# the reconstructions half of the way. Only Glow has learnt how strokes hang together. (Samples of
# a prior need not look like much for it to help: all that a reconstruction asks of it is which of
# two similar images is the more probable one.)

shown = 7
samples = {name: prior.sample(shown, random_state=0) for name, prior in priors.items()}
parts = {
    "real digits and samples": {"real": X_train[:shown], **samples},
    "reconstructions from 24 measurements": {"truth": X, **reconstructed},
}
figure = plt.figure(figsize=(10.5, 3.6), layout="constrained")
both = figure.subfigures(1, 2, width_ratios=[1.1, 1])
for part, (title, rows) in zip(both, parts.items(), strict=True):
    part.suptitle(title)
    notes = {name: f"\n{value:.2f} bits/pixel" for name, value in bits.items()}
    if "truth" in rows:
        notes = {name: f"\n{value:.1f} dB" for name, value in psnr.items()}
    grid = part.subplots(len(rows), shown)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
            axes.set(xticks=[], yticks=[])
        label = name + notes.get(name, "")
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
plt.show()
