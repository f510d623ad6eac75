"""The choice of lambda: the path of reconstructions, and cross-validation along it."""

import copy
import numbers
import warnings

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import _safe_indexing, indexable
from sklearn.utils.validation import _num_samples

from skaipo._messages import averaged
from skaipo._validation import check_lam
from skaipo.estimators import AIPORegressor
from skaipo.estimators._base import is_learnt
from skaipo.estimators._estimators import Continuation, Regressor
from skaipo.metrics import (
    discrepancy_scorer,
    reconstruction_error,
    reconstruction_error_scorer,
)
from skaipo.priors._base import is_prior
from skaipo.solvers import DirectSchedule, lam_range

__all__ = ["AIPORegressorCV", "aipo_path"]


def _grid(lams, eps, estimator):
    """Ascending lambdas, from a number of them or as given."""
    if isinstance(lams, numbers.Integral) and not isinstance(lams, bool):
        if lams < 1 or not (eps is None or 0 < eps < 1):
            raise ValueError(
                f"lams must be at least 1 and eps lie in (0, 1), got lams={lams!r}, eps={eps!r}."
            )
        prior = estimator._ready_prior()
        prior.flow_.compile_for_inference()  # notices weights that have changed
        _, noise = estimator._bind(prior)
        parts = lam_range(noise, prior.flow_)
        top, eps = parts["top"], 1 / parts["span"] if eps is None else eps
        return np.geomspace(eps * top, top, int(lams)) if lams > 1 else np.array([top])
    grid = np.array([check_lam(lam) for lam in np.asarray(lams).ravel().tolist()])
    if len(grid) == 0:
        raise ValueError("lams must hold at least one lambda, got none.")
    return np.unique(grid)


_SHARED = "geometric", "lattice"


def _is_shared(schedule):
    """Whether lambdas share a way along this schedule."""
    if isinstance(schedule, str):
        return schedule in _SHARED
    return hasattr(schedule, "trunk") or hasattr(schedule, "lattice")


def _check_schedule(schedule):
    if not _is_shared(schedule):
        raise ValueError(
            f"A path needs a schedule whose stages do not depend on the target, such as "
            f"'geometric' or 'lattice', got {schedule!r}."
        )


def aipo_path(
    Y,
    op,
    prior,
    *,
    lams=20,
    eps=None,
    return_details=False,
    mask=None,
    op_params=None,
    **params,
):
    """Reconstructions along a grid of lambdas, by one continuation.

    It starts at one lambda of a fixed lattice (the Bayesian one, where there is a noise model) and
    goes to both ends of the grid; what lies between two of the lattice branches off. Every point of
    the path equals ``AIPORegressor(op, lam, schedule="lattice", max_evals=880, **params)`` at that
    lambda, whatever the other values of the grid. The default grid, which is the lattice, takes
    less than three times the evaluations of one solve by default; twenty other values spread over
    its range about four times. Each has a shorter way than a single solve: ``docs/solvers.md``
    tells how close they come.

    Parameters
    ----------
    Y : array-like or torch.Tensor of shape (n_samples, m)
        Measurements; NaN where nothing was measured.
    op : Operator or array-like of shape (m, d)
    prior : FlowPrior or GaussianPrior
        Fitted.
    lams : int or array-like, default=20
        The grid, or its size. A size gives equal ratios up to 1, the Bayesian lambda; without a
        noise model, which leaves the scale open, up to the lambda at which prior and data weigh
        about the same, the curvature of the squared error times the variance of the data.
    eps : float, default=None
        Length of that grid, ``lam_min / lam_max``. None: 0.01, and 0.001 without a noise model.
    return_details : bool, default=False
        Return the :class:`~skaipo.Reconstruction` of each lambda and the evaluations as well.
    mask : array-like of bool of the shape of Y, default=None
        False where a value of ``Y`` is to be ignored, as if it were NaN.
    op_params : array-like of shape (n_samples, ...), default=None
        What the operator takes per row (its kernel, its mask), for operators that do.
    **params
        Of :class:`AIPORegressor`: noise, solver, space, penalty, smoothing, init, mle_solver,
        n_starts, tol, batch_size, n_jobs, random_state, verbose; max_evals, here 880, on the way to
        any one lambda; and schedule, "lattice", "geometric" or an object of their kind.

    Returns
    -------
    lams : ndarray of shape (n_lams,)
        Ascending.
    X_path : ndarray of shape (n_lams, n_samples, d), or torch.Tensor if ``Y`` is one
        Further dimensions of images as in ``Y``.
    reconstructions : list of Reconstruction
        Only if ``return_details``.
    n_evals : int
        Flow evaluations of all rows and lambdas together. Only if ``return_details``.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import GaussianPrior, aipo_path
    >>> from skaipo.operators import Denoising
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> lams, X_path = aipo_path(np.ones((3, 2)), Denoising(), prior, lams=[0.0, 2.0])
    >>> X_path.shape
    (2, 3, 2)
    """
    params.setdefault("schedule", "lattice")
    params.setdefault("max_evals", 880)
    if "lam" in params:
        # (AIPORegressor takes one, and nothing here would look at it.)
        raise TypeError(
            f"A path has many lambdas: pass lams={[params['lam']]!r} in place of "
            f"lam={params['lam']!r}, or use AIPORegressor for one."
        )
    estimator = AIPORegressor(op, prior=prior, **params)
    _check_schedule(estimator.schedule)
    lams = _grid(lams, eps, estimator)
    results, n_evals = estimator._solve(Y, tuple(lams.tolist()), mask, op_params=op_params)
    images = [result.x for result in results]
    if isinstance(images[0], np.ndarray):
        X_path = np.stack(images)
    else:
        X_path = torch.stack(images)
    return (lams, X_path, results, n_evals) if return_details else (lams, X_path)


