"""What all adapters share: shapes, standard normal latents, rows that cannot harm others."""

import math

import torch

from skaipo.flows._base import Flow
from skaipo.flows._foreign._checks import check_flow, gaussian_of

__all__ = ["LIBRARIES", "ForeignFlow", "name_of"]

LIBRARIES = ("normflows", "zuko", "nflows", "FrEIA")


def name_of(obj):
    library = next((part for part in type(obj).__module__.split(".") if part in LIBRARIES), "torch")
    return f"{library}'s {type(obj).__name__}"


class ForeignFlow(Flow):
    """A flow of another library: subclasses say how it is called.

    They write ``_encode(x) -> (latents, log_det)``, ``_decode(latents) -> (x, log_det)``,
    ``_base_log_prob(latents)`` and ``_their_log_prob(x)`` on the library's own shapes, where
    ``latents`` is a list of tensors; the last two may be None: standard normal latents, and no
    density of its own. What is not the library's is here: flat standard normal latents and rows
    that cannot harm others.

    Parameters
    ----------
    obj : object
        What is wrapped.
    event_shape : tuple of int or None
        What was asked for.
    own_shape : tuple of int or None
        The library's shape of one event; None: what was asked for.
    like : torch.Tensor
        Its dtype and device are those of the flow.

    Attributes
    ----------
    source : object
        What is wrapped.
    """

    # An inverse of as many passes as there are features is quicker in large batches.
    _batch = 256

    def __init__(self, obj, event_shape, own_shape, like):
        name = name_of(obj)
        if own_shape is None and event_shape is None:
            raise ValueError(
                f"{name} does not say the shape of its data: pass event_shape, (d,) or (C, H, W)."
            )
        own_shape = event_shape if own_shape is None else tuple(own_shape)
        if event_shape is None:
            event_shape = own_shape or (1,)
            if len(event_shape) not in (1, 3):
                raise ValueError(
                    f"The data of {name} have shape {own_shape}; here one sample is (d,) or "
                    f"(C, H, W). Pass event_shape, for example (1, H, W)."
                )
        if math.prod(own_shape) != math.prod(event_shape):
            raise ValueError(
                f"event_shape {event_shape} has {math.prod(event_shape)} entries, but the data of "
                f"{name} have shape {own_shape}."
            )
        super().__init__(event_shape)
        self.own_shape = own_shape
        self.loc, self.scale = self.loc.to(like), self.scale.to(like)

    def _complete(self, obj):
        """Find out the rest by trying, and check all of it."""
        name = name_of(obj)
        before = self._digest()
        self.eval()
        x = self.loc.new_zeros(2, *self.own_shape)
        try:
            with torch.no_grad():
                latents, _ = self._encode(x)
        except Exception as error:
            if _is_missing(error):
                raise ValueError(
                    f"{name} has no direction from data to latents ({_said(error)}), so that it "
                    f"has no density that could be a prior. Use an architecture with both."
                ) from error
            raise ValueError(
                f"{name} cannot be evaluated on data of shape {tuple(x.shape)}: {_said(error)}. "
                f"If the shape is wrong, pass event_shape. If the flow is conditional, fix its "
                f"context first: a flow of zuko called with one gives a distribution, which is "
                f"accepted."
            ) from error
        self.latent_shapes = [tuple(latent.shape[1:]) for latent in latents]
        if sum(math.prod(shape) for shape in self.latent_shapes) != self.n_features:
            raise ValueError(
                f"{name} maps data of shape {self.own_shape} to latents of shapes "
                f"{self.latent_shapes}: their number of entries must be the same."
            )
        self._standardisation()
        try:
            with torch.no_grad():
                self._generate(self.loc.new_zeros(2, self.n_features))
        except Exception as error:
            if not _is_missing(error):
                raise ValueError(
                    f"{name} fails on its way from latents to data: {_said(error)}"
                ) from error
            self.has_inverse = False
        theirs = self._their_log_prob
        check_flow(
            self,
            name,
            None if theirs is None else lambda x: theirs(x.reshape(-1, *self.own_shape)),
        )
        if self._digest() != before:
            raise ValueError(
                f"Evaluating {name} changed its parameters: it has layers that take their first "
                f"values from data. Train it, or pass data through it, before it is wrapped."
            )

    def _follow(self):
        """Take over the dtype and device of what is wrapped, which its owner may have changed."""

    def _standardisation(self):
        """Location and factor of the latents; computed again if the base was trained further."""
        tensors = self._base_tensors()
        key = tuple((id(t), t._version, t.dtype, t.device) for t in tensors)
        known = self.__dict__.get("_cache_of_base")
        if known is None or known[0] != key:
            known = key, None
            if self._base_log_prob is not None:
                loc, factor = gaussian_of(
                    lambda u: self._base_log_prob(self._latents(u)),
                    self.loc,
                    self.n_features,
                    self._base_name(),
                )
                if factor.ndim == 2 or bool((loc != 0).any()) or bool((factor != 1).any()):
                    known = key, (loc, factor)
            # With the tensors themselves, or another one might take over an id.
            known = (*known, tensors)
            self.__dict__["_cache_of_base"] = known
        return known[1]

    def __getstate__(self):
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_cache_of_base", "_cache", "_source")}

    def _latents(self, z):
        parts = z.split([math.prod(shape) for shape in self.latent_shapes], 1)
        shapes = self.latent_shapes
        return [p.reshape(-1, *s).contiguous() for p, s in zip(parts, shapes, strict=True)]

    def _normalize(self, x):
        x = x.reshape(len(x), -1)
        return _each_row(self._normalize_finite, x)

    def _normalize_finite(self, x):
        latents, log_det = self._encode(x.reshape(-1, *self.own_shape))
        u = torch.cat([latent.reshape(len(x), -1) for latent in latents], 1)
        log_det = _per_row(log_det, u)
        affine = self._standardisation()
        if affine is None:
            return u, log_det
        loc, factor = affine
        if factor.ndim == 1:
            return (u - loc) / factor, log_det - factor.log().sum()
        z = torch.linalg.solve_triangular(factor, (u - loc).T, upper=False).T
        return z, log_det - factor.diagonal().log().sum()

    def _generate(self, z):
        x, log_det = _each_row(self._generate_finite, z)
        return x.reshape(-1, *self.event_shape), log_det

    def _generate_finite(self, z):
        affine, volume = self._standardisation(), 0.0
        if affine is not None:
            loc, factor = affine
            if factor.ndim == 1:
                z, volume = loc + factor * z, factor.log().sum()
            else:
                z, volume = loc + z @ factor.T, factor.diagonal().log().sum()
        x, log_det = self._decode(self._latents(z))
        x = x.reshape(len(z), -1)
        return x, _per_row(log_det, x) + volume

    _base_log_prob = None
    _their_log_prob = None

    def _base_tensors(self):
        return []

    def _base_name(self):
        return "its base"


