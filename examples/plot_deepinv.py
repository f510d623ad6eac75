"""
A deepinv physics
=================

`deepinv <https://deepinv.github.io>`_ keeps a large catalogue of instruments, each a ``Physics``
with its noise. skaipo takes a physics as the operator, and the noise that comes with it. Here it is
a blurred camera, and reconstructions by deepinv's tools are the baseline.
"""

# %%
# The camera: a blur, longer along one diagonal, with black around the image, and Gaussian noise.
# Calling a physics measures with noise; its ``A`` measures without, and is what skaipo uses.

import warnings

import deepinv
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score

kernel = torch.tensor([[0.0, 0.05, 0.15], [0.1, 0.4, 0.1], [0.15, 0.05, 0.0]])
physics = deepinv.physics.Blur(
    filter=kernel[None, None],
    padding="constant",
    noise_model=deepinv.physics.GaussianNoise(sigma=1.0, rng=torch.Generator().manual_seed(0)),
)

X_train, X_test, _, _ = load_digits_split()
X_tune, X = (images[:40].reshape(-1, 1, 8, 8) for images in (X_train, X_test))
Y, Y_tune = (physics(torch.from_numpy(images).float()) for images in (X, X_tune))

# %%
# deepinv's way: the pseudo-inverse, and total variation by proximal gradient descent, with the
# weight that suits the training digits best.


def total_variation(Y, weight):
    prior = deepinv.optim.prior.TVPrior(n_it_max=50)
    step = 1 / float(physics.compute_norm(Y[:1], verbose=False))
    x = physics.A_adjoint(Y)
    with torch.no_grad():
        for _ in range(60):
            x = x - step * physics.A_adjoint(physics.A(x) - Y)
            x = prior.prox(x, gamma=step * weight)
    return x.numpy()


weights = np.geomspace(0.05, 1.6, 6)
weight = max(weights, key=lambda w: psnr_score(X_tune, total_variation(Y_tune, w), data_range=16))

# %%
# skaipo's way, in one line: the physics is the operator. As ``noise`` is not given, that of the
# physics is used, a standard deviation of one grey level of 16.

warnings.simplefilter("ignore", ConvergenceWarning)
model = AIPORegressor(physics, 1.0, prior=load_digits_prior(device="cpu"), max_evals=100)
pictures = {
    "truth": X,
    "measured": Y.numpy(),
    "pseudo-inverse": physics.A_dagger(Y).numpy(),
    "total variation": total_variation(Y, weight),
    "AIPO": model.predict(Y.numpy()),
}
psnr = {name: psnr_score(X, pictures[name], data_range=16) for name in list(pictures)[1:]}
for name, value in psnr.items():
    print(f"{name:15s} {value:5.2f} dB")

# %%
# The pseudo-inverse explains the noise. Total variation flattens it, and keeps edges, but an
# image of 8 x 8 pixels is all edges. The prior of the digits tells strokes from noise.

shown = 10
figure, grid = plt.subplots(len(pictures), shown, figsize=(9.5, 4.7), layout="constrained")
for axes_row, (name, images) in zip(grid, pictures.items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()
