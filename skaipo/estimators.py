"""The estimators: MAP reconstruction by continuation in lambda, or at a fixed lambda."""

import numbers
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted

from skaipo._progress import Progress
from skaipo._validation import check_batch, check_lam, to_numpy, to_tensor
from skaipo.noise import as_noise
from skaipo.objective import MAPObjective, check_choice
from skaipo.operators import as_operator
from skaipo.priors import FlowPrior
from skaipo.solvers import (
    LBFGS,
    STATUS,
    Adam,
    FixedLambda,
    GradientDescent,
    LinearSchedule,
    Method,
    minimize,
    mle_start,
)

__all__ = ["AIPORegressor", "FixedLambdaMAP", "Reconstruction"]

_METHODS = {"adam": Adam, "lbfgs": LBFGS, "gd": GradientDescent}
_INITS = ("mle", "zero", "random")
# The paper's number of projected-gradient iterations for the MLE start.
_MLE_EVALS = 500


@dataclass(repr=False)
class Reconstruction:
    """The whole story of a batch of reconstructions.

    Attributes
    ----------
    x : ndarray or torch.Tensor of shape (n_samples, d) or (n_samples, *event_shape)
        Reconstructions, in the layout of the measurements.
    objective : ndarray of shape (n_samples,)
        ``misfit + lam * penalty`` at ``x``; for the default penalty,
        ``misfit - lam * log_prob``.
    misfit : ndarray of shape (n_samples,)
        ``nll(y, f(x))`` over the observed measurements.
    log_prob : ndarray of shape (n_samples,)
        ``log p_G(x)`` in nats.
    n_evals : ndarray of shape (n_samples,)
        Flow evaluations spent, the start included.
    n_observed : ndarray of shape (n_samples,)
        Measurements that were there.
    status : ndarray of str of shape (n_samples,)
        "converged", "budget" (ran out of evaluations), "stalled" (no step makes progress) or
        "diverged" (numbers overflowed and smaller steps did not help).
    lam : float
    lam_history, objective_history : list of ndarray, or None
        Per row: lambda and objective at that lambda after each evaluation, if asked for.
    """

    x: object
    objective: np.ndarray
    misfit: np.ndarray
    log_prob: np.ndarray
    n_evals: np.ndarray
    n_observed: np.ndarray
    status: np.ndarray
    lam: float
    lam_history: list | None = None
    objective_history: list | None = None

    def counts(self):
        """Number of rows per status, a dict in the order of ``skaipo.solvers.STATUS``."""
        return {name: int((self.status == name).sum()) for name in STATUS}

    def __repr__(self):
        counts = ", ".join(f"{k} {v}" for k, v in self.counts().items() if v)
        return (
            f"<Reconstruction of {len(self.status)} samples at lam={self.lam:g}: {counts}; "
            f"mean objective {np.mean(self.objective):.6g}, "
            f"mean evaluations {np.mean(self.n_evals):.0f}>"
        )


def _is_prior(obj):
    return hasattr(obj, "score_samples") and hasattr(type(obj), "flow_")


def _is_fitted(prior):
    try:
        check_is_fitted(prior)
    except NotFittedError:
        return False
    return True


class _MAPRegressor(RegressorMixin, BaseEstimator):
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
        lam = check_lam(self.lam)
        self._check_params()
        prior = self._ready_prior()
        flow = prior.flow_
        op, noise = self._bind(prior)
        y, layout, _ = self._measurements(Y, op, flow=flow)
        starts = self._starts(y, flow)
        method, schedule = self._method(), self._schedule()
        chunks = list(torch.arange(len(y)).split(self.batch_size))
        task = delayed(_solve_chunk)
        with Progress(type(self).__name__, len(y), enabled=self.verbose > 0) as bar:
            results = Parallel(n_jobs=self.n_jobs, return_as="generator")(
                task(
                    MAPObjective(flow, op, noise, y[rows], self.space, self.penalty),
                    starts if isinstance(starts, str) else starts[rows],
                    method,
                    schedule,
                    dict(lam=lam, max_evals=self.max_evals, tol=self.tol, history=history),
                )
                for rows in chunks
            )
            parts = []
            for part in results:
                parts.append(part)
                bar.update(sum(len(p["status"]) for p in parts))
        joined = {
            key: np.concatenate([part[key] for part in parts])
            for key in ("x", "objective", "misfit", "log_prob", "n_evals", "n_observed", "status")
        }
        x = layout.restore(to_tensor(joined.pop("x")), op.event_shape_)
        joined["status"] = np.array(STATUS)[joined["status"]]
        histories = {}
        if history:
            for key in ("lam_history", "objective_history"):
                histories[key] = [row for part in parts for row in part[key]]
        result = Reconstruction(x=x, lam=lam, **joined, **histories)
        diverged = int((result.status == "diverged").sum())
        if diverged:
            warnings.warn(
                f"{diverged} of {len(y)} rows diverged: their numbers overflowed and smaller steps "
                f"did not help; what is returned for them is the best that was seen. Check the "
                f"units of these measurements; see reconstruct(Y).status.",
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


def _solve_chunk(objective, start, method, schedule, options):
    """Solve one chunk of rows; numpy out, so that it can come back from another process."""
    lam, max_evals = options["lam"], options["max_evals"]
    y = objective.y
    n = len(objective)
    fallback = None
    if not isinstance(schedule, FixedLambda):
        # Where the continuation fails, from the mode of the latent space.
        z0 = y.new_zeros(1, objective.n_features)
        fallback = objective.in_space("latent").image(z0) if objective.space == "image" else z0
        fallback = fallback.expand(n, -1)
    if isinstance(start, str) and start == "mle":
        # At most a third of the budget, and never more than the paper's number.
        x0, _ = mle_start(objective, max_evals=min(_MLE_EVALS, max(1, max_evals // 3)))
        u0 = objective.variable(x0)
    else:
        z0 = y.new_zeros(n, objective.n_features) if isinstance(start, str) else start
        u0 = z0
        if objective.space == "image":
            u0 = objective.in_space("latent").image(z0)
            objective.n_evals += 1
    target = torch.full((n,), lam, dtype=y.dtype, device=y.device)
    solution = minimize(
        objective,
        u0,
        target,
        method,
        schedule,
        max_evals=max_evals,
        tol=options["tol"],
        fallback=fallback,
        history=options["history"],
    )
    best = solution.evaluation
    result = dict(
        x=best.x,
        objective=best.value(target),
        misfit=best.data,
        log_prob=best.log_prob,
        n_evals=objective.n_evals,
        n_observed=objective.observed.sum(1),
        status=solution.status,
    )
    result = {key: to_numpy(value) for key, value in result.items()}
    if options["history"]:
        lams, values = [[] for _ in range(n)], [[] for _ in range(n)]
        for rows, _, lam_now, value in solution.history:
            for i, a, b in zip(rows.tolist(), lam_now.tolist(), value.tolist(), strict=True):
                lams[i].append(a)
                values[i].append(b)
        result["lam_history"] = [np.array(row) for row in lams]
        result["objective_history"] = [np.array(row) for row in values]
    return result


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
    schedule : "linear" or LinearSchedule, default="linear"
        How lambda rises.
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
        if isinstance(self.schedule, str):
            check_choice("schedule", self.schedule, ("linear",))
            return LinearSchedule()
        return self.schedule


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
        return FixedLambda()
