"""
Write your own operator
=======================

An operator is a class with a handful of methods. This example writes one for a shaken camera: the
image is smeared along a diagonal, and some rows of the sensor are broken. It tests the operator,
and reconstructs digits with it.
"""

# %%
# The class. ``__init__`` only stores parameters, as in every scikit-learn estimator. ``_setup`` is
# called once the shape of the images is known. All other methods take and return torch tensors with
# one flattened image, or one flattened measurement, per row.
#
# - ``forward`` measures. Autograd differentiates it: anything written in torch will do.
# - ``adjoint`` is the transpose of a linear ``forward``. Convolution has one, and torch knows it.
# - ``projector`` and ``norm`` are for the solvers that need exact measurements or a step length.
#   For small images the matrix, which is what ``forward`` makes of the unit vectors, is good
#   enough, and :class:`~skaipo.operators.MatrixOperator` does the rest.
#
# Nothing here is about broken pixels. Where a measurement is NaN, it does not count, for
# any operator.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch.nn.functional import conv2d, conv_transpose2d

from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score, reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import MatrixOperator, Operator


class MotionBlur(Operator):
    """Smear images by a kernel; outside of the image it is black.

    Parameters
    ----------
    kernel : array-like, shape (k, k) with odd k
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def _setup(self):
        kernel = np.asarray(self.kernel, dtype=float)
        if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) % 2 == 0:
            raise ValueError(f"kernel must be square with odd sides, got shape {kernel.shape}.")
        self.kernel_ = torch.from_numpy(kernel)[None, None]
        self.n_measurements_ = self.n_features_in_
        matrix = self.forward(torch.eye(self.n_features_in_, dtype=torch.float64)).T
        self.matrix_operator_ = MatrixOperator(matrix.numpy()).bind(self.event_shape_)

    def _apply(self, convolution, rows):
        channels, height, width = self.event_shape_
        images = rows.reshape(-1, 1, height, width)
        out = convolution(images, self.kernel_.to(rows), padding=self.kernel_.shape[-1] // 2)
        return out.reshape(rows.shape)

    def forward(self, x):
        return self._apply(conv2d, x)

    def adjoint(self, y):
        return self._apply(conv_transpose2d, y)

    def projector(self, y, observed=None):
        return self.matrix_operator_.projector(y, observed)

    def norm(self):
        return self.matrix_operator_.norm()


# %%
# The adjoint test. For random ``x`` and ``y`` the two sides of ``<f(x), y> = <x, adjoint(y)>`` must
# agree to rounding. It takes four lines and finds the mistakes that everybody makes. The classic
# one is to blur with the same kernel again, which would be right for a symmetric kernel only. A
# kernel that fades along the streak tells the difference.

streak = np.diag([0.1, 0.15, 0.2, 0.25, 0.3])
op = MotionBlur(streak).bind((1, 8, 8))
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)


def adjoint_error(adjoint):
    left, right = (op.forward(x) * y).sum(1), (x * adjoint(y)).sum(1)
    return float((left - right).abs().max() / left.abs().max())


print(f"conv_transpose2d:       relative error {adjoint_error(op.adjoint):.1e}")
print(f"the same blur again:    relative error {adjoint_error(op.forward):.1e}")
assert adjoint_error(op.adjoint) < 1e-12

# %%
# The projection, of any ``x``, must end on an image that explains the measurement, and leave it
# where it is if it is projected again.

measured = op.forward(y)
projected = op.project(x, measured)
again = op.project(projected, measured)
print(f"f(projection) - y:      at most {(op.forward(projected) - measured).abs().max():.1e}")
print(f"projected once more:    moves by {(again - projected).abs().max():.1e}")

# %%
# Measure: blurred, with two broken rows (NaN), and a little noise.

X_train, X_test, _, _ = load_digits_split()
X_tune, X = X_train[:40], X_test[:40]
noise = GaussianNoise(0.3)


def measure(X, random_state):
    Y = noise.add_noise(MotionBlur(streak)(X.reshape(-1, 1, 8, 8)), random_state=random_state)
    Y.reshape(-1, 8, 8)[:, [2, 5]] = np.nan
    return Y


Y, Y_tune = measure(X, 0), measure(X_tune, 1)

# %%
# Reconstruct. The baselines invert the matrix of the rows that work: by least squares, and with a
# penalty on the squared norm of the image (Tikhonov), whose weight is chosen on training digits.
# For :class:`~skaipo.AIPORegressor` the new class is an operator like any other. Its optimisation
# stops at 100 evaluations per digit; the warning that says so is not needed here.

warnings.simplefilter("ignore", ConvergenceWarning)
works = ~np.isnan(Y[0])
A = op.matrix_operator_.matrix_[works]


def tikhonov(Y, alpha):
    return np.linalg.solve(A.T @ A + alpha * np.eye(64), A.T @ Y[:, works].T).T


alphas = np.geomspace(1e-4, 1, 9)
alpha = min(alphas, key=lambda a: reconstruction_error(X_tune, tikhonov(Y_tune, a)))
prior = load_digits_prior(device="cpu")
model = AIPORegressor(MotionBlur(streak), 1.0, prior=prior, noise=noise, max_evals=100)
pictures = {
    "truth": X,
    "measured": Y,
    "least squares": Y[:, works] @ np.linalg.pinv(A).T,
    "Tikhonov": tikhonov(Y, alpha),
    "AIPO": model.predict(Y),
}
for name in list(pictures)[2:]:
    print(f"{name:14s} {psnr_score(X, pictures[name], data_range=16):5.2f} dB")

# %%
# Least squares explains the measurements exactly, noise included: to undo a blur is to amplify
# what it damped. Tikhonov's penalty takes most of that away, and contrast with it, and nothing
# tells it what the broken rows would have shown. AIPO is told no more of the camera than the class
# above; what it adds is what digits look like.

shown = 10
greys = plt.colormaps["gray"].with_extremes(bad="#9db7d5")
figure = plt.figure(figsize=(9.5, 4.1), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1, 5.5])
axes = left.subplots()
axes.imshow(streak, cmap="gray", vmin=0)
axes.set(xticks=[], yticks=[], title="kernel")
grid = right.subplots(len(pictures), shown)
for axes_row, (name, images) in zip(grid, pictures.items(), strict=True):
    for axes, image in zip(axes_row, images, strict=False):
        axes.imshow(image.reshape(8, 8), cmap=greys, vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()
