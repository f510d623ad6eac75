"""What all priors share: the scikit-learn side of a fitted flow."""

import copy
import numbers

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from skaipo._handle import pack_module, unpack_module
from skaipo._validation import check_batch, to_numpy
from skaipo.flows._base import log_normal
from skaipo.operators._base import ShortRepr

__all__ = ["Packed", "Prior", "is_fitted", "is_prior", "map_rows"]

# Parameters and attributes that nothing here ever writes to: copies and clones share them.
_SHARED = torch.nn.Module | torch.distributions.Distribution


def is_prior(obj):
    """Whether an object has a prior's interface."""
    return hasattr(obj, "score_samples") and hasattr(type(obj), "flow_")


def is_fitted(prior):
    """Whether a prior is ready to be used."""
    if not is_prior(prior):
        return False
    try:
        check_is_fitted(prior)
    except NotFittedError:
        return False
    return True


def map_rows(function, x, chunk=256):
    """Apply ``function`` to chunks of rows, so that memory does not grow with their number."""
    return torch.cat([function(rows) for rows in x.split(chunk)])


class Packed:
    """A frozen module inside of a pickle: unpacked where it arrives."""

    def __init__(self, module):
        self.state = pack_module(module)


class Prior(
    ShortRepr, ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator
):
    """What every prior does with its fitted flow, ``self.flow_``."""

    # Width of the uniform noise that was added to integer data, of which finer structure the
    # density therefore knows nothing; 0: none.
    dequantize_width = 0.0

    def _describe(self, value):
        if isinstance(value, torch.distributions.Distribution):
            return f"<{type(value).__name__}>"
        return super()._describe(value)

    def __sklearn_is_fitted__(self):
        return getattr(self, "_fitted_flow", None) is not None

    @property
    def flow_(self):
        """Flow : the fitted module, frozen."""
        flow = getattr(self, "_fitted_flow", None)
        if flow is None:
            raise NotFittedError(
                f"This {type(self).__name__} is not fitted yet: call fit(X) with clean data, load "
                f"a saved prior with {type(self).__name__}.load(path), or wrap a trained flow "
                f"module with FlowPrior(flow=module)."
            )
        return flow

    @property
    def event_shape_(self):
        """Shape of one sample."""
        return self.flow_.event_shape

    @property
    def _n_features_out(self):
        return self.flow_.n_features

    # The modules of a fitted prior never change: copies and clones share them, and a pickle holds
    # them as one flat array, which joblib writes to disk once for all of its workers.

    def __getstate__(self):
        state = dict(super().__getstate__())
        for key, value in state.items():
            if isinstance(value, torch.nn.Module):
                state[key] = Packed(value)
        return state

    def __setstate__(self, state):
        unpacked = {
            key: unpack_module(value.state) if isinstance(value, Packed) else value
            for key, value in state.items()
        }
        super().__setstate__(unpacked)

    def __copy__(self):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo):
        other = object.__new__(type(self))
        for key, value in self.__dict__.items():
            shared = isinstance(value, _SHARED)
            other.__dict__[key] = value if shared else copy.deepcopy(value, memo)
        return other

    def __sklearn_clone__(self):
        # clone() would deep-copy modules and moments; nothing here ever writes to them.
        params = self.get_params(deep=False).items()
        shared = {k: v for k, v in params if isinstance(v, _SHARED | np.ndarray)}
        shell = copy.copy(self)
        vars(shell).update(dict.fromkeys(shared))
        return super(Prior, shell).__sklearn_clone__().set_params(**shared)

    def _check(self, X, name="X"):
        flow = self.flow_
        # A wrapped or loaded prior has not seen fit, where scikit-learn notes the width.
        estimator = self if hasattr(self, "n_features_in_") else None
        return check_batch(
            X,
            event_shape=flow.event_shape,
            estimator=estimator,
            name=name,
            whose=f"this {type(self).__name__}",
            device=flow.loc.device,
            dtype=flow.loc.dtype,
        )

    def transform(self, X):
        """Map data to the latent space.

        Parameters
        ----------
        X : array-like of shape (n_samples, d) or (n_samples, *event_shape)

        Returns
        -------
        Z : ndarray of shape (n_samples, d)
            Standard normal if ``X`` follows the prior.
        """
        evaluator = self.flow_.compile_for_inference()
        x, layout, _ = self._check(X)
        return layout.restore(map_rows(lambda rows: evaluator.forward(rows)[0], x))

    def inverse_transform(self, Z):
        """Map latents to data.

        Parameters
        ----------
        Z : array-like of shape (n_samples, d)

        Returns
        -------
        X : ndarray of shape (n_samples, d)
        """
        flow = self.flow_
        z, layout, _ = check_batch(
            Z,
            event_shape=(flow.n_features,),
            name="Z",
            whose=f"this {type(self).__name__}",
            device=flow.loc.device,
            dtype=flow.loc.dtype,
        )
        evaluator = flow.compile_for_inference()
        return layout.restore(map_rows(lambda rows: evaluator.inverse(rows)[0], z))

    def score_samples(self, X):
        """Log-density of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, d) or (n_samples, *event_shape)

        Returns
        -------
        log_prob : ndarray of shape (n_samples,)
            In nats, per unit of ``X``. For a prior trained on integer levels this is the density
            of the dequantised data: a lower bound of the log-probability of the levels is its
            mean over noise in [-1/2, 1/2).
        """
        evaluator = self.flow_.compile_for_inference()
        x, layout, _ = self._check(X)

        def log_prob(rows):
            z, log_det = evaluator.forward(rows)
            return log_det + log_normal(z)

        return layout.restore(map_rows(log_prob, x))

    def score(self, X, y=None):
        """Mean log-density of the samples, in nats.

        Parameters
        ----------
        X : array-like of shape (n_samples, d) or (n_samples, *event_shape)
        y : Ignored

        Returns
        -------
        score : float
        """
        return float(self.score_samples(X).mean())

    def sample(self, n_samples=1, random_state=None, temperature=1.0):
        """Draw samples from the prior.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState or None, default=None
        temperature : float, default=1
            Standard deviation of the latent; below 1 gives cleaner, less varied samples.

        Returns
        -------
        X : ndarray of shape (n_samples, d)
        """
        if not isinstance(n_samples, numbers.Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}.")
        seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
        generator = torch.Generator().manual_seed(int(seed))
        x = self.flow_.sample(int(n_samples), temperature, generator)
        return to_numpy(x.flatten(1))
