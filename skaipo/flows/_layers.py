"""Invertible layers.

Every layer maps ``forward(x) -> (y, log_det)`` and ``inverse(y) -> (x, log_det)``; each ``log_det``
is that of the direction taken and broadcasts against ``(n,)``. Scales are bounded away from zero
and infinity, so that no inverse divides by a scale that can vanish.
"""

import torch
from torch import nn
from torch.nn import functional as F

from skaipo._validation import checksum

__all__ = ["ActNorm", "AffineCoupling", "InvertibleLinear", "MaskedCoupling", "Split", "Squeeze"]

# |log scale| of the layers with free scales: e^7 is about 1100.
_MAX_LOG_SCALE = 7.0


def bounded(raw, bound):
    """Smoothly limit ``raw`` to (-bound, bound), with slope one at zero."""
    return bound * torch.tanh(raw / bound)


def _per_row(values):
    return values.flatten(1).sum(1)


class Squeeze(nn.Module):
    """Space to depth: ``(n, C, H, W) -> (n, 4 C, H / 2, W / 2)`` (Dinh et al., 2017)."""

    def forward(self, x):
        return F.pixel_unshuffle(x, 2), x.new_zeros(())

    def inverse(self, y):
        return F.pixel_shuffle(y, 2), y.new_zeros(())


class ActNorm(nn.Module):
    """Affine map per channel, ``y = (x + bias) * exp(log_scale)`` (Kingma & Dhariwal, 2018).

    It never looks at data by itself: :meth:`initialize` is called by the training loop only.

    Parameters
    ----------
    channels : int
    """

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def _terms(self, x):
        log_scale = self.log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)
        shape = (-1,) + (1,) * (x.ndim - 2)
        positions = x[0, 0].numel()
        return self.bias.view(shape), log_scale.view(shape), positions * log_scale.sum()

    @torch.no_grad()
    def initialize(self, x):
        """Set scale and bias so that the batch ``x`` leaves with zero mean and unit variance."""
        dims = [0, *range(2, x.ndim)]
        std = x.std(dims, correction=0).clamp_min(torch.finfo(x.dtype).tiny)
        self.bias.copy_(-x.mean(dims))
        # Constant channels (image borders) would ask for an infinite scale.
        self.log_scale.copy_((-std.log()).clamp(-_MAX_LOG_SCALE / 2, _MAX_LOG_SCALE / 2))

    @torch.no_grad()
    def affine(self):
        """Matrix, bias and log-determinant per position, in float64 on the CPU."""
        log_scale = self.log_scale.cpu().double().clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)
        scale = log_scale.exp()
        return scale.diag(), self.bias.cpu().double() * scale, log_scale.sum()

    def forward(self, x):
        bias, log_scale, log_det = self._terms(x)
        return (x + bias) * log_scale.exp(), log_det

    def inverse(self, y):
        bias, log_scale, log_det = self._terms(y)
        return y * (-log_scale).exp() - bias, -log_det


class InvertibleLinear(nn.Module):
    """Invertible 1x1 convolution, or a dense layer for vectors, in LU form.

    ``W = P L (U + diag(sign * exp(log_diagonal)))`` with a fixed permutation ``P``, initialised at
    a random rotation (Kingma & Dhariwal, 2018, section 3.2). The log-determinant is a sum, and the
    inverse is two triangular solves, done once in float64 and cached until a parameter changes.

    Parameters
    ----------
    channels : int
    """

    def __init__(self, channels):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        dtype = torch.get_default_dtype()
        self.register_buffer("permutation", permutation.to(dtype))
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))
        self._cache = None

    def __getstate__(self):
        return {**self.__dict__, "_cache": None}

    def _factors(self):
        lower = self.lower.tril(-1) + torch.eye(
            len(self.lower), dtype=self.lower.dtype, device=self.lower.device
        )
        log_diagonal = self.log_diagonal.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)
        upper = self.upper.triu(1) + torch.diag(self.sign * log_diagonal.exp())
        return lower, upper, log_diagonal.sum()

    def _frozen(self):
        """Weight, inverse and log-determinant per position, cached while the parameters stand."""
        tensors = (self.lower, self.upper, self.log_diagonal, self.sign, self.permutation)
        key = self.lower.dtype, self.lower.device, checksum(*tensors)
        if self._cache is None or self._cache[0] != key:
            # A tensor born in inference mode could never take part in autograd later.
            with torch.inference_mode(False), torch.no_grad():
                lower, upper, log_det = self._factors()
                lower, upper, permutation = (
                    lower.double(),
                    upper.double(),
                    self.permutation.double(),
                )
                weight = permutation @ lower @ upper
                half = torch.linalg.solve_triangular(
                    lower, permutation.T, upper=False, unitriangular=True
                )
                inverse = torch.linalg.solve_triangular(upper, half, upper=True)
                dtype = self.lower.dtype
                self._cache = (key, weight.to(dtype), inverse.to(dtype), log_det)
        return self._cache[1:]

    @torch.no_grad()
    def affine(self):
        """Matrix, bias and log-determinant per position, in float64 on the CPU."""
        lower, upper, log_det = (t.cpu().double() for t in self._factors())
        weight = self.permutation.cpu().double() @ lower @ upper
        return weight, weight.new_zeros(len(weight)), log_det

    def _terms(self, inverse):
        if torch.is_grad_enabled() and self.lower.requires_grad:
            lower, upper, log_det = self._factors()
            if not inverse:
                return self.permutation @ lower @ upper, log_det
            half = torch.linalg.solve_triangular(
                lower, self.permutation.T, upper=False, unitriangular=True
            )
            return torch.linalg.solve_triangular(upper, half, upper=True), -log_det
        weight, weight_inverse, log_det = self._frozen()
        return (weight_inverse, -log_det) if inverse else (weight, log_det)

    def _apply_weight(self, x, weight):
        if x.ndim == 2:
            return x @ weight.T
        return F.conv2d(x, weight[:, :, None, None])

    def forward(self, x):
        weight, log_det = self._terms(inverse=False)
        return self._apply_weight(x, weight), log_det * x[0, 0].numel()

    def inverse(self, y):
        weight, log_det = self._terms(inverse=True)
        return self._apply_weight(y, weight), log_det * y[0, 0].numel()


