"""Glow: ActNorm, invertible 1x1 convolution and affine coupling (Kingma & Dhariwal, 2018)."""

from torch import nn

from skaipo.flows._base import MultiscaleFlow
from skaipo.flows._layers import ActNorm, AffineCoupling, InvertibleLinear, Split, Squeeze
from skaipo.flows._nets import conv_net, mlp

__all__ = ["Glow"]


class Glow(MultiscaleFlow):
    """Glow for images ``(C, H, W)`` and, with dense layers, for vectors ``(d,)``.

    Parameters
    ----------
    event_shape : tuple of int
        Sides of images must be multiples of ``2**n_levels``.
    n_steps : int, default=8
        Steps of flow (ActNorm, 1x1 convolution, coupling) per level.
    n_levels : int, default=None
        Scales. Default: 3 for images as far as their sides allow, 1 for vectors.
    hidden_channels : int, default=64
        Width of the coupling networks.
    bound : float, default=2
        Largest absolute log-scale of a coupling.
    dropout : float, default=0
        Dropout in the coupling networks while training.
    loc, scale : float, default=0, 1
        Standardisation of the data; set by ``FlowPrior.fit``.

    References
    ----------
    Kingma, D. P. and Dhariwal, P., "Glow: Generative Flow with Invertible 1x1 Convolutions",
    NeurIPS 2018.
    """

    def __init__(
        self,
        event_shape,
        n_steps=8,
        n_levels=None,
        hidden_channels=64,
        bound=2.0,
        dropout=0.0,
        loc=0.0,
        scale=1.0,
    ):
        super().__init__(event_shape, default_levels(event_shape, n_levels), loc, scale)
        self._options = dict(
            n_steps=int(n_steps),
            n_levels=self.n_levels,
            hidden_channels=int(hidden_channels),
            bound=float(bound),
            dropout=float(dropout),
        )
        image = len(self.event_shape) == 3
        net = conv_net if image else mlp
        channels = self.event_shape[0]
        for level in range(self.n_levels):
            layers = []
            if image:
                layers.append(Squeeze())
                channels *= 4
            sizes = (channels - channels // 2, channels // 2)
            for _ in range(n_steps):
                conditioner = net(sizes[0], hidden_channels, 2 * sizes[1], dropout)
                layers += [
                    ActNorm(channels),
                    InvertibleLinear(channels),
                    AffineCoupling(conditioner, sizes, bound=bound),
                ]
            self.levels.append(nn.ModuleList(layers))
            if level < self.n_levels - 1:
                self.splits.append(
                    Split(net(sizes[0], hidden_channels, 2 * sizes[1], dropout), sizes)
                )
                channels = sizes[0]
        # A last affine map per channel: a learned diagonal Gaussian for the coarsest latents.
        self.levels[-1].append(ActNorm(channels))

    def config(self):
        return {"class": "Glow", "event_shape": list(self.event_shape), **self._options}


def default_levels(event_shape, n_levels):
    """Three levels for images, as far as the sides can be halved; one for vectors."""
    if n_levels is not None:
        return n_levels
    if len(event_shape) != 3:
        return 1
    levels = 1
    while (
        levels < 3 and event_shape[1] % 2 ** (levels + 1) == event_shape[2] % 2 ** (levels + 1) == 0
    ):
        levels += 1
    return levels
