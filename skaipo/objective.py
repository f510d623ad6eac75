"""The MAP objective: value and gradient per row, data term and prior term kept apart."""

import math
import numbers
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

from skaipo._padding import padded
from skaipo._validation import to_tensor
from skaipo.flows._base import log_normal

__all__ = ["Evaluation", "MAPObjective"]

PENALTIES = ("density", "latent")
SPACES = ("image", "latent")


def check_choice(name, value, choices):
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def check_smoothing(smoothing, space, penalty):
    """Raise a ValueError unless the density can be smoothed that much, in that space."""
    is_number = isinstance(smoothing, numbers.Real) and not isinstance(smoothing, bool)
    if not (is_number and 0 <= smoothing < math.inf):
        raise ValueError(
            f"smoothing must be a finite number >= 0, in the units of the images, got "
            f"{smoothing!r}."
        )
    if smoothing and (space, penalty) != ("image", "density"):
        raise ValueError(
            f"smoothing={smoothing:g} averages the density over images near x: it needs "
            f"space='image' and penalty='density', got space={space!r} and penalty={penalty!r}. "
            f"Change these, or set smoothing=0."
        )
    return float(smoothing)


@lru_cache(maxsize=32)
def _standard_normal(draw, d):
    """A fixed sequence of vectors (d,), float64."""
    return np.random.default_rng((draw, d)).standard_normal(d)


