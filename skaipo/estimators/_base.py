"""What the estimators share: making ready, chunks of rows, results and warnings."""

import copy
import math
import numbers
import warnings

import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.parallel import Parallel, delayed

from skaipo._checkpoint import Checkpoint, describe_run
from skaipo._messages import far_off, other_units, unfinished
from skaipo._progress import Progress
from skaipo._reconstruct import Problem, Reconstruction, solve_chunk
from skaipo._validation import (
    check_batch,
    check_lam,
    check_range,
    masked,
    reject_empty_rows,
    to_numpy,
    to_tensor,
)
from skaipo.estimators._smoothing import Smoothing
from skaipo.flows._foreign import is_flow
from skaipo.noise import CorrelatedGaussianNoise, GaussianNoise, as_noise
from skaipo.objective import PENALTIES, SPACES, check_choice
from skaipo.operators import as_operator
from skaipo.operators._base import ShortRepr
from skaipo.operators._convert import is_foreign
from skaipo.operators._packing import Packed, packed
from skaipo.priors import FlowPrior
from skaipo.priors._base import is_fitted, is_prior
from skaipo.solvers import (
    LBFGS,
    MLE_SOLVERS,
    Adam,
    GradientDescent,
    Hybrid,
    Method,
    surrogate_of,
)

__all__ = ["Reconstructor", "is_learnt"]

# From here on a result says something of the problem, and not of the start alone.
_SOME_EVALS = 20
INITS = ("auto", "gaussian", "mle", "zero", "random")
_METHODS = {"hybrid": Hybrid, "lbfgs": LBFGS, "adam": Adam, "gd": GradientDescent}


def _no_such_prior(prior):
    hint = ""
    if isinstance(prior, str):
        hint = f' Did you mean FlowPrior("{prior}")?'
    elif isinstance(prior, type):
        hint = f" Did you mean {prior.__name__}()?"
    return TypeError(f"prior must be a FlowPrior or GaussianPrior, got {prior!r:.80}.{hint}")


def is_learnt(op):
    """Whether an operator is to be learnt from pairs of measurements and clean images."""
    return hasattr(op, "learn")


def _check_measurements(noise, op, y):
    # What the operator does not measure is no measurement, whatever the array holds.
    seen = torch.where(op.measured(y), y, torch.nan)
    reject_empty_rows(seen, "The operator's mask and the NaN in Y leave")
    noise.check_measurements(seen)


