"""The normal distribution as a prior: closed forms, and the oracle of the tests."""

import math
import numbers
import operator

import numpy as np
import torch

from skaipo._validation import check_batch, check_lam, to_numpy, to_tensor
from skaipo.flows import Flow
from skaipo.noise import CorrelatedGaussianNoise, GaussianNoise, SquaredError, as_noise
from skaipo.operators import as_operator
from skaipo.priors._base import Prior
from skaipo.priors._file import read_file, unreadable, write_file

__all__ = ["GaussianPrior"]


class _GaussianFlow(Flow):
    """Linear flow of a normal distribution: ``z = C^-1 (x - mean)``, covariance ``C C^T``."""

    def __init__(self, mean, cholesky, event_shape):
        super().__init__(event_shape)
        self.double()
        self.register_buffer("mean", mean)
        self.register_buffer("cholesky", cholesky)

    def _normalize(self, x):
        z = torch.linalg.solve_triangular(
            self.cholesky, (x.flatten(1) - self.mean).T, upper=False
        ).T
        return z, -self.cholesky.diagonal().log().sum()

    def _generate(self, z):
        x = self.mean + z @ self.cholesky.T
        return x.reshape(-1, *self.event_shape), self.cholesky.diagonal().log().sum()


class GaussianPrior(Prior):
    """A multivariate normal prior, for which reconstruction has a closed form.

    A real baseline where images are few, and the reference that the solvers are tested against.
    All arithmetic is in float64. :meth:`save` and :meth:`load` keep one in a file.

    Parameters
    ----------
    mean : array-like of shape (d,), default=None
    covariance : array-like of shape (d, d), default=None
        If both are given the prior is fitted; otherwise ``fit`` estimates both.
    shrinkage : "auto" or float in [0, 1], default="auto"
        How far ``fit`` shrinks the covariance towards a multiple of the identity; "auto" is the
        Ledoit-Wolf estimate.
    event_shape : tuple of int, default=None
        ``(d,)`` by default.

    Attributes
    ----------
    mean_ : ndarray of shape (d,)
    covariance_ : ndarray of shape (d, d)
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import GaussianPrior
    >>> from skaipo.noise import GaussianNoise
    >>> from skaipo.operators import Denoising
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> prior.map_estimate([[2.0, 4.0]], Denoising(), noise=GaussianNoise(1.0))
    array([[1., 2.]])
    """

    def __init__(self, mean=None, covariance=None, *, shrinkage="auto", event_shape=None):
        self.mean = mean
        self.covariance = covariance
        self.shrinkage = shrinkage
        self.event_shape = event_shape

    @property
    def _given(self):
        if (self.mean is None) != (self.covariance is None):
            raise ValueError("Pass both mean and covariance, or neither and call fit(X).")
        return self.mean is not None

    def __sklearn_is_fitted__(self):
        return self._given or super().__sklearn_is_fitted__()

    @property
    def flow_(self):
        """Flow : the linear flow of this distribution, in float64."""
        if not self._given:
            return super().flow_
        if not self._current():
            mean = np.asarray(self.mean, dtype=np.float64)
            covariance = np.asarray(self.covariance, dtype=np.float64)
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(
                    f"mean must have shape (d,) and covariance (d, d), got {mean.shape} and "
                    f"{covariance.shape}."
                )
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError("mean and covariance must be finite.")
            if not np.allclose(covariance, covariance.T):
                raise ValueError("covariance must be symmetric.")
            shape = (len(mean),) if self.event_shape is None else tuple(self.event_shape)
            if math.prod(shape) != len(mean):
                raise ValueError(
                    f"mean has {len(mean)} entries, but event_shape {shape} has {math.prod(shape)}."
                )
            # (Born in inference mode it could never take part in autograd later.)
            with torch.inference_mode(False):
                self._given_flow = self._build(mean, covariance, shape)
            self._built_from = (self.mean, self.covariance, self.event_shape)
        return self._given_flow

    def _current(self):
        """Whether the flow was built from the parameters as they are now."""
        parts = getattr(self, "_built_from", None)
        now = (self.mean, self.covariance, self.event_shape)
        return parts is not None and all(a is b for a, b in zip(parts, now, strict=True))

    @staticmethod
    def _build(mean, covariance, event_shape):
        cholesky, info = torch.linalg.cholesky_ex(to_tensor(covariance))
        if info:
            raise ValueError(
                "covariance must be symmetric positive definite; its Cholesky factorisation "
                "failed. Add a small multiple of the identity (shrinkage)."
            )
        return _GaussianFlow(to_tensor(mean), cholesky, event_shape).eval().requires_grad_(False)

    @property
    def mean_(self):
        """Ndarray of shape (d,)."""
        return to_numpy(self.flow_.mean)

    @property
    def covariance_(self):
        """Ndarray of shape (d, d)."""
        factor = to_numpy(self.flow_.cholesky)
        return factor @ factor.T

    def fit(self, X, y=None):
        """Estimate mean and covariance, or, where both were given, check the width only.

        Parameters
        ----------
        X : array-like of shape (n_samples, d) or (n_samples, *event_shape)
        y : Ignored

        Returns
        -------
        self : GaussianPrior
        """
        event_shape = self.flow_.event_shape if self._given else self.event_shape
        x, _, shape = check_batch(
            X, event_shape=event_shape, estimator=self, reset=True, dtype=torch.float64
        )
        if self._given:
            return self
        if len(x) < 2:
            raise ValueError("GaussianPrior needs at least 2 samples to fit, got n_samples=1.")
        x = to_numpy(x)
        if self.shrinkage == "auto":
            # Here, because it takes longer to import than the whole of skaipo.
            from sklearn.covariance import LedoitWolf

            covariance = LedoitWolf().fit(x).covariance_
        elif isinstance(self.shrinkage, numbers.Real) and 0 <= self.shrinkage <= 1:
            covariance = np.atleast_2d(np.cov(x, rowvar=False, bias=True))
            ridge = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
            covariance = (1 - self.shrinkage) * covariance + self.shrinkage * ridge
        else:
            raise ValueError(f"shrinkage must be 'auto' or in [0, 1], got {self.shrinkage!r}.")
        # Features that never vary have no density; a tiny jitter keeps the factor finite.
        trace = np.trace(covariance)
        covariance[np.diag_indices_from(covariance)] += 1e-9 * (trace if trace > 0 else 1e-9)
        event_shape = tuple(event_shape) if event_shape is not None else shape
        self._fitted_flow = self._build(x.mean(0), covariance, event_shape)
        return self

    def save(self, path):
        """Write the prior to a ``.safetensors`` file: moments, and a JSON config as metadata.

        Parameters
        ----------
        path : str or path-like
            Written whole or not at all.

        Raises
        ------
        NotFittedError
            If there are no moments yet.
        OSError
            If the file cannot be written.
        """
        flow = self.flow_
        shrinkage = self.shrinkage if isinstance(self.shrinkage, str) else float(self.shrinkage)
        config = {"event_shape": list(flow.event_shape), "shrinkage": shrinkage}
        # The factor, not the covariance: what is read back is then the same, bit for bit.
        write_file(path, {"mean": flow.mean, "cholesky": flow.cholesky}, {"gaussian": config})

    @classmethod
    def load(cls, path):
        """Read a prior that :meth:`save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        prior : GaussianPrior
            Fitted, as if by ``fit``: ``mean`` and ``covariance`` are None, ``mean_`` and
            ``covariance_`` what they were.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, not a safetensors file, or not a GaussianPrior.
        """
        path, info, tensors = read_file(path, "gaussian")
        try:
            config = info["gaussian"]
            event_shape = tuple(operator.index(n) for n in config["event_shape"])
            shrinkage = config.get("shrinkage", "auto")
        except (KeyError, TypeError, AttributeError) as error:
            raise unreadable(path, "gaussian") from error
        d = math.prod(event_shape)
        expected = {"mean": (d,), "cholesky": (d, d)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected or any(t.dtype != torch.float64 for t in tensors.values()):
            raise ValueError(
                f"The moments in {path!r} do not fit its event shape {event_shape}: expected "
                f"float64 tensors {expected}, got {shapes} of dtypes "
                f"{[str(t.dtype) for t in tensors.values()]}."
            )
        mean, cholesky = tensors["mean"], tensors["cholesky"]
        is_factor = torch.equal(cholesky, cholesky.tril()) and (cholesky.diagonal() > 0).all()
        if not (is_factor and mean.isfinite().all() and cholesky.isfinite().all()):
            raise ValueError(
                f"The moments in {path!r} are no normal distribution: they must be finite, and the "
                f"factor of the covariance lower triangular with a positive diagonal."
            )
        prior = cls(shrinkage=shrinkage, event_shape=event_shape)
        prior._fitted_flow = _GaussianFlow(mean, cholesky, event_shape).eval().requires_grad_(False)
        prior.n_features_in_ = d
        return prior

    def map_estimate(self, Y, op, noise=None, lam=1.0):
        """Closed-form minimiser of ``nll(y, A x) - lam * log p(x)`` for a linear operator.

        ``x = mu + S A^T (A S A^T + lam W^-1)^-1 (y - A mu)``, where ``W`` is twice the identity
        for squared error and ``1 / sigma^2`` for Gaussian noise. At ``lam = 0`` it is the most
        probable ``x`` with ``A x = y``, the start of AIPO (eq. 4 of Liu et al., 2023).

        Parameters
        ----------
        Y : array-like of shape (n_samples, m)
            NaN where nothing was measured.
        op : Operator
        noise : NoiseModel, default=None
        lam : float, default=1

        Returns
        -------
        X : ndarray of shape (n_samples, d)
        """
        return self._solve(Y, op, noise, lam)[0]

    def posterior(self, Y, op, noise):
        """Posterior mean and covariance under Gaussian noise.

        Parameters
        ----------
        Y : array-like of shape (n_samples, m)
        op : Operator
        noise : GaussianNoise

        Returns
        -------
        mean : ndarray of shape (n_samples, d)
        covariance : ndarray of shape (n_samples, d, d)
        """
        return self._solve(Y, op, noise, 1.0)

    def _solve(self, Y, op, noise, lam):
        lam = check_lam(lam)
        op = as_operator(op).bind(self.event_shape_)
        if not op.is_linear:
            raise TypeError(f"The closed form needs a linear operator, got {op!r}.")
        d, m = op.n_features_in_, op.n_measurements_
        noise = as_noise(noise).bind(m)
        correlated = isinstance(noise, CorrelatedGaussianNoise)
        if not (correlated or isinstance(noise, SquaredError | GaussianNoise)):
            raise TypeError(
                f"The closed form needs squared error or GaussianNoise, got {type(noise).__name__}."
            )
        y, _, _ = check_batch(
            Y,
            event_shape=op.measurement_shape_,
            name="Y",
            whose="op",
            allow_nan=True,
            dtype=torch.float64,
        )
        y = to_numpy(y)
        A = to_numpy(op.linear(torch.eye(d, dtype=torch.float64))).T
        y = y - to_numpy(op.forward(torch.zeros(1, d, dtype=torch.float64)))
        if correlated:
            spread = lam * noise.covariance_
        else:
            # Quadratic noise: nll of a unit residual in entry i is half of its weight.
            eye = torch.eye(m, dtype=torch.float64)
            spread = np.diag(lam / (2 * to_numpy(noise.nll(eye, torch.zeros_like(eye)))))
        measured = ~np.isnan(y) & np.asarray(op.measured_)
        mean, covariance = self.mean_, self.covariance_
        means, covariances = [], []
        for row, seen in zip(y, measured, strict=True):
            a = A[seen]
            gram = a @ covariance @ a.T + spread[np.ix_(seen, seen)]
            gain = np.linalg.lstsq(gram, a @ covariance, rcond=None)[0].T
            means.append(mean + gain @ (row[seen] - a @ mean))
            covariances.append(covariance - gain @ a @ covariance)
        return np.stack(means), np.stack(covariances)
