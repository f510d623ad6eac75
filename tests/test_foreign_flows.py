"""Flows of other libraries: their own densities, autograd's Jacobians, and what must be refused.

Weights are random, as in the tests of the package's own flows; nothing is trained.
"""

import copy
import gc
import pickle
import weakref

import joblib
import numpy as np
import pytest
import torch
from problems import random_flow
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.distributions import (
    AffineTransform,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)
from torch.distributions import transforms as T
from torch.distributions.transforms import Transform

from skaipo import AIPORegressor, FlowPrior, GaussianPrior
from skaipo._fingerprint import fingerprint
from skaipo._handle import _PACKED
from skaipo.flows import Flow, as_flow
from skaipo.metrics import reconstruction_error_scorer
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # Of the other libraries.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
]


def perturb(module, scale=0.1):
    """Noise on what is trained: at their initialisation many layers are the identity."""
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def small_net(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))


def small_conv(n_in, n_out):
    return nn.Conv2d(n_in, n_out, 3, padding=1)


# -------------------------------------------------------------------------------- the kinds


def normflows_vectors():
    nf = pytest.importorskip("normflows")
    flows = []
    for _ in range(2):
        net = nf.nets.MLP([3, 8, 6], init_zeros=False)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(6, mode="swap")]
    # Its base has a location and scales of its own.
    return perturb(nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows))


def normflows_glow(class_cond=False, num_classes=None):
    nf = pytest.importorskip("normflows")
    flows = [
        [nf.flows.GlowBlock(8, 6), nf.flows.Squeeze()],
        [nf.flows.GlowBlock(4, 6), nf.flows.Squeeze()],
    ]
    bases = [
        nf.distributions.GlowBase((8, 1, 1), num_classes),
        nf.distributions.GlowBase((2, 2, 2), num_classes),
    ]
    model = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()], class_cond=class_cond)
    label = torch.zeros(64, dtype=torch.long) if num_classes else None
    model.log_prob(2 + 3 * torch.randn(64, 1, 4, 4), label)  # ActNorm takes its scales from it
    return perturb(model)


def normflows_spline():
    nf = pytest.importorskip("normflows")
    flows = [
        nf.flows.AutoregressiveRationalQuadraticSpline(6, 1, 8),
        nf.flows.LULinearPermute(6),
    ]
    return perturb(nf.NormalizingFlow(nf.distributions.DiagGaussian(6, trainable=False), flows))


def normflows_planar():
    """A density that cannot be sampled from."""
    nf = pytest.importorskip("normflows")
    flows = [nf.flows.Reverse(nf.flows.Planar((6,))) for _ in range(2)]
    return perturb(nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows), 0.3)


def zuko_spline():
    zuko = pytest.importorskip("zuko")
    return perturb(zuko.flows.NSF(6, transforms=2, hidden_features=(8,)))


def zuko_autoregressive():
    zuko = pytest.importorskip("zuko")
    return perturb(zuko.flows.MAF(6, transforms=2, hidden_features=(8,)))


def zuko_given_a_context():
    zuko = pytest.importorskip("zuko")
    flow = perturb(zuko.flows.NSF(6, context=2, transforms=1, hidden_features=(8,)))
    return flow.double()(torch.tensor([0.5, -1.0], dtype=torch.float64))


def nflows_autoregressive():
    pytest.importorskip("nflows")
    from nflows.distributions import DiagonalNormal
    from nflows.flows import Flow as NFlow
    from nflows.transforms import CompositeTransform, LULinear, MaskedAffineAutoregressiveTransform

    base = perturb(DiagonalNormal([6]))
    layers = [MaskedAffineAutoregressiveTransform(6, 8), LULinear(6)]
    return perturb(NFlow(CompositeTransform(layers), base))


def nflows_one_way():
    pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow
    from nflows.transforms import Transform as NTransform

    class OneWay(NTransform):
        def forward(self, inputs, context=None):
            return inputs + 0.5 * inputs.tanh(), (1.5 - 0.5 * inputs.tanh() ** 2).log().sum(1)

    return NFlow(OneWay(), StandardNormal([6]))


