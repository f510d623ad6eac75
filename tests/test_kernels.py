"""The frozen evaluator against the plain layers and autograd, which it must never differ from.

Its fast paths are many (folded matrices, convolutions as products, gradients by hand, activations
stored or computed again, workspaces that are used again), and each has its case here.
"""

import copy
import functools
import itertools
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_flow
from torch import nn
from torch.autograd.functional import jacobian

import skaipo._reconstruct
import skaipo.flows
from skaipo import AIPORegressor, FlowPrior
from skaipo.flows import Glow, RealNVP
from skaipo.flows._frozen import FrozenEvaluator, ReferenceEvaluator, _evaluator
from skaipo.flows._frozen._native import library
from skaipo.flows._layers import AffineCoupling, InvertibleLinear
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising, Inpainting

FLOWS = {
    "realnvp of vectors": lambda **k: random_flow(RealNVP, (7,), **k),
    "glow of vectors": lambda **k: random_flow(Glow, (6,), **k),
    "realnvp of images": lambda **k: random_flow(RealNVP, (2, 8, 4), noise=0.1, **k),
    "glow of images": lambda **k: random_flow(Glow, (3, 4, 8), noise=0.1, **k),
    "glow of grey images": lambda **k: random_flow(Glow, (1, 8, 8), noise=0.1, **k),
    "networks without kinks": lambda **k: random_flow(Glow, (2, 4, 4), smooth=True, **k),
}
MEMORY = ["store", "recompute"]
IMAGES = [name for name in FLOWS if "of images" in name or "grey" in name]
KERNELS = ["native", "fused"]
# Compiled are convolutions with ReLU between them: elsewhere "native" is the same as "fused".
CASES = [(k, name) for k in KERNELS for name in FLOWS if k == "fused" or name in IMAGES]
each_case = pytest.mark.parametrize("kernels, name", CASES, indirect=["kernels"])


@pytest.fixture(autouse=True, params=KERNELS)
def kernels(monkeypatch, request):
    """The kernels are what is tested here, also where all else runs without them."""
    if request.param == "native" and library() is None:
        pytest.skip("nothing was compiled")
    monkeypatch.setenv("SKAIPO_KERNELS", request.param)
    return request.param


@functools.cache
def shared(name, dtype=torch.float64):
    """For tests that only look at the flow."""
    return FLOWS[name](dtype=dtype)


