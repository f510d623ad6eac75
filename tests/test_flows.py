"""Flows and their layers against autograd's Jacobians, scipy's densities and their own inverses.

Everything is done at random parameters: at the zeros of the initialisation every coupling is the
identity, and all of it would pass.
"""

import copy
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.autograd.functional import jacobian
from torch.func import functional_call

from skaipo._training import train_flow
from skaipo.flows import Flow, Glow, RealNVP, build_flow
from skaipo.flows._layers import (
    ActNorm,
    AffineCoupling,
    InvertibleLinear,
    MaskedCoupling,
    Split,
    Squeeze,
    bounded,
)
from skaipo.flows._nets import conv_net, mlp

ARCHITECTURES = [RealNVP, Glow]
# Odd and even widths; non-square sides; one, two and three channels; one to three levels.
EVENTS = [
    ((2,), 1),
    ((7,), 1),
    ((9,), 2),
    ((12,), 3),
    ((1, 4, 4), 2),
    ((3, 2, 4), 1),
    ((2, 8, 4), 2),
    ((1, 8, 8), 3),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they bring at these sizes, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(module, scale=0.1, lu_scale=0.02):
    """Noise on every parameter; less on LU factors, so that the matrices stay well conditioned."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_lu = name.rpartition(".")[2] in ("lower", "upper", "log_diagonal")
            parameter.add_((lu_scale if is_lu else scale) * torch.randn_like(parameter))
    return module


def make_flow(architecture, event_shape, n_levels=None, dtype=torch.float64, noise=0.1, **options):
    options = dict(n_steps=3, hidden_channels=8, loc=0.7, scale=2.5) | options
    flow = architecture(event_shape, n_levels=n_levels, **options).to(dtype)
    return perturb(flow, noise).eval().requires_grad_(False)


def slogdet(function, point):
    """log |det| of the Jacobian of a function of one event, by autograd."""

    def of_rows(x):
        return function(x.reshape(point.shape)).flatten()

    matrix = jacobian(of_rows, point.flatten(), vectorize=True)
    return torch.linalg.slogdet(matrix).logabsdet


# ---------------------------------------------------------------------------------- layers


def checkerboard(shape):
    return torch.arange(math.prod(shape)).reshape(shape) % 2


def couplings(net, channels, shape):
    small, large = channels // 2, channels - channels // 2
    yield "affine", AffineCoupling(net(large, 8, 2 * small), (large, small))
    yield "affine swapped", AffineCoupling(net(small, 8, 2 * large), (large, small), swap=True)
    yield "masked", MaskedCoupling(net(channels, 8, 2 * channels), checkerboard(shape))


def all_layers():
    # Seeded here: the module is imported before any fixture runs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, shape, net in (("vector", (5,), mlp), ("image", (3, 4, 2), conv_net)):
            layers = [("actnorm", ActNorm(shape[0])), ("linear", InvertibleLinear(shape[0]))]
            layers += couplings(net, shape[0], shape)
            for name, layer in layers:
                yield pytest.param(perturb(layer.double(), 0.3), shape, id=f"{kind}-{name}")
    yield pytest.param(Squeeze(), (3, 4, 2), id="image-squeeze")


@pytest.fixture(params=["training", "frozen"])
def mode(request):
    """InvertibleLinear takes another way through its code where no gradient is asked for."""
    return request.param


@pytest.mark.parametrize("layer, shape", list(all_layers()))
def test_layer_log_det_is_autograds_and_inverse_inverts(layer, shape, mode):
    layer.requires_grad_(mode == "training")
    x = torch.randn(3, *shape, dtype=torch.float64)
    y, log_det = layer(x)
    log_det = log_det.expand(3)
    back, log_det_back = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det_back.expand(3), -log_det)
    for row in range(3):
        want = slogdet(lambda v: layer(v[None])[0], x[row])
        torch.testing.assert_close(log_det[row], want)

    # The inverse direction from a start of its own.
    y = torch.randn(3, *y.shape[1:], dtype=torch.float64)
    x, log_det = layer.inverse(y)
    torch.testing.assert_close(layer(x)[0], y, rtol=0, atol=1e-12)
    for row in range(3):
        want = slogdet(lambda v: layer.inverse(v[None])[0], y[row])
        torch.testing.assert_close(log_det.expand(3)[row], want)


@pytest.mark.parametrize("shape, net", [((5,), mlp), ((5, 2, 3), conv_net)])
def test_split_log_det_is_autograds_and_inverse_inverts(shape, net):
    split = perturb(Split(net(3, 8, 4), (3, 2)).double(), 0.3)
    x = torch.randn(3, *shape, dtype=torch.float64)

    def both(x):
        return torch.cat([part.flatten(1) for part in split(x)[:2]], dim=1)

    def join(v):
        kept, z = v.split([v.numel() // 5 * 3, v.numel() // 5 * 2])
        return split.inverse(kept.reshape(1, 3, *shape[1:]), z.reshape(1, 2, *shape[1:]))

    kept, z, log_det = split(x)
    back, log_det_back = split.inverse(kept, z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det)
    latent = both(x)
    for row in range(3):
        torch.testing.assert_close(log_det[row], slogdet(lambda v: both(v[None]), x[row]))
        want = slogdet(lambda v: join(v)[0], latent[row])
        torch.testing.assert_close(log_det_back[row], want)


def test_squeeze_moves_every_two_by_two_block_into_channels():
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    y, _ = Squeeze()(x)
    assert y.shape == (1, 8, 2, 3)
    for channel in range(2):
        block = x[0, channel, 2:4, 4:6].flatten()
        torch.testing.assert_close(y[0, 4 * channel : 4 * channel + 4, 1, 2], block)


@pytest.mark.parametrize("name", ["affine", "affine swapped", "masked"])
def test_coupling_passes_its_condition_unchanged(name):
    layer = perturb(dict(couplings(mlp, 5, (5,)))[name].double(), 0.3)
    x = torch.randn(4, 5, dtype=torch.float64)
    same = ((layer(x)[0] - x) == 0).all(0).tolist()
    expected = {
        "affine": [True, True, True, False, False],
        "affine swapped": [False, False, False, True, True],
        "masked": [False, True, False, True, False],
    }
    assert same == expected[name]


@pytest.mark.parametrize("name", ["affine", "affine swapped", "masked", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_weights_never_exceed_the_bound(name, dtype):
    """An unbounded exp(s) overflows at once; here both directions stay finite."""
    layers = dict(couplings(mlp, 5, (5,)), split=Split(mlp(3, 8, 4), (3, 2)))
    layer = perturb(layers[name].to(dtype), 100.0).requires_grad_(False)
    x = 10 * torch.randn(64, 5, dtype=dtype)
    *y, log_det = layer(x)
    changed = {"affine": 2, "affine swapped": 3, "masked": 3, "split": 2}[name]
    assert log_det.abs().max() <= changed * layer.bound * (1 + 1e-6)
    assert log_det.abs().max() > 0.9 * layer.bound  # the weights did reach it
    assert all(part.isfinite().all() for part in y)
    *back, log_det = layer.inverse(*y)
    assert back[0].isfinite().all() and log_det.isfinite().all()


def test_bounded_has_slope_one_at_zero_and_keeps_order():
    raw = torch.linspace(-8, 8, 41, dtype=torch.float64)
    assert (bounded(raw, 2.0).diff() > 0).all()
    small = torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    torch.testing.assert_close(bounded(small, 2.0), small)
    assert bounded(torch.tensor([1e30, torch.inf]), 2.0).tolist() == [2.0, 2.0]


# ---------------------------------------------------------------------------------- actnorm


@pytest.mark.parametrize("shape", [(200, 3), (20, 3, 4, 6)])
def test_actnorm_initialize_whitens_each_channel(shape):
    x = 5 + 3 * torch.randn(shape, dtype=torch.float64) * torch.arange(1, 4).view(
        -1, *[1] * (len(shape) - 2)
    )
    layer = ActNorm(3).double()
    layer.initialize(x)
    y = layer(x)[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3, dtype=y.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(3, dtype=y.dtype))


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_actnorm_survives_constant_channels_and_a_single_row(rows):
    x = torch.randn(rows, 3)
    x[:, 1] = 4.0
    layer = ActNorm(3)
    layer.initialize(x)
    y, log_det = layer(x)
    assert y.isfinite().all() and log_det.isfinite()
    torch.testing.assert_close(y[:, 1], torch.zeros(rows))
    torch.testing.assert_close(layer.inverse(y)[0], x)


def test_actnorm_clamps_scales_and_counts_what_it_clamped():
    layer = ActNorm(2).double().requires_grad_(False)
    layer.log_scale.copy_(torch.tensor([100.0, -100.0]))
    x = torch.randn(4, 2, dtype=torch.float64)
    y, log_det = layer(x)
    torch.testing.assert_close(layer.inverse(y)[0], x)
    torch.testing.assert_close(log_det, slogdet(lambda v: layer(v[None])[0], x[0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_initialize_looks_at_data(architecture):
    """A training-mode pass must not change anything, whatever comes first."""
    flow = perturb(architecture((2, 4, 4), n_steps=2, hidden_channels=4)).train()
    before = copy.deepcopy(flow.state_dict())
    x = 30 + 5 * torch.randn(16, 2, 4, 4)
    flow.log_prob(x).mean().backward()
    flow.inverse(torch.randn(3, 32))
    flow.sample(3)
    for key, value in flow.state_dict().items():
        assert torch.equal(value, before[key]), key

    flow.initialize(x)
    changed = {k for k, v in flow.state_dict().items() if not torch.equal(v, before[k])}
    norms = {name for name, module in flow.named_modules() if isinstance(module, ActNorm)}
    assert changed == {f"{name}.{p}" for name in norms for p in ("bias", "log_scale")}

    # In order: each layer saw what the layers before it, already initialised, made of the data.
    seen = {}
    for name, module in flow.named_modules():
        if isinstance(module, ActNorm):
            module.register_forward_hook(lambda m, i, out, n=name: seen.update({n: out[0]}))
    flow(x)
    assert set(seen) == norms
    for y in seen.values():
        y = y.transpose(0, 1).flatten(1)
        torch.testing.assert_close(y.mean(1), torch.zeros(len(y)), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(1, correction=0), torch.ones(len(y)), rtol=1e-3, atol=0)
    # The coarsest latents, 16 channels of one pixel, leave through such a layer.
    coarsest = flow(x)[0][:, -16:].detach()
    torch.testing.assert_close(coarsest.std(0, correction=0), torch.ones(16), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------- LU layer


def shift_in_place(layer):
    with torch.no_grad():
        layer.lower.add_(0.1)


def scale_diagonal(layer):
    with torch.no_grad():
        layer.log_diagonal.mul_(-1).add_(0.2)


def load_other(layer):
    layer.load_state_dict(perturb(InvertibleLinear(6).to(layer.lower.dtype)).state_dict())


def adam_step(layer):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    layer(torch.randn(5, 6, dtype=layer.lower.dtype))[0].square().sum().backward()
    optimizer.step()


def replace_data(layer):
    layer.upper.data = layer.upper.data + 0.1


@pytest.mark.parametrize(
    "change", [shift_in_place, scale_diagonal, load_other, adam_step, replace_data]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_inverse_follows_the_parameters(change, dtype):
    layer = perturb(InvertibleLinear(6).to(dtype))
    x = torch.randn(5, 6, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        first = layer(x)[0]
        layer.inverse(first)  # the cache is warm
    change(layer)
    y, log_det = layer(x)  # with gradients: computed anew from the parameters
    assert (y - first).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], y.detach(), rtol=0, atol=tolerance)
        back, log_det_back = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(log_det_back, -log_det.detach())


def test_cached_inverse_follows_the_dtype():
    layer = perturb(InvertibleLinear(6)).requires_grad_(False)
    layer.inverse(torch.randn(5, 6))
    layer.double()
    x = torch.randn(5, 6, dtype=torch.float64)
    y, log_det = layer(x)
    assert y.dtype == log_det.dtype == torch.float64
    # Precise as float64 is, not a float32 inverse that was cast.
    torch.testing.assert_close(layer.inverse(y)[0], x, rtol=0, atol=1e-12)
    layer.float()
    assert layer(x.float())[0].dtype == layer.inverse(x.float())[0].dtype == torch.float32


def test_inverse_is_solved_once_while_the_parameters_stand(monkeypatch):
    calls = []
    solve = torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda *a, **k: (calls.append(1), solve(*a, **k))[1]
    )
    layer = InvertibleLinear(6).requires_grad_(False)
    for _ in range(3):
        layer.inverse(layer(torch.randn(5, 6))[0])
    assert len(calls) == 2  # one lower and one upper triangle


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_have_a_cache_of_their_own(duplicate):
    layer = perturb(InvertibleLinear(6).double()).requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64)
    size = len(pickle.dumps(layer))
    y, _ = layer(x)
    assert len(pickle.dumps(layer)) == size  # addresses mean nothing in another process
    other = duplicate(layer)
    assert torch.equal(other(x)[0], y) and torch.equal(other.inverse(y)[0], layer.inverse(y)[0])
    shift_in_place(other)
    assert torch.equal(layer(x)[0], y)
    torch.testing.assert_close(other.inverse(other(x)[0])[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 2, 3)])
def test_gradients_reach_the_factors_in_both_directions(direction, shape):
    """Finite differences of output and log-det with respect to x and to every parameter."""
    layer = perturb(InvertibleLinear(4).double(), lu_scale=0.1)
    names = [name for name, _ in layer.named_parameters()]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return getattr(self.layer, direction)(x)

    call = Call()

    def function(x, *values):
        parameters = {f"layer.{n}": v for n, v in zip(names, values, strict=True)}
        return functional_call(call, parameters, (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *values))
    grads = torch.autograd.grad(function(x, *values)[0].square().sum(), values)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_weight_starts_as_a_rotation():
    weight = InvertibleLinear(7).double()(torch.eye(7, dtype=torch.float64))[0].detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(7).double(), rtol=0, atol=1e-6)
    other = InvertibleLinear(7).double()(torch.eye(7, dtype=torch.float64))[0].detach()
    assert (weight - other).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_mode_does_not_spoil_later_gradients(architecture):
    """What is cached there must not be a tensor that autograd refuses to save."""
    flow = make_flow(architecture, (4,))
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.inference_mode():
        flow.inverse(flow(x)[0])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    assert grad.isfinite().all() and grad.abs().min() > 0


# ---------------------------------------------------------------------------------- whole flows


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(params=EVENTS, ids=lambda e: "x".join(map(str, e[0])) + f"-L{e[1]}")
def flow(request, architecture):
    torch.manual_seed(1)
    return make_flow(architecture, *request.param)


def test_log_dets_are_autograds_and_log_prob_is_the_change_of_variables(flow):
    x = 2 * torch.randn(2, *flow.event_shape, dtype=torch.float64) + 1
    z, log_det = flow(x)
    volume = torch.stack([slogdet(lambda v: flow(v[None])[0], row) for row in x])
    torch.testing.assert_close(log_det, volume)
    base = stats.norm.logpdf(z.numpy()).sum(1)
    np.testing.assert_allclose(flow.log_prob(x).numpy(), base + volume.numpy(), rtol=1e-10)

    z = torch.randn(2, flow.n_features, dtype=torch.float64)
    x, log_det = flow.inverse_and_log_det(z)
    for row in range(2):
        want = slogdet(lambda v: flow.inverse(v[None])[0], z[row])
        torch.testing.assert_close(log_det[row], want)


def test_flow_parameters_are_not_the_identity(flow):
    """Guards the tests of this file: a flow close to an affine map would prove little."""
    z = torch.randn(64, flow.n_features, dtype=torch.float64)
    log_det = flow.inverse_and_log_det(z)[1]
    assert log_det.std() > 0.01


def test_flow_inverse_inverts_both_ways(flow):
    d = flow.n_features
    x = 2 * torch.randn(5, *flow.event_shape, dtype=torch.float64) + 1
    z, log_det = flow(x)
    assert z.shape == (5, d) and log_det.shape == (5,)
    back, log_det_back = flow.inverse_and_log_det(z)
    assert back.shape == x.shape and log_det_back.shape == (5,)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det_back, -log_det)
    assert torch.equal(flow.inverse(z), back)

    z = torch.randn(5, d, dtype=torch.float64)
    torch.testing.assert_close(flow(flow.inverse(z))[0], z, rtol=0, atol=1e-10)


def test_flow_accepts_flat_rows_and_keeps_rows_apart(flow):
    x = torch.randn(9, *flow.event_shape, dtype=torch.float64)
    z, log_det = flow(x)
    flat_z, flat_log_det = flow(x.flatten(1))
    assert torch.equal(flat_z, z) and torch.equal(flat_log_det, log_det)
    alone_z, alone_log_det = flow(x[4:5])
    torch.testing.assert_close(alone_z[0], z[4], rtol=0, atol=1e-12)
    torch.testing.assert_close(alone_log_det[0], log_det[4], rtol=0, atol=1e-11)
    alone, _ = flow.inverse_and_log_det(z[4:5])
    torch.testing.assert_close(alone[0], x[4], rtol=0, atol=1e-10)
    # One wild row spoils itself only.
    x[4] = torch.nan
    spoilt, _ = flow(x)
    rest = torch.arange(9) != 4
    torch.testing.assert_close(spoilt[rest], z[rest], rtol=0, atol=1e-12)


def test_flow_refuses_rows_of_another_width(architecture):
    """Six rows of six are not nine rows of four."""
    flow = make_flow(architecture, (4,))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        flow(torch.randn(6, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("event_shape", [(6,), (3, 8, 4)])
def test_dtypes_pass_through(architecture, event_shape, dtype, tolerance):
    flow = make_flow(architecture, event_shape, dtype=dtype)
    assert {t.dtype for t in flow.state_dict().values()} == {dtype}
    x = torch.randn(3, *event_shape, dtype=dtype)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse_and_log_det(z)
    assert {t.dtype for t in (z, log_det, back, log_det_back, flow.log_prob(x))} == {dtype}
    assert flow.sample(2).dtype == dtype
    assert (back - x).abs().max() < tolerance


@pytest.mark.parametrize("seed", [0, 1])
def test_density_integrates_to_one_on_a_grid(architecture, seed):
    torch.manual_seed(seed)
    flow = make_flow(architecture, (2,), noise=0.3, loc=-40.0, scale=7.0)
    x = flow.sample(2000)
    low, high = x.min(0).values, x.max(0).values
    low, high = low - 0.6 * (high - low), high + 0.6 * (high - low)
    n = 400
    axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    density = flow.log_prob(torch.cartesian_prod(*axes)).exp()
    cell = float(((high - low) / (n - 1)).prod())
    assert float(density.sum()) * cell == pytest.approx(1, abs=2e-4)
    # And it is where the samples are, not only of the right total.
    edges = [torch.linspace(a, b, 5).numpy() for a, b in zip(low, high, strict=True)]
    counts = np.histogram2d(*x.numpy().T, bins=edges)[0] / len(x)
    mass = density.reshape(4, n // 4, 4, n // 4).sum((1, 3)).numpy() * cell
    np.testing.assert_allclose(counts, mass, atol=0.05)


def linear_flow(architecture, event_shape, n_levels):
    """Couplings and splits of constant scale and linear shift: the whole flow is affine."""
    flow = make_flow(architecture, event_shape, n_levels)
    for module in list(flow.modules()):
        if isinstance(module, AffineCoupling | MaskedCoupling | Split):
            first, last = module.net[0], module.net[-1]
            if len(event_shape) == 1:
                net = torch.nn.Linear(first.in_features, last.out_features)
            else:
                net = torch.nn.Conv2d(first.in_channels, last.out_channels, 3, padding=1)
            module.net = net.double().requires_grad_(False)
            net.weight[: len(net.weight) // 2] = 0
    return flow


@pytest.mark.parametrize("event_shape, n_levels", [((2,), 1), ((7,), 2), ((1, 4, 4), 2)])
def test_affine_flow_is_scipys_normal_distribution(architecture, event_shape, n_levels):
    flow = linear_flow(architecture, event_shape, n_levels)
    d = flow.n_features
    # x = mean + z A^T, read off the generator: no log-det of the package enters.
    mean = flow.inverse(torch.zeros(1, d).double()).flatten().numpy()
    A = (flow.inverse(torch.eye(d).double()).flatten(1).numpy() - mean).T
    covariance = A @ A.T
    assert (np.abs(covariance) > 1e-3).mean() > 0.5  # not a diagonal one
    x = flow.sample(20)
    want = stats.multivariate_normal(mean, covariance).logpdf(x.flatten(1).numpy())
    np.testing.assert_allclose(flow.log_prob(x).numpy(), want, rtol=1e-9)


def test_standardisation_shifts_the_log_density_by_its_volume(architecture):
    flow = make_flow(architecture, (3, 4, 2), loc=0.0, scale=1.0)
    other = copy.deepcopy(flow)
    other.loc.fill_(120.0)
    other.scale.fill_(255.0)
    x = torch.randn(4, 24, dtype=torch.float64)
    torch.testing.assert_close(other(120 + 255 * x)[0], flow(x)[0])
    want = flow.log_prob(x) - 24 * math.log(255)
    torch.testing.assert_close(other.log_prob(120 + 255 * x), want)


# ---------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("event_shape, n_levels", [((9,), 2), ((2, 4, 8), 2)])
def test_samples_come_from_the_latents_they_map_to(architecture, event_shape, n_levels):
    """Through the splits, whose learned Gaussian is part of the map."""
    flow = make_flow(architecture, event_shape, n_levels)
    seed = partial(torch.Generator().manual_seed, 3)
    x = flow.sample(6, generator=seed())
    assert x.shape == (6, *event_shape) and not x.requires_grad
    z = torch.randn(6, flow.n_features, generator=seed(), dtype=torch.float64)
    torch.testing.assert_close(flow(x)[0], z, rtol=0, atol=1e-10)
    assert torch.equal(flow.sample(6, generator=seed()), x)
    half = flow.sample(6, temperature=0.5, generator=seed())
    torch.testing.assert_close(flow(half)[0], z / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_levels", [1, 3])
def test_data_scale_is_the_standard_deviation_in_the_datas_units(architecture, n_levels):
    flow = linear_flow(architecture, (1, 8, 8), n_levels)
    d = flow.n_features
    mean = flow.inverse(torch.zeros(1, d).double())
    A = (flow.inverse(torch.eye(d).double()) - mean).flatten(1)
    std = A.square().sum(0).mean().sqrt()
    assert 0.8 < flow.data_scale() / std < 1.2
    other = copy.deepcopy(flow)
    other.scale.mul_(100)
    other.loc.fill_(-300.0)
    assert other.data_scale() == pytest.approx(100 * flow.data_scale())


def test_data_scale_is_made_anew_by_training():
    flow = RealNVP((2,), n_steps=2, hidden_channels=4)
    before = flow.data_scale()
    train_flow(flow, 50 * torch.randn(64, 2), max_epochs=1)
    assert flow.data_scale() > 10 * before


def test_what_its_images_are_like_is_found_once_for_given_weights():
    class Counting(RealNVP):
        drawn = 0

        def typical(self, n_samples, seed=0):
            self.drawn += 1
            return super().typical(n_samples, seed)

    flow = Counting((2,), n_steps=2, hidden_channels=4).requires_grad_(False)

    def all_three():
        return [flow.data_scale(), flow.typical_log_prob(), *flow.typical_range()]

    before = all_three()
    assert all_three() == before and flow.drawn == 3
    state = {key: value.clone() for key, value in flow.state_dict().items()}
    flow.scale.mul_(10)
    scale, log_prob, low, high = all_three()
    assert flow.drawn == 6
    np.testing.assert_allclose(
        [scale, low, high], 10 * np.array([before[0], *before[2:]]), rtol=1e-5
    )
    assert log_prob == pytest.approx(before[1] - 2 * math.log(10), abs=1e-4)
    x = flow.typical(32).numpy()
    assert low < np.median(x) < high
    assert np.mean((low < x) & (x < high)) == pytest.approx(0.9, abs=0.05)
    # Nor is what was found under one set of weights ever taken for another's.
    flow.load_state_dict(state)
    flow.data_scale()
    other = copy.copy(flow)
    flow.typical_range()
    assert list(other.__dict__["_known_moments"][1]) == ["scale"]
    flow.scale.mul_(10)
    assert flow.typical_range() == (low, high)
    flow.load_state_dict(state)
    assert all_three() == before


def test_data_scale_can_always_be_divided_by():
    class Collapsed(Flow):
        def _generate(self, z):
            return 0 * z, z.new_zeros(len(z))

    class Wild(Flow):
        def _generate(self, z):
            return z / 0, z.new_zeros(len(z))

    for flow in (Collapsed((3,)), Wild((3,))):
        assert flow.data_scale() > 0 and math.isfinite(1 / flow.data_scale())


# ---------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_in_float32_at_full_size(architecture):
    """64x64 colour, K = 16, three levels, a few steps of training on smooth images with grain."""
    flow = architecture((3, 64, 64), n_steps=16, n_levels=3, hidden_channels=16)
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), size=(64, 64), mode="bicubic")
    x = x + 0.05 * torch.randn(x.shape)
    history = train_flow(
        flow, x, max_epochs=3, batch_size=2, warmup_steps=6, ema_decay=0, learning_rate=1e-3
    )
    assert history[-1]["train_nll"] < history[0]["train_nll"] - 0.01  # no longer the start
    with torch.no_grad():
        z, _ = flow(x)
        error = (flow.inverse(z) - x).abs().max() / x.std()
        assert error < 1e-4
        z = torch.randn(2, flow.n_features)
        assert (flow(flow.inverse(z))[0] - z).abs().max() < 1e-3


# ---------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    "event_shape, n_levels, message",
    [
        ((4, 4), None, r"\(d,\) for vectors or \(C, H, W\) for images, got \(4, 4\)"),
        ((), None, r"event_shape must be .* got \(\)"),
        ((0,), None, "event_shape must be"),
        ((3, 0, 4), None, "event_shape must be"),
        ((1,), None, "at least 2 features, got n_features=1"),
        ((7,), 3, "3 levels needs at least 8 features, got n_features=7; lower n_levels"),
        ((1, 5, 4), None, r"multiples of 2\*\*n_levels = 2, got 5x4"),
        ((1, 4, 6), 2, r"multiples of 2\*\*n_levels = 4, got 4x6; lower n_levels or pad"),
        ((4,), 0, "n_levels must be an integer of at least 1, got 0"),
        ((4,), 1.5, "n_levels must be an integer of at least 1, got 1.5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(architecture, event_shape, n_levels, message):
    with pytest.raises(ValueError, match=message):
        architecture(event_shape, n_levels=n_levels)


@pytest.mark.parametrize(
    "event_shape, levels",
    [((9,), 1), ((1, 2, 2), 1), ((1, 6, 8), 1), ((1, 4, 8), 2), ((3, 16, 8), 3), ((3, 64, 32), 3)],
)
def test_default_levels_are_three_as_far_as_sides_allow(architecture, event_shape, levels):
    flow = architecture(event_shape, n_steps=1, hidden_channels=2)
    assert flow.n_levels == levels
    assert flow.event_shape == event_shape and flow.n_features == math.prod(event_shape)


def test_build_flow_by_name():
    for name, architecture in (("glow", Glow), ("RealNVP", RealNVP)):
        flow = build_flow(name, [4], n_steps=2, hidden_channels=None, n_levels=None)
        assert type(flow) is architecture and flow.config()["hidden_channels"] == 64
        assert flow.config()["n_steps"] == 2
    with pytest.raises(ValueError, match=r"Unknown flow 'nice'; expected one of \['glow', 'real"):
        build_flow("nice", (4,))
    with pytest.raises(ValueError, match="Unknown flow None"):
        build_flow(None, (4,))


@pytest.mark.parametrize("event_shape", [(9,), (3, 8, 4)])
def test_config_and_state_dict_rebuild_the_flow(architecture, event_shape):
    flow = make_flow(architecture, event_shape, n_levels=2, bound=1.3, dropout=0.25)
    config = json.loads(json.dumps(flow.config()))
    other = build_flow(config.pop("class"), tuple(config.pop("event_shape")), **config).double()
    x = torch.randn(4, *event_shape, dtype=torch.float64)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.eval().log_prob(x), flow.log_prob(x))
    assert other.config() == flow.config()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_flows_can_be_copied_and_pickled(architecture, duplicate):
    flow = make_flow(architecture, (2, 4, 4))
    x = torch.randn(4, 32, dtype=torch.float64)
    before = flow.log_prob(x)
    other = duplicate(flow)
    assert torch.equal(other.log_prob(x), before)
    perturb(other)
    assert not torch.equal(other.log_prob(x), before)
    assert torch.equal(flow.log_prob(x), before)


@pytest.mark.parametrize("event_shape", [(4,), (1, 4, 4)])
def test_dropout_acts_in_training_only(architecture, event_shape):
    flow = make_flow(architecture, event_shape, dropout=0.5)
    x = torch.randn(4, *event_shape, dtype=torch.float64)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x))
    flow.train()
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))


def test_every_parameter_takes_part(architecture):
    """A layer left out of the sum, or a channel that no net sees, would have no gradient."""
    flow = perturb(architecture((2, 8, 8), n_steps=4, n_levels=2, hidden_channels=8).double())
    flow.log_prob(torch.randn(16, 2, 8, 8, dtype=torch.float64)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "event_shape, kind",
    [((7,), MaskedCoupling), ((1, 4, 4), MaskedCoupling), ((1, 4, 4), AffineCoupling)],
)
def test_realnvp_couplings_take_turns(event_shape, kind):
    """Two steps of a kind, with all else at the identity, change every entry."""
    flow = RealNVP(event_shape, n_steps=4 if len(event_shape) == 3 else 2, n_levels=1).double()
    for module in flow.modules():
        if isinstance(module, kind):
            perturb(module)
    x = torch.randn(1, *event_shape, dtype=torch.float64)
    unchanged = torch.isin(flow(x)[0], x)
    assert not unchanged.any()


def test_a_users_own_flow_needs_two_methods():
    """The base class adds the standardisation, the layouts and the density."""

    class Cubed(Flow):
        def _normalize(self, x):
            x = x.flatten(1)
            return x + x**3, (1 + 3 * x**2).log().sum(1)

    flow = Cubed((2, 3), loc=1.0, scale=4.0).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    z, log_det = flow(x)
    assert z.shape == (5, 6)
    torch.testing.assert_close(log_det[0], slogdet(lambda v: flow(v[None])[0], x[0]))