def freia_sequence():
    pytest.importorskip("FrEIA")
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    network = framework.SequenceINN(6)
    for _ in range(2):
        network.append(modules.AllInOneBlock, subnet_constructor=small_net, permute_soft=True)
    return perturb(network)


def freia_graph():
    """Images, and two outputs."""
    pytest.importorskip("FrEIA")
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    nodes = [framework.InputNode(1, 4, 4)]
    nodes.append(framework.Node(nodes[-1], modules.HaarDownsampling, {}))
    options = dict(subnet_constructor=small_conv)
    nodes.append(framework.Node(nodes[-1], modules.GLOWCouplingBlock, options))
    split = framework.Node(nodes[-1], modules.Split, dict(section_sizes=[1, 3], dim=0))
    flat = framework.Node(split.out0, modules.Flatten, {})
    ends = [framework.OutputNode(flat), framework.OutputNode(split.out1)]
    return perturb(framework.GraphINN([*nodes, split, flat, *ends]))


def torch_independent():
    loc, scale = torch.linspace(-1, 1, 6).double(), torch.linspace(0.5, 2, 6).double()
    base = Independent(Normal(loc, scale), 1)
    bend = T.ComposeTransform([T.TanhTransform(cache_size=0), AffineTransform(0.5, 3.0)])
    return TransformedDistribution(base, [AffineTransform(loc, 0.2 * scale), bend, bend.inv, bend])


def torch_correlated():
    root = (torch.eye(6) + 0.3 * torch.randn(6, 6).tril()).double()
    base = MultivariateNormal(torch.arange(6.0).double(), scale_tril=root)
    return TransformedDistribution(base, [AffineTransform(1.0, -0.5)])


TWO_WAYS = [
    normflows_vectors,
    normflows_glow,
    normflows_spline,
    zuko_spline,
    zuko_autoregressive,
    zuko_given_a_context,
    nflows_autoregressive,
    freia_sequence,
    freia_graph,
    torch_independent,
    torch_correlated,
]
ONE_WAY = [normflows_planar, nflows_one_way]
each_kind = pytest.mark.parametrize("kind", TWO_WAYS + ONE_WAY, ids=lambda kind: kind.__name__)
each_two_ways = pytest.mark.parametrize("kind", TWO_WAYS, ids=lambda kind: kind.__name__)
each_one_way = pytest.mark.parametrize("kind", ONE_WAY, ids=lambda kind: kind.__name__)


def make(kind):
    obj = kind()
    return obj.double() if isinstance(obj, nn.Module) else obj


def their_log_prob(obj, x):
    """By the library itself, of rows (n, d)."""
    if hasattr(obj, "q0") and isinstance(obj.q0, nn.ModuleList):
        return obj.log_prob(x.reshape(-1, 1, 4, 4), None)
    if type(obj).__name__ == "SequenceINN":
        z, log_det = obj(x)
    elif type(obj).__name__ == "GraphINN":
        (first, second), log_det = obj(x.reshape(-1, 1, 4, 4))
        z = torch.cat((first, second.flatten(1)), 1)
    elif isinstance(obj, nn.Module) and not hasattr(obj, "log_prob"):
        return obj().log_prob(x)
    else:
        return obj.log_prob(x)
    return Normal(0.0, 1.0).log_prob(z).sum(1) + log_det


def points(flow, n=5, seed=1):
    """Inside the support of every flow."""
    z = (
        0.7
        * torch.randn(n, flow.n_features, generator=torch.Generator().manual_seed(seed)).double()
    )
    return flow.inverse(z).flatten(1) if flow.has_inverse else z


# ---------------------------------------------------------------------------------- densities


@each_kind
def test_density_is_that_of_the_library(kind):
    obj = make(kind)
    flow = as_flow(obj)
    x = points(flow)
    ours = flow.log_prob(x)
    assert ours.dtype == torch.float64 and ours.shape == (len(x),)
    torch.testing.assert_close(ours, their_log_prob(obj, x), rtol=1e-6, atol=1e-6)
    prior = FlowPrior(flow=obj)
    check = prior.score_samples(x.detach().numpy())
    np.testing.assert_allclose(check, ours.detach().numpy(), rtol=1e-12)