def points(flow, n=5, seed=0):
    """Images and latents; the images are the flow's own."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, flow.n_features, generator=generator, dtype=torch.float64)
    z = z.to(flow.loc.dtype)
    with torch.no_grad():
        return flow.inverse(z).flatten(1), z


def evaluated(evaluator, u, inverse, cotangents):
    value, log_det, pull = (evaluator.linearize_inverse if inverse else evaluator.linearize)(u)
    return [value, log_det, *pull(*cotangents)]


def assert_same(a, b, tolerance):
    for ours, theirs in zip(a, b, strict=True):
        scale = theirs.abs().amax().clamp_min(1.0)
        assert (ours - theirs).abs().amax() <= tolerance * scale


# ---------------------------------------------------------------------------- the same results


@functools.cache
def by_the_layers(name, inverse, dtype=torch.float64):
    """Points, cotangents, and what the layers make of them: the same for all kernels."""
    flow = shared(name, dtype)
    u, v = reversed(points(flow)) if inverse else points(flow)
    cotangents = [(v, -1.0), (None, 1.0), (2.0 * v, 0.0)]
    return u, cotangents, evaluated(ReferenceEvaluator(flow), u, inverse, cotangents)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
@each_case
def test_values_and_gradients_are_those_of_the_layers(name, memory, inverse):
    u, cotangents, expected = by_the_layers(name, inverse)
    evaluator = FrozenEvaluator(shared(name), memory)
    for n, some in ((2, [0, 1, 2]), (5, [0, 1, 2]), (5, [0]), (5, [1]), (1, [0, 1, 2])):
        given = [(None if v is None else v[:n], c) for v, c in (cotangents[k] for k in some)]
        ours = evaluated(evaluator, u[:n], inverse, given)
        assert_same(ours, [expected[k][:n] for k in (0, 1, *(2 + k for k in some))], 1e-10)


@functools.cache
def jacobians(name):
    """Of both directions, at an image and at its latents."""
    flow = shared(name)
    x, z = points(flow, 1)
    return (
        jacobian(lambda x: flow(x[None])[0][0], x[0], vectorize=True),
        jacobian(lambda z: flow.inverse(z[None]).flatten(), z[0], vectorize=True),
    )


@pytest.mark.parametrize("memory", MEMORY)
@each_case
def test_gradients_are_products_with_the_jacobian(name, memory):
    flow = shared(name)
    x, z = points(flow, 1)
    v = torch.randn_like(z)
    evaluator = FrozenEvaluator(flow, memory)
    for inverse, u, matrix in zip((False, True), (x, z), jacobians(name), strict=True):
        _, log_det, gradient = evaluated(evaluator, u, inverse, [(v, 0.0)])
        assert_same([gradient[0]], [matrix.T @ v[0]], 1e-9)
        assert_same([log_det[0]], [torch.linalg.slogdet(matrix).logabsdet], 1e-9)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_values_alone_are_those_of_the_layers(name, inverse):
    u, _, expected = by_the_layers(name, inverse)
    evaluator = FrozenEvaluator(shared(name))
    found = (evaluator.inverse if inverse else evaluator.forward)(u)
    assert_same(found, expected[:2], 1e-10)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("architecture", [RealNVP, Glow])
def test_single_precision_is_as_exact_as_that_of_the_layers(architecture, memory):
    """Against double precision, neither is much farther off than the other."""
    flow = random_flow(architecture, (3, 8, 8), noise=0.05)
    x, z = points(flow, 16)
    exact = evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0)])
    flow = flow.float()
    x, z = x.float(), z.float()
    ours = evaluated(FrozenEvaluator(flow, memory), x, False, [(z, -1.0)])
    theirs = evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0)])
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a - truth).norm() <= 4 * (b - truth).norm() + 1e-6 * truth.norm()


def odd_network(in_channels, out_channels):
    """Kernels of several sizes, layers without bias, dropout; no zeros in the last layer."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 5, (1, 3), padding=(0, 1), bias=False),
        nn.ReLU(),
        nn.Dropout2d(0.5),
        nn.Conv2d(5, 6, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, out_channels, 5, padding=2),
    )


class Doubled(nn.Sequential):
    """Its children do not tell what it does."""

    def forward(self, x):
        return 0.5 * super().forward(x) + 0.3


def hooked(i, o):
    net = nn.Sequential(nn.Conv2d(i, o, 3, padding=1))
    net[0].register_forward_hook(lambda module, inputs, output: output + 0.5)
    return net


class Constant(nn.Module):
    """Does not depend on its input at all."""

    def __init__(self, i, o):
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-1, 1, o)[:, None, None])

    def forward(self, x):
        return self.values.expand(len(x), -1, *x.shape[2:])


NETWORKS = {
    "odd": odd_network,
    "own forward": lambda i, o: Doubled(nn.Conv2d(i, o, 3, padding=1)),
    "hook": hooked,
    "constant": Constant,
    "constant inside": lambda i, o: nn.Sequential(Constant(i, o), nn.Identity()),
    "single layer": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "circular": lambda i, o: nn.Sequential(
        nn.Conv2d(i, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(4, o, 1)
    ),
    "dilated": lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=2, dilation=2)),
    "leaky": lambda i, o: nn.Sequential(nn.Conv2d(i, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, o, 1)),
}


@pytest.mark.parametrize(
    "kernels, network",
    # All others are left to autograd, whatever the kernels.
    [("native", "odd"), ("native", "single layer"), *(("fused", network) for network in NETWORKS)],
    indirect=["kernels"],
)
@pytest.mark.parametrize("architecture", [RealNVP, Glow])
def test_any_network_may_condition(architecture, network):
    flow = random_flow(architecture, (2, 4, 4))
    for module in flow.modules():
        if hasattr(module, "net"):
            convolutions = [m for m in module.net if isinstance(m, nn.Conv2d)]
            module.net = NETWORKS[network](
                convolutions[0].in_channels, convolutions[-1].out_channels
            ).double()
    flow.eval().requires_grad_(False)
    x, z = points(flow)
    evaluators = [FrozenEvaluator(flow, memory) for memory in MEMORY]
    for inverse, u, v in ((False, x, z), (True, z, x)):
        cotangents = [(v, -1.0), (None, 1.0)]
        expected = evaluated(ReferenceEvaluator(flow), u, inverse, cotangents)
        for evaluator in evaluators:
            assert_same(evaluated(evaluator, u, inverse, cotangents), expected, 1e-10)


