"""The estimators: MAP reconstruction by continuation in lambda, or at a fixed lambda."""

import warnings

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, RegressorMixin, TransformerMixin

from skaipo._validation import check_batch, masked, to_numpy
from skaipo.estimators._base import Reconstructor, is_learnt
from skaipo.objective import check_choice
from skaipo.operators import as_operator
from skaipo.priors._base import is_fitted
from skaipo.solvers import (
    AdaptiveSchedule,
    DirectSchedule,
    GeometricSchedule,
    LatticeSchedule,
    LinearSchedule,
)

__all__ = ["AIPORegressor", "AIPOTransformer", "Continuation", "FixedLambdaMAP", "Regressor"]

_SCHEDULES = {
    "direct": DirectSchedule,
    "linear": LinearSchedule,
    "geometric": GeometricSchedule,
    "lattice": LatticeSchedule,
    "adaptive": AdaptiveSchedule,
}


class Regressor(RegressorMixin, Reconstructor):
    """The estimators that predict clean images from measurements."""

    __metadata_request__predict = dict(mask=True, op_params=True)
    __metadata_request__score = dict(mask=True, op_params=True)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = not self._is_ready()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, Y, mask=None, checkpoint=None, op_params=None):
        """Reconstruct a batch of measurements.

        Parameters
        ----------
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.
        mask : array-like of bool (or 0/1) of the shape of Y, default=None
            False where a value of ``Y`` is to be ignored, as if it were NaN.
        checkpoint : path-like, default=None
            Directory that keeps the finished chunks of rows, so that the same call goes on there
            if the process was killed; see :meth:`reconstruct`.
        op_params : array-like of shape (n_samples, ...), default=None
            What the operator takes per row (its kernel, its mask), for operators that do.

        Returns
        -------
        X : ndarray or torch.Tensor of shape (n_samples, d) or (n_samples, *event_shape)
            In the layout and dtype of ``Y``. Rows that did not converge are counted in a
            ``ConvergenceWarning``; :meth:`reconstruct` tells which they are.
        """
        X = self._predict(Y, mask, checkpoint, op_params)
        return X.reshape(len(X)) if getattr(self, "_one_output", False) else X

    def score(self, X, y, sample_weight=None, op_params=None, mask=None):
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
        op_params, mask : array-like of shape (n_samples, ...), default=None
            As in :meth:`predict`.

        Returns
        -------
        score : float
        """
        params = dict(op_params=op_params, mask=mask)
        params = {name: value for name, value in params.items() if value is not None}
        predicted, true = (
            # (Of a GPU's tensors, numpy takes none.)
            np.asarray(to_numpy(images) if hasattr(images, "detach") else images, dtype=np.float64)
            for images in (self.predict(X, **params), y)
        )
        if len(true) != len(predicted):
            raise ValueError(f"y holds {len(true)} images for {len(predicted)} measurements.")
        true, predicted = true.reshape(len(true), -1), predicted.reshape(len(true), -1)
        if true.shape != predicted.shape:
            raise ValueError(
                f"y must hold clean images of {predicted.shape[1]} features, got {true.shape[1]}."
            )
        weight = np.ones(len(true)) if sample_weight is None else np.asarray(sample_weight)
        mean = np.average(true, axis=0, weights=weight)
        residual = (weight[:, None] * (true - predicted) ** 2).sum()
        total = (weight[:, None] * (true - mean) ** 2).sum()
        return float(1 - residual / total) if total > 0 else float(residual == 0)


class Continuation:
    """Parameters and schedule of AIPO."""

    def __init__(
        self,
        op=None,
        lam=1.0,
        *,
        prior=None,
        noise=None,
        solver="hybrid",
        space="image",
        penalty="density",
        smoothing="auto",
        schedule="direct",
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
        self.lam = lam
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

    def _schedule(self):
        if hasattr(self.schedule, "last") and not isinstance(self.schedule, type):
            return self.schedule
        if isinstance(self.schedule, str) and self.schedule == "theory":
            raise ValueError(
                "Algorithm 1 needs its constants: pass schedule=TheorySchedule(L, sigma, delta, C, "
                "epsilon), from skaipo.solvers."
            )
        return _SCHEDULES[check_choice("schedule", self.schedule, tuple(_SCHEDULES))]()


class AIPORegressor(Continuation, Regressor):
    """MAP reconstruction with a flow as prior: ``argmin_x nll(y, f(x)) - lam * log p_G(x)``.

    The defaults start from the solution under a Gaussian with the prior's two moments, and minimise
    at the target, in the metric of that Gaussian's posterior: with ``smoothing=0`` this reached the
    lowest objective per flow evaluation on denoising, inpainting and compressed sensing of faces
    (``benchmarks/solvers.py``; ``docs/solvers.md`` has the figures). ``smoothing="auto"`` has the
    higher PSNR there, at an exact objective some percent higher.

    AIPO as Liu et al. (2023) run it starts at ``lam = 0`` instead, at the most probable image that
    explains the measurements exactly, and follows it along a sequence of lambdas with Adam in image
    space::

        AIPORegressor(op, lam, solver="adam", schedule="linear", init="mle", mle_solver="pgd")

    and with ``schedule=TheorySchedule(...)`` and ``solver=GradientDescent(lipschitz=L)`` it is
    their Algorithm 1, with its guarantee.

    Parameters
    ----------
    op : Operator or array-like of shape (m, d)
        Forward operator ``f``; a matrix stands for itself.
    lam : float, default=1.0
        Weight of the prior, >= 0. With ``noise=GaussianNoise(sigma)`` 1 is the Bayes MAP.
    prior : FlowPrior or GaussianPrior, default=None
        Fitted, or unfitted and trained by ``fit(Y, X_clean)``.
    noise : NoiseModel, default=None
        None: ``||y - f(x)||^2``. ``GaussianNoise(sigma)``: the same over ``2 sigma^2``; others in
        :mod:`skaipo.noise`.
    solver : {"hybrid", "lbfgs", "adam", "gd"} or Method, default="hybrid"
        Update rule: :class:`~skaipo.solvers.Hybrid`, :class:`~skaipo.solvers.LBFGS`,
        :class:`~skaipo.solvers.Adam` or :class:`~skaipo.solvers.GradientDescent`.
    space : {"image", "latent"}, default="image"
        Variable of the optimisation: the image, or ``z`` with ``x = G(z)``.
    penalty : {"density", "latent"}, default="density"
        ``-log p_G(x)``, the same function in both spaces, or ``||z||^2 / 2``.
    smoothing : "auto" or float, default="auto"
        Standard deviation of noise, in the units of the images, over which ``log p_G`` is averaged:
        the solver then minimises ``nll(y, f(x)) - lam * E log p_G(x + smoothing * u)``, ``u``
        standard normal, one ``u`` per evaluation. Flows that were trained on integer levels know
        nothing of what is finer than a level, and their density has peaks there that are no
        property of images: averaging takes them out, and gives decibels at ``lam=1`` and some
        tenths at the best lambda (``docs/solvers.md``). "auto": by half a level, if the prior was
        trained with dequantisation, in those rows where the exact density is too rough for
        quasi-Newton steps, so that "hybrid" goes over to Adam, with a fixed lambda and with the
        schedules "direct" and "lattice"; other rows, schedules, solvers, spaces and penalties see
        the exact one. A number: in all rows, for ``space="image"``, ``penalty="density"`` and
        schedules other than "adaptive" and :class:`~skaipo.solvers.TheorySchedule`, best with a
        solver that bears noise in its gradients, "hybrid" or "adam" (others may stall); that rows
        end with the budget is then not warned of. 0: the exact density throughout.

        What is reported are the numbers of the exact objective at the result. Where that was
        averaged its minimiser is another, and above ``lam=0`` such a row is not called converged:
        ``reconstruct(Y).smoothed`` marks it.
    schedule : {"direct", "linear", "geometric", "lattice", "adaptive"} or schedule object, \
            default="direct"
        How lambda moves: not at all (the target from the first step), up in equal steps
        (:class:`~skaipo.solvers.LinearSchedule`), up along fixed lambdas in equal ratios
        (:class:`~skaipo.solvers.GeometricSchedule`), from the middle of such lambdas to the
        target (:class:`~skaipo.solvers.LatticeSchedule`), or up as each row can follow
        (:class:`~skaipo.solvers.AdaptiveSchedule`).
    init : {"auto", "gaussian", "mle", "zero", "random"}, default="auto"
        Start. "gaussian": the solution if the prior were the Gaussian of the same mean and
        covariance; for operators that are not linear by Gauss-Newton steps from several images.
        "mle": the most probable image that explains the measurements, AIPO's solution at
        ``lam = 0``. "zero": ``G(0)``. "random": ``G(z)`` with standard normal ``z``. "auto" is
        "gaussian".
        At ``lam=0`` the result is that of "mle", whatever the start.
    mle_solver : {"lbfgs", "pgd"}, default="lbfgs"
        How the MLE start is found: by L-BFGS, or by the paper's projected gradient with Adam
        steps, which takes about ten times as many evaluations.
    n_starts : int, default=1
        Number of starts, which share ``max_evals``: ``init``, then "zero" and "mle", then random
        ones. The result of lowest objective is kept, and how far the others are from it is
        ``reconstruct(Y).disagreement``.
    max_evals : int, default=300
        Flow evaluations per row, everything counted; at most a third goes to the start.
    tol : float, default=1e-4
        A row has converged when its gradient is this small against its two terms' gradients.
    batch_size : int, default=64
        Rows that are solved together. Memory grows with it; results do not depend on it, bit for
        bit for convolutional flows, to rounding for dense ones (BLAS rounds a row by its place).
    n_jobs : int, default=None
        Chunks of rows in parallel, by joblib.
    random_state : int, RandomState or None, default=None
        Of random starts.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    prior_ : FlowPrior or GaussianPrior
        The fitted prior.
    noise_ : GaussianNoise
        With its sigma as ``fit`` estimated it, for ``noise=GaussianNoise("estimate")``.
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