@each_kind
def test_log_determinant_is_that_of_the_jacobian(kind):
    flow = as_flow(make(kind))
    for x in points(flow, 3):
        z, log_det = flow(x[None])
        jacobian = torch.autograd.functional.jacobian(lambda x, f=flow: f(x[None])[0][0], x)
        assert z.shape == (1, flow.n_features)
        torch.testing.assert_close(log_det[0], jacobian.slogdet()[1], rtol=1e-6, atol=1e-6)


@each_two_ways
def test_inverse(kind):
    flow = as_flow(make(kind))
    assert flow.has_inverse
    z = 0.7 * torch.randn(5, flow.n_features, dtype=torch.float64)
    x, log_det = flow.inverse_and_log_det(z)
    assert x.shape == (5, *flow.event_shape)
    again, forward_log_det = flow(x)
    torch.testing.assert_close(again, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, -forward_log_det, rtol=1e-5, atol=1e-5)
    # The moments of samples: a latent that was not made standard normal would show.
    prior = FlowPrior(flow=flow)
    latents = prior.transform(prior.sample(2000, random_state=0))
    assert np.abs(latents.mean(0)).max() < 0.15 and np.abs(latents.std(0) - 1).max() < 0.1


@each_kind
def test_gradient(kind):
    flow = as_flow(make(kind))
    x = points(flow, 2).detach()
    z, _, pull = flow.compile_for_inference().linearize(x)
    (gradient,) = pull((-z, 1.0))
    for k in range(flow.n_features):
        step = torch.zeros_like(x)
        step[:, k] = 1e-5
        slope = (flow.log_prob(x + step) - flow.log_prob(x - step)).detach() / 2e-5
        torch.testing.assert_close(gradient[:, k], slope, rtol=1e-4, atol=1e-4)


@each_kind
def test_rows_do_not_touch_each_other(kind):
    flow = as_flow(make(kind))
    x = points(flow, 4).detach()
    expected = flow.log_prob(x).detach()
    x = torch.cat((x, torch.full_like(x[:3], torch.nan)))
    x[5] = 1e300
    x[6, 0] = -torch.inf
    with torch.no_grad():
        value = flow.log_prob(x)
    torch.testing.assert_close(value[:4], expected, rtol=1e-9, atol=1e-9)
    assert not value[4:].isfinite().any()


def test_a_layer_that_refuses_a_row_does_not_refuse_the_others():
    class Fussy(Transform):
        domain = codomain = torch.distributions.constraints.real_vector
        bijective = True

        def _call(self, x):
            return x

        def _inverse(self, y):
            assert (y.abs() < 5).all()
            return y

        def log_abs_det_jacobian(self, x, y):
            return x.new_zeros(len(x))

    base = Independent(Normal(torch.zeros(3).double(), torch.ones(3).double()), 1)
    flow = as_flow(TransformedDistribution(base, [Fussy()]))
    x = torch.zeros(7, 3).double()
    x[4] = 9.0
    value = flow.log_prob(x)
    assert value.isnan().tolist() == [False] * 4 + [True] + [False] * 2
    with pytest.raises(AssertionError):
        flow.log_prob(x[[4, 4]])


# ------------------------------------------------------------- the same thing by other means


@pytest.mark.parametrize("space", ["image", "latent"])
def test_reconstructs_like_the_same_prior_of_the_package(space):
    rng = np.random.default_rng(0)
    root = np.tril(rng.normal(size=(6, 6)), -1) * 0.4 + np.diag(np.linspace(0.5, 2, 6))
    mean = rng.normal(size=6)
    tensors = torch.tensor(mean), torch.tensor(root)
    base = Independent(Normal(torch.zeros(6).double(), torch.ones(6).double()), 1)
    by_layers = TransformedDistribution(
        MultivariateNormal(torch.zeros(6).double(), scale_tril=tensors[1]),
        [AffineTransform(tensors[0], 1.0, event_dim=1)],
    )
    by_base = MultivariateNormal(tensors[0], tensors[1] @ tensors[1].T)
    assert as_flow(base).event_shape == (6,)
    known = GaussianPrior(mean, root @ root.T)
    op, noise = CompressedSensing(3, random_state=0), GaussianNoise(0.3)
    Y = noise.add_noise(op(known.sample(5, random_state=0)), random_state=1)
    options = dict(noise=noise, space=space, max_evals=300, tol=1e-7)
    exact = known.map_estimate(Y, op, noise=noise, lam=1.0)
    for prior in (known, FlowPrior(flow=by_layers), FlowPrior(flow=by_base)):
        x = AIPORegressor(op, prior=prior, **options).predict(Y)
        np.testing.assert_allclose(x, exact, atol=1e-4)


