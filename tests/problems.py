"""Small random problems for the tests of the optimisation; the answers of some are known."""

from itertools import combinations, product

import numpy as np
import torch

from skaipo import GaussianPrior
from skaipo.flows import Flow, Glow, RealNVP
from skaipo.noise import as_noise
from skaipo.objective import MAPObjective
from skaipo.operators import CompressedSensing, Denoising, Inpainting, as_operator


def random_flow(
    architecture=RealNVP, event_shape=(6,), dtype=torch.float64, seed=0, noise=0.2, smooth=False
):
    """A small flow with noise on every parameter: at its initialisation it is the identity.

    With ``smooth`` its networks have no kinks: minima are then stationary points.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        n_levels = 1 if len(event_shape) == 1 else 2
        flow = architecture(
            event_shape, n_steps=3, n_levels=n_levels, hidden_channels=8, loc=0.7, scale=2.0
        ).to(dtype)
        with torch.no_grad():
            for name, parameter in flow.named_parameters():
                # Less on LU factors, so that the matrices stay well conditioned.
                is_lu = name.rpartition(".")[2] in ("lower", "upper", "log_diagonal")
                parameter.add_((0.05 if is_lu else noise) * torch.randn_like(parameter))
        for module in flow.modules() if smooth else ():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(module, name, torch.nn.Tanh())
    return flow.eval().requires_grad_(False)


def gaussian_prior(d=6, seed=0):
    """A correlated normal distribution with a mean that is not zero."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return GaussianPrior(rng.normal(size=d), axes * np.linspace(0.5, 2.0, d) @ axes.T)


def any_flow(name):
    """A flow by the name that a parametrised test shows."""
    return {
        "gaussian": lambda: gaussian_prior().flow_,
        "realnvp": lambda: random_flow(RealNVP, (6,)),
        "glow": lambda: random_flow(Glow, (1, 4, 4)),
    }[name]()


def any_operator(name, d):
    """An operator by name, for images of ``d`` pixels; "wide" measures half as often."""
    return {
        "denoising": lambda: Denoising(),
        "inpainting": lambda: Inpainting(np.arange(d) % 3 != 1),
        "compressed": lambda: CompressedSensing(d // 2, random_state=3),
    }[name]()


def make_objective(flow, op, noise, y, space="image", penalty="density"):
    """What the estimators build from a prior, an operator, a noise model and a batch."""
    op = as_operator(op).bind(flow.event_shape)
    y = torch.as_tensor(y, dtype=flow.loc.dtype)
    return MAPObjective(flow, op, as_noise(noise).bind(op.n_measurements_), y, space, penalty)


def drop_entries(Y, seed=0, share=0.2):
    """A copy of ``Y`` with NaN at random, at least one measurement left in every row."""
    rng = np.random.default_rng(seed)
    Y = np.array(Y, dtype=np.float64)
    missing = rng.random(Y.shape) < share
    missing[np.arange(len(Y)), rng.integers(Y.shape[1], size=len(Y))] = False
    Y[missing] = np.nan
    return Y


class Cliff(Flow):
    """Standard normal up to ``radius``, and not a number beyond it."""

    def __init__(self, d, radius):
        super().__init__((d,))
        self.double()
        self.radius = radius

    def _broken(self, x):
        return torch.where(x.norm(dim=1, keepdim=True) > self.radius, torch.nan, x)

    def _normalize(self, x):
        return self._broken(x), x.new_zeros(len(x))

    def _generate(self, z):
        return self._broken(z), z.new_zeros(len(z))


def covering(*axes, only=lambda *values: True):
    """Tuples of one value of each axis, such that every pair of values of two axes meets in one.

    What goes wrong goes wrong for one value or for two together far more often than for three, and
    the tuples are a fraction of the product. (Greedy, and the same every time.) ``only`` says of
    which tuples there is a choice; pairs that are in none of them do not meet.
    """
    rows = [
        row
        for row in product(*(range(len(axis)) for axis in axes))
        if only(*(axis[i] for axis, i in zip(map(list, axes), row, strict=True)))
    ]
    pairs = {row: frozenset(combinations(enumerate(row), 2)) for row in rows}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(rows, key=lambda row: len(pairs[row] & left))
        left -= pairs[best]
        chosen.append(best)
    values = [list(axis) for axis in axes]
    return [tuple(axis[i] for axis, i in zip(values, row, strict=True)) for row in sorted(chosen)]