class AIPOTransformer(
    Continuation, ClassNamePrefixFeaturesOutMixin, TransformerMixin, Reconstructor
):
    """AIPO as a step of a pipeline: corrupted measurements in, reconstructions out.

    ``fit`` ignores its second argument, which in a pipeline holds labels. An unfitted prior is
    trained on the rows that ``fit`` gets, which must then be clean images (for operators whose
    measurements are images, such as inpainting: train on clean images, transform corrupted ones).
    Rows with missing values are left out of that training, and a warning counts them.
    :class:`AIPORegressor` has the same parameters, and predicts.

    Parameters
    ----------
    op, lam, prior, noise, solver, space, penalty, smoothing, schedule, init, mle_solver
        As in :class:`AIPORegressor`.
    n_starts, max_evals, tol, batch_size, n_jobs, random_state, verbose
        As in :class:`AIPORegressor`.

    Attributes
    ----------
    prior_ : FlowPrior or GaussianPrior
        The fitted prior.
    noise_ : GaussianNoise
        With its sigma as ``fit`` estimated it, for ``noise=GaussianNoise("estimate")``.
    n_features_in_ : int
        Number of measurements, if ``fit`` saw some.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import AIPOTransformer, GaussianPrior
    >>> from skaipo.operators import Inpainting
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> fill_in = AIPOTransformer(Inpainting(), 1e-6, prior=prior)
    >>> fill_in.fit_transform(np.array([[1.0, np.nan]])).round(2)
    array([[1. , 0.9]])
    """

    __metadata_request__transform = dict(mask=True, op_params=True)

    def _clean_data(self, X, y, mask):
        # y holds labels here. What an unfitted prior learns from is X itself.
        if X is None or is_fitted(self.prior):
            return None
        if is_learnt(self.op) or not as_operator(self.op)._keeps_shape:
            raise ValueError(
                f"{type(self).__name__} can train its prior only on images, and what "
                f"{type(self.op).__name__} measures are none: pass a fitted prior."
            )
        x, _, shape = check_batch(X, estimator=self, reset=True, name="X", allow_nan=True)
        if mask is not None:
            x = masked(x, mask, {(x.shape[1],), shape})
        whole = ~x.isnan().any(1)
        if not whole.any():
            raise ValueError(
                f"{type(self).__name__} trains its prior {type(self.prior).__name__} on the rows "
                f"that it is given, as far as they are whole images, and all of these {len(x)} "
                f"have missing values. Pass a fitted prior, {type(self).__name__}(op, "
                f"prior={type(self.prior).__name__}().fit(X_clean)), or fit on clean images "
                f"and transform the others."
            )
        if not whole.all():
            warnings.warn(
                f"{int((~whole).sum())} of {len(x)} rows have missing values and are left out when "
                f"{type(self).__name__} trains its prior, which takes whole images.",
                UserWarning,
                stacklevel=3,
            )
        return to_numpy(x[whole]).reshape(-1, *shape)

    @property
    def _n_features_out(self):
        return self._ready_prior().flow_.n_features

    def fit_transform(self, X, y=None, *, prior=None, mask=None, checkpoint=None, op_params=None):
        """Fit, then reconstruct the same rows; see :meth:`fit` and :meth:`transform`."""
        self.fit(X, y, prior=prior, mask=mask, op_params=op_params)
        return self.transform(X, mask, checkpoint, op_params)

    def transform(self, Y, mask=None, checkpoint=None, op_params=None):
        """Reconstruct a batch of measurements.

        Parameters
        ----------
        Y : array-like or torch.Tensor of shape (n_samples, m)
            Measurements; NaN where nothing was measured.
        mask : array-like of bool (or 0/1) of the shape of Y, default=None
            False where a value of ``Y`` is to be ignored, as if it were NaN.
        checkpoint : path-like, default=None
            Directory that keeps the finished chunks of rows, so that the same call goes on there
            if the process was killed; see :meth:`reconstruct`.
        op_params : array-like of shape (n_samples, ...), default=None
            What the operator takes per row (its kernel, its mask), for operators that do.

        Returns
        -------
        X : ndarray or torch.Tensor of shape (n_samples, d)
            Rows that did not converge are counted in a ``ConvergenceWarning``.
        """
        return self._predict(Y, mask, checkpoint, op_params)