def test_an_own_flow_in_torchs_clothes():
    """A flow of the package as a torch transform: the same numbers, and the same gradients."""
    own = random_flow()

    class Wrapped(Transform):
        domain = codomain = torch.distributions.constraints.real_vector
        bijective = True

        def __init__(self):
            super().__init__()
            self.flow = own

        def _call(self, z):
            return self.flow.inverse(z)

        def _inverse(self, x):
            return self.flow(x)[0]

        def log_abs_det_jacobian(self, z, x):
            return self.flow.inverse_and_log_det(z)[1]

    base = Independent(Normal(torch.zeros(6).double(), torch.ones(6).double()), 1)
    prior = FlowPrior(flow=TransformedDistribution(base, [Wrapped()]))
    X = FlowPrior(flow=own).sample(6, random_state=0)
    options = dict(noise=GaussianNoise(0.5), max_evals=40)
    ours = AIPORegressor(Inpainting(), prior=FlowPrior(flow=own), **options).reconstruct(X)
    theirs = AIPORegressor(Inpainting(), prior=prior, **options).reconstruct(X)
    np.testing.assert_allclose(theirs.x, ours.x, atol=1e-6)
    np.testing.assert_allclose(theirs.log_prob, ours.log_prob, atol=1e-6)


def test_vectors_may_be_images():
    pytest.importorskip("zuko")
    obj = zuko_spline()
    assert as_flow(obj).event_shape == (6,)
    flow = as_flow(obj, (1, 2, 3))
    assert flow.event_shape == (1, 2, 3) and flow.sample(2).shape == (2, 1, 2, 3)
    X = FlowPrior(flow=obj, event_shape=(1, 2, 3)).sample(3, random_state=0).reshape(-1, 1, 2, 3)
    model = AIPORegressor(Denoising(), prior=FlowPrior(flow=obj, event_shape=(1, 2, 3)))
    assert model.set_params(max_evals=8).predict(X).shape == X.shape


def test_float32_and_dtype_changed_later():
    obj = torch_correlated()
    single = as_flow(copy.deepcopy(normflows_vectors()))
    assert single.loc.dtype == torch.float32 and single.sample(2).dtype == torch.float32
    module = zuko_autoregressive()
    prior = FlowPrior(flow=module)
    X = prior.sample(3, random_state=0)
    before = prior.score_samples(X)
    module.double()
    after = prior.score_samples(X)
    assert X.dtype == np.float32 and prior.flow_.loc.dtype == torch.float64
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)
    flow = copy.deepcopy(as_flow(obj)).float()
    x = torch.zeros(1, 6)
    torch.testing.assert_close(flow.log_prob(x), obj.log_prob(x.double()).float())


# ------------------------------------------------------------------------------- the prior


def model_of(prior, **options):
    options = dict(noise=GaussianNoise(0.5), max_evals=4) | options
    return AIPORegressor(Inpainting(), prior=prior, **options)


def ready(obj):
    """A fitted prior."""
    prior = FlowPrior(flow=obj)
    X = np.random.default_rng(0).normal(size=(70, prior.flow_.n_features))
    return prior.fit(X), X


@each_kind
def test_clones_and_copies_share_the_flow(kind):
    obj = make(kind)
    prior, X = ready(obj)
    expected = prior.score_samples(X)
    copies = [copy.copy(prior), copy.deepcopy(prior), clone(model_of(prior)).prior]
    for other in copies:
        check_is_fitted(other)
        assert other.flow is obj and other.flow_ is prior.flow_
        # (Some of these are outside of a flow's support.)
        assert np.array_equal(other.score_samples(X), expected, equal_nan=True)
    # What a clone forgets is the data; the flow is not checked again.
    assert clone(prior).flow is obj
    assert clone(prior).flow_ is FlowPrior(flow=obj).flow_ is as_flow(obj)
    assert clone(prior).flow_.clean is None and len(prior.flow_.clean) == len(X)
    assert "FlowPrior(flow=<" in repr(prior) and "\n" not in repr(prior)


