"""The MAP objective against finite differences, scipy, and autograd's Jacobians.

All in float64 at random parameters: at the zeros of its initialisation a flow is the identity, and
everything would pass.
"""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch
from problems import (
    any_flow,
    any_operator,
    covering,
    drop_entries,
    gaussian_prior,
    make_objective,
    random_flow,
)
from scipy import stats
from torch.autograd.functional import jacobian

from skaipo.flows import Flow, Glow, RealNVP
from skaipo.noise import GaussianNoise
from skaipo.objective import Evaluation
from skaipo.operators import Denoising, Inpainting

FLOWS = ["gaussian", "realnvp", "glow"]
OPERATORS = ["denoising", "inpainting", "compressed"]
SPACES = ["image", "latent"]
PENALTIES = ["density", "latent"]
N = 5


def noise_of(name, m):
    return {"squared": None, "gaussian": GaussianNoise(np.linspace(0.3, 0.9, m))}[name]


def problem(flow, operator, noise="gaussian", space="image", penalty="density", n=N, missing=True):
    """An objective with missing entries, a point to evaluate it at, and the numbers behind."""
    flow = any_flow(flow) if isinstance(flow, str) else flow
    d = flow.n_features
    op = any_operator(operator, d)
    m = op.bind(flow.event_shape).n_measurements_
    rng = np.random.default_rng(1)
    y = rng.normal(size=(n, m))
    y = drop_entries(y) if missing else y
    model = noise_of(noise, m)
    objective = make_objective(flow, op, model, y, space, penalty)
    u = torch.as_tensor(rng.normal(size=(n, d)))
    return objective, u, op.bind(flow.event_shape), model, y


def every_field(evaluation):
    return {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}


def assert_same_bits(a, b, rows=slice(None)):
    for name, value in every_field(a).items():
        torch.testing.assert_close(
            value[rows], getattr(b, name)[rows], rtol=0, atol=0, equal_nan=True, msg=name
        )


# ---------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "flow, operator, noise", covering(FLOWS, OPERATORS, ["squared", "gaussian"])
)
def test_values_are_the_formulas(flow, operator, noise):
    objective, x, op, model, y = problem(flow, operator, noise)
    result = objective.evaluate(x)

    # f(x) is read off the operator's dense matrix; only what was measured counts.
    matrix = op.forward(torch.eye(op.n_features_in_, dtype=torch.float64)).numpy().T
    residual = y - x.numpy() @ matrix.T
    residual[:, ~op.measured_] = np.nan
    weight = 1.0 if model is None else 0.5 / np.asarray(model.sigma) ** 2
    data = np.nansum(weight * residual**2, axis=1)
    assert np.isnan(residual).any(), "the problem is meant to have missing entries"
    np.testing.assert_allclose(result.data, data, rtol=1e-12)

    # log p by the change of variables, with the whole Jacobian.
    def normalise(row):
        return objective.flow(row.reshape(1, *objective.flow.event_shape))[0].flatten()

    log_det = torch.stack([torch.linalg.slogdet(jacobian(normalise, row)).logabsdet for row in x])
    z = torch.stack([normalise(row) for row in x])
    log_prob = stats.norm.logpdf(z).sum(1) + log_det.numpy()
    np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-10)
    np.testing.assert_allclose(result.prior, -log_prob, rtol=1e-10)
    np.testing.assert_array_equal(result.x, x)

    lam = torch.linspace(0.2, 1.7, N, dtype=torch.float64)
    np.testing.assert_allclose(result.value(lam), data - lam.numpy() * log_prob, rtol=1e-10)


def test_log_prob_of_the_gaussian_is_that_of_scipy():
    prior = gaussian_prior()
    objective = make_objective(prior.flow_, Denoising(), None, np.zeros((4, 6)))
    x = np.random.default_rng(2).normal(size=(4, 6))
    expected = stats.multivariate_normal(prior.mean_, prior.covariance_).logpdf(x)
    np.testing.assert_allclose(objective.evaluate(torch.tensor(x)).log_prob, expected, rtol=1e-11)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("flow", FLOWS)