# ------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("memory", MEMORY)
@each_case
def test_a_batch_does_not_change_its_rows(name, memory):
    flow = shared(name, torch.float32)
    x, z = points(flow, 24)
    evaluator = FrozenEvaluator(flow, memory)
    together = evaluated(evaluator, x, False, [(z, -1.0)])
    for rows in (slice(0, 1), slice(3, 5), slice(7, 14), slice(23, 24), slice(2, 19)):
        part = evaluated(evaluator, x[rows], False, [(z[rows], -1.0)])
        assert_same(part, [t[rows] for t in together], 1e-5)


@pytest.mark.parametrize("memory", MEMORY)
@each_case
def test_broken_rows_do_not_change_the_others_by_one_bit(name, memory):
    flow = shared(name, torch.float32)
    x, z = points(flow, 9)
    evaluator = FrozenEvaluator(flow, memory)
    clean = evaluated(evaluator, x, False, [(z, -1.0), (None, 1.0)])
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for poison in (float("nan"), float("inf"), 1e30):
        broken = x.clone()
        broken[4] = poison
        spoilt = evaluated(evaluator, broken, False, [(z, -1.0), (None, 1.0)])
        # The workspace that the broken row went through serves again.
        again = evaluated(evaluator, x, False, [(z, -1.0), (None, 1.0)])
        for before, now, after in zip(clean, spoilt, again, strict=True):
            assert torch.equal(before[others], now[others])
            assert torch.equal(before, after)


@functools.cache
def twenty_rows():
    """Of a Glow: points, latents, and the layers' values and gradients there."""
    flow = shared("glow of images")
    x, z = points(flow, 20)
    return x, z, evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0)])


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=25)
def test_workspaces_are_not_mixed_up(calls):
    """Evaluations of all sizes, with gradients now, later, in another order, or never."""
    x, z, (value, log_det, gradient) = twenty_rows()
    evaluator = FrozenEvaluator(shared("glow of images"))
    waiting, results = [], []
    for n, when in calls:
        *found, pull = evaluator.linearize(x[:n])
        results.append((n, *found))
        if when == 0:
            waiting.append((n, pull))
        elif when == 1:
            results.append((n, *pull((z[:n], -1.0))))
    results += [(n, *pull((z[:n], -1.0))) for n, pull in reversed(waiting)]
    for n, *parts in results:
        expected = [gradient[:n]] if len(parts) == 1 else [value[:n], log_det[:n]]
        assert_same(parts, expected, 1e-10)


def test_threads_can_share_an_evaluator():
    flow = FLOWS["glow of images"]()
    x, z = points(flow, 32)
    evaluator = FrozenEvaluator(flow)
    jobs = [slice(i, i + n) for i in range(0, 24, 3) for n in (1, 4, 8)]

    def job(rows):
        return evaluated(evaluator, x[rows], False, [(z[rows], -1.0)])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, jobs))
    expected = evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0)])
    for rows, result in zip(jobs, results, strict=True):
        assert_same(result, [t[rows] for t in expected], 1e-10)


@pytest.mark.parametrize("name", ["glow of images", "networks without kinks"])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_pass_back_is_for_once_and_for_its_own_rows(name, memory):
    flow = FLOWS[name]()
    x, z = points(flow, 4)
    evaluator = FrozenEvaluator(flow, memory)
    value, _, pull = evaluator.linearize(x)
    for wrong in (z[:1], z[:3], torch.cat((z, z)), z[:, 1:]):
        with pytest.raises(ValueError, match="must have the shape of the value"):
            pull((wrong, 0.0))
    (gradient,) = pull((z, 0.0))
    if memory == "store":
        with pytest.raises(RuntimeError, match="linearize again"):
            pull((z, 0.0))
    # No workspace is there twice.
    spaces = [space for idle in evaluator._idle.values() for space in idle]
    assert len({id(space) for space in spaces}) == len(spaces)
    # The points may change in between.
    moved = x.clone()
    _, _, pull = evaluator.linearize(moved)
    moved.add_(1.0)
    assert_same(pull((z, 0.0)), [gradient], 1e-10)