@each_kind
def test_pickle(kind):
    obj = make(kind)
    prior, X = ready(obj)
    data = pickle.dumps(prior)
    assert obj not in _PACKED, "packed by itself, beside the adapter that holds it"
    other = pickle.loads(data)
    check_is_fitted(other)
    assert np.array_equal(other.score_samples(X), prior.score_samples(X), equal_nan=True)
    assert torch.equal(other.flow_.clean, prior.flow_.clean)
    if prior.flow_.has_inverse:
        z = 0.7 * np.random.default_rng(1).normal(size=(3, X.shape[1]))
        expected = prior.inverse_transform(z)
        np.testing.assert_array_equal(other.inverse_transform(z), expected)
    # Once, however many tasks refer to it; a second pickle is no larger than the first.
    assert len(pickle.dumps([prior, prior])) < 1.5 * len(data)
    assert len(pickle.dumps(other)) < 1.2 * len(data)


@pytest.mark.parametrize(
    "kind", [normflows_glow, zuko_spline, zuko_given_a_context, torch_correlated]
)
def test_fingerprints_know_the_weights(kind):
    flow = as_flow(make(kind))
    assert fingerprint(flow) == fingerprint(pickle.loads(pickle.dumps(flow)))
    changed = copy.deepcopy(flow)
    name = next(
        k for k, v in changed.state_dict().items() if v.is_floating_point() and v.numel() > 1
    )
    evaluator = changed.compile_for_inference()
    assert changed.compile_for_inference() is evaluator
    with torch.no_grad():
        changed.state_dict()[name].view(-1)[-1] += 0.5
    assert fingerprint(flow) != fingerprint(changed)
    assert changed.compile_for_inference() is not evaluator


@pytest.mark.parametrize("kind", [zuko_given_a_context, torch_correlated, normflows_planar])
def test_grid_search_in_processes(kind):
    prior, X = ready(make(kind))
    # A task for each process.
    options = dict(cv=[([0, 1], [2, 3, 4])], refit=False, scoring=reconstruction_error_scorer)
    search = GridSearchCV(model_of(prior), {"lam": [0.3, 3.0]}, n_jobs=2, **options)
    with joblib.parallel_config(backend="loky"):
        search.fit(X[:5], X[:5])
    alone = clone(search).set_params(n_jobs=1).fit(X[:5], X[:5])
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and scores[0] != scores[1]
    np.testing.assert_allclose(scores, alone.cv_results_["mean_test_score"], rtol=1e-6)


@pytest.mark.parametrize("kind", [normflows_vectors, torch_correlated, zuko_given_a_context])
def test_fit_takes_the_flow_itself(kind):
    obj = make(kind)
    X = FlowPrior(flow=obj).sample(3, random_state=0)
    expected = model_of(FlowPrior(flow=obj)).predict(X)
    np.testing.assert_array_equal(model_of(None).fit(obj).predict(X), expected)
    np.testing.assert_array_equal(model_of(None).fit(prior=obj).predict(X), expected)


def test_save_refuses(tmp_path):
    with pytest.raises(TypeError, match="Only the flows of skaipo.flows can be saved"):
        FlowPrior(flow=torch_correlated()).save(tmp_path / "prior.safetensors")


def test_what_is_done_to_the_object():
    pytest.importorskip("normflows")
    module = make(normflows_glow).train()
    state = copy.deepcopy(module.state_dict())
    prior = FlowPrior(flow=module)
    prior.sample(2, random_state=0)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    # A base that is trained further is followed.
    X = prior.sample(3, random_state=0)
    with torch.no_grad():
        for base in module.q0:
            base.log_scale.add_(0.1)
    theirs = module.log_prob(torch.tensor(X).reshape(-1, 1, 4, 4), None).numpy()
    np.testing.assert_allclose(prior.score_samples(X), theirs, rtol=1e-9)
    # Tensors of a distribution are left alone.
    scale = torch.ones(3, requires_grad=True)
    as_flow(TransformedDistribution(Normal(torch.zeros(3), 1.0), [AffineTransform(0.0, scale)]))
    assert scale.requires_grad and scale.grad is None