class Reconstructor(Smoothing, ShortRepr, BaseEstimator):
    """What all estimators share: priors, validation, chunks, results."""

    # Metadata routing: what belongs to the measurements goes wherever they go, unless a request
    # says otherwise. (Where fit asks and transform does not, fit_transform cannot be routed.)
    __metadata_request__fit = dict(mask=True, op_params=True)

    def _is_ready(self):
        """Whether there is nothing left to learn."""
        estimated = getattr(self.noise, "is_estimated", False)
        return is_fitted(self.prior) and not (is_learnt(self.op) or estimated)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = not self._is_ready()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = self.random_state is None and (
            self.init == "random" or self.n_starts > 2
        )
        return tags

    def __sklearn_clone__(self):
        # clone() would give back an unfitted prior; a fitted one rides along, weights shared.
        # Neither does what measures need copies: matrices and foreign operators are only read.
        keeps_prior = is_fitted(self.prior)
        keeps_op = not hasattr(self.op, "get_params")
        shell = copy.copy(self)
        shell.prior = None if keeps_prior else self.prior
        shell.op = None if keeps_op else self.op
        other = super(Reconstructor, shell).__sklearn_clone__()
        if keeps_prior:
            other.prior = copy.copy(self.prior)
        if keeps_op:
            other.op = self.op
        return other

    def __copy__(self):
        # As if there were no __getstate__, which packs.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self):
        state = dict(super().__getstate__())
        if is_foreign(self.op):
            # Lambdas in it must not keep a whole search from running in other processes.
            state["op"] = packed(self.op, f"The op of this {type(self).__name__}")
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if isinstance(self.op, Packed):
            self.op = self.op.open()

    def __sklearn_is_fitted__(self):
        return hasattr(self, "prior_") or self._is_ready()

    def fit(self, X=None, y=None, *, prior=None, mask=None, op_params=None):
        """Make the prior ready: take it, or train it on clean data.

        Parameters
        ----------
        X : prior, or array-like of shape (n_samples, m), default=None
            ``fit(prior)`` takes a fitted prior, like ``set_params(prior=prior)``. Otherwise the
            measurements, whose width is noted, and from which ``GaussianNoise("estimate")`` is
            estimated.
        y : array-like of shape (n_samples, d), default=None
            Clean data, on which an unfitted ``prior`` is trained.
        prior : prior, default=None
            The same as the first argument, by name.
        mask : array-like of bool of the shape of X, default=None
            False where a value of ``X`` is to be ignored, as if it were NaN.
        op_params : array-like of shape (n_samples, ...), default=None
            What the operator takes per row (its kernel, its mask), for operators that do.

        Returns
        -------
        self : estimator

        Raises
        ------
        NotFittedError
            If there is no prior.
        ValueError
            If the prior or the operator is not fitted and there is no clean data to fit it on.

        Warns
        -----
        UserWarning
            If the prior is fitted and the clean data cannot be in its units.
        """
        if is_prior(X) or is_flow(X):
            if prior is not None:
                raise TypeError("Got two priors: pass it once, as fit(prior).")
            X, prior = None, X
        if is_flow(prior):
            prior = FlowPrior(flow=prior)
        if prior is not None:
            if not is_prior(prior):
                raise _no_such_prior(prior)
            self.prior = prior
        self._check_params()
        if self.prior is None:
            raise self._no_prior()
        if X is None and not (mask is None and op_params is None):
            raise TypeError(
                f"mask and op_params belong to measurements, and {type(self).__name__}.fit got "
                f"none: pass fit(Y, mask=mask), or leave them to the method that gets Y."
            )
        self._one_output = False
        clean = self._clean_data(X, y, mask)
        if is_fitted(self.prior):
            self.prior_ = self.prior
        elif clean is None:
            why = getattr(self.prior, "_unfitted_because", "")
            raise self._nothing_to_learn_from(f"The prior {type(self.prior).__name__}", why)
        else:
            self.prior_ = clone(self.prior).fit(clean)
        if is_learnt(self.op):
            if clean is None:
                raise self._nothing_to_learn_from(f"The operator {type(self.op).__name__}")
            measured, _, shape = check_batch(
                X, estimator=self, reset=True, name="X", allow_nan=True, dtype=torch.float64
            )
            if mask is not None:
                measured = masked(measured, mask, {(measured.shape[1],), shape})
            flat, _, _ = check_batch(clean, name="y", dtype=torch.float64)
            self.op_ = self.op.learn(to_numpy(flat), to_numpy(measured))
        op = self._bind_op(self.prior_)
        noise = self._noise_for(op)
        vars(self).pop("noise_", None)
        if X is not None:
            measured, _, _ = self._measurements(X, op, reset=True, mask=mask)
            if op_params is not None:
                params = op.check_params(op_params, len(measured), like=measured)
                measured = torch.where(op.given(params).measured(measured), measured, torch.nan)
            _check_measurements(noise, op, measured)
            if noise.is_estimated:
                self.noise_ = noise = noise.estimate(measured, op)
        if not noise.is_estimated:
            noise.bind(op.n_measurements_)
        # (What is X itself has been checked.)
        d = op.n_features_in_
        if clean is not None and clean is not X and math.prod(clean.shape[1:]) != d:
            raise ValueError(
                f"y must hold clean images of {d} features, as the prior does, got shape "
                f"{tuple(clean.shape)}."
            )
        if clean is not None and self.prior_ is self.prior:
            message = other_units(clean, self.prior_.flow_)
            if message:
                warnings.warn(message, UserWarning, stacklevel=2)
        return self

    def _clean_data(self, X, y, mask):
        """What an unfitted prior or operator may learn from, or None."""
        return None if y is None else self._check_clean(X, y)

    def _check_clean(self, X, y):
        if X is not None:
            check_consistent_length(X, y)
        if not isinstance(y, torch.Tensor):
            y = check_array(
                y, ensure_2d=False, allow_nd=True, dtype=None, input_name="y", estimator=self
            )
        if y.ndim == 1:
            self._one_output = True
            y = y.reshape(-1, 1)
        return y

    def _nothing_to_learn_from(self, what, why=""):
        name = type(self).__name__
        return ValueError(
            f"{what} is not fitted, so that {name} requires y to be passed, but the target y is "
            f"None. Pass clean data, {name}.fit(Y, X_clean), or a fitted one.{why}"
        )

    def _no_prior(self):
        name = type(self).__name__
        return NotFittedError(
            f"This {name} has no prior. Pass a fitted one, {name}(op, lam, prior=prior) or "
            f"fit(prior); or an unfitted one and clean data, "
            f"{name}(op, lam, prior=FlowPrior()).fit(Y, X_clean)."
        )

    def _ready_prior(self):
        if is_fitted(self.prior):
            return self.prior
        if hasattr(self, "prior_"):
            return self.prior_
        if self.prior is None:
            raise self._no_prior()
        raise NotFittedError(
            f"The prior of this {type(self).__name__} is not fitted yet: call fit(Y, X_clean), or "
            f"fit the prior before.{getattr(self.prior, '_unfitted_because', '')}"
        )

    def _bind(self, prior):
        op = self._bind_op(prior)
        noise = self._noise_for(op)
        if noise.is_estimated:
            if not hasattr(self, "noise_"):
                raise NotFittedError(
                    f"The noise of this {type(self).__name__} is still to be estimated: call "
                    f"fit(Y) with measurements, or pass a number, noise=GaussianNoise(sigma)."
                )
            noise = self.noise_
        return op, noise.bind(op.n_measurements_)

    def _bind_op(self, prior):
        if self.op is None:
            raise ValueError(
                f"{type(self).__name__} needs a forward operator: pass op, for example "
                f"{type(self).__name__}(Denoising())."
            )
        op = self.op
        if is_learnt(op):
            if not hasattr(self, "op_"):
                raise NotFittedError(
                    f"The operator of this {type(self).__name__} is not fitted yet: call "
                    f"fit(Y, X_clean)."
                )
            op = self.op_
        return as_operator(op).bind(prior.event_shape_)

    def _noise_for(self, op):
        """The noise model; where none is given, what the operator says of its noise."""
        if self.noise is None and op.implied_sigma is not None:
            return GaussianNoise(op.implied_sigma)
        return as_noise(self.noise)

    def _measurements(self, Y, op, reset=False, flow=None, mask=None):
        estimator = self if reset or hasattr(self, "n_features_in_") else None
        dtype = None if flow is None else flow.loc.dtype
        device = None if flow is None else flow.loc.device
        y, layout, shape = check_batch(
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
        if mask is not None:
            y = masked(y, mask, {(y.shape[1],), shape, op.measurement_shape_})
        return y, layout, shape

    def _target(self):
        return check_lam(self.lam)

    def _check_params(self):
        if self.prior is not None and (isinstance(self.prior, type) or not is_prior(self.prior)):
            raise _no_such_prior(self.prior)
        if hasattr(self, "lam"):
            check_lam(self.lam)
        for name, low in (("max_evals", 4), ("batch_size", 1), ("n_starts", 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value is True or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")
        if self.max_evals < 4 * self.n_starts:
            raise ValueError(
                f"max_evals must be at least 4 for each of the n_starts={self.n_starts} starts, "
                f"got {self.max_evals!r}."
            )
        if not (isinstance(self.tol, numbers.Real) and self.tol >= 0):
            raise ValueError(f"tol must be a number >= 0, got {self.tol!r}.")
        self._check_smoothing()

    def _method(self):
        if isinstance(self.solver, Method):
            return self.solver
        return _METHODS[check_choice("solver", self.solver, tuple(_METHODS))]()

    def _starts(self, y, flow, op):
        """The starts: "gaussian", "mle", "zero", or latents (n, d) for all rows."""
        first = check_choice("init", self.init, INITS)
        if first == "auto":
            first = "gaussian"
        kinds = [first, *(kind for kind in ("zero", "mle") if kind != first)][: self.n_starts]
        kinds += ["random"] * (self.n_starts - len(kinds))
        if not flow.has_inverse:
            self._check_needs_no_samples(kinds)
        # Drawn for all rows at once: a row's start does not depend on the chunk it falls in.
        rng = check_random_state(self.random_state)
        return [
            to_tensor(
                rng.standard_normal((len(y), flow.n_features)), device=y.device, dtype=y.dtype
            )
            if kind == "random"
            else kind
            for kind in kinds
        ]

    def _check_needs_no_samples(self, kinds):
        """Refuse what needs the direction from latents to data."""
        asked = [
            text
            for text, is_asked in (
                ("space='latent'", self.space == "latent"),
                ("init='zero'", self.init == "zero"),
                ("a random start (init='random' or n_starts above 3)", "random" in kinds),
            )
            if is_asked
        ]
        if asked:
            raise ValueError(
                f"The prior's flow has no direction from latents to data, which {asked[0]} needs: "
                f"use space='image' with init='gaussian' or 'mle'."
            )

    def _check_repeatable(self, starts):
        """Refuse to keep what the same call, in another process, would not find again."""
        if self.random_state is None and not all(isinstance(start, str) for start in starts):
            raise ValueError(
                "checkpoint needs an integer random_state where the start is random, got None: the "
                "start would be another one when the run goes on. Pass random_state=0, say."
            )

    @torch.inference_mode(False)  # in which there are no gradients
    def _solve(self, Y, lams, mask=None, history=False, checkpoint=None, op_params=None):
        """Reconstructions at ascending lambdas, and the evaluations that all of them took."""
        self._check_params()
        prior = self._ready_prior()
        flow = prior.flow_
        check_range(max(lams), flow.loc.dtype)
        op, noise = self._bind(prior)
        y, layout, _ = self._measurements(Y, op, flow=flow, mask=mask)
        y = y.clone() if y.is_inference() else y
        params = op.check_params(op_params, len(y), like=y)
        _check_measurements(noise, op.given(params), y)
        starts = self._starts(y, flow, op)
        method = self._method()
        helps = self.space == "image" and method.wants_metric
        needed = "gaussian" in [start for start in starts if isinstance(start, str)]
        smoothing, rough_only = self._width(prior, lams)
        problem = Problem(
            prior=prior,
            op=op,
            noise=noise,
            method=method,
            schedule=self._schedule(),
            space=check_choice("space", self.space, SPACES),
            penalty=check_choice("penalty", self.penalty, PENALTIES),
            lams=lams,
            smoothing=smoothing,
            rough_only=rough_only,
            max_evals=self.max_evals,
            tol=self.tol,
            mle_solver=check_choice("mle_solver", self.mle_solver, MLE_SOLVERS),
            surrogate=surrogate_of(flow) if needed or helps else None,
            history=history,
        )
        # The edges of the chunks follow batch_size alone: results do not depend on n_jobs.
        chunks = list(torch.arange(len(y)).split(self.batch_size))
        store = None
        if checkpoint is not None:
            self._check_repeatable(starts)
            run = describe_run(problem, y, starts, self.batch_size, params)
            store = Checkpoint(checkpoint, run)
        parts = [None if store is None else store.load(k) for k in range(len(chunks))]
        todo = [k for k, part in enumerate(parts) if part is None]

        def task(k):
            rows = chunks[k]
            start = [start if isinstance(start, str) else start[rows] for start in starts]
            args = (problem, y[rows], start, None if params is None else params[rows])
            if store is None:
                return delayed(solve_chunk)(*args)
            return delayed(store.solve)(k, solve_chunk, *args)

        with Progress(type(self).__name__, len(y), enabled=self.verbose > 0) as bar:
            results = Parallel(n_jobs=self.n_jobs, return_as="generator")(task(k) for k in todo)
            done = len(y) - sum(len(chunks[k]) for k in todo)
            bar.update(done)
            for k, part in zip(todo, results, strict=True):
                parts[k] = part
                done += len(chunks[k])
                bar.update(done)
        total = sum(n_evals for _, n_evals in parts)
        by_lam = zip(*(part for part, _ in parts), strict=True)
        joined = [Reconstruction.join(p, lam) for lam, p in zip(lams, by_lam, strict=True)]
        for result in joined:
            result.x = layout.restore(to_tensor(result.x), op.event_shape_)
        return joined, total

    def reconstruct(self, Y, *, mask=None, history=False, checkpoint=None, op_params=None):
        """Reconstruct a batch and tell how each row went.

        Parameters
        ----------
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.
        mask : array-like of bool (or 0/1) of the shape of Y, default=None
            False where a value of ``Y`` is to be ignored, as if it were NaN.
        history : bool, default=False
            Record lambda and objective after each evaluation.
        checkpoint : path-like, default=None
            Directory in which every chunk of ``batch_size`` rows is kept as soon as it is solved.
            If the process dies, the same call goes on after the last finished chunk, and gives the
            same bits as one that was never interrupted. It is made if it is missing, and belongs
            to one run: whatever the results depend on must be the same when the call is repeated,
            but not ``n_jobs`` and ``verbose``.
        op_params : array-like of shape (n_samples, ...), default=None
            What the operator takes per row (its kernel, its mask), for operators that do.

        Returns
        -------
        reconstruction : Reconstruction

        Raises
        ------
        ValueError
            If ``checkpoint`` holds another run (the message says what differs) or other files, or
            the start is random and ``random_state`` is None.
        TypeError
            If there is a ``checkpoint`` and the operator, noise model or solver does not pickle.
        OSError
            If ``checkpoint`` cannot be written.
        """
        (result,), _ = self._solve(Y, (self._target(),), mask, history, checkpoint, op_params)
        diverged = int((result.status == "diverged").sum())
        if diverged:
            warnings.warn(
                f"{diverged} of {len(result.status)} rows diverged: their numbers overflowed and "
                f"smaller steps did not help; what is returned for them is the best that was seen. "
                f"Check the units of these measurements"
                + (f" and of smoothing={self.smoothing:g}" if self._common_smoothing() else "")
                + "; see reconstruct(Y).status.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._warn_if_far_off(result)
        return result

    def _warn_if_far_off(self, result):
        """Tell of results that no true image explains; only Gaussian noise says what is usual."""
        known = isinstance(self.noise, GaussianNoise | CorrelatedGaussianNoise)
        # (After a handful of evaluations far off is where it began.)
        if not known or self.max_evals < _SOME_EVALS:
            return
        message = far_off(result, self._ready_prior().flow_, self.penalty)
        if message:
            message += f" (Or is max_evals={self.max_evals} far too small, or the start far from "
            message += "the solution? Try n_starts=2.)"
            warnings.warn(message, UserWarning, stacklevel=3)

    def _predict(self, Y, mask, checkpoint=None, op_params=None):
        """The reconstructions alone, with a warning that counts what did not converge."""
        result = self.reconstruct(Y, mask=mask, checkpoint=checkpoint, op_params=op_params)
        smoothing, rough_only = self._width(self._ready_prior(), (result.lam,))
        for message in unfinished(result, self.max_evals, self.tol, smoothing, rough_only):
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return result.x
