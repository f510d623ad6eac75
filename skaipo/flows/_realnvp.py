"""RealNVP: affine couplings with checkerboard and channel masks (Dinh et al., 2017)."""

import torch
from torch import nn

from skaipo.flows._base import MultiscaleFlow
from skaipo.flows._glow import default_levels
from skaipo.flows._layers import ActNorm, AffineCoupling, MaskedCoupling, Split, Squeeze
from skaipo.flows._nets import conv_net, mlp

__all__ = ["RealNVP"]


class RealNVP(MultiscaleFlow):
    """RealNVP for images ``(C, H, W)`` and for vectors ``(d,)``, with ActNorm as its normalisation.

    At each level of an image half of the couplings use alternating checkerboard masks; then the
    image is squeezed and the other half use alternating halves of the channels. Vectors use
    alternating even and odd features.

    Parameters
    ----------
    event_shape : tuple of int
        Sides of images must be multiples of ``2**n_levels``.
    n_steps : int, default=8
        Couplings per level.
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
    Dinh, L., Sohl-Dickstein, J. and Bengio, S., "Density estimation using Real NVP", ICLR 2017.
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
        shape = self.event_shape
        for level in range(self.n_levels):
            masked_steps = n_steps // 2 if image else n_steps
            layers = []
            for step in range(masked_steps):
                mask = _checkerboard(shape, step % 2)
                conditioner = net(shape[0], hidden_channels, 2 * shape[0], dropout)
                layers += [ActNorm(shape[0]), MaskedCoupling(conditioner, mask, bound)]
            if image:
                layers.append(Squeeze())
                shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
            sizes = (shape[0] - shape[0] // 2, shape[0] // 2)
            for step in range(n_steps - masked_steps):
                source, target = sizes[:: -1 if step % 2 else 1]
                conditioner = net(source, hidden_channels, 2 * target, dropout)
                layers += [
                    ActNorm(shape[0]),
                    AffineCoupling(conditioner, sizes, swap=bool(step % 2), bound=bound),
                ]
            self.levels.append(nn.ModuleList(layers))
            if level < self.n_levels - 1:
                self.splits.append(
                    Split(net(sizes[0], hidden_channels, 2 * sizes[1], dropout), sizes)
                )
                shape = (sizes[0], *shape[1:])
        self.levels[-1].append(ActNorm(shape[0]))

    def config(self):
        return {"class": "RealNVP", "event_shape": list(self.event_shape), **self._options}


def _checkerboard(shape, parity):
    """Ones where row + column (or the feature's index) has the given parity."""
    if len(shape) == 1:
        return (torch.arange(shape[0]) % 2 == parity).to(torch.get_default_dtype())
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])
    return ((rows + columns) % 2 == parity).to(torch.get_default_dtype()).expand(shape).clone()
