"""Errors of reconstructions, and scorers for ``GridSearchCV``."""

import numpy as np

__all__ = [
    "discrepancy_scorer",
    "psnr_score",
    "psnr_scorer",
    "reconstruction_error",
    "reconstruction_error_scorer",
]


def _pair(X_true, X_pred):
    X_true, X_pred = np.asarray(X_true, dtype=np.float64), np.asarray(X_pred, dtype=np.float64)
    if len(X_true) != len(X_pred) or X_true.size != X_pred.size:
        raise ValueError(
            f"X_true and X_pred must hold the same images, got shapes {X_true.shape} and "
            f"{X_pred.shape}."
        )
    return X_true.reshape(len(X_true), -1), X_pred.reshape(len(X_pred), -1)


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
    return float(np.average(((X_true - X_pred) ** 2).mean(1), weights=sample_weight))


def psnr_score(X_true, X_pred, data_range=None, per_image=False):
    """Peak signal-to-noise ratio, ``10 log10(range^2 / mse)`` of each image, averaged.

    Parameters
    ----------
    X_true, X_pred : array-like of shape (n_samples, d) or (n_samples, *event_shape)
    data_range : float, default=None
        Difference between the largest and the smallest possible value, such as 255. Default:
        that of ``X_true``, over all images.
    per_image : bool, default=False

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
    return psnr if per_image else float(psnr.mean())


def reconstruction_error_scorer(estimator, Y, X_true, sample_weight=None):
    """Scorer: negative mean squared error of ``estimator.predict(Y)``; higher is better."""
    return -reconstruction_error(X_true, estimator.predict(Y), sample_weight)


def psnr_scorer(estimator, Y, X_true):
    """Scorer: mean PSNR in dB, with the range of ``X_true``; higher is better."""
    return psnr_score(X_true, estimator.predict(Y))


def discrepancy_scorer(estimator, Y, y=None):
    """Scorer without ground truth: Morozov's discrepancy principle.

    A good lambda leaves a residual of the size of the noise: ``||y - f(x)||^2 / sigma^2`` close
    to the number of measurements. The score is minus the mean absolute logarithm of their
    quotient; 0 is best. (The residual alone would always choose the smallest lambda.)

    Parameters
    ----------
    estimator : AIPORegressor or FixedLambdaMAP, or a pipeline that ends in one
        With ``noise=GaussianNoise(sigma)`` or ``CorrelatedGaussianNoise(covariance)``.
    Y : array-like of shape (n_samples, m)
    y : Ignored

    Returns
    -------
    score : float

    References
    ----------
    Morozov, V. A., "On the solution of functional equations by the method of regularization",
    Soviet Math. Dokl. 7, 1966.
    """
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
    result = estimator.reconstruct(Y)
    # The misfit is half of the squared residual in units of the noise.
    quotient = 2 * np.asarray(result.misfit) / np.asarray(result.n_observed)
    return -float(np.abs(np.log(np.maximum(quotient, 1e-300))).mean())