def test_inference_mode_leaves_nothing_behind():
    flow = FLOWS["glow of images"]()
    prior = FlowPrior(flow=flow)
    X = prior.sample(5, random_state=0)
    expected = prior.score_samples(X)
    flow.release_workspaces()
    with torch.inference_mode():
        np.testing.assert_array_equal(prior.score_samples(X), expected)
    np.testing.assert_array_equal(prior.score_samples(X), expected)
    with torch.inference_mode():
        made_there = FlowPrior(flow=FLOWS["glow of images"]())
        made_there.score_samples(X)
    assert_same(
        made_there.flow_.compile_for_inference().linearize(torch.as_tensor(X))[:1],
        flow.compile_for_inference().linearize(torch.as_tensor(X))[:1],
        1e-10,
    )


def test_foreign_networks_keep_no_graph_that_nobody_needs():
    flow = FLOWS["networks without kinks"]()
    x, z = points(flow, 4)
    evaluator = FrozenEvaluator(flow, "recompute")
    evaluator.forward(x)
    assert not any(space.graphs for spaces in evaluator._idle.values() for space in spaces)
    # What they keep counts for the budget: far more than one number for each of their inputs.
    assert evaluator._bytes_per_row > 8 * 8 * flow.n_features


@pytest.mark.parametrize("memory", MEMORY)
@each_case
def test_arguments_are_not_written_to(name, memory):
    flow = shared(name)
    x, z = points(flow)
    x0, z0 = x.clone(), z.clone()
    evaluator = FrozenEvaluator(flow, memory)
    for _ in range(2):
        first = evaluated(evaluator, x, False, [(z, -1.0)])
        kept = [t.clone() for t in first]
        evaluated(evaluator, z, True, [(x, 1.0), (None, 1.0)])
        evaluator.forward(2 * x)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert torch.equal(x, x0)
    assert torch.equal(z, z0)


# ------------------------------------------------------------------------------------- memory


def held(evaluator):
    """Bytes in the workspaces that wait for their next use."""
    return sum(
        buffer.numel() * buffer.element_size()
        for spaces in evaluator._idle.values()
        for space in spaces
        for buffer in space._storage.values()
    )


def test_without_stored_activations_memory_does_not_grow_with_depth():
    sizes = {}
    for memory in MEMORY:
        for depth in (4, 32):
            flow = Glow((3, 8, 8), n_steps=depth, n_levels=1, hidden_channels=16).eval()
            evaluator = FrozenEvaluator(flow, memory)
            x = torch.randn(4, 192)
            evaluated(evaluator, x, False, [(x, -1.0)])
            sizes[memory, depth] = held(evaluator)
    assert sizes["recompute", 32] <= 1.05 * sizes["recompute", 4]
    assert sizes["store", 32] >= 2.5 * sizes["store", 4]
    evaluator.release()
    assert held(evaluator) == 0


def test_a_budget_decides_how_many_rows_are_stored():
    flow = FLOWS["glow of grey images"]()
    evaluator = FrozenEvaluator(flow)
    per_row = evaluator._bytes_per_row + evaluator._scratch_per_row
    x, z = points(flow, 8)
    expected = evaluated(evaluator, x, False, [(z, 0.0)])
    for room, stored in ((9, 8), (4, 4), (1, 1), (0.9, 0)):
        evaluator = FrozenEvaluator(flow, int(room * per_row))
        found = evaluated(evaluator, x, False, [(z, 0.0)])
        assert [space.n for space in evaluator._idle[True]] == [stored] * (stored > 0)
        assert_same(found, expected, 0.0 if stored else 1e-10)
    with pytest.raises(ValueError, match="memory must be 'auto', 'store'"):
        flow.compile_for_inference(memory="half")