@dataclass
class Evaluation:
    """What one evaluation of the objective gives, per row.

    Attributes
    ----------
    x : torch.Tensor of shape (n, d)
        The image.
    data, prior : torch.Tensor of shape (n,)
        ``nll(y, f(x))`` and the penalty; the objective is ``data + lam * prior``.
    log_prob : torch.Tensor of shape (n,)
        ``log p_G(x)``, whatever the penalty.
    grad_data, grad_prior : torch.Tensor of shape (n, d)
        Gradients of the two terms with respect to the variable.
    """

    x: torch.Tensor
    data: torch.Tensor
    prior: torch.Tensor
    log_prob: torch.Tensor
    grad_data: torch.Tensor
    grad_prior: torch.Tensor

    def value(self, lam):
        """Objective at ``lam`` (n,), shape (n,)."""
        return self.data + lam * self.prior

    def gradient(self, lam):
        """Gradient of the objective at ``lam`` (n,), shape (n, d)."""
        return torch.addcmul(self.grad_data, lam[:, None], self.grad_prior)

    def relative_gradient(self, lam):
        """Norm of the gradient over the sum of the norms of its two terms, in [0, 1].

        At a minimiser the two terms cancel, so that the quotient measures how well they do,
        whatever the units of the objective and of the variable. Exactly zero gradients give 0.
        """
        prior = lam[:, None] * self.grad_prior
        # In units of the largest entry: squares of large and small ones over- and underflow, and
        # a gradient must not pass for zero, nor its scale for infinite.
        unit = torch.maximum(self.grad_data.abs().amax(1), prior.abs().amax(1))
        unit = torch.where(unit > 0, unit, 1.0)[:, None]
        scale = (self.grad_data / unit).norm(dim=1) + (prior / unit).norm(dim=1)
        norm = (self.gradient(lam) / unit).norm(dim=1)
        return torch.where(norm == 0, norm, norm / scale)

    def rounding(self, lam, eps, ulps=64):
        """How much of a difference in the objective may be rounding, shape (n,).

        ``eps`` is the relative rounding of the terms; see :attr:`MAPObjective.eps`.
        """
        return ulps * eps * (self.data.abs() + (lam * self.prior).abs())

    def finite(self, lam=None):
        """Rows whose terms and gradients are all finite, shape (n,).

        With ``lam`` (n,) also their sums, and the squared norms, without which no method can tell
        how long a step is.
        """
        ok = self.data.isfinite() & self.prior.isfinite() & self.x.isfinite().all(1)
        ok &= self.grad_data.isfinite().all(1) & self.grad_prior.isfinite().all(1)
        if lam is not None:
            ok &= self.value(lam).isfinite() & self.gradient(lam).square().sum(1).isfinite()
        return ok

    def rows(self, index):
        """The evaluation restricted to some rows."""
        return Evaluation(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def replace(self, index, other):
        """A copy with the rows of ``index`` taken from ``other``, in order."""
        out = {f.name: getattr(self, f.name).clone() for f in fields(self)}
        for name, value in out.items():
            value[index] = getattr(other, name)
        return Evaluation(**out)

    def where(self, mask, other):
        """Rows of ``other`` where ``mask`` is true, of this evaluation elsewhere."""
        out = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            chosen = mask[:, None] if mine.ndim == 2 else mask
            out[f.name] = torch.where(chosen, theirs, mine)
        return Evaluation(**out)


class MAPObjective:
    """``nll(y, f(x)) + lam * penalty`` for a batch of measurements, row by row.

    Parameters
    ----------
    flow : Flow
        The prior's flow, frozen.
    op : Operator
        Bound to the flow's event shape.
    noise : NoiseModel
        Bound to the operator's number of measurements.
    y : torch.Tensor of shape (n, m)
        Measurements; NaN where nothing was measured.
    space : {"image", "latent"}, default="image"
        The variable: the image ``x`` itself, or ``z`` with ``x = G(z)``.
    penalty : {"density", "latent"}, default="density"
        ``-log p_G(x)``, the MAP of Liu et al. (2023), the same function in both spaces; or
        ``||z||^2 / 2``, the surrogate of Asim et al. (2020), whose minimiser is another one.
    params : torch.Tensor of shape (n, ...), default=None
        What the operator takes per row.
    smoothing : float, default=0.0
        Above zero the penalty is ``-E log p_G(x + smoothing * u)`` with standard normal ``u``, of
        which every evaluation sees one ``u``: unbiased, and exact no more. A row's ``u`` follows
        from how many evaluations it has had, each followed by its negative. Only for the density,
        in image space.
    rough_only : bool, default=False
        Smooth only where :meth:`evaluate` is told to, as solvers do in rows that turn out to be too
        rough for their gradients.

    Attributes
    ----------
    n_evals : torch.Tensor of shape (n,)
        Flow evaluations so far: passes through the flow with a gradient, and two kinds without:
        from an image to the latent where a search in latent space begins (:meth:`variable`), and
        from the latent to the image where one in image space begins, at zero or at random (counted
        by who chooses the start). :meth:`image` and :meth:`centre` by themselves do not count.
    observed : torch.Tensor of shape (n, m), bool
        Which measurements exist.
    """

    def __init__(
        self,
        flow,
        op,
        noise,
        y,
        space="image",
        penalty="density",
        params=None,
        smoothing=0.0,
        rough_only=False,
    ):
        self.flow = flow
        self._evaluator = flow.compile_for_inference()
        self.op = op
        self.params = params
        self.noise = noise
        self.space = check_choice("space", space, SPACES)
        self.penalty = check_choice("penalty", penalty, PENALTIES)
        self.observed = op.given(params).measured(y) & ~y.isnan()
        self.y = torch.where(self.observed, y, 0.0)
        self.n_evals = torch.zeros(len(y), dtype=torch.long, device=y.device)
        self._metric = None
        self.smoothing = check_smoothing(smoothing, space, penalty)
        self.rough_only = rough_only

    @property
    def smooths_all(self):
        """Whether all evaluations see the density averaged."""
        return self.smoothing > 0 and not self.rough_only

    @property
    def smooths_rough(self):
        """Whether those evaluations do that are told to."""
        return self.smoothing > 0 and self.rough_only

    @property
    def metric(self):
        """Approximate curvature in image space (:class:`GaussianMetric`), or None."""
        return self._metric if self.space == "image" else None

    @metric.setter
    def metric(self, metric):
        self._metric = metric

    @property
    def eps(self):
        """Relative rounding of its terms: an operator may compute in less than the flow's dtype."""
        return max(torch.finfo(self.y.dtype).eps, torch.finfo(self.op.precision_).eps)

    def __len__(self):
        return len(self.y)

    def in_space(self, space, penalty=None):
        """The same measurements and counters, with another variable or penalty."""
        other = object.__new__(MAPObjective)
        other.__dict__.update(self.__dict__)
        other.space = check_choice("space", space, SPACES)
        other.penalty = check_choice("penalty", penalty or self.penalty, PENALTIES)
        if (other.space, other.penalty) != ("image", "density"):
            other.smoothing = 0.0
        return other

    def exactly(self):
        """The same measurements and counters, without smoothing."""
        other = self.in_space(self.space)
        other.smoothing = 0.0
        return other

    def select(self, rows, *, space=None, penalty=None):
        """The objective of some rows alone, with counters of its own."""
        other = self.in_space(space or self.space, penalty)
        other._metric = None  # it belongs to all rows
        for name in ("y", "observed", "n_evals"):
            setattr(other, name, getattr(self, name)[rows])
        if self.params is not None:
            other.params = self.params[rows]
        return other

    def operator(self, rows):
        """The operator for some rows (k,); the same for all where it takes no parameters."""
        return self.op.given(None if self.params is None else self.params[rows])

    @property
    def n_features(self):
        """Dimension of the image and of the latent space."""
        return self.flow.n_features

    def scale(self):
        """Typical size of one entry of the variable: 1 in latent space, pixels in image space."""
        return 1.0 if self.space == "latent" else self.flow.data_scale()

    def variable(self, x):
        """The variable of this objective at the image ``x`` of shape (n, d); counts if it flows."""
        if self.space == "image":
            return x
        self.n_evals += 1
        return self._evaluator.forward(x)[0]

    def image(self, u):
        """The image at the variable ``u``."""
        if self.space == "image":
            return u
        return self._evaluator.inverse(u)[0]

    def centre(self):
        """An image to begin with that knows nothing of the measurements, for all rows (n, d)."""
        if not self.flow.has_inverse:
            return self.flow.centre().expand(len(self), -1)
        return self.in_space("latent").image(self.y.new_zeros(len(self), self.n_features))

    def evaluate(self, u, rows=None, smoothed=None):
        """Values and gradients of both terms.

        Parameters
        ----------
        u : torch.Tensor of shape (k, d)
        rows : torch.Tensor of shape (k,), default=None
            Which measurements the rows of ``u`` belong to; default: all, in order.
        smoothed : torch.Tensor of shape (k,), bool, default=None
            In which rows the density is averaged over ``smoothing``; default: in all, or with
            ``rough_only`` in none.

        Returns
        -------
        evaluation : Evaluation
            Rows that overflow hold non-finite numbers and do not touch the others.
        """
        if rows is None:
            rows = torch.arange(len(self), device=u.device)
        self.n_evals[rows] += 1
        if self.space == "latent":
            return Evaluation(*self._latent_terms(u.detach(), rows))
        if smoothed is None:
            smoothed = torch.full_like(rows, not self.rough_only, dtype=torch.bool)
        return Evaluation(*self._image_terms(u.detach(), rows, smoothed))

    def _data_terms(self, x, rows):
        """The data term and its gradient with respect to the image."""

        def terms(x, y, observed, rows):
            with torch.enable_grad():
                x = x.requires_grad_()
                data = self.noise.nll(self.operator(rows).forward(x), y, observed)
                (gradient,) = torch.autograd.grad(data.sum(), x)
            return data.detach(), gradient

        return padded(terms, x.clone(), self.y[rows], self.observed[rows], rows)

    def misfit(self, x, rows):
        """The data term at images (k, d) alone, (k,): no flow is evaluated."""
        return self._data_terms(x, rows)[0]

    def _nearby(self, x, rows, smoothed):
        """The images at which the density is looked at, in place of ``x``."""
        if self.smoothing == 0 or not smoothed.any():
            return x
        nth = self.n_evals[rows] - 1
        sign = 1 - 2 * (nth % 2)
        moved = x.clone()
        # (Rows that are solved together mostly have had equally many.)
        for pair in (nth // 2)[smoothed].unique().tolist():
            here = smoothed & (nth // 2 == pair)
            u = to_tensor(_standard_normal(pair, x.shape[1])).to(x)
            moved[here] += self.smoothing * sign[here, None].to(x) * u
        return moved

    def _image_terms(self, x, rows, smoothed):
        data, grad_data = self._data_terms(x, rows)
        z, log_det, pull = self._evaluator.linearize(self._nearby(x, rows, smoothed))
        log_prob = log_det + log_normal(z)
        density = self.penalty == "density"
        penalty = -log_prob if density else 0.5 * z.square().sum(1)
        (grad_prior,) = pull((z, -1.0 if density else 0.0))
        return x, data, penalty, log_prob, grad_data, grad_prior

    def _latent_terms(self, z, rows):
        x, log_det, pull = self._evaluator.linearize_inverse(z)
        data, grad_x = self._data_terms(x, rows)
        log_prob = log_normal(z) - log_det
        if self.penalty == "latent":
            (grad_data,) = pull((grad_x, 0.0))
            return x, data, 0.5 * z.square().sum(1), log_prob, grad_data, z
        grad_data, grad_log_det = pull((grad_x, 0.0), (None, 1.0))
        return x, data, -log_prob, log_prob, grad_data, z + grad_log_det