class AffineCoupling(nn.Module):
    """Affine coupling over two groups of channels (Dinh et al., 2017, eq. 4-5).

    One group passes unchanged and conditions the other:
    ``y_b = x_b * exp(s(x_a)) + t(x_a)``, ``|s| < bound``.

    Parameters
    ----------
    net : torch.nn.Module
        Maps group ``a`` to ``2 * (size of b)`` channels.
    sizes : tuple of int
        Channels of the first and of the second group.
    swap : bool, default=False
        False: the first group conditions the second. True: the other way round.
    bound : float, default=2
        Largest absolute log-scale.
    """

    def __init__(self, net, sizes, swap=False, bound=2.0):
        super().__init__()
        self.net = net
        self.sizes = tuple(sizes)
        self.swap = swap
        self.bound = bound

    def _halves(self, x):
        first, second = x.split(self.sizes, dim=1)
        return (second, first) if self.swap else (first, second)

    def _join(self, a, b):
        return torch.cat((b, a) if self.swap else (a, b), dim=1)

    def _scale_shift(self, a):
        raw, shift = self.net(a).chunk(2, dim=1)
        return bounded(raw, self.bound), shift

    def forward(self, x):
        a, b = self._halves(x)
        log_scale, shift = self._scale_shift(a)
        return self._join(a, torch.addcmul(shift, b, log_scale.exp())), _per_row(log_scale)

    def inverse(self, y):
        a, b = self._halves(y)
        log_scale, shift = self._scale_shift(a)
        return self._join(a, (b - shift) * (-log_scale).exp()), -_per_row(log_scale)


class MaskedCoupling(nn.Module):
    """Affine coupling over a fixed binary mask, such as a checkerboard (Dinh et al., 2017, eq. 9).

    Parameters
    ----------
    net : torch.nn.Module
        Maps ``(n, C, ...)`` to ``(n, 2 C, ...)``.
    mask : torch.Tensor
        One where an entry passes unchanged and conditions the rest; shape of one event.
    bound : float, default=2
        Largest absolute log-scale.
    """

    def __init__(self, net, mask, bound=2.0):
        super().__init__()
        self.net = net
        self.bound = bound
        self.register_buffer("mask", mask.to(torch.get_default_dtype()), persistent=False)

    def _scale_shift(self, x):
        raw, shift = self.net(x * self.mask).chunk(2, dim=1)
        rest = 1.0 - self.mask
        return bounded(raw, self.bound) * rest, shift * rest

    def forward(self, x):
        log_scale, shift = self._scale_shift(x)
        return torch.addcmul(shift, x, log_scale.exp()), _per_row(log_scale)

    def inverse(self, y):
        log_scale, shift = self._scale_shift(y)
        return (y - shift) * (-log_scale).exp(), -_per_row(log_scale)


class Split(nn.Module):
    """Factor out the second group of channels with a learned Gaussian prior.

    ``z = (x_b - m(x_a)) * exp(-s(x_a))`` is standard normal under the model (Dinh et al., 2017,
    section 3.6; learned prior as in Kingma & Dhariwal, 2018).

    Parameters
    ----------
    net : torch.nn.Module
        Maps the kept group to ``2 * (size of the other)`` channels.
    sizes : tuple of int
        Channels that stay and channels that leave.
    bound : float, default=3
        Largest absolute log-scale.
    """

    def __init__(self, net, sizes, bound=3.0):
        super().__init__()
        self.net = net
        self.sizes = tuple(sizes)
        self.bound = bound

    def _scale_shift(self, kept):
        raw, mean = self.net(kept).chunk(2, dim=1)
        return bounded(raw, self.bound), mean

    def forward(self, x):
        kept, rest = x.split(self.sizes, dim=1)
        log_scale, mean = self._scale_shift(kept)
        return kept, (rest - mean) * (-log_scale).exp(), -_per_row(log_scale)

    def inverse(self, kept, z):
        log_scale, mean = self._scale_shift(kept)
        return torch.cat((kept, torch.addcmul(mean, z, log_scale.exp())), dim=1), _per_row(
            log_scale
        )