@pytest.mark.parametrize("inverse", [False, True])
def test_rows_whose_way_back_goes_astray_are_stored(inverse):
    """Inverting a chain of extreme scales in single precision leads nowhere near the start."""
    flow = random_flow(Glow, (3, 8, 8), noise=0.02)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if name.endswith("log_diagonal"):
                parameter[::2] += 1.0
                parameter[1::2] -= 1.0
    flow = flow.float()
    u, v = torch.randn(20, 192), torch.randn(20, 192)
    recompute = FrozenEvaluator(flow, "recompute")
    (stored,) = evaluated(FrozenEvaluator(flow, "store"), u, inverse, [(v, -1.0)])[2:]
    (gradient,) = evaluated(recompute, u, inverse, [(v, -1.0)])[2:]
    scale = stored.norm(dim=1)
    assert ((gradient - stored).norm(dim=1) <= 1e-3 * scale).all()
    # Without the check the same comes out wrong: the flow is as ill-conditioned as it should be.
    recompute._drift = float("inf")
    (unchecked,) = evaluated(recompute, u, inverse, [(v, -1.0)])[2:]
    assert ((unchecked - stored).norm(dim=1) > 1e-2 * scale).any()


@pytest.mark.parametrize("kernels", ["fused"], indirect=True)
def test_a_chunk_that_does_not_fit_is_halved(monkeypatch, kernels):
    prior, op, Y = small_problem(7)
    estimator = AIPORegressor(op, 1.0, prior=prior, noise=GaussianNoise(0.3), max_evals=8)
    whole = estimator.reconstruct(Y)
    linearize, sizes = FrozenEvaluator.linearize, []

    def limited(self, x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a pretended limit)")
        return linearize(self, x)

    monkeypatch.setattr(FrozenEvaluator, "linearize", limited)
    halved = estimator.reconstruct(Y)
    assert max(sizes) > 3
    np.testing.assert_allclose(halved.x, whole.x, atol=1e-5)
    np.testing.assert_array_equal(halved.n_evals, whole.n_evals)
    np.testing.assert_array_equal(halved.status, whole.status)

    def exhausted(self, x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    monkeypatch.setattr(FrozenEvaluator, "linearize", exhausted)
    with pytest.raises(MemoryError, match="not enough memory to reconstruct even a single row"):
        estimator.reconstruct(Y)

    def broken(self, x):
        raise RuntimeError("something else")

    monkeypatch.setattr(FrozenEvaluator, "linearize", broken)
    with pytest.raises(RuntimeError, match="something else"):
        estimator.reconstruct(Y)


# ----------------------------------------------------------------------------- which evaluator


def test_a_flow_keeps_its_evaluator_until_it_changes():
    flow = FLOWS["glow of images"]()
    x, _ = points(flow)
    evaluator = flow.compile_for_inference()
    assert isinstance(evaluator, FrozenEvaluator)
    assert flow.compile_for_inference() is evaluator
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert copied.compile_for_inference() is not evaluator
        assert_same(copied.compile_for_inference().forward(x), evaluator.forward(x), 0.0)
    for change in (
        lambda bias: bias.add_(0.5),
        lambda bias: bias.data.add_(0.5),
        lambda bias: np.add(bias.numpy(), 0.5, out=bias.numpy()),
    ):
        before = flow.compile_for_inference()
        with torch.no_grad():
            change(flow.levels[0][1].bias)
        assert flow.compile_for_inference() is not before
    assert_same(flow.compile_for_inference().forward(x), ReferenceEvaluator(flow).forward(x), 1e-10)
    assert flow.float().compile_for_inference().forward(x.float())[0].dtype == torch.float32


class Shifted(Glow):
    """Does something of its own around the layers."""

    def _normalize(self, x):
        return super()._normalize(x + 1.0)

    def _generate(self, z):
        x, log_det = super()._generate(z)
        return x - 1.0, log_det


class OtherLayer(nn.Module):
    def forward(self, x):
        return 2.0 * x, x.new_tensor(float(np.log(2.0) * x[0].numel()))

    def inverse(self, y):
        return 0.5 * y, -y.new_tensor(float(np.log(2.0) * y[0].numel()))


def test_what_the_kernels_do_not_know_is_left_to_autograd():
    subclass = random_flow(Shifted, (1, 4, 4))
    foreign = random_flow(Glow, (1, 4, 4))
    foreign.levels[0].append(OtherLayer())
    training = random_flow(Glow, (1, 4, 4)).train()
    for flow in (subclass, foreign, training):
        evaluator = flow.compile_for_inference()
        assert isinstance(evaluator, ReferenceEvaluator)
        z = torch.randn(3, 16, dtype=torch.float64)
        x, log_det = evaluator.inverse(z)
        assert_same(evaluator.forward(x), (z, -log_det), 1e-9)
    # Dropout is on in training, and no gradient may be missing it.
    assert isinstance(training.eval().compile_for_inference(), FrozenEvaluator)


def test_an_environment_variable_turns_the_kernels_off(monkeypatch, kernels):
    flow = FLOWS["glow of images"]()
    evaluator = flow.compile_for_inference()
    assert isinstance(evaluator, FrozenEvaluator)
    native = [op.native is not None for op in evaluator._operations if op.bound is not None]
    assert native == [kernels == "native"] * len(native)
    monkeypatch.setenv("SKAIPO_KERNELS", "reference")
    assert isinstance(flow.compile_for_inference(), ReferenceEvaluator)
    monkeypatch.setenv("SKAIPO_KERNELS", "fast")
    with pytest.raises(ValueError, match="SKAIPO_KERNELS must be one of native, fused, reference"):
        flow.compile_for_inference()


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux alone")
@pytest.mark.skipif(shutil.which("g++") is None or "CC" in os.environ, reason="needs g++")
def test_where_there_is_a_compiler_the_kernels_are_compiled(monkeypatch):
    monkeypatch.delenv("SKAIPO_KERNELS")
    # A failed build is no error of the installation, and would be noticed by nobody.
    assert skaipo.flows.kernels() == "native", "install again: pip install -e . (or make install)"


def test_without_a_compiler_the_kernels_are_torchs(monkeypatch):
    monkeypatch.delenv("SKAIPO_KERNELS")
    monkeypatch.setattr(_evaluator, "library", lambda: None)
    assert skaipo.flows.kernels() == "fused"
    monkeypatch.setenv("SKAIPO_KERNELS", "native")
    with pytest.raises(ValueError, match=r"no compiled kernels: install .* C\+\+ compiler"):
        FLOWS["glow of images"]().compile_for_inference()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("name", IMAGES)
def test_a_copy_has_memory_of_its_own(name, copied):
    flow = shared(name)
    x, z = points(flow, 4)
    evaluator = FrozenEvaluator(flow)
    expected = evaluated(evaluator, x, False, [(z, -1.0)])
    twin = copied(evaluator)
    _, _, pull = twin.linearize(x)
    evaluated(evaluator, -x, False, [(z, 1.0)])
    assert_same(pull((z, -1.0)), expected[2:], 1e-12)
    del evaluator
    assert_same(evaluated(twin, x, False, [(z, -1.0)]), expected, 1e-12)


# ---------------------------------------------------------------------------------- compiled ones


def with_instructions(evaluator, instructions):
    """The same with another set of the processor's instructions."""
    if instructions > library().skaipo_instructions():
        pytest.skip("not of this processor")
    for op in evaluator._operations:
        if op.bound is not None:
            op.native._instructions = instructions
    return evaluator


@pytest.fixture
def native(kernels):
    if kernels != "native":
        pytest.skip("of compiled kernels alone")


@pytest.mark.parametrize("instructions", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IMAGES)
def test_every_set_of_instructions(native, name, dtype, instructions):
    evaluator = with_instructions(FrozenEvaluator(shared(name, dtype)), instructions)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-4
    for inverse in (False, True):
        u, cotangents, expected = by_the_layers(name, inverse, dtype)
        assert_same(evaluated(evaluator, u, inverse, cotangents), expected, tolerance)


@pytest.mark.parametrize("instructions", [0, 1, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (16, 33), (40, 70, 20)])
@pytest.mark.parametrize("kernel", [1, 3, (1, 5)])
def test_networks_of_any_widths(native, kernel, hidden, instructions):
    """Groups of 16 outputs, blocks of pixels, and what is left over of both."""
    torch.manual_seed(0)
    flow = Glow((5, 6, 10), n_steps=2, n_levels=1).double().eval().requires_grad_(False)
    for step in flow.modules():
        if isinstance(getattr(step, "net", None), nn.Sequential):
            widths = step.net[0].in_channels, *hidden, step.net[-1].out_channels
            layers = []
            for n_inputs, n_outputs in itertools.pairwise(widths):
                layers += [
                    nn.Conv2d(n_inputs, n_outputs, kernel, padding="same", dtype=torch.float64),
                    nn.ReLU(),
                ]
            step.net = nn.Sequential(*layers[:-1])
    x, z = points(flow, 3)
    evaluator = with_instructions(FrozenEvaluator(flow), instructions)
    expected = evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0), (None, 0.5)])
    assert_same(evaluated(evaluator, x, False, [(z, -1.0), (None, 0.5)]), expected, 1e-10)