def test_both_spaces_are_one_function(flow, operator):
    latent, z, *_ = problem(flow, operator, space="latent")
    at_z = latent.evaluate(z)
    x = latent.flow.inverse(z).flatten(1)
    at_x = latent.in_space("image").evaluate(x)
    for name in ("x", "data", "prior", "log_prob"):
        torch.testing.assert_close(
            getattr(at_z, name), getattr(at_x, name), rtol=1e-9, atol=1e-9, msg=name
        )
    # And both are the same with the other penalty, half of the squared norm of z.
    half = latent.in_space("latent", "latent").evaluate(z)
    torch.testing.assert_close(half.prior, 0.5 * z.square().sum(1))
    torch.testing.assert_close(
        latent.in_space("image", "latent").evaluate(x).prior, half.prior, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(half.log_prob, at_z.log_prob)
    assert not torch.allclose(half.prior, at_z.prior)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "flow, operator, noise, space, penalty",
    covering(FLOWS, OPERATORS, ["squared", "gaussian"], SPACES, PENALTIES),
)
def test_gradients_against_finite_differences(flow, operator, noise, space, penalty):
    objective, u, *_ = problem(flow, operator, noise, space, penalty)
    result = objective.evaluate(u)
    step = 1e-6
    data, prior = torch.empty_like(u), torch.empty_like(u)
    for i in range(u.shape[1]):
        shift = torch.zeros_like(u)
        shift[:, i] = step
        above, below = objective.evaluate(u + shift), objective.evaluate(u - shift)
        data[:, i] = (above.data - below.data) / (2 * step)
        prior[:, i] = (above.prior - below.prior) / (2 * step)
    torch.testing.assert_close(result.grad_data, data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.grad_prior, prior, rtol=1e-6, atol=1e-6)
    assert (data.norm(dim=1) > 1e-3).all() and (prior.norm(dim=1) > 1e-3).all()

    lam = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    torch.testing.assert_close(
        result.gradient(lam), data + lam[:, None] * prior, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("flow", FLOWS)
def test_latent_gradient_is_the_jacobian_transposed_times_the_image_gradient(flow, penalty):
    latent, z, *_ = problem(flow, "compressed", space="latent", penalty=penalty)
    at_z = latent.evaluate(z)
    at_x = latent.in_space("image").evaluate(latent.image(z))
    for row in range(N):
        generator = jacobian(lambda v: latent.flow.inverse(v[None]).flatten(), z[row])
        for name in ("grad_data", "grad_prior"):
            expected = generator.T @ getattr(at_x, name)[row]
            torch.testing.assert_close(getattr(at_z, name)[row], expected, rtol=1e-7, atol=1e-8)


def test_unmeasured_entries_have_no_influence():
    y = np.random.default_rng(0).normal(size=(3, 6))
    mask = np.array([1, 0, 1, 1, 0, 1], dtype=bool)
    flow = any_flow("realnvp")
    x = torch.randn(3, 6, dtype=torch.float64)
    reference = make_objective(flow, Inpainting(mask), None, y).evaluate(x)
    for content in (np.nan, np.inf, 1e300):
        other = y.copy()
        other[:, ~mask] = content
        masked = make_objective(flow, Inpainting(mask), None, other)
        assert_same_bits(masked.evaluate(x), reference)
        assert masked.observed.sum(1).tolist() == [4, 4, 4]
    # A mask, and NaN under Denoising, are two ways to say the same.
    other = np.where(mask, y, np.nan)
    objective = make_objective(flow, Denoising(), None, other)
    assert_same_bits(objective.evaluate(x), reference)
    assert (reference.grad_data[:, ~mask] == 0).all()


# ---------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "architecture, operator, space, dtype",
    covering([RealNVP, Glow], OPERATORS, SPACES, [torch.float64, torch.float32]),
)
def test_a_row_alone_is_the_row_in_a_batch(architecture, operator, space, dtype):
    """To rounding: kernels choose their order of summation by the batch's size and alignment.

    Padding makes most of it the same bits, but which bits is up to the processor.
    """
    flow = random_flow(architecture, (1, 4, 4) if architecture is Glow else (7,), dtype)
    objective, u, _, _, y = problem(flow, operator, space=space, n=21)
    u = u.to(dtype)
    together = objective.evaluate(u)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for rows in ([0], [20], [3, 4, 5, 6, 7], list(range(2, 18))):
        part = make_objective(flow, objective.op, objective.noise, y[rows], space).evaluate(u[rows])
        subset = objective.evaluate(u[rows], torch.tensor(rows))
        for name, value in every_field(together).items():
            size = value.abs().max().item()
            for other in (part, subset):
                error = (getattr(other, name) - value[rows]).abs().max().item()
                assert error <= tolerance * size, (name, rows)


