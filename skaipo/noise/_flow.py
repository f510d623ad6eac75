"""Noise whose density is a trained flow."""

import copy
import math

import torch

from skaipo._handle import pack_module, unpack_module
from skaipo._padding import padded
from skaipo._validation import named_rows
from skaipo.flows._base import Flow, log_normal, without_outliers
from skaipo.noise._base import Likelihood, known_gradient

__all__ = ["FlowNoise"]

_N_SAMPLES = 1024


class FlowNoise(Likelihood):
    """Noise with structure: ``nll = -log p_e(y - f(x))`` with a flow ``p_e`` trained on noise.

    Stripes, bands, fixed patterns, whatever there are samples of: measurements of a dark or a known
    scene, less what they should have been. Train a :class:`~skaipo.FlowPrior` on them.

    A flow has no marginals in closed form: measurements with missing entries are refused.

    Parameters
    ----------
    flow : FlowPrior, GaussianPrior or Flow
        Fitted to samples of the noise, in the units and of the size of the measurements.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: the flow is none.
    NotFittedError
        By ``bind`` and ``add_noise``: the flow is not trained yet.
    ValueError
        By ``bind`` and ``add_noise``: the flow is of another size than the measurements. By
        ``nll`` and the estimators: missing measurements.

    References
    ----------
    Whang, J., Lei, Q. and Dimakis, A. G., "Solving inverse problems with a flow-based noise model",
    ICML 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import GaussianPrior
    >>> from skaipo.noise import FlowNoise
    >>> noise = FlowNoise(GaussianPrior(mean=np.zeros(2), covariance=np.eye(2)))
    >>> noise.add_noise(np.zeros((3, 2))).shape
    (3, 2)
    """

    def __init__(self, flow):
        self.flow = flow

    def _module(self):
        flow = self.flow
        # (By the class: asked of a prior that is not fitted, getattr would hide why.)
        flow = flow.flow_ if hasattr(type(flow), "flow_") else flow
        if not isinstance(flow, Flow):
            raise TypeError(
                f"FlowNoise(flow) must be a fitted FlowPrior or a skaipo.flows.Flow, got "
                f"{type(flow).__name__}. Wrap another library's flow: FlowPrior(flow=module)."
            )
        return flow

    def _check(self):
        flow, m = self._module(), self.n_measurements_
        if flow.n_features != m:
            raise ValueError(
                f"FlowNoise(flow) is a density of {flow.n_features} values, but there are {m} "
                f"measurements: train it on noise of their size."
            )

    def _evaluator(self, like):
        """The flow's evaluator on the device and in the dtype of a tensor.

        Of a copy where the flow itself is elsewhere, or open to training.
        """
        flow = self._module()
        cache = self.__dict__.setdefault("_cache", {})
        key = like.device, like.dtype
        if key not in cache or cache[key][0] is not flow:
            ours = flow
            trainable = flow.training or any(p.requires_grad for p in flow.parameters())
            if trainable or (flow.loc.device, flow.loc.dtype) != key:
                with torch.inference_mode(False):
                    ours = copy.deepcopy(flow).to(*key).eval().requires_grad_(False)
            # Looking a flow's evaluator up takes a pass over its weights.
            cache[key] = flow, ours.compile_for_inference()
        return cache[key][1]

    def release_workspaces(self):
        """Let go of the memory that the flow's evaluator keeps for its next call."""
        for key, kept in self.__dict__.get("_cache", {}).items():
            if key != "moments":
                kept[1].release()

    def check_measurements(self, y):
        """Refuse rows with missing entries.

        See :meth:`NoiseModel.check_measurements`.
        """
        rows = y.isnan().any(1).nonzero().flatten().tolist()
        if rows:
            raise self._missing(rows)

    def _missing(self, rows):
        return ValueError(
            f"FlowNoise needs every measurement, because a flow has no marginals in closed form; "
            f"some are missing in {len(rows)} row(s): {named_rows(rows)}. Leave these rows out, or "
            f"use CorrelatedGaussianNoise(covariance of the noise), which takes NaN."
        )

    def _nll(self, prediction, y, observed):
        if observed is not None and not bool(observed.all()):
            missing = ~observed.expand_as(y).all(1)
            raise self._missing(missing.nonzero().flatten().tolist())
        residual = y - prediction
        with torch.no_grad():
            z, log_det, pull = self._evaluator(y).linearize(residual.detach())
            nll = -log_normal(z) - log_det
            # What the evaluator keeps is overwritten by the next call: the gradient is taken now.
            (gradient,) = pull((z, -1.0))
        return known_gradient(residual, nll, gradient)

    def max_curvature(self):
        return math.inf

    def typical_curvature(self):
        """Inverse of the smallest variance that samples of the flow have."""
        return float(1 / self._moments()[1].min())

    def _moments(self):
        """Mean and variance of each entry, of samples with a fixed seed."""
        cache = self.__dict__.setdefault("_cache", {})
        flow = self._module()
        if "moments" not in cache or cache["moments"][0] is not flow:
            x = flow.sample(_N_SAMPLES, generator=torch.Generator().manual_seed(0))
            x = x.flatten(1).cpu().double()
            x = x[x.isfinite().all(1)]
            mean, variance = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
            if len(x) > 1:
                x = without_outliers(x)
                mean, variance = x.mean(0), x.var(0)
            tiny = max(1e-9 * float(variance.mean()), torch.finfo(torch.float32).tiny)
            cache["moments"] = flow, mean, variance.clamp_min(tiny)
        return cache["moments"][1:]

    def gaussian_fit(self, y):
        """Independent noise with the mean and the variances of the flow's samples.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        mean, variance = (moment.to(y) for moment in self._moments())
        return y - mean, (1 / variance).expand_as(y)

    def _draw(self, clean, rng):
        flow = self._module()
        z = torch.from_numpy(rng.standard_normal(clean.shape)).to(flow.loc)
        with torch.no_grad():
            noise = padded(lambda z: flow.inverse(z).flatten(1), z)
        return clean + noise.cpu().double().numpy()

    def __getstate__(self):
        state = super().__getstate__()
        if isinstance(self.flow, torch.nn.Module):
            state["flow"] = pack_module(self.flow)
        return state

    def __setstate__(self, state):
        if isinstance(state["flow"], dict):
            state = {**state, "flow": unpack_module(state["flow"])}
        super().__setstate__(state)