def test_the_same_bits_with_any_number_of_threads(native):
    flow = FLOWS["glow of images"]().float()
    x, z = points(flow, 7)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(evaluated(FrozenEvaluator(flow), x, False, [(z, -1.0)]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_tanh_and_exp_over_their_whole_range(native, instructions):
    """Of single precision they are the kernels' own."""
    flow = Glow((1, 64, 64), n_steps=1, n_levels=1).double().eval().requires_grad_(False)
    (mix,) = [m for m in flow.modules() if isinstance(m, InvertibleLinear)]
    for tensor, value in ((mix.permutation, torch.eye(4)), (mix.sign, 1.0)):
        tensor.copy_(torch.as_tensor(value))
    for tensor in (mix.lower, mix.upper, mix.log_diagonal):
        tensor.zero_()
    (coupling,) = [m for m in flow.modules() if isinstance(m, AffineCoupling)]
    coupling.net = nn.Conv2d(2, 4, 1, dtype=torch.float64).requires_grad_(False)
    coupling.net.weight.zero_()[0, 0] = coupling.net.weight[1, 1] = 1.0
    coupling.net.bias.zero_()
    single = copy.deepcopy(flow).float()
    magnitudes = torch.logspace(-8, 3, 2048, dtype=torch.float64)
    x = torch.cat((magnitudes, -magnitudes)).float()[torch.randperm(4096)].view(1, -1)
    expected = evaluated(ReferenceEvaluator(flow), x.double(), False, [(None, 1.0)])
    evaluator = with_instructions(FrozenEvaluator(single), instructions)
    z, log_det, gradient = evaluated(evaluator, x, False, [(None, 1.0)])
    assert ((z - expected[0]) / expected[0]).abs().max() < 1e-6
    assert ((gradient - expected[2]).abs().max()) < 1e-6
    assert (log_det - expected[1]).abs() < 1e-3


@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_what_is_not_a_number_stays_in_its_row(native, instructions):
    flow = FLOWS["glow of images"]().float()
    x, z = points(flow, 4)
    clean = evaluated(with_instructions(FrozenEvaluator(flow), instructions), x, False, [(z, -1.0)])
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    # Also one whose payload is large.
    x[1, 9:] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    found = evaluated(with_instructions(FrozenEvaluator(flow), instructions), x, False, [(z, -1.0)])
    for ours, theirs in zip(found, clean, strict=True):
        assert torch.equal(ours[[0, 3]], theirs[[0, 3]])
        assert not ours[1].isfinite().all() and not ours[2].isfinite().all()
    assert found[1][1].isnan()


def test_borders_stay_inside_of_their_pictures(native):
    """Of a kernel of one row and many more hidden channels than there are pixels."""
    flow = Glow((2, 2, 2), n_steps=1, n_levels=1).eval().requires_grad_(False)
    (coupling,) = [m for m in flow.modules() if isinstance(m, AffineCoupling)]
    sizes = dict(kernel_size=(1, 7), padding="same")
    coupling.net = nn.Sequential(nn.Conv2d(4, 999, **sizes), nn.ReLU(), nn.Conv2d(999, 8, **sizes))
    x, z = points(flow, 3)
    assert coupling_of(FrozenEvaluator(flow)).native is not None
    for _ in range(20):
        expected = evaluated(ReferenceEvaluator(flow), x, False, [(z, -1.0)])
        assert_same(evaluated(FrozenEvaluator(flow), x, False, [(z, -1.0)]), expected, 1e-4)


def coupling_of(evaluator):
    return next(op for op in evaluator._operations if op.bound is not None)


def test_an_exponential_beyond_single_precision_is_torchs(native):
    flow = Glow((2, 2, 2), n_steps=1, n_levels=1, bound=81.0).eval()
    assert coupling_of(FrozenEvaluator(flow)).native is None


def small_problem(n):
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    op = Inpainting(np.arange(16) % 3 != 1)
    X = prior.sample(n, random_state=0)
    return prior, op, op(X) + 0.3 * np.random.RandomState(0).randn(n, 16)


@functools.cache
def reconstructed(kernels, solver, space):
    prior, op, Y = small_problem(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKAIPO_KERNELS", kernels)
        return AIPORegressor(
            op, 1.0, prior=prior, noise=GaussianNoise(0.3), solver=solver, space=space, max_evals=20
        ).reconstruct(Y)


@pytest.mark.parametrize(
    "solver, space", [("hybrid", "image"), ("lbfgs", "latent"), ("adam", "image")]
)
def test_reconstructions_do_not_depend_on_the_kernels(kernels, solver, space):
    ours, reference = (reconstructed(kind, solver, space) for kind in (kernels, "reference"))
    np.testing.assert_allclose(ours.objective, reference.objective, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(ours.x, reference.x, atol=1e-5)
    np.testing.assert_array_equal(ours.n_evals, reference.n_evals)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", FLOWS)
def test_the_gpu_gives_what_the_cpu_does(name, memory):
    flow = FLOWS[name]().float()
    x, z = points(flow, 33)
    expected = evaluated(FrozenEvaluator(flow, memory), x, False, [(z, -1.0), (None, 1.0)])
    evaluator = FrozenEvaluator(flow.cuda(), memory)
    spaces = evaluator._idle[memory == "store"]
    # Planned, run, captured and replayed; with other rows every time.
    for n in (33, 1, 33, 17, 33, 33, 33, 33):
        rows = torch.randperm(33)[:n]
        found = evaluated(evaluator, x[rows].cuda(), False, [(z[rows].cuda(), -1.0), (None, 1.0)])
        assert_same([t.cpu() for t in found], [t[rows] for t in expected], 1e-4)
    programs = [
        program
        for space in spaces
        for size in space._programs.values()
        for program in size.values()
    ]
    steps = [part for program in programs for part in program if hasattr(part, "_graph")]
    if name != "networks without kinks":
        assert any(part._graph is not None for part in steps)


def test_out_of_memory_is_told_from_other_errors():
    told = skaipo._reconstruct._out_of_memory
    assert told(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert told(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert told(MemoryError())
    assert told(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not told(RuntimeError("expected scalar type Float but found Double"))


@pytest.mark.parametrize("space", ["image", "latent"])
def test_rows_do_not_depend_on_how_many_fit_into_memory(monkeypatch, kernels, space):
    """Bit for bit, with room for all rows, for some, for one, and for none."""
    prior = FlowPrior(flow=random_flow(Glow, (1, 8, 8), dtype=torch.float32))
    Y = GaussianNoise(0.3).add_noise(prior.sample(3, random_state=0), random_state=0)
    model = AIPORegressor(
        Denoising(), 1.0, prior=prior, noise=GaussianNoise(0.3), space=space, max_evals=8
    )
    evaluator = prior.flow_.compile_for_inference()
    per_row = evaluator._bytes_per_row + evaluator._scratch_per_row
    expected = model.reconstruct(Y)
    for room, batch_size in ((2.5, 3), (1.2, 3), (1.2, 1), (0.2, 3)):
        monkeypatch.setattr(_evaluator, "_CPU_BYTES", int(room * per_row))
        if room < 1:
            # Along the inverse, all of them: to rounding, but the same in every batch.
            expected = model.set_params(batch_size=1).reconstruct(Y)
        found = model.set_params(batch_size=batch_size).reconstruct(Y)
        np.testing.assert_array_equal(found.x, expected.x)
        np.testing.assert_array_equal(found.objective, expected.objective)


def test_weights_that_change_unseen_are_noticed():
    """Written through ``.data``, as averages of weights are."""
    for flow in (random_flow(Glow, (6,)), random_flow(Glow, (1, 4, 4))):
        prior = FlowPrior(flow=flow)
        x = torch.randn(3, flow.n_features, dtype=torch.float64)
        before = prior.score_samples(x)
        flow.log_prob(x), pickle.dumps(prior)
        for parameter in flow.parameters():
            parameter.data.mul_(1.1)
        after = prior.score_samples(x)
        assert (after - before).abs().min() > 1e-3
        torch.testing.assert_close(flow.log_prob(x), after)
        torch.testing.assert_close(pickle.loads(pickle.dumps(prior)).score_samples(x), after)
