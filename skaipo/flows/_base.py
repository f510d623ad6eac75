"""The flow interface and the multi-scale architecture that the package's flows share."""

import copy
import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from skaipo._validation import checksum, to_numpy
from skaipo.flows._frozen import (
    FrozenEvaluator,
    ReferenceEvaluator,
    UnknownLayerError,
    kernels,
)

__all__ = ["Flow", "MultiscaleFlow", "bulk", "log_normal", "without_outliers"]


def log_normal(z):
    """``log N(z; 0, I)`` of rows (n, d), in nats."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def without_outliers(x):
    """Samples (n, d) of a flow, but for those far outside the rest.

    The few wild ones of an imperfect flow would otherwise be all of a variance, and the first of
    the principal components. (Few: by the median a second mode would be wild, too.)
    """
    size = (x - x.median(0).values).norm(dim=1)
    return x[size <= 3 * size.quantile(0.9)]


def bulk(x):
    """Between which values the bulk of an array lies, wild ones left out; (0, 0) of nothing."""
    x = x[np.isfinite(x)]
    low, high = np.quantile(x.astype(float), (0.05, 0.95)) if len(x) else (0.0, 0.0)
    return float(low), float(high)


class Flow(nn.Module):
    """A normalizing flow with a standard normal base: the interface of every prior's density.

    Subclasses implement ``_normalize(x) -> (z, log_det)`` and ``_generate(z) -> (x, log_det)`` on
    standardised data ``(x - loc) / scale`` of shape ``(n, *event_shape)``, each with the
    log-determinant of its own direction; the Jacobian of the standardisation is accounted for
    here, so that ``log_prob`` is a density in the units of ``x``. A flow that cannot generate sets
    ``has_inverse = False`` and leaves ``_generate`` out: it has a density, and takes what others
    learn from their samples from clean data (:meth:`with_clean_data`).

    Parameters
    ----------
    event_shape : tuple of int
        ``(d,)`` or ``(C, H, W)``.
    loc, scale : float, default=0, 1
        Standardisation of the data, set by training.

    Attributes
    ----------
    event_shape : tuple of int
    n_features : int
        Number of entries of one event, which is also the dimension of ``z``.
    has_inverse : bool
        Whether data can be generated from latents.
    clean : torch.Tensor of shape (k, d), or None
        Clean data in place of samples; see :meth:`with_clean_data`.
    """

    has_inverse = True
    clean = None
    # Rows that are sampled at once.
    _batch = 64

    def __init__(self, event_shape, loc=0.0, scale=1.0):
        super().__init__()
        self.event_shape = tuple(int(s) for s in event_shape)
        self.n_features = math.prod(self.event_shape)
        dtype = torch.get_default_dtype()
        self.register_buffer("loc", torch.tensor(float(loc), dtype=dtype))
        self.register_buffer("scale", torch.tensor(float(scale), dtype=dtype))

    def forward(self, x):
        """Normalise data.

        Parameters
        ----------
        x : torch.Tensor of shape (n, d) or (n, *event_shape)

        Returns
        -------
        z : torch.Tensor of shape (n, d)
        log_det : torch.Tensor of shape (n,)
            ``log |det dz/dx|`` in nats.
        """
        x = x.reshape(len(x), *self.event_shape)
        z, log_det = self._normalize((x - self.loc) / self.scale)
        return z, (log_det - self.n_features * self.scale.log()).expand(len(x))

    def inverse(self, z):
        """Generate data from latents.

        Parameters
        ----------
        z : torch.Tensor of shape (n, d)

        Returns
        -------
        x : torch.Tensor of shape (n, *event_shape)
        """
        return self.inverse_and_log_det(z)[0]

    def inverse_and_log_det(self, z):
        """Generate data and the volume change in one pass.

        Parameters
        ----------
        z : torch.Tensor of shape (n, d)

        Returns
        -------
        x : torch.Tensor of shape (n, *event_shape)
        log_det : torch.Tensor of shape (n,)
            ``log |det dx/dz|`` in nats.

        Raises
        ------
        NotImplementedError
            If the flow has no such direction.
        """
        if not self.has_inverse:
            raise NotImplementedError(
                f"{type(self).__name__} has no direction from latents to data: it cannot sample or "
                f"be used in latent space. It has a density, which is enough for space='image'."
            )
        x, log_det = self._generate(z)
        log_det = log_det + self.n_features * self.scale.log()
        return x * self.scale + self.loc, log_det.expand(len(z))

    def log_prob(self, x):
        """Log-density, ``log N(z; 0, I) + log |det dz/dx|``.

        Parameters
        ----------
        x : torch.Tensor of shape (n, d) or (n, *event_shape)

        Returns
        -------
        log_prob : torch.Tensor of shape (n,)
            In nats, per unit of ``x``.
        """
        z, log_det = self(x)
        return log_det + log_normal(z)

    def compile_for_inference(self, memory="auto"):
        """Lay the flow out for evaluation with its gradient, as long as no parameter changes.

        Solvers and :class:`~skaipo.FlowPrior` call it. The flows of this package in evaluation mode
        get an evaluator with folded parameters and a written-out backward pass, all others one that
        uses autograd; both give the same results to rounding. With the environment variable
        ``SKAIPO_KERNELS=reference`` all get the latter; see :func:`~skaipo.flows.kernels`.

        Parameters
        ----------
        memory : {"auto", "store", "recompute"} or int, default="auto"
            Whether a pass back uses activations that were kept, or computes them again from the
            outputs, in about half as much time more and in memory that does not grow with the
            flow's depth. A number is a budget in bytes: activations are kept for as many rows as
            there is room for, and then for the next ones, computed again from the inputs, so that
            the results are the same bits; where there is no room for one row, from the outputs.
            "auto" is a budget of 512 MiB, on a GPU of a quarter of its memory.

        Returns
        -------
        evaluator : FrozenEvaluator or ReferenceEvaluator
            The same one until a parameter or ``memory`` is changed. (Layers that are replaced are
            not noticed: what is evaluated is a frozen flow.)
        """
        digest = self._digest()
        key = kernels(), memory, self.training, self.loc.dtype, self.loc.device, digest
        known = self.__dict__.get("_evaluator")
        if known is None or known[0] != key:
            # Tensors born in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                known = self.__dict__["_evaluator"] = key, self._evaluator_for(memory)
        return known[1]

    def _digest(self):
        return checksum(*self.parameters(), *self.buffers())

    def _known(self, name, find):
        """What is known of images like those of the prior: found once for given weights."""
        digest = self._digest()
        of, known = self.__dict__.get("_known_moments", (None, {}))
        if of == digest and name in known:
            return known[name]
        found = find()
        # (Never in place: a copy may hold the same.)
        known = {**known, name: found} if of == digest else {name: found}
        self.__dict__["_known_moments"] = digest, known
        return found

    def release_workspaces(self):
        """Let go of the memory that the evaluator keeps for its next call."""
        known = self.__dict__.get("_evaluator")
        if known is not None:
            known[1].release()

    def _evaluator_for(self, memory):
        return ReferenceEvaluator(self)

    def __getstate__(self):
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_evaluator"}

    def with_clean_data(self, x):
        """A copy, with shared parameters, that knows the moments of its data without sampling.

        Parameters
        ----------
        x : torch.Tensor of shape (n, d) or (n, *event_shape)
            Clean data. At most 1024 rows are kept, spread evenly over all.

        Returns
        -------
        flow : Flow
        """
        x = x.detach().reshape(len(x), -1).to(self.loc.dtype).cpu()
        if len(x) < 4 or not float(x.std(0).max()) > 0:
            raise ValueError(
                f"Mean and covariance of the data of {type(self).__name__} are taken from clean "
                f"data: pass at least 4 samples that differ (better some hundred), got {len(x)}."
            )
        other = copy.copy(self)
        kept = torch.linspace(0, len(x) - 1, min(len(x), 1024), dtype=torch.float64)
        other.clean = x[kept.round().long()].clone()
        other.__dict__.pop("_known_moments", None)
        return other

    def typical(self, n_samples, seed=0):
        """Images like those of the prior: clean data where there are, or samples.

        Parameters
        ----------
        n_samples : int
        seed : int, default=0

        Returns
        -------
        x : torch.Tensor of shape (n_samples, d)
            Fewer if there are fewer clean data.

        Raises
        ------
        ValueError
            If there are no clean data, and the flow cannot sample.
        """
        if self.clean is not None:
            return self.clean[:n_samples]
        if not self.has_inverse:
            raise ValueError(
                f"{type(self).__name__} has no direction from latents to data, so that the mean "
                f"and covariance of its data cannot be found by sampling. Give them by clean data: "
                f"FlowPrior(flow=flow).fit(X). (Nothing is trained.)"
            )
        generator = torch.Generator().manual_seed(seed)
        whole, rest = divmod(n_samples, self._batch)
        sizes = [self._batch] * whole + [rest] * bool(rest)
        return torch.cat([self.sample(n, generator=generator).flatten(1) for n in sizes])

    def centre(self):
        """The image where a search begins that knows nothing: G(0), or the mean of clean data.

        Returns
        -------
        x : torch.Tensor of shape (1, d)
        """
        if self.has_inverse:
            with torch.no_grad():
                return self.inverse(self.loc.new_zeros(1, self.n_features)).flatten(1)
        return self.typical(1024).mean(0, keepdim=True).to(self.loc)

    def data_scale(self):
        """Typical standard deviation of one entry of the data, by a few fixed samples.

        Solvers measure their steps in image space by it. Cached; at least the smallest normal
        number, so that it can be divided by.
        """
        return self._known("scale", self._find_scale)

    def _find_scale(self):
        x = self.typical(32 if self.clean is None else 1024)
        x = x[x.isfinite().all(1)]
        if len(x) == 0:
            return 1.0
        if self.clean is None:
            # Robust against the few wild samples that an imperfect flow may give.
            spread, factor = (x - x.median(0).values).abs().median(0).values, 1.4826
        else:
            spread, factor = x.std(0), 1.0
        return max(factor * float(spread.square().mean().sqrt()), torch.finfo(x.dtype).tiny)

    def typical_log_prob(self):
        """Median log-density of images like those of the prior, in nats, by a few fixed samples.

        Cached; NaN where none is finite.
        """
        return self._known("log_prob", self._find_log_prob)

    def _find_log_prob(self):
        with torch.inference_mode(False), torch.no_grad():
            log_prob = self.log_prob(self.typical(32).to(self.loc))
        return float(log_prob[log_prob.isfinite()].median())

    def typical_range(self):
        """Between which values images like those of the prior lie, by a few fixed samples.

        Cached.

        Returns
        -------
        low, high : float
            Quantiles of 5 and 95 % of the finite entries; (0, 0) where there are none.
        """
        return self._known("range", self._find_range)

    def _find_range(self):
        return bulk(to_numpy(self.typical(32)))

    def sample(self, n_samples=1, temperature=1.0, generator=None):
        """Draw samples.

        Parameters
        ----------
        n_samples : int, default=1
        temperature : float, default=1
            Standard deviation of the latent; below 1 gives cleaner, less varied samples.
        generator : torch.Generator, default=None

        Returns
        -------
        x : torch.Tensor of shape (n_samples, *event_shape)
        """
        # Drawn on the CPU, so that a seed gives the same samples on every device.
        z = torch.randn(n_samples, self.n_features, generator=generator, dtype=self.loc.dtype)
        with torch.no_grad():
            return self.inverse(temperature * z.to(self.loc.device))


class MultiscaleFlow(Flow):
    """Levels of invertible steps, half of the channels leaving after each level but the last.

    Subclasses fill ``self.levels`` with lists of layers and ``self.splits`` with the
    :class:`~skaipo.flows._layers.Split` that follows each of them (one fewer).
    """

    def __init__(self, event_shape, n_levels, loc=0.0, scale=1.0):
        super().__init__(event_shape, loc, scale)
        self.n_levels = _check_levels(self.event_shape, n_levels)
        self.levels = nn.ModuleList()
        self.splits = nn.ModuleList()

    def _scan(self, x, before=None):
        outputs, total = [], x.new_zeros(len(x))
        for level, layers in enumerate(self.levels):
            for layer in layers:
                if before is not None:
                    before(layer, x)
                x, log_det = layer(x)
                total = total + log_det
            if level < len(self.splits):
                x, z, log_det = self.splits[level](x)
                outputs.append(z.flatten(1))
                total = total + log_det
        outputs.append(x.flatten(1))
        return torch.cat(outputs, dim=1), total

    def _normalize(self, x):
        return self._scan(x)

    def _evaluator_for(self, memory):
        if self.training or kernels() == "reference":
            return super()._evaluator_for(memory)
        # A subclass may do anything of its own between the layers.
        whole = {"_normalize", "_generate", "_scan", "forward", "inverse_and_log_det"}
        own = type(self).__mro__
        own = own[: own.index(MultiscaleFlow)]
        if any(whole & vars(cls).keys() for cls in own):
            return super()._evaluator_for(memory)
        try:
            return FrozenEvaluator(self, memory)
        except UnknownLayerError:
            return super()._evaluator_for(memory)

    @torch.no_grad()
    def initialize(self, x):
        """Data-dependent initialisation of every ActNorm, in order. Called by training only.

        Parameters
        ----------
        x : torch.Tensor of shape (n, *event_shape)
        """

        def visit(layer, h):
            if hasattr(layer, "initialize"):
                layer.initialize(h)

        self._scan((x.reshape(-1, *self.event_shape) - self.loc) / self.scale, before=visit)

    def _generate(self, z):
        shapes = self._latent_shapes()
        parts = z.split([math.prod(s) for s in shapes], dim=1)
        parts = [p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True)]
        x, total = parts[-1], z.new_zeros(len(z))
        for level in reversed(range(len(self.levels))):
            if level < len(self.splits):
                x, log_det = self.splits[level].inverse(x, parts[level])
                total = total + log_det
            for layer in reversed(self.levels[level]):
                x, log_det = layer.inverse(x)
                total = total + log_det
        return x, total

    def _latent_shapes(self):
        """Shapes of the parts of ``z``, in the order in which they leave."""
        if len(self.event_shape) == 1:
            widths = [self.event_shape[0]] + [split.sizes[0] for split in self.splits]
            return [(a - b,) for a, b in pairwise(widths)] + [(widths[-1],)]
        channels, height, width = self.event_shape
        shapes = []
        for level in range(self.n_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            if level < len(self.splits):
                channels, leaving = self.splits[level].sizes
                shapes.append((leaving, height, width))
        return [*shapes, (channels, height, width)]


def _check_levels(event_shape, n_levels):
    if len(event_shape) not in (1, 3) or min(event_shape) < 1:
        raise ValueError(
            f"event_shape must be (d,) for vectors or (C, H, W) for images, got {event_shape}."
        )
    if int(n_levels) != n_levels or n_levels < 1:
        raise ValueError(f"n_levels must be an integer of at least 1, got {n_levels!r}.")
    n_levels = int(n_levels)
    if len(event_shape) == 1:
        if event_shape[0] < 2**n_levels:
            raise ValueError(
                f"A flow of {n_levels} levels needs at least {2**n_levels} features, got "
                f"n_features={event_shape[0]}; lower n_levels (couplings need two groups of "
                f"features)."
            )
    elif event_shape[1] % 2**n_levels or event_shape[2] % 2**n_levels:
        raise ValueError(
            f"Image sides must be multiples of 2**n_levels = {2**n_levels}, got "
            f"{event_shape[1]}x{event_shape[2]}; lower n_levels or pad the images."
        )
    return n_levels