def test_adapters_die_with_what_they_wrap():
    module = nn.Module()
    obj = torch_correlated()
    flow = as_flow(obj)
    assert as_flow(obj) is flow and as_flow(flow) is flow
    gone = weakref.ref(flow)
    del flow, obj, module
    gc.collect()
    assert gone() is None


# ----------------------------------------------------------------------- flows of one direction


class Squashed(Flow):
    """A flow of the package's own kind that has no way back."""

    has_inverse = False

    def __init__(self, d):
        super().__init__((d,))
        self.double()

    def _normalize(self, x):
        return x + 0.5 * x.tanh(), (1.5 - 0.5 * x.tanh() ** 2).log().sum(1)


def squashed():
    return Squashed(6)


@pytest.mark.parametrize("kind", [*ONE_WAY, squashed], ids=lambda kind: kind.__name__)
def test_without_a_way_back(kind):
    obj = make(kind)
    prior = FlowPrior(flow=obj)
    assert not prior.flow_.has_inverse
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) * 0.3
    # The density and the latents are there at once; what others learn from samples is not.
    assert prior.score_samples(X).shape == (50,) and prior.transform(X).shape == X.shape
    for call in (prior.sample, lambda: prior.inverse_transform(X)):
        with pytest.raises(NotImplementedError, match="no direction from latents to data"):
            call()
    with pytest.raises(NotFittedError):
        check_is_fitted(prior)
    with pytest.raises(NotFittedError, match="clean data gives it their mean and covariance"):
        model_of(prior).predict(X)
    with pytest.raises(ValueError, match="clean data gives it their mean and covariance"):
        model_of(prior).fit(X)
    with pytest.raises(ValueError, match="fit\\(X\\)"):
        prior.flow_.data_scale()
    with pytest.raises(ValueError, match="at least 4 samples that differ"):
        prior.fit(X[:2])

    assert prior.fit(X) is prior
    check_is_fitted(prior)
    check_is_fitted(pickle.loads(pickle.dumps(prior)))
    assert prior.flow_.data_scale() == pytest.approx(np.sqrt(X.var(0, ddof=1).mean()), rel=1e-3)
    for refused in (dict(space="latent"), dict(init="random"), dict(init="zero"), dict(n_starts=4)):
        with pytest.raises(ValueError, match="no direction from latents to data, which"):
            model_of(prior, max_evals=40, random_state=0, **refused).predict(X)
    Y = np.where(rng.random(X.shape) < 0.3, np.nan, X)
    best = None
    starts = [
        dict(),
        dict(init="mle", mle_solver="pgd", schedule="linear", solver="adam"),
        dict(init="mle"),
        dict(n_starts=3),
        dict(lam=0.0),
    ]
    # What comes before the first look at the flow is the same for every kind.
    for options in starts if kind is squashed else starts[:1]:
        result = model_of(prior, **{"max_evals": 100, **options}).reconstruct(Y[:3])
        assert np.isfinite(result.objective).all() and "diverged" not in result.status
        if options.get("lam") != 0.0:
            # The density has one mode along each line here: all starts lead to it.
            best = result.objective if best is None else best
            np.testing.assert_allclose(result.objective, best, rtol=0.02, atol=0.05)
    # Trained by the estimator, where it is given clean data.
    fitted = model_of(FlowPrior(flow=obj)).fit(X, X)
    assert fitted.predict(Y[:2]).shape == (2, 6)


def test_few_data_do_not_replace_samples():
    obj = torch_correlated()
    prior, X = ready(obj)
    assert len(prior.flow_.clean) == 70
    for few in (X[:63], np.zeros_like(X)):
        assert FlowPrior(flow=obj).fit(few).flow_ is as_flow(obj)
    # Grey levels are dequantised: a pixel that never changes has the variance of the noise.
    levels = np.random.default_rng(0).integers(0, 3, X.shape).astype(float)
    levels[:, 0] = 0
    spread = FlowPrior(flow=obj).fit(levels).flow_.clean[:, 0].std()
    assert spread == pytest.approx(12**-0.5, rel=0.2)