@pytest.mark.parametrize("n, expected", [(1, 16), (8, 16), (16, 16), (17, 24), (24, 24)])
def test_small_batches_are_padded(n, expected):
    """What the equality of rows rests on; eight rows and fewer go other ways through oneDNN."""

    class Spy(Flow):
        seen = []

        def _normalize(self, x):
            self.seen.append(len(x))
            return x, x.new_zeros(len(x))

    flow = Spy((3,)).double()
    objective = make_objective(flow, Denoising(), None, np.zeros((n, 3)))
    assert len(objective.evaluate(torch.zeros(n, 3, dtype=torch.float64)).data) == n
    assert flow.seen == [expected]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("flow", FLOWS)
def test_neighbours_do_not_change_a_row_by_one_bit(flow, operator, space):
    objective, u, *_ = problem(flow, operator, space=space, n=12)
    reference = objective.evaluate(u)
    others = [i for i in range(12) if i not in (2, 7, 9)]
    for poison in (torch.nan, torch.inf, 1e30, 1e300):
        spoilt = copy.copy(objective)
        spoilt.y = objective.y.clone()
        spoilt.y[7] = poison
        bad = u.clone()
        bad[2] = poison
        bad[9] = -poison
        result = spoilt.evaluate(bad)
        assert_same_bits(result, reference, others)
        assert result.finite()[others].all()
        if not np.isfinite(poison):
            assert not result.finite()[[2, 9]].any()


# ---------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("space", SPACES)
def test_evaluations_are_counted_per_row(space):
    objective, u, *_ = problem("realnvp", "compressed", space=space)
    assert objective.n_evals.tolist() == [0] * N
    objective.evaluate(u)
    objective.evaluate(u[[4, 1]], torch.tensor([4, 1]))
    objective.evaluate(u[:1], torch.tensor([1]))
    assert objective.n_evals.tolist() == [1, 3, 1, 1, 2]
    # Another view of the same problem counts into the same counters.
    other = objective.in_space("image" if space == "latent" else "latent")
    other.evaluate(u)
    assert objective.n_evals.tolist() == other.n_evals.tolist() == [2, 4, 2, 2, 3]


def test_going_to_latent_space_costs_an_evaluation_and_comes_back():
    latent, _, *_ = problem("glow", "denoising", space="latent")
    x = torch.randn(N, 16, dtype=torch.float64)
    z = latent.variable(x)
    assert latent.n_evals.tolist() == [1] * N
    torch.testing.assert_close(latent.image(z), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latent.evaluate(z).x, x, rtol=1e-9, atol=1e-9)
    image = latent.in_space("image")
    before = image.n_evals.clone()
    assert image.variable(x) is x and image.image(x) is x
    assert torch.equal(image.n_evals, before)


def test_a_subset_belongs_to_the_measurements_named():
    objective, u, *_ = problem("realnvp", "compressed")
    rows = torch.tensor([3, 0, 3])
    result = objective.evaluate(u[rows], rows)
    reference = objective.evaluate(u)
    torch.testing.assert_close(result.data, reference.data[rows])
    swapped = objective.evaluate(u[rows], torch.tensor([0, 3, 1]))
    assert not torch.isclose(swapped.data, reference.data[rows]).any()