class FixedLambdaMAP(Regressor):
    """MAP reconstruction at the target lambda from the first step: the paper's baselines.

    Adam in image space, from the MLE or from another start, is what Liu et al. (2023) compare AIPO
    with, and the default here. Other solvers and starts are those of :class:`AIPORegressor`.

    Parameters
    ----------
    op : Operator or array-like of shape (m, d)
        Forward operator ``f``; a matrix stands for itself.
    lam : float, default=1.0
        Weight of the prior, >= 0. With ``noise=GaussianNoise(sigma)`` 1 is the Bayes MAP.
    init : {"mle", "zero", "random", "gaussian", "auto"}, default="mle"
        Start; see :class:`AIPORegressor`.
    solver : {"adam", "lbfgs", "hybrid", "gd"} or Method, default="adam"
        Update rule.
    mle_solver : {"pgd", "lbfgs"}, default="pgd"
        How the MLE start is found.
    prior, noise, space, penalty, smoothing, n_starts, max_evals, tol, batch_size, n_jobs, verbose
        As in :class:`AIPORegressor`.
    random_state : int, RandomState or None, default=None
        Of random starts.

    Attributes
    ----------
    prior_ : FlowPrior or GaussianPrior
        The fitted prior.
    noise_ : GaussianNoise
        With its sigma as ``fit`` estimated it, for ``noise=GaussianNoise("estimate")``.
    n_features_in_ : int
        Number of measurements, if ``fit`` saw some.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import FixedLambdaMAP, GaussianPrior
    >>> from skaipo.noise import GaussianNoise
    >>> from skaipo.operators import Denoising
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.eye(2))
    >>> model = FixedLambdaMAP(
    ...     Denoising(), prior=prior, noise=GaussianNoise(1.0), solver="lbfgs", tol=1e-6
    ... )
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
        smoothing="auto",
        mle_solver="pgd",
        n_starts=1,
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
        self.smoothing = smoothing
        self.mle_solver = mle_solver
        self.n_starts = n_starts
        self.max_evals = max_evals
        self.tol = tol
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def _schedule(self):
        return None
