"""Errors of reconstructions, and scorers for ``GridSearchCV``."""

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.metadata_routing import UNUSED

from skaipo._keywords import CheckedKeywords

__all__ = [
    "ReconstructionScorer",
    "discrepancy_scorer",
    "psnr_score",
    "psnr_scorer",
    "reconstruction_error",
    "reconstruction_error_scorer",
]


def _array(X):
    # Tensors may be on another device, or part of a graph.
    return np.asarray(X.detach().cpu() if hasattr(X, "detach") else X, dtype=np.float64)


def _pair(X_true, X_pred):
    X_true, X_pred = _array(X_true), _array(X_pred)
    if len(X_true) != len(X_pred) or X_true.size != X_pred.size:
        raise ValueError(
            f"X_true and X_pred must hold the same images, got shapes {X_true.shape} and "
            f"{X_pred.shape}."
        )
    return X_true.reshape(len(X_true), -1), X_pred.reshape(len(X_pred), -1)


def _mean(values, weights):
    if weights is None:
        return float(values.mean())
    # Without those of weight zero, for a perfect image has an infinite PSNR.
    weights = _array(weights)
    return float(np.average(values[weights != 0], weights=weights[weights != 0]))


def reconstruction_error(X_true, X_pred, sample_weight=None):
    """Mean squared error over all pixels of all images.

    Parameters
    ----------
    X_true, X_pred : array-like of shape (n_samples, d) or (n_samples, *event_shape)
    sample_weight : array-like of shape (n_samples,), default=None

    Returns
    -------
    error : float
        In squared pixel units.
    """
    X_true, X_pred = _pair(X_true, X_pred)
    return _mean(((X_true - X_pred) ** 2).mean(1), sample_weight)


def psnr_score(X_true, X_pred, data_range=None, per_image=False, sample_weight=None):
    """Peak signal-to-noise ratio, ``10 log10(range^2 / mse)`` of each image, averaged.

    Parameters
    ----------
    X_true, X_pred : array-like of shape (n_samples, d) or (n_samples, *event_shape)
    data_range : float, default=None
        Difference between the largest and the smallest possible value, such as 255. Default:
        that of ``X_true``, over all images: pass it where scores of several sets are compared.
    per_image : bool, default=False
    sample_weight : array-like of shape (n_samples,), default=None
        Of the images in their mean.

    Returns
    -------
    psnr : float, or ndarray of shape (n_samples,) if ``per_image``
        In dB; infinite for a perfect image.
    """
    X_true, X_pred = _pair(X_true, X_pred)
    if data_range is None:
        data_range = np.ptp(X_true)
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}; pass it explicitly.")
    mse = ((X_true - X_pred) ** 2).mean(1)
    with np.errstate(divide="ignore"):
        psnr = 20 * np.log10(data_range) - 10 * np.log10(mse)
    return psnr if per_image else _mean(psnr, sample_weight)