def _said(error):
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_missing(error):
    """Whether an error says that a direction is not there."""
    return isinstance(error, NotImplementedError) or any(
        cls.__name__ == "InverseNotAvailable" for cls in type(error).__mro__
    )


def _per_row(log_det, x):
    """A log-determinant (n,): libraries also give a number, or one that all rows share."""
    if isinstance(log_det, torch.Tensor) and log_det.numel() == len(x):
        log_det = log_det.reshape(len(x))
    return x.new_zeros(len(x)) + log_det


def _each_row(function, x):
    """Call with rows (n, d); those that are not finite, or that it refuses, give NaN.

    Libraries refuse a whole batch where one value is outside of a spline's domain.
    """
    fine = x.isfinite().all(1)
    outputs = _in_halves(function, torch.where(fine[:, None], x, 0.0))
    return tuple(
        torch.where(fine.reshape(-1, *[1] * (out.ndim - 1)), out, torch.nan) for out in outputs
    )


def _in_halves(function, x):
    try:
        return function(x)
    except (AssertionError, ValueError) as error:
        # The errors of two or more rows together are those of the flow.
        if len(x) == 1 or _is_missing(error):
            raise
    half = len(x) // 2
    parts, refused = [], []
    for rows in (x[:half], x[half:]):
        try:
            parts.append(_in_halves(function, rows))
        except (AssertionError, ValueError) as error:
            parts.append(None)
            refused.append(error)
    if len(refused) == 2:
        raise refused[0]
    for k, rows in enumerate((x[:half], x[half:])):
        if parts[k] is None:
            parts[k] = tuple(
                torch.full_like(other[:1], torch.nan).expand(len(rows), *other.shape[1:])
                for other in parts[1 - k]
            )
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