def test_inputs_are_left_alone():
    flow = any_flow("realnvp")
    y = torch.randn(N, 6, dtype=torch.float64)
    y[0, 2] = torch.nan
    kept = y.clone()
    objective = make_objective(flow, Denoising(), None, y)
    u = torch.randn(N, 6, dtype=torch.float64)
    kept_u = u.clone()
    objective.evaluate(u)
    torch.testing.assert_close(y, kept, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(u, kept_u) and not u.requires_grad


# ---------------------------------------------------------------------------------- evaluation


def test_relative_gradient_is_zero_at_the_closed_form_minimum():
    prior = gaussian_prior()
    rng = np.random.default_rng(5)
    noise = GaussianNoise(0.4)
    for name in OPERATORS:
        op = any_operator(name, 6)
        y = drop_entries(rng.normal(size=(4, op.bind((6,)).n_measurements_)))
        lam = torch.full((4,), 0.7, dtype=torch.float64)
        x = torch.tensor(prior.map_estimate(y, op, noise, lam=0.7))
        for space in SPACES:
            objective = make_objective(prior.flow_, op, noise, y, space)
            u = objective.variable(x)
            relative = objective.evaluate(u).relative_gradient(lam)
            assert (relative < 1e-10).all()
            away = objective.evaluate(u + 0.1).relative_gradient(lam)
            assert ((away > 1e-3) & (away <= 1)).all()


def test_relative_gradient_by_its_formula():
    grad_data = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).double()
    grad_prior = torch.tensor([[-3.0, -4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 5.0]]).double()
    zero = torch.zeros(4, dtype=torch.float64)
    result = Evaluation(grad_data, zero, zero, zero, grad_data, grad_prior)
    lam = torch.tensor([1.0, 1.0, 2.0, 1.0]).double()
    expected = torch.tensor([0.0, 0.0, 5**0.5 / 3, 1.0]).double()
    torch.testing.assert_close(result.relative_gradient(lam), expected)
    # Half of the opposing term: 5 / (10 + 5).
    doubled = Evaluation(grad_data, zero, zero, zero, 2 * grad_data, grad_prior)
    assert doubled.relative_gradient(lam)[0] == pytest.approx(1 / 3)


def test_relative_gradient_has_no_units():
    objective, u, *_ = problem("glow", "compressed", missing=False)
    result = objective.evaluate(u)
    lam = torch.full((N,), 0.3, dtype=torch.float64)
    scaled = copy.copy(result)
    scaled.grad_data, scaled.grad_prior = 1e9 * result.grad_data, 1e9 * result.grad_prior
    torch.testing.assert_close(scaled.relative_gradient(lam), result.relative_gradient(lam))


def test_where_and_rows_pick_whole_rows():
    objective, u, *_ = problem("realnvp", "inpainting")
    first, second = objective.evaluate(u), objective.evaluate(u + 1)
    mask = torch.tensor([True, False, False, True, False])
    merged = first.where(mask, second)
    for name, value in every_field(merged).items():
        assert torch.equal(value[mask], getattr(second, name)[mask]), name
        assert torch.equal(value[~mask], getattr(first, name)[~mask]), name
        assert not torch.equal(getattr(first, name)[mask], getattr(second, name)[mask]), name
    for index in (mask, torch.tensor([3, 1])):
        picked = first.rows(index)
        for name, value in every_field(picked).items():
            assert torch.equal(value, getattr(first, name)[index]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "data", "prior", "grad_data", "grad_prior"])
def test_finite_sees_every_field(name, bad):
    objective, u, *_ = problem("realnvp", "denoising")
    result = objective.evaluate(u)
    assert result.finite().all()
    spoilt = getattr(result, name).clone()
    spoilt.view(N, -1)[2, -1] = bad
    setattr(result, name, spoilt)
    assert result.finite().tolist() == [True, True, False, True, True]


# ---------------------------------------------------------------------------------- errors


def test_unknown_space_and_penalty():
    flow = any_flow("gaussian")
    with pytest.raises(ValueError, match=r"space must be one of 'image', 'latent', got 'pixels'"):
        make_objective(flow, Denoising(), None, np.zeros((1, 6)), "pixels")
    with pytest.raises(ValueError, match=r"penalty must be one of 'density', 'latent', got 'l2'"):
        make_objective(flow, Denoising(), None, np.zeros((1, 6)), "image", "l2")
    objective = make_objective(flow, Denoising(), None, np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"space must be one of"):
        objective.in_space("pixels")