def test_moments_come_from_all_of_the_data():
    X = torch.arange(4000.0).double()[:, None].expand(-1, 6) + torch.randn(6).double()
    flow = Squashed(6).with_clean_data(X)
    assert len(flow.clean) == 1024 and flow.centre().mean() == pytest.approx(2000, rel=0.01)
    assert Squashed(6).clean is None


# ------------------------------------------------------------------------------ what is refused


class Bent(Transform):
    """x = sinh(z), with whatever is wrong with it."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True
    sign = 1

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def _call(self, z):
        return z.sinh() * (1.1 if self.fault == "round trip" else 1.0)

    def _inverse(self, x):
        if self.fault == "one way":
            raise NotImplementedError
        if self.fault == "constant":
            return (x / x.detach()) * x.detach().asinh().detach()
        if self.fault == "numpy":
            return x.detach().asinh()
        if self.fault == "noisy":
            return x.asinh() + 0.01 * torch.randn_like(x)
        if self.fault == "batch":
            return (x - x.mean(0)).asinh()
        return x.asinh()

    def log_abs_det_jacobian(self, z, x):
        value = z.cosh().log()
        return {"sign": -value, "missing": 0 * value}.get(self.fault, value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sign", "not that of its Jacobian.*off by .* nats.*The sign is wrong"),
        ("missing", "not that of its Jacobian, .* by autograd: it is off by"),
        ("round trip", "not inverses of each other: z -> x -> z is off by 0"),
        ("one way", "no direction from data to latents"),
        ("numpy", "cannot be differentiated"),
        ("noisy", "is random: called twice"),
        ("batch", "not inverses|rows of a batch affect each other"),
    ],
)
def test_faults_are_found(fault, message):
    base = Normal(torch.zeros(5).double(), torch.ones(5).double())
    assert as_flow(TransformedDistribution(base, [Bent()])).has_inverse
    with pytest.raises(ValueError, match=message) as caught:
        as_flow(TransformedDistribution(base, [Bent(fault)]))
    assert "torch's TransformedDistribution" in str(caught.value)


def test_wrong_sign_of_one_direction_is_found():
    nf = pytest.importorskip("normflows")

    class Wrong(nf.flows.Flow):
        def forward(self, z):
            return 2 * z, torch.full((len(z),), 6 * np.log(2.0))

        def inverse(self, x):
            return x / 2, torch.full((len(x),), 6 * np.log(2.0))

    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), [Wrong()]).train()
    with pytest.raises(
        ValueError, match="do not cancel: 4.15888 .* off by 8.32 nats.*sign is wrong"
    ):
        as_flow(model)
    assert model.training  # what is refused is left as it came


def test_a_density_that_is_not_the_flows_is_found():
    nf = pytest.importorskip("normflows")

    class Tempered(nf.NormalizingFlow):
        def log_prob(self, x):
            return super().log_prob(x) / 2

    flow = normflows_vectors()
    with pytest.raises(ValueError, match="by its own library is .* off by"):
        as_flow(Tempered(flow.q0, list(flow.flows)))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (Laplace(torch.zeros(3), torch.ones(3)), "no Gaussian's curvature"),
        (Uniform(-torch.ones(3), torch.ones(3)), "no Gaussian's curvature"),
        (torch.distributions.StudentT(torch.full((3,), 5.0)), "differs by .* nats"),
    ],
)
def test_base_must_be_gaussian(base, said):
    with pytest.raises(ValueError, match=f"is not Gaussian: .*{said}"):
        as_flow(TransformedDistribution(base, [AffineTransform(1.0, 2.0)]))


def test_support_may_be_a_half_line():
    flow = as_flow(LogNormal(torch.zeros(3).double(), 0.5 * torch.ones(3).double()))
    x = flow.sample(4)
    expected = LogNormal(0.0, 0.5).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_shapes():
    batch = MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
    with pytest.raises(ValueError, match="batch of \\(2,\\) distributions of shape \\(3,\\)"):
        as_flow(batch)
    assert as_flow(Independent(batch, 1), (6,)).event_shape == (6,)
    field = Independent(Normal(torch.zeros(2, 3), 1.0), 2)
    with pytest.raises(ValueError, match="have shape \\(2, 3\\).*Pass event_shape"):
        as_flow(field)
    assert as_flow(field, (1, 2, 3)).event_shape == (1, 2, 3)
    with pytest.raises(ValueError, match="event_shape \\(5,\\) has 5 entries"):
        as_flow(field, (5,))
    own = random_flow()
    assert as_flow(own) is own and as_flow(own, (6,)) is own
    with pytest.raises(ValueError, match="event_shape is \\(7,\\), but the flow RealNVP has"):
        as_flow(own, (7,))
    assert as_flow(Normal(torch.tensor(1.0).double(), 2.0)).event_shape == (1,)
    with pytest.raises(ValueError, match="AbsTransform.* is not invertible"):
        as_flow(TransformedDistribution(Normal(torch.zeros(3), 1.0), [T.AbsTransform()]))


def test_normflows_that_are_refused():
    nf = pytest.importorskip("normflows")
    untrained = [nf.flows.ActNorm((6,))]
    base = nf.distributions.DiagGaussian(6)
    with pytest.raises(ValueError, match="is not trained: its ActNorm layers"):
        as_flow(nf.NormalizingFlow(base, untrained))
    assert not untrained[0].data_dep_init_done and not untrained[0].t.any()
    with pytest.raises(ValueError, match="conditional on a class"):
        as_flow(normflows_glow(class_cond=True, num_classes=3))
    # Classes are the default of the library, and mean nothing where the base has none.
    assert as_flow(normflows_glow(class_cond=True)).event_shape == (1, 4, 4)
    with pytest.raises(ValueError, match="conditional on a class"):
        labelled = nf.distributions.ClassCondDiagGaussian(6, 3)
        as_flow(nf.ClassCondFlow(labelled, [nf.flows.Permute(6)]))
    with pytest.raises(ValueError, match="conditional on a context"):
        as_flow(nf.ConditionalNormalizingFlow(base, []))
    with pytest.raises(ValueError, match="no direction from data to latents"):
        as_flow(nf.NormalizingFlow(base, [nf.flows.Planar((6,))]))
    with pytest.raises(ValueError, match="GaussianMixture, is not Gaussian"):
        mixture = nf.distributions.GaussianMixture(2, 6)
        as_flow(nf.NormalizingFlow(mixture, [nf.flows.Permute(6)]).double(), (6,))
    with pytest.raises(ValueError, match="does not say the shape"):
        as_flow(nf.NormalizingFlow(nf.distributions.GaussianMixture(2, 6), [nf.flows.Permute(6)]))


def test_zuko_that_are_refused():
    zuko = pytest.importorskip("zuko")
    conditional = zuko.flows.NSF(3, context=2, hidden_features=(8,))
    with pytest.raises(ValueError, match="If the flow is conditional, fix its context"):
        as_flow(conditional)
    with pytest.raises(ValueError, match="batch of \\(4,\\) distributions"):
        as_flow(conditional(torch.zeros(4, 2)))
    with pytest.raises(TypeError, match="must be a skaipo.flows.Flow, got GMM"):
        as_flow(zuko.mixtures.GMM(3, components=2))


def test_freia_that_are_refused():
    pytest.importorskip("FrEIA")
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    network = framework.SequenceINN(6)
    network.append(modules.ActNorm)
    with pytest.raises(ValueError, match="is not trained: its ActNorm layers"):
        as_flow(network)
    network = framework.SequenceINN(6)
    network.append(modules.AllInOneBlock, cond=0, cond_shape=(2,), subnet_constructor=small_net)
    with pytest.raises(ValueError, match="is conditional"):
        as_flow(network)


def test_anything_else():
    for obj in (nn.Linear(2, 2), 3, None):
        with pytest.raises(TypeError, match="flow must be a skaipo.flows.Flow, got"):
            as_flow(obj)
