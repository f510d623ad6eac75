"""The estimators: MAP reconstruction by continuation in lambda, or at a fixed lambda."""

import copy
import numbers
import warnings

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted

from skaipo._progress import Progress
from skaipo._reconstruct import Problem, Reconstruction, solve_chunk
from skaipo._validation import check_batch, check_lam, to_tensor
from skaipo.noise import as_noise
from skaipo.objective import PENALTIES, SPACES, check_choice
from skaipo.operators import as_operator
from skaipo.operators._base import ShortRepr
from skaipo.priors import FlowPrior
from skaipo.solvers import (
    LBFGS,
    Adam,
    GeometricSchedule,
    GradientDescent,
    LinearSchedule,
    Method,
)

__all__ = ["AIPORegressor", "FixedLambdaMAP"]

_METHODS = {"adam": Adam, "lbfgs": LBFGS, "gd": GradientDescent}
_SCHEDULES = {"linear": LinearSchedule, "geometric": GeometricSchedule}
_INITS = ("mle", "zero", "random")


def _is_prior(obj):
    return hasattr(obj, "score_samples") and hasattr(type(obj), "flow_")


def _is_fitted(prior):
    try:
        check_is_fitted(prior)
    except NotFittedError:
        return False
    return True


class _MAPRegressor(ShortRepr, RegressorMixin, BaseEstimator):
    """What both estimators share: priors, validation, chunks, results."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        ready = self.prior is not None and _is_fitted(self.prior)
        tags.requires_fit = not ready
        tags.target_tags.required = not ready
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = True
        tags.non_deterministic = self.random_state is None and getattr(self, "init", "") == "random"
        return tags

    def __sklearn_clone__(self):
        # clone() would give back an unfitted prior; a fitted one rides along, weights shared.
        params = {
            name: value
            if name == "prior" and _is_prior(value) and _is_fitted(value)
            else clone(value, safe=False)
            for name, value in self.get_params(deep=False).items()
        }
        return type(self)(**params)

    def __sklearn_is_fitted__(self):
        return hasattr(self, "prior_") or (self.prior is not None and _is_fitted(self.prior))

    def fit(self, X=None, y=None, *, prior=None):
        """Make the prior ready: take it, or train it on clean data.

        Parameters
        ----------
        X : prior, or array-like of shape (n_samples, m), default=None
            ``fit(prior)`` takes a fitted prior, like ``set_params(prior=prior)``. Otherwise the
            measurements, whose width is noted.
        y : array-like of shape (n_samples, d), default=None
            Clean data, on which an unfitted ``prior`` is trained.
        prior : prior, default=None
            The same as the first argument, by name.

        Returns
        -------
        self : estimator

        Raises
        ------
        NotFittedError
            If there is no prior, or an unfitted one and no clean data.
        """
        if _is_prior(X) or isinstance(X, torch.nn.Module):
            if prior is not None:
                raise TypeError("Got two priors: pass it once, as fit(prior).")
            X, prior = None, X
        if isinstance(prior, torch.nn.Module):
            prior = FlowPrior(flow=prior)
        if prior is not None:
            if not _is_prior(prior):
                raise TypeError(f"prior must be a FlowPrior or GaussianPrior, got {prior!r}.")
            self.prior = prior
        check_lam(self.lam)
        if self.prior is None:
            raise self._no_prior()
        if _is_fitted(self.prior):
            self.prior_ = self.prior
        elif y is None:
            raise NotFittedError(
                f"The prior {type(self.prior).__name__} is not fitted. Pass clean data to train "
                f"it on, {type(self).__name__}.fit(Y, X_clean), or fit it before, with "
                f"prior.fit(X_clean)."
            )
        else:
            self.prior_ = clone(self.prior).fit(y)
        op, _ = self._bind(self.prior_)
        if X is not None:
            self._measurements(X, op, reset=True)
        return self

    def _no_prior(self):
        name = type(self).__name__
        return NotFittedError(
            f"This {name} has no prior. Pass a fitted one, {name}(op, lam, prior=prior) or "
            f"fit(prior); or an unfitted one and clean data, "
            f"{name}(op, lam, prior=FlowPrior()).fit(Y, X_clean)."
        )

    def _ready_prior(self):
        if self.prior is not None and _is_fitted(self.prior):
            return self.prior
        if hasattr(self, "prior_"):
            return self.prior_
        if self.prior is None:
            raise self._no_prior()
        raise NotFittedError(
            f"The prior of this {type(self).__name__} is not fitted yet: call fit(Y, X_clean), or "
            f"fit the prior before."
        )

    def _bind(self, prior):
        if self.op is None:
            raise ValueError(
                f"{type(self).__name__} needs a forward operator: pass op, for example "
                f"{type(self).__name__}(Denoising())."
            )
        op = as_operator(self.op).bind(prior.event_shape_)
        return op, as_noise(self.noise).bind(op.n_measurements_)

    def _measurements(self, Y, op, reset=False, flow=None):
        estimator = self if reset or hasattr(self, "n_features_in_") else None
        dtype = None if flow is None else flow.loc.dtype
        device = None if flow is None else flow.loc.device
        return check_batch(
            Y,
            event_shape=op.measurement_shape_,
            estimator=estimator,
            reset=reset,
            name="Y",
            whose=(
                f"{type(op).__name__} (with a prior of {op.n_features_in_} features, shape "
                f"{op.event_shape_})"
            ),
            allow_nan=True,
            device=device,
            dtype=dtype,
        )

    def _check_params(self):
        for name, low in (("max_evals", 4), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")
        if not (isinstance(self.tol, numbers.Real) and self.tol >= 0):
            raise ValueError(f"tol must be a number >= 0, got {self.tol!r}.")

    def _method(self):
        if isinstance(self.solver, Method):
            return self.solver
        return _METHODS[check_choice("solver", self.solver, tuple(_METHODS))]()

    def _solve(self, Y, lams, history=False):
        """Reconstructions at ascending lambdas."""
        self._check_params()
        prior = self._ready_prior()
        flow = prior.flow_
        op, noise = self._bind(prior)
        y, layout, _ = self._measurements(Y, op, flow=flow)
        starts = self._starts(y, flow)
        problem = Problem(
            prior=prior,
            op=op,
            noise=noise,
            method=self._method(),
            schedule=self._schedule(),
            space=check_choice("space", self.space, SPACES),
            penalty=check_choice("penalty", self.penalty, PENALTIES),
            lams=lams,
            max_evals=self.max_evals,
            tol=self.tol,
            history=history,
        )
        # The edges of the chunks follow batch_size alone: results do not depend on n_jobs.
        chunks = list(torch.arange(len(y)).split(self.batch_size))
        parts = []
        with Progress(type(self).__name__, len(y), enabled=self.verbose > 0) as bar:
            results = Parallel(n_jobs=self.n_jobs, return_as="generator")(
                delayed(solve_chunk)(
                    problem, y[rows], starts if isinstance(starts, str) else starts[rows]
                )
                for rows in chunks
            )
            done = 0
            for rows, (part, _) in zip(chunks, results, strict=True):
                parts.append(part)
                done += len(rows)
                bar.update(done)
        by_lam = zip(*parts, strict=True)
        joined = [Reconstruction.join(p, lam) for lam, p in zip(lams, by_lam, strict=True)]
        for result in joined:
            result.x = layout.restore(to_tensor(result.x), op.event_shape_)
        return joined

    def reconstruct(self, Y, *, history=False):
        """Reconstruct a batch and tell how each row went.

        Parameters
        ----------
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.
        history : bool, default=False
            Record lambda and objective after each evaluation.

        Returns
        -------
        reconstruction : Reconstruction
        """
        result = self._solve(Y, (check_lam(self.lam),), history)[0]
        diverged = int((result.status == "diverged").sum())
        if diverged:
            warnings.warn(
                f"{diverged} of {len(result.status)} rows diverged: their numbers overflowed and "
                f"smaller steps did not help; what is returned for them is the best that was seen. "
                f"Check the units of these measurements; see reconstruct(Y).status.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return result

    def predict(self, Y):
        """Reconstruct a batch of measurements.

        Parameters
        ----------
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.

        Returns
        -------
        X : ndarray or torch.Tensor of shape (n_samples, d) or (n_samples, *event_shape)
            In the layout and dtype of ``Y``. Rows that did not converge are counted in a
            ``ConvergenceWarning``; :meth:`reconstruct` tells which they are.
        """
        result = self.reconstruct(Y)
        counts = result.counts()
        open_rows = counts["budget"] + counts["stalled"]
        if open_rows:
            warnings.warn(
                f"{open_rows} of {len(result.status)} rows stopped before they converged "
                f"({counts['budget']} at max_evals={self.max_evals}, {counts['stalled']} stalled). "
                f"Raise max_evals or tol; see reconstruct(Y).status.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return result.x

    def score(self, X, y, sample_weight=None):
        """Coefficient of determination, pooled over pixels.

        ``1 - sum (x - x_hat)^2 / sum (x - mean)^2`` with one mean per pixel and one quotient over
        all of them. (The usual average of one R2 per pixel breaks on constant pixels.)

        Parameters
        ----------
        X : array-like of shape (n_samples, m)
            Measurements.
        y : array-like of shape (n_samples, d)
            Clean images.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        score : float
        """
        predicted = np.asarray(self.predict(X), dtype=np.float64)
        true = np.asarray(y, dtype=np.float64).reshape(len(predicted), -1)
        predicted = predicted.reshape(len(predicted), -1)
        if true.shape != predicted.shape:
            raise ValueError(
                f"y must hold clean images of {predicted.shape[1]} features, got {true.shape[1]}."
            )
        weight = np.ones(len(true)) if sample_weight is None else np.asarray(sample_weight)
        mean = np.average(true, axis=0, weights=weight)
        residual = (weight[:, None] * (true - predicted) ** 2).sum()
        total = (weight[:, None] * (true - mean) ** 2).sum()
        return float(1 - residual / total) if total > 0 else float(residual == 0)


class AIPORegressor(_MAPRegressor):
    """MAP reconstruction by AIPO: lambda rises from 0 to its target, each solve warm-started.

    Minimises ``nll(y, f(x)) - lam * log p_G(x)`` for every row of ``Y``. The first solve, at
    ``lam = 0``, is the most probable image that explains the measurements exactly; it is then
    followed along a sequence of lambdas up to the target.

    Parameters
    ----------
    op : Operator or array-like of shape (m, d)
        Forward operator ``f``; a matrix stands for itself.
    lam : float, default=1.0
        Weight of the prior, >= 0. With ``noise=GaussianNoise(sigma)`` 1 is the Bayes MAP.
    prior : FlowPrior or GaussianPrior, default=None
        Fitted, or unfitted and trained by ``fit(Y, X_clean)``.
    noise : NoiseModel, default=None
        None: ``||y - f(x)||^2``. ``GaussianNoise(sigma)``: the same over ``2 sigma^2``.
    solver : {"adam", "lbfgs", "gd"} or Method, default="adam"
        Update rule.
    space : {"image", "latent"}, default="image"
        Variable of the optimisation.
    penalty : {"density", "latent"}, default="density"
        ``-log p_G(x)``, or ``||z||^2 / 2``.
    schedule : {"linear", "geometric"} or schedule object, default="linear"
        How lambda rises: in equal steps (:class:`~skaipo.solvers.LinearSchedule`), or along fixed
        lambdas in equal ratios (:class:`~skaipo.solvers.GeometricSchedule`).
    max_evals : int, default=300
        Flow evaluations per row, everything counted; at most a third goes to the start.
    tol : float, default=1e-4
        A row has converged when its gradient is this small against its two terms' gradients.
    batch_size : int, default=64
        Rows that are solved together. Memory grows with it; results do not depend on it.
    n_jobs : int, default=None
        Chunks of rows in parallel, by joblib.
    random_state : int, RandomState or None, default=None
        Not used by this estimator's default start; kept for a uniform interface.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    prior_ : FlowPrior or GaussianPrior
        The fitted prior.
    n_features_in_ : int
        Number of measurements, if ``fit`` saw some.

    References
    ----------
    Liu, T., Yang, T., Zhang, Q. and Lei, Q., "Optimization for Amortized Inverse Problems",
    ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import AIPORegressor, GaussianPrior
    >>> from skaipo.noise import GaussianNoise
    >>> from skaipo.operators import Denoising
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> model = AIPORegressor(Denoising(), prior=prior, noise=GaussianNoise(1.0), tol=1e-6)
    >>> model.predict(np.array([[2.0, 4.0]])).round(3)
    array([[1., 2.]])
    """

    def __init__(
        self,
        op=None,
        lam=1.0,
        *,
        prior=None,
        noise=None,
        solver="adam",
        space="image",
        penalty="density",
        schedule="linear",
        max_evals=300,
        tol=1e-4,
        batch_size=64,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.op = op
        self.lam = lam
        self.prior = prior
        self.noise = noise
        self.solver = solver
        self.space = space
        self.penalty = penalty
        self.schedule = schedule
        self.max_evals = max_evals
        self.tol = tol
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def _starts(self, y, flow):
        return "mle"

    def _schedule(self):
        if not isinstance(self.schedule, str):
            return self.schedule
        return _SCHEDULES[check_choice("schedule", self.schedule, tuple(_SCHEDULES))]()


class FixedLambdaMAP(_MAPRegressor):
    """MAP reconstruction at the target lambda from the first step: the usual baseline.

    Parameters
    ----------
    op : Operator or array-like of shape (m, d)
        Forward operator ``f``; a matrix stands for itself.
    lam : float, default=1.0
        Weight of the prior, >= 0. With ``noise=GaussianNoise(sigma)`` 1 is the Bayes MAP.
    init : {"mle", "zero", "random"}, default="mle"
        Start: the most probable image that explains the measurements, ``G(0)``, or ``G(z)`` with
        standard normal ``z``.
    prior, noise, solver, space, penalty, max_evals, tol, batch_size, n_jobs, verbose
        As in :class:`AIPORegressor`.
    random_state : int, RandomState or None, default=None
        Of ``init="random"``.

    Attributes
    ----------
    prior_ : FlowPrior or GaussianPrior
        The fitted prior.
    n_features_in_ : int
        Number of measurements, if ``fit`` saw some.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import FixedLambdaMAP, GaussianPrior
    >>> from skaipo.noise import GaussianNoise
    >>> from skaipo.operators import Denoising
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> model = FixedLambdaMAP(Denoising(), prior=prior, noise=GaussianNoise(1.0), tol=1e-6)
    >>> model.predict(np.array([[2.0, 4.0]])).round(3)
    array([[1., 2.]])
    """

    def __init__(
        self,
        op=None,
        lam=1.0,
        *,
        init="mle",
        prior=None,
        noise=None,
        solver="adam",
        space="image",
        penalty="density",
        max_evals=300,
        tol=1e-4,
        batch_size=64,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.op = op
        self.lam = lam
        self.init = init
        self.prior = prior
        self.noise = noise
        self.solver = solver
        self.space = space
        self.penalty = penalty
        self.max_evals = max_evals
        self.tol = tol
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def _starts(self, y, flow):
        if check_choice("init", self.init, _INITS) != "random":
            return self.init
        # Drawn for all rows at once: a row's start does not depend on the chunk it falls in.
        z = check_random_state(self.random_state).standard_normal((len(y), flow.n_features))
        return to_tensor(z, device=y.device, dtype=y.dtype)

    def _schedule(self):
        return None