class ReconstructionScorer(CheckedKeywords, BaseEstimator):
    """Scorer of reconstructions, for searches: with settings, masks and operator parameters.

    What ``scoring=`` of ``GridSearchCV``, ``cross_validate`` or :class:`~skaipo.AIPORegressorCV`
    takes. Where metadata routing is enabled it hands ``mask`` and ``op_params`` on to ``predict``,
    without being asked to, and ``sample_weight``, if ``set_score_request(sample_weight=True)``
    asks for it, to the metric. (Scikit-learn's own scorers, also those that ``make_scorer`` makes,
    predict without.)

    Parameters
    ----------
    metric : {"psnr", "error", "discrepancy"} or callable, default="psnr"
        "psnr": the mean of :func:`psnr_score` over the images. "error": the negative
        :func:`reconstruction_error`. "discrepancy": how far the residual is from the size of the
        noise, which needs no clean images; see :func:`discrepancy_scorer`. A callable gets the
        clean images and the reconstructions, and returns a number that is higher for better.
    data_range : float, default=None
        Of "psnr": the difference between the largest and the smallest possible value, such as 255.
        None takes that of the clean images of each fold by itself; the scores of two folds are
        then not in the same units. (Which lambda is best hardly changes: a fold's range is the
        same for all of them.)

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import GridSearchCV
    >>> from skaipo import AIPORegressor, GaussianPrior
    >>> from skaipo.metrics import ReconstructionScorer
    >>> from skaipo.operators import Denoising
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(30, 2))
    >>> Y = X + rng.normal(size=X.shape)
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> scorer = ReconstructionScorer("psnr", data_range=4.0)
    >>> search = GridSearchCV(
    ...     AIPORegressor(Denoising(), prior=prior), {"lam": [0.02, 2.0, 200.0]}, scoring=scorer
    ... )
    >>> search.fit(Y, X).best_params_
    {'lam': 2.0}
    """

    # (As the estimators do: whatever rows are scored, these belong to them.)
    __metadata_request__score = dict(mask=True, op_params=True, estimator=UNUSED)

    def __init__(self, metric="psnr", *, data_range=None):
        self.metric = metric
        self.data_range = data_range

    def __call__(self, estimator, Y, y=None, sample_weight=None, *, mask=None, op_params=None):
        """Score an estimator on some rows.

        Parameters
        ----------
        estimator : AIPORegressor or FixedLambdaMAP, or a pipeline that ends in one
        Y : array-like of shape (n_samples, m)
            Measurements.
        y : array-like of shape (n_samples, d), default=None
            Clean images; "discrepancy" does without.
        sample_weight : array-like of shape (n_samples,), default=None
        mask, op_params : array-like of shape (n_samples, ...), default=None
            As in ``predict``.

        Returns
        -------
        score : float
            Higher is better.
        """
        return self.score(estimator, Y, y, sample_weight, mask, op_params)

    def score(self, estimator, Y, y=None, sample_weight=None, mask=None, op_params=None):
        """The same as a call, under the name by which metadata routing knows it."""
        params = dict(mask=mask, op_params=op_params)
        params = {name: value for name, value in params.items() if value is not None}
        if self.data_range is not None and self.metric != "psnr":
            raise ValueError(
                f"data_range={self.data_range!r} is for metric='psnr', got metric={self.metric!r}. "
                f"For a callable that takes one, pass functools.partial(metric, data_range=...)."
            )
        if self.metric == "discrepancy":
            return _discrepancy(estimator, Y, sample_weight, params)
        if not callable(self.metric) and self.metric not in ("psnr", "error"):
            raise ValueError(
                f"metric must be 'psnr', 'error', 'discrepancy' or a callable, got {self.metric!r}."
            )
        if y is None:
            raise ValueError(
                f"The metric {self.metric!r} compares with clean images, and got none: call "
                f"fit(Y, X_clean), or score by metric='discrepancy', which needs none."
            )
        found = estimator.predict(Y, **params)
        if self.metric == "psnr":
            return psnr_score(y, found, self.data_range, sample_weight=sample_weight)
        if self.metric == "error":
            return -reconstruction_error(y, found, sample_weight)
        weights = {} if sample_weight is None else dict(sample_weight=sample_weight)
        return self.metric(y, found, **weights)


def _discrepancy(estimator, Y, sample_weight, params):
    if hasattr(estimator, "steps"):
        Y = estimator[:-1].transform(Y) if len(estimator.steps) > 1 else Y
        estimator = estimator[-1]
    sized = any(hasattr(estimator.noise, name) for name in ("sigma", "covariance"))
    # (The misfit of rounded or saturated measurements is no half of a squared residual.)
    if not sized or not getattr(estimator.noise, "is_chi_square", True):
        raise ValueError(
            f"discrepancy_scorer needs to know the size of the noise: set "
            f"noise=GaussianNoise(sigma) on the estimator, got noise={estimator.noise!r}."
        )
    result = estimator.reconstruct(Y, **params)
    # The misfit is half of the squared residual in units of the noise.
    quotient = 2 * np.asarray(result.misfit) / np.asarray(result.n_observed)
    return -_mean(np.abs(np.log(np.maximum(quotient, 1e-300))), sample_weight)


#: Scorer: negative mean squared error of ``estimator.predict(Y)``; higher is better.
reconstruction_error_scorer = ReconstructionScorer("error")

#: Scorer: mean PSNR in dB, with the range of the clean images that are scored; higher is better.
#: ``ReconstructionScorer("psnr", data_range=...)`` is the same with one range for all.
psnr_scorer = ReconstructionScorer("psnr")

#: Scorer without ground truth: Morozov's discrepancy principle (Morozov, V. A., "On the solution
#: of functional equations by the method of regularization", Soviet Math. Dokl. 7, 1966). A good
#: lambda leaves a residual of the size of the noise: ``||y - f(x)||^2 / sigma^2`` close to the
#: number of measurements. The score is minus the mean absolute logarithm of their quotient; 0 is
#: best. (The residual alone would always choose the smallest lambda.) The estimator, or the last
#: step of a pipeline, needs ``noise=GaussianNoise(sigma)`` or ``CorrelatedGaussianNoise``.
discrepancy_scorer = ReconstructionScorer("discrepancy")