def _rows(index, *arrays):
    """Some rows of arrays, or of None."""
    return [None if array is None else _safe_indexing(array, index) for array in arrays]


class _AlongPath:
    """An estimator at one lambda whose predictions are known already, for scorers."""

    def __init__(self, estimator, result):
        self._estimator, self._result = copy.copy(estimator), result
        self._estimator.lam = result.lam

    def __getattr__(self, name):
        return getattr(self._estimator, name)

    def predict(self, Y, **params):
        return self._result.x

    def reconstruct(self, Y, **params):
        return self._result

    def score(self, Y, y, sample_weight=None):
        return type(self._estimator).score(self, Y, y, sample_weight)


class AIPORegressorCV(Continuation, Regressor):
    """AIPO with lambda chosen by cross-validation along one path, as ``LassoCV`` does for Lasso.

    A point of the path equals the single solve at that lambda, so that the choice is the one that
    ``GridSearchCV`` makes over ``AIPORegressor(schedule="geometric")``, at a fraction of its
    evaluations. For flows of images, where such short ways end far from the minimum, prefer
    ``schedule="lattice"`` with ``max_evals=880``. Where the prior is fitted beforehand nothing is
    learnt in the folds: each row is solved for once, however many folds test it.

    Parameters
    ----------
    op : Operator or array-like of shape (m, d)
        Forward operator.
    lams : int or array-like, default=20
        The grid, or its size; see :func:`aipo_path`.
    eps : float, default=None
        ``lam_min / lam_max`` of a grid given by its size; see :func:`aipo_path`.
    cv : int, splitter or iterable, default=None
        As in ``GridSearchCV``; None is 5 folds. Where rows belong together (several measurements
        of one object), pass the splits, ``list(GroupKFold(5).split(Y, X, groups))``.
    scoring : str, callable or None, default=None
        Scorer, higher is better. None: negative mean squared error against the clean images, or,
        where there are none, :func:`~skaipo.metrics.discrepancy_scorer`.
    prior, noise, solver, space, penalty, smoothing, schedule, max_evals, tol, batch_size, n_jobs
        As in :class:`AIPORegressor`, but for ``schedule``, "geometric" or "lattice": the path's.
        ``predict`` solves at ``lam_`` alone, as :class:`AIPORegressor` does by default. (Along
        "geometric" the scores are those of the exact density, while ``predict`` averages it in
        rough rows, by ``smoothing="auto"``, where a larger lambda is often the best one: with a
        flow of images take "lattice", which averages along the path as well, or ``smoothing=0``.)
    init, mle_solver, n_starts, random_state, verbose
        As in :class:`AIPORegressor`.

    Attributes
    ----------
    lam_ : float
        The best lambda.
    lams_ : ndarray of shape (n_lams,)
        The grid, ascending.
    best_score_ : float
        Mean score of ``lam_`` over the folds.
    mse_path_ : ndarray of shape (n_lams, n_folds)
        Mean squared error of the held-out reconstructions, where ``fit`` got clean images.
    cv_results_ : dict of ndarray
        ``param_lam``, ``split<k>_test_score``, ``mean_test_score``, ``std_test_score``,
        ``rank_test_score``, as in ``GridSearchCV``.
    n_evals_ : int
        Flow evaluations of the whole search.
    prior_ : FlowPrior or GaussianPrior
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import AIPORegressorCV, GaussianPrior
    >>> from skaipo.operators import Denoising
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(30, 2))
    >>> Y = X + rng.normal(size=X.shape)
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> search = AIPORegressorCV(Denoising(), lams=[0.02, 2.0, 200.0], prior=prior, cv=3)
    >>> search.fit(Y, X).lam_
    2.0
    """

    def __init__(
        self,
        op=None,
        *,
        lams=20,
        eps=None,
        cv=None,
        scoring=None,
        prior=None,
        noise=None,
        solver="hybrid",
        space="image",
        penalty="density",
        smoothing="auto",
        schedule="geometric",
        init="auto",
        mle_solver="lbfgs",
        n_starts=1,
        max_evals=300,
        tol=1e-4,
        batch_size=64,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.op = op
        self.lams = lams
        self.eps = eps
        self.cv = cv
        self.scoring = scoring
        self.prior = prior
        self.noise = noise
        self.solver = solver
        self.space = space
        self.penalty = penalty
        self.smoothing = smoothing
        self.schedule = schedule
        self.init = init
        self.mle_solver = mle_solver
        self.n_starts = n_starts
        self.max_evals = max_evals
        self.tol = tol
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        # Lambda is learnt, whatever else is ready.
        tags.requires_fit = True
        return tags

    def __sklearn_is_fitted__(self):
        return hasattr(self, "lam_")

    def _target(self):
        if not hasattr(self, "lam_"):
            raise NotFittedError(
                f"This {type(self).__name__} has not chosen lambda yet: call fit(Y, X_clean) first."
            )
        return self.lam_

    def _schedule(self):
        # A path shares its way; one lambda alone is better off with all of the budget.
        return DirectSchedule() if _is_shared(self.schedule) else super()._schedule()

    def _single(self, lam=1.0):
        """The estimator of one point of the path."""
        params = self.get_params(deep=False)
        for name in ("lams", "eps", "cv", "scoring"):
            del params[name]
        return clone(AIPORegressor(lam=lam, **params))

    def _along_the_path(self):
        """That estimator with all that fit made ready."""
        fitted = self._single()
        fitted.prior = self._ready_prior()
        if is_learnt(self.op):
            fitted.op = self.op_
        if hasattr(self, "noise_"):
            fitted.noise = self.noise_
        return fitted

    def fit(self, X, y=None, *, prior=None, mask=None, op_params=None):
        """Choose lambda, then make the prior ready as :meth:`AIPORegressor.fit` does.

        Parameters
        ----------
        X : array-like of shape (n_samples, m)
            Measurements.
        y : array-like of shape (n_samples, d), default=None
            Clean images; without them a fitted prior and a scorer that needs none.
        prior : prior, default=None
            Like ``set_params(prior=prior)``.
        mask : array-like of bool of the shape of X, default=None
            False where a value of ``X`` is to be ignored, as if it were NaN.
        op_params : array-like of shape (n_samples, ...), default=None
            What the operator takes per row (its kernel, its mask), for operators that do. It is
            split into folds as the rows are, and so is ``mask``.

        Returns
        -------
        self : AIPORegressorCV

        Raises
        ------
        ValueError
            If no lambda has a mean score that is finite. Those that have none are named in a
            warning, and not chosen.
        """
        # Here, because they take longer to import than the whole of skaipo.
        from sklearn.model_selection import check_cv

        _check_schedule(self.schedule)
        if X is None or is_prior(X) or isinstance(X, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} chooses lambda by measurements: call fit(Y, X_clean), and "
                f"pass the prior as {type(self).__name__}(op, prior=prior) or fit(Y, prior=prior)."
            )
        X, y, mask, op_params = indexable(X, y, mask, op_params)
        super().fit(X, y, prior=prior, mask=mask, op_params=op_params)
        fitted = self._along_the_path()
        lams = _grid(self.lams, self.eps, fitted)
        scorer = self._scorer(y)
        frozen = self._is_ready()
        folds = list(check_cv(self.cv, None, classifier=False).split(X, y))
        targets = tuple(lams.tolist())
        # Where nothing is learnt in the folds and they share rows, one path serves all of them.
        # (Where they do not, a path for each costs the same, and has the chunks of GridSearchCV.)
        shared, n_evals = None, 0
        if frozen and sum(len(test) for _, test in folds) > _num_samples(X):
            shared, n_evals = fitted._solve(X, targets, mask, op_params=op_params)
        scores, errors = np.empty((len(lams), len(folds))), np.empty((len(lams), len(folds)))
        short = solved = rough = 0
        for k, (train, test) in enumerate(folds):
            Y_test, X_test, mask_test, params_test = _rows(test, X, y, mask, op_params)
            estimator = fitted
            if shared is not None:
                results = [result.rows(test) for result in shared]
            else:
                if not frozen:
                    Y_train, X_train, mask_train, params_train = _rows(train, X, y, mask, op_params)
                    estimator = self._single().fit(
                        Y_train, X_train, mask=mask_train, op_params=params_train
                    )
                results, spent = estimator._solve(Y_test, targets, mask_test, op_params=params_test)
                n_evals += spent
            for i, result in enumerate(results):
                # (With smoothing they end with the budget, as was asked for.)
                fine = ("converged", "budget") if self._common_smoothing() else ("converged",)
                unfinished = ~np.isin(result.status, fine)
                short += int(unfinished.sum())
                rough += int((unfinished & result.smoothed).sum())
                solved += len(result.status)
                if getattr(self, "_one_output", False):
                    result.x = result.x.reshape(len(result.x))
                scores[i, k] = scorer(_AlongPath(estimator, result), Y_test, X_test)
                if X_test is not None:
                    errors[i, k] = reconstruction_error(X_test, result.x)
        if short:
            warnings.warn(
                f"{short} of {solved} solves along the path stopped before they converged: the "
                f"scores are those of shorter runs than predict's. Raise max_evals if two lambdas "
                f"are close, and prefer schedule='lattice' where the prior is a flow of images."
                + (f" {averaged(rough, short)}" if rough else ""),
                ConvergenceWarning,
                stacklevel=2,
            )
        mean = scores.mean(1)
        scored = np.isfinite(mean)
        if not scored.all():
            which = ", ".join(f"{lam:g}" for lam in lams[~scored])
            message = (
                f"The mean score is not finite at lambda {which}: the scorer gave NaN or an "
                f"infinity in some fold, as it does for an image that is not finite. See "
                f"aipo_path(..., return_details=True) for the status of each row"
            )
            if not scored.any():
                raise ValueError(f"{message}; leave such rows out, or pass another scoring.")
            warnings.warn(f"{message}. It is not chosen from there.", UserWarning, stacklevel=2)
        self.lams_ = lams
        # As in GridSearchCV, what has no score is behind all that has one.
        ranked = np.where(scored, mean, -np.inf)
        best = int(np.argmax(ranked))
        self.lam_ = float(lams[best])
        self.best_score_ = float(mean[best])
        self.n_evals_ = int(n_evals)
        vars(self).pop("mse_path_", None)
        if y is not None:
            self.mse_path_ = errors
        self.cv_results_ = {
            "param_lam": lams,
            **{f"split{k}_test_score": scores[:, k] for k in range(len(folds))},
            "mean_test_score": mean,
            "std_test_score": scores.std(1),
            "rank_test_score": rankdata(-ranked, method="min").astype(np.int32),
        }
        return self

    def _scorer(self, y):
        if self.scoring is None:
            return reconstruction_error_scorer if y is not None else discrepancy_scorer
        if isinstance(self.scoring, list | tuple | set | dict):
            raise ValueError(
                f"scoring must be one scorer, by which {type(self).__name__} chooses, got "
                f"{self.scoring!r}. For several use cross_validate or GridSearchCV."
            )
        from sklearn.metrics import check_scoring

        return check_scoring(self, scoring=self.scoring)
