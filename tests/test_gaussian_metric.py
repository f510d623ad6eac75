"""The Gaussian stand-in of a prior against dense linear algebra and closed forms."""

import math

import numpy as np
import pytest
import torch
from problems import Cliff, any_operator, drop_entries, gaussian_prior, make_objective, random_flow
from scipy.fft import dct

from skaipo import AIPORegressor, FlowPrior, GaussianPrior
from skaipo.flows import Glow, RealNVP
from skaipo.noise import GaussianNoise, NoiseModel
from skaipo.operators import Denoising, Inpainting, MatrixOperator
from skaipo.solvers import (
    LBFGS,
    STATUS,
    Adam,
    GaussianMetric,
    GaussianSurrogate,
    Hybrid,
    gaussian_start,
    minimize,
    surrogate_of,
)

CONVERGED = STATUS.index("converged")
SIGMA = 0.5
NOISES = {
    "squared": None,
    "gaussian": GaussianNoise(SIGMA),
    "per entry": GaussianNoise(np.linspace(0.2, 2.0, 6)),
}


def exact_surrogate(prior):
    """The moments themselves instead of those of samples."""
    variances, axes = np.linalg.eigh(prior.covariance_)
    mean = torch.tensor(prior.mean_)
    return GaussianSurrogate(mean, torch.tensor(axes), torch.tensor(variances), None, [])


def gaussian_problem(operator="compressed", noise="gaussian", n=6, missing=True, seed=0):
    """Objective with the exact metric, prior, operator, noise and measurements."""
    prior, op, noise = gaussian_prior(), any_operator(operator, 6), NOISES[noise]
    x = np.random.default_rng(seed).multivariate_normal(prior.mean_, prior.covariance_, size=n)
    y = GaussianNoise(SIGMA).add_noise(op(x), random_state=seed)
    if operator == "compressed" and noise is NOISES["per entry"]:
        noise = GaussianNoise(np.linspace(0.2, 2.0, y.shape[1]))
    y = drop_entries(y, seed) if missing else y
    objective = make_objective(prior.flow_, op, noise, y)
    objective.metric = GaussianMetric(exact_surrogate(prior), objective)
    return objective, prior, op, noise, y


def matrix_of(op, d):
    """The operator's matrix, column by column."""
    bound = op.bind((d,))
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    return (bound.forward(eye) - bound.forward(zero)).numpy().T


def dense_hessians(objective, precision, op, noise, lam):
    """``A_i^T W A_i + lam_i S`` with the rows of ``A`` that were measured, one matrix per row."""
    A = matrix_of(op, len(precision))
    sigma = 0.5**0.5 if noise is None else np.asarray(noise.sigma)
    weight = np.broadcast_to(sigma**-2.0, len(A))
    hessians = []
    for seen, weighting in zip(objective.observed.numpy(), lam.tolist(), strict=True):
        hessians.append((A[seen].T * weight[seen]) @ A[seen] + weighting * precision)
    return np.stack(hessians)


# ---------------------------------------------------------------------------------- surrogate


def dense_transform(axes):
    """The transform along the axes as one matrix, by Kronecker products."""
    colours, rows, columns = (axis.numpy() for axis in axes)
    return np.kron(colours, np.kron(rows, columns))


def dense_precision(surrogate):
    """``U diag(1/e) U^T + Q F^T diag(1/p) F Q``, as the class says."""
    U, e = surrogate.basis.numpy(), surrogate.variances.numpy()
    precision = (U / e) @ U.T
    if surrogate.residual is not None:
        d = len(U)
        F = dense_transform(surrogate.axes) if surrogate.axes else np.eye(d)
        Q = np.eye(d) - U @ U.T
        precision = precision + Q @ (F.T / surrogate.residual.numpy()) @ F @ Q
    return precision


def smooth_images(n=160, shape=(3, 12, 24), seed=0):
    """Images whose neighbouring pixels correlate, as those of a flow of photographs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape))
    for axis in (2, 3):
        x = x + np.roll(x, 1, axis) + 0.5 * np.roll(x, 2, axis)
    x = np.einsum("ij,njkl->nikl", [[1.0, 0.5, 0.2], [0.0, 0.6, 0.3], [0.0, 0.0, 0.2]], x)
    return torch.tensor(x.reshape(n, -1) + 3.0)


def test_the_moments_of_a_normal_distribution_are_found():
    prior = gaussian_prior()
    surrogate, n = surrogate_of(prior.flow_), 1024
    U, e = surrogate.basis.numpy(), surrogate.variances.numpy()
    np.testing.assert_allclose(U.T @ U, np.eye(6), atol=1e-12)
    assert surrogate.residual is None
    # Five standard errors (of a covariance: Wishart).
    covariance, variance = prior.covariance_, np.diag(prior.covariance_)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert (np.abs((U * e) @ U.T - covariance) < 5 * error).all()
    assert (np.abs(surrogate.mean.numpy() - prior.mean_) < 5 * np.sqrt(variance / n)).all()
    # And they are those of the samples, whose principal components are all there is.
    x = np.random.default_rng(0).multivariate_normal(prior.mean_, covariance, size=400)
    surrogate = GaussianSurrogate.from_samples(torch.tensor(x), (6,))
    np.testing.assert_allclose(surrogate.mean, x.mean(0))
    sample = np.linalg.inv(np.cov(x.T, bias=True))
    np.testing.assert_allclose(dense_precision(surrogate), sample, rtol=1e-9, atol=1e-9)


def test_wild_samples_are_left_out():
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)))
    clean = GaussianSurrogate.from_samples(x, (5,))
    wild = x[:4].clone()
    wild[0, 1], wild[1, 2], wild[2], wild[3] = torch.nan, torch.inf, 1e6, -1e30
    # In between, so that order plays no part.
    mixed = torch.cat((x[:100], wild, x[100:]))
    spoilt = GaussianSurrogate.from_samples(mixed, (5,))
    torch.testing.assert_close(spoilt.mean, clean.mean)
    np.testing.assert_allclose(dense_precision(spoilt), dense_precision(clean), rtol=1e-8)
    # Kept in, a single one of them would have been the first component.
    assert float(mixed[mixed.isfinite().all(1)].var(0).max()) > 1e9 * float(clean.variances.max())


@pytest.mark.parametrize("share", [0.15, 0.35, 0.5])
def test_a_second_mode_is_not_wild(share):
    """Moments of a mixture, whose second mode is far away in units of the first's width."""
    rng = np.random.default_rng(2)
    x = np.where(rng.random((4000, 1)) < share, -10.0, 10.0) + 0.5 * rng.normal(size=(4000, 2))
    surrogate = GaussianSurrogate.from_samples(torch.tensor(x), (2,))
    np.testing.assert_allclose(surrogate.mean, x.mean(0), rtol=1e-12)
    precision = np.linalg.inv(np.cov(x.T, bias=True))
    np.testing.assert_allclose(dense_precision(surrogate), precision, rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 12, 24), (1, 10, 30)])
def test_images_are_analysed_in_an_orthonormal_basis(shape):
    x = smooth_images(shape=(3, *shape[1:])).reshape(160, 3, -1)[:, : shape[0]].reshape(160, -1)
    surrogate = GaussianSurrogate.from_samples(x, shape)
    assert [len(axis) for axis in surrogate.axes] == list(shape)
    for axis in surrogate.axes:
        torch.testing.assert_close(axis @ axis.T, torch.eye(len(axis), dtype=torch.float64))
    # Height and width by cosines: those of scipy.
    for axis in surrogate.axes[1:]:
        expected = dct(np.eye(len(axis)), norm="ortho", axis=0)
        np.testing.assert_allclose(axis, expected, atol=1e-12)
    v = torch.randn(5, x.shape[1], dtype=torch.float64)
    c = surrogate.analyse(v)
    np.testing.assert_allclose(c, v.numpy() @ dense_transform(surrogate.axes).T, atol=1e-10)
    torch.testing.assert_close(surrogate.synthesise(c), v)
    torch.testing.assert_close(surrogate.analyse(surrogate.synthesise(v)), v)
    torch.testing.assert_close(c.norm(dim=1), v.norm(dim=1))


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_no_variance_is_lost(kind):
    """What the components leave is spread over the basis, in the same total."""
    if kind == "images":
        x, shape = smooth_images(), (3, 12, 24)
    else:
        x, shape = smooth_images(shape=(3, 10, 10)), (300,)
    surrogate = GaussianSurrogate.from_samples(x, shape)
    d, k = surrogate.basis.shape
    assert k == (32 if kind == "images" else 40) and bool(surrogate.axes) == (kind == "images")
    total = ((x - x.mean(0)) ** 2).sum().item() / len(x)
    left = surrogate.residual.sum().item() * (d - k) / d
    assert surrogate.variances.sum().item() + left == pytest.approx(total)
    # The cosines of smooth images differ in variance; in pixels they would be about equal.
    if kind == "images":
        assert surrogate.residual.max() > 20 * surrogate.residual.median()


def test_a_surrogate_is_found_once_per_prior():
    prior, same = gaussian_prior(seed=1), gaussian_prior(seed=1)
    assert surrogate_of(prior.flow_) is surrogate_of(same.flow_)
    assert surrogate_of(prior.flow_) is not surrogate_of(gaussian_prior(seed=2).flow_)


def test_flows_of_the_same_weights_and_other_functions_have_other_surrogates():
    """Tanh in the place of ReLU: or else results would depend on what was solved before."""
    rough, smooth = random_flow(noise=0.5), random_flow(noise=0.5, smooth=True)
    assert all(torch.equal(a, b) for a, b in zip(rough.buffers(), smooth.buffers(), strict=True))
    one, other = surrogate_of(rough), surrogate_of(smooth)
    assert not torch.equal(one.mean, other.mean)


def test_flows_that_do_not_pickle_have_surrogates_too():
    class Local(Cliff):
        pass

    one, other = Local(3, 1e9), Local(3, 1e9)
    surrogate = surrogate_of(one)
    assert surrogate_of(one) is surrogate and surrogate_of(other) is not surrogate
    one.loc += 1.0
    torch.testing.assert_close(surrogate_of(one).mean, surrogate.mean + 1.0)


# ---------------------------------------------------------------------------------- metric


LAM = torch.tensor([0.01, 0.1, 0.7, 1.0, 5.0, 100.0]).double()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("operator", ["denoising", "inpainting", "compressed"])
def test_with_the_exact_moments_the_metric_is_the_hessian(operator, noise):
    """Every row with its own lambda and missing measurements, against dense inverses."""
    objective, prior, op, noise, y = gaussian_problem(operator, noise)
    metric, everyone = objective.metric, torch.arange(6)
    assert len(set(map(tuple, objective.observed.tolist()))) > 1, "patterns are meant to differ"
    hessians = dense_hessians(objective, np.linalg.inv(prior.covariance_), op, noise, LAM)
    g = torch.randn(6, 6, dtype=torch.float64)
    expected = np.stack([np.linalg.solve(H, v) for H, v in zip(hessians, g.numpy(), strict=True)])
    np.testing.assert_allclose(metric.solve(g, LAM, everyone), expected, rtol=1e-8, atol=1e-9)
    # Some rows, in another order.
    some = torch.tensor([4, 1, 5])
    np.testing.assert_allclose(metric.solve(g[some], LAM[some], some), expected[some], atol=1e-9)
    # In its two halves, which are each other's transposes.
    white = metric.whiten(g, LAM, everyone)
    np.testing.assert_allclose(metric.colour(white, LAM, everyone), expected, atol=1e-9)
    for i, H in enumerate(hessians):
        lam, row = LAM[i].expand(6), torch.full((6,), i)
        eye = torch.eye(6, dtype=torch.float64)
        T = metric.colour(eye, lam, row).numpy().T  # image = T @ coordinates
        np.testing.assert_allclose(metric.whiten(eye, lam, row).numpy(), T, atol=1e-10)
        np.testing.assert_allclose(T.T @ H @ T, np.eye(6), atol=1e-8)
        applied = metric._apply(eye, lam, metric.group[row])
        np.testing.assert_allclose(applied, H, rtol=1e-9, atol=1e-9)
    for i in range(6):
        alone = prior.map_estimate(y[i : i + 1], op, noise, float(LAM[i]))
        np.testing.assert_allclose(metric.start(LAM)[i], alone[0], atol=1e-7)


class Shifted(Denoising):
    """Affine: the measurement of nothing is three."""

    def forward(self, x):
        return x + 3.0

    def adjoint(self, v):
        return v


def test_the_start_of_an_affine_operator():
    prior, op, noise = gaussian_prior(), Shifted(), GaussianNoise(SIGMA)
    y = drop_entries(op(prior.sample(5, random_state=0)))
    objective = make_objective(prior.flow_, op, noise, y)
    metric = GaussianMetric(exact_surrogate(prior), objective)
    x = metric.start(torch.full((5,), 0.7, dtype=torch.float64))
    np.testing.assert_allclose(x, prior.map_estimate(y, op, noise, 0.7), atol=1e-9)


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_what_the_components_leave_is_in_the_metric(kind):
    """More dimensions than components: the residual's part, against dense matrices."""
    rng = np.random.default_rng(3)
    shape = (3, 10, 10) if kind == "images" else (300,)
    surrogate = GaussianSurrogate.from_samples(smooth_images(shape=(3, 10, 10)), shape)
    precision = dense_precision(surrogate)
    flow = GaussianPrior(surrogate.mean.numpy(), np.eye(300)).flow_
    flow.event_shape = shape
    y = drop_entries(rng.normal(size=(4, 300)) + 3.0)
    op, noise = Denoising(), GaussianNoise(SIGMA)
    objective = make_objective(flow, op, noise, y)
    metric, lam = GaussianMetric(surrogate, objective), torch.tensor([0.1, 1.0, 5.0, 20.0]).double()
    hessians = dense_hessians(objective, precision, op, noise, lam)
    v = torch.randn(4, 300, dtype=torch.float64)
    applied = metric._apply(v, lam, metric.group).numpy()
    for i, H in enumerate(hessians):
        np.testing.assert_allclose(applied[i], H @ v[i].numpy(), rtol=1e-8, atol=1e-8)
    # The curvature of the data, spread evenly: the estimate of its mean is exact for a mask.
    seen = objective.observed.double().mean(1) / SIGMA**2
    torch.testing.assert_close(metric.level[metric.group], seen)
    # The minimiser, by conjugate gradients.
    start = metric.start(lam).numpy()
    W = objective.observed.numpy() / SIGMA**2
    mean = surrogate.mean.numpy()
    for i, H in enumerate(hessians):
        exact = mean + np.linalg.solve(H, W[i] * np.nan_to_num(y[i] - mean))
        np.testing.assert_allclose(start[i], exact, atol=1e-3 * np.abs(exact - mean).max())
    # Preconditioned it is much better conditioned than it was, and symmetric and positive.
    for i in (1, 3):
        eye = torch.eye(300, dtype=torch.float64)
        inverse = metric.solve(eye, lam[[i]].expand(300), torch.full((300,), i)).numpy()
        np.testing.assert_allclose(inverse, inverse.T, atol=1e-10)
        assert np.linalg.eigvalsh(inverse)[0] > 0
        factor = np.linalg.cholesky(inverse)
        before, after = np.linalg.cond(hessians[i]), np.linalg.cond(factor.T @ hessians[i] @ factor)
        assert after < 0.5 * before
    # The two halves that Adam takes are each other's transposes, and nearly as good.
    for i in (1, 3):
        row = torch.full((300,), i)
        T = metric.colour(eye, lam[row], row).numpy().T
        white = metric.whiten(eye, lam[row], row)
        np.testing.assert_allclose(white.numpy(), T, atol=1e-10)
        assert np.linalg.cond(T.T @ hessians[i] @ T) < 0.5 * np.linalg.cond(hessians[i])
        # Their coordinates are where the pixels are.
        place = surrogate.to_channels(white).abs().argmax(1)
        assert (place == torch.arange(300)).double().mean() > 0.95
    # Curvature along steps.
    ratio = metric.prior_ratio(v, torch.tensor(v.numpy() @ precision) * 2.5)
    np.testing.assert_allclose(ratio, 2.5, rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 10, 10)])
def test_colours_that_do_not_correlate(shape):
    """For images whose covariance is kept whole, and for those that have components."""
    d = math.prod(shape)
    grey, colour = torch.randn(2, 2000, *shape, dtype=torch.float64)
    x = (grey[:, :1] + 0.2 * colour).reshape(2000, d)
    surrogate = GaussianSurrogate.from_samples(x, shape)
    turned = surrogate.to_colours(x)
    torch.testing.assert_close(surrogate.to_channels(turned), x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    colours = turned.reshape(2000, *shape).transpose(0, 1).flatten(1)
    correlation = np.corrcoef(colours.numpy()) - np.eye(3)
    assert np.abs(correlation).max() < 0.05 < np.abs(np.corrcoef(x[:, [0, d // 3]].T)[0, 1])


def test_the_priors_curvature_over_the_surrogates():
    objective, prior, *_ = gaussian_problem()
    precision = torch.tensor(np.linalg.inv(prior.covariance_))
    step = torch.randn(6, 6, dtype=torch.float64)
    # Of the objective's own gradients: exact moments, so 1.
    u = torch.randn(6, 6, dtype=torch.float64)
    change = objective.evaluate(u + step).grad_prior - objective.evaluate(u).grad_prior
    torch.testing.assert_close(change, step @ precision, rtol=1e-9, atol=1e-9)
    ratio = objective.metric.prior_ratio(step, change)
    torch.testing.assert_close(ratio, torch.ones(6).double())
    factor = torch.tensor([0.125, 1.0, 3.0, -1.0, 0.0, 7.0]).double()[:, None]
    ratio = objective.metric.prior_ratio(step, factor * change)
    expected = [0.125, 1.0, 3.0, np.nan, np.nan, 7.0]  # NaN: not convex there
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)


@pytest.mark.parametrize("operator", ["denoising", "inpainting", "compressed"])
def test_quasi_newton_steps_in_the_metric_are_newtons(operator):
    objective, prior, op, noise, y = gaussian_problem(operator)
    u = torch.full((6, 6), 4.0, dtype=torch.float64)
    solution = minimize(objective, u, LAM, LBFGS(), max_evals=200, tol=1e-9)
    assert (solution.status == CONVERGED).all()
    assert (objective.n_evals <= 4).all(), "the first step is Newton's, up to rounding"
    for i in range(6):
        alone = prior.map_estimate(y[i : i + 1], op, noise, float(LAM[i]))
        np.testing.assert_allclose(solution.u[i], alone[0], atol=1e-7)
    # Without the metric it takes many more.
    objective.metric = None
    objective.n_evals.zero_()
    minimize(objective, u, LAM, LBFGS(), max_evals=200, tol=1e-9)
    assert objective.n_evals.double().mean() > 8


@pytest.mark.parametrize("factor", [0.1, 20.0])
def test_a_surrogate_of_the_wrong_width_is_corrected_by_the_measured_ratio(factor):
    """``ratio`` learns how much stiffer the prior is than its surrogate."""
    objective, prior, op, noise, y = gaussian_problem("compressed")
    exact = exact_surrogate(prior)
    wide = GaussianSurrogate(exact.mean, exact.basis, factor * exact.variances, None, [])
    objective.metric = GaussianMetric(wide, objective)
    u = torch.full((6, 6), 4.0, dtype=torch.float64)
    solution = minimize(objective, u, LAM, LBFGS(), max_evals=100, tol=1e-8)
    assert (solution.status == CONVERGED).all()
    torch.testing.assert_close(solution.memory["ratio"], torch.full((6,), factor).double())
    assert (objective.n_evals <= 12).all()


def test_adam_in_the_metric_measures_steps_in_posterior_deviations():
    objective, prior, op, noise, _ = gaussian_problem("compressed")
    u = torch.full((6, 6), 4.0, dtype=torch.float64)
    evaluation = objective.evaluate(u)
    method = Adam(preconditioner="gaussian").prepare(objective)
    memory = method.start(objective, u, evaluation, LAM)
    progress = torch.zeros(6).double()
    step = (method.propose(memory, u, evaluation, LAM, progress) - u).numpy()
    # Adam's first step is the rate, 0.3, in each of six white coordinates: its length by H.
    hessians = dense_hessians(objective, np.linalg.inv(prior.covariance_), op, noise, LAM)
    length = np.sqrt(np.einsum("ni,nij,nj->n", step, hessians, step))
    np.testing.assert_allclose(length, 0.3 * 6**0.5, rtol=1e-6)
    slope = (step * evaluation.gradient(LAM).numpy()).sum(1)
    assert (slope < 0).all()


@pytest.mark.parametrize("preconditioner", ["gaussian", None])
@pytest.mark.parametrize("rate", [None, 0.07])
def test_adams_own_rate(preconditioner, rate):
    objective, *_ = gaussian_problem()
    u, lam = torch.zeros(6, 6).double(), torch.ones(6).double()
    evaluation = objective.evaluate(u)
    scale = objective.flow.data_scale()
    for metric in (objective.metric, None):
        objective.metric = metric
        method = Adam(learning_rate=rate, preconditioner=preconditioner).prepare(objective)
        memory = method.start(objective, u, evaluation, lam)
        if preconditioner and metric:
            expected = 0.3 if rate is None else rate
        else:
            expected = (0.02 if rate is None else rate) * scale
        torch.testing.assert_close(memory["rate"], torch.full((6,), expected).double())


def test_an_unknown_preconditioner_is_refused():
    objective, *_ = gaussian_problem()
    u, lam = torch.zeros(6, 6).double(), torch.ones(6).double()
    for method in (Adam(preconditioner="newton"), LBFGS(preconditioner=True)):
        with pytest.raises(ValueError, match="preconditioner must be one of 'gaussian', None, got"):
            minimize(objective, u, lam, method, max_evals=5)


# ---------------------------------------------------------------------------------- start


def flow_problem(n=20, poison=(), dtype=torch.float64, architecture=Glow):
    shape = (1, 4, 4) if architecture is Glow else (6,)
    flow = random_flow(architecture, shape, dtype=dtype)
    d = flow.n_features
    op = Inpainting(np.arange(d) % 3 != 1)
    x = flow.sample(n, generator=torch.Generator().manual_seed(0)).flatten(1)
    y = GaussianNoise(SIGMA).add_noise(op(x.double().numpy()), random_state=0)
    y = drop_entries(y)
    for i, value in zip(poison, (1e30, 0.25, np.nan), strict=False):
        y[i, 1:] = value
    return flow, op, y


def with_metric(flow, op, y, space="image"):
    objective = make_objective(flow, op, GaussianNoise(SIGMA), y, space)
    objective.metric = GaussianMetric(surrogate_of(flow), objective)
    return objective


@pytest.mark.parametrize("space", ["image", "latent"])
def test_every_row_takes_the_best_of_its_candidates(space):
    flow, op, y = flow_problem()
    objective = with_metric(flow, op, y, space)
    lam = torch.logspace(-2, 1, 20, dtype=torch.float64)
    u = gaussian_start(objective, lam)
    # In latent space one pass more, from the image to its latent.
    assert objective.n_evals.tolist() == [3 + (space == "latent")] * 20
    again = with_metric(flow, op, y)
    candidates = [again.metric.start(f * lam) for f in (1.0, 3.0, 10.0)]
    values = torch.stack([again.evaluate(x).value(lam) for x in candidates])
    best = values.argmin(0)
    assert len(set(best.tolist())) > 1, "no factor is the best for all rows"
    expected = torch.stack(candidates)[best, torch.arange(20)]
    torch.testing.assert_close(objective.image(u), expected, rtol=0, atol=1e-9)


def test_a_candidate_that_overflows_is_not_taken(monkeypatch):
    objective, prior, *_ = gaussian_problem()
    inner = objective.metric.start
    lam = torch.ones(6).double()

    def start(at):
        x = inner(at).clone()
        if at[0] != 3.0:
            x[[0, 2]] = torch.nan
        return x

    monkeypatch.setattr(objective.metric, "start", start)
    x = gaussian_start(objective, lam)
    assert torch.equal(x[[0, 2]], inner(3 * lam)[[0, 2]])
    torch.testing.assert_close(x[[1, 3, 4, 5]], inner(lam)[[1, 3, 4, 5]])


def test_on_a_normal_prior_the_start_is_the_answer():
    objective, prior, op, noise, y = gaussian_problem("inpainting")
    x = gaussian_start(objective, torch.full((6,), 0.7).double())
    np.testing.assert_allclose(x, prior.map_estimate(y, op, noise, 0.7), atol=1e-8)


def test_adam_in_the_metric_paces_itself_by_the_steps_ahead():
    objective, *_ = gaussian_problem()
    u, lam = torch.zeros(6, 6).double(), torch.ones(6).double()
    steps, rows = torch.tensor([1, 75, 150, 600, 1200, 1200]), torch.arange(6) < 5

    def planned(method, objective):
        method = method.prepare(objective)
        memory = method.start(objective, u, objective.evaluate(u), lam)
        method.plan(memory, steps, rows)
        return memory["pace"], memory["betas"], memory["final"]

    pace, betas, final = planned(Adam(preconditioner="gaussian"), objective)
    # The last row was not asked for.
    torch.testing.assert_close(pace**3, torch.tensor([1, 1, 1 / 2, 1 / 8, 1 / 16, 1]).double())
    torch.testing.assert_close(final, 0.01 * pace**6)
    window = 1 / (1 - betas[:, 0])
    torch.testing.assert_close(window, torch.tensor([5, 10, 10, 40, 50, 10]).double())
    assert (betas[:, 1] == 0.999).all()
    # What is given stays, and so does the method of the paper, which has no metric.
    given = Adam(0.2, betas=(0.8, 0.99), final_rate=0.1, preconditioner="gaussian")
    for method, first, last in ((given, 0.8, 0.1), (Adam(), 0.9, 0.01)):
        pace, betas, final = planned(method, objective)
        assert (pace == 1).all() and (betas[:, 0] == first).all() and (final == last).all()


@pytest.mark.parametrize(
    "what, dtype",
    [
        ("start", torch.float64),
        ("start", torch.float32),
        ("lbfgs", torch.float32),
        ("adam", torch.float64),
        ("hybrid", torch.float32),
    ],
)
def test_rows_in_the_metric_are_alone(what, dtype):
    """In batches of 1, 7 and 20, and beside a row of 1e30, a constant one and an empty one."""
    methods = dict(lbfgs=LBFGS(), adam=Adam(preconditioner="gaussian", warm_up=10), hybrid=Hybrid())
    lam = torch.logspace(-1, 1, 20, dtype=dtype)

    def solve(rows, poison=()):
        flow, op, y = flow_problem(dtype=dtype, poison=poison)
        objective = with_metric(flow, op, y[rows])
        start = gaussian_start(objective, lam[rows])
        if what == "start":
            return start, torch.zeros(len(start)), objective.n_evals
        options = dict(max_evals=25, tol=1e-3)
        solution = minimize(objective, start, lam[rows], methods[what], **options)
        return solution.u, solution.status, objective.n_evals

    whole = solve(range(20))
    rest = [i for i in range(20) if i not in (2, 11, 12)]
    for rows, poison, among in (
        ([5], (), [5]),
        (range(7, 14), (), range(7, 14)),
        (range(20), (2, 11, 12), rest),
    ):
        keep = [list(rows).index(i) for i in among]
        for part, all_of_them in zip(solve(rows, poison), whole, strict=True):
            assert torch.equal(part[keep], all_of_them[list(among)]), (rows, poison)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_images_with_a_residual_are_alone(dtype):
    """Where the components are not all there is: the metric itself, bit for bit."""
    shape = (1, 20, 20)
    x = smooth_images(shape=(3, 20, 20)).reshape(160, 3, -1)[:, 0]
    surrogate = GaussianSurrogate.from_samples(x, shape)
    flow = random_flow(Glow, shape, dtype=dtype)
    y = drop_entries(x[:20].numpy())
    lam = torch.logspace(-1, 1, 20, dtype=dtype)

    def solve(rows, poison=()):
        there = y.copy()
        for i in poison:
            there[i] = 1e30
        objective = make_objective(flow, Denoising(), GaussianNoise(SIGMA), there[rows])
        metric = GaussianMetric(surrogate, objective)
        g = torch.tensor(y, dtype=dtype).nan_to_num()[list(rows)]
        everyone = torch.arange(len(g))
        return torch.stack([metric.start(lam[rows]), metric.solve(g, lam[rows], everyone)])

    whole = solve(range(20))
    assert torch.equal(solve([5])[:, 0], whole[:, 5])
    assert torch.equal(solve(range(7, 14)), whole[:, 7:14])
    rest = [i for i in range(20) if i not in (2, 11)]
    assert torch.equal(solve(range(20), (2, 11))[:, rest], whole[:, rest])


# ---------------------------------------------------------------------------------- hard cases


def test_lambda_zero_and_rows_without_measurements():
    """Where the Gaussian posterior is flat in some directions a start must still be finite."""
    flow, op, y = flow_problem(n=5, architecture=RealNVP)
    y[3] = np.nan
    objective = with_metric(flow, op, y)
    lam = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30]).double()
    # (No measurements and some prior: its mean.)
    mean = objective.metric.surrogate.mean
    torch.testing.assert_close(objective.metric.start(lam.clamp_min(1.0))[3], mean)
    assert gaussian_start(objective, lam).isfinite().all()
    u = objective.in_space("latent").image(torch.zeros(5, 6).double())
    for method in (LBFGS(), Adam(preconditioner="gaussian"), Hybrid()):
        solution = minimize(objective, u, lam, method, max_evals=40 + objective.n_evals)
        assert (solution.status != STATUS.index("diverged")).all(), method
        assert solution.u.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", ["denoising", "inpainting", "compressed"])
def test_without_the_prior_the_metric_is_the_pseudo_inverse(operator, dtype):
    """What was not measured stays where it is; in between two measurements, least squares."""
    prior, op, noise = gaussian_prior(), any_operator(operator, 6), GaussianNoise(SIGMA)
    y = drop_entries(op(prior.sample(6, random_state=0)))
    flow = prior.flow_.to(dtype)
    objective = make_objective(flow, op, noise, y)
    metric = GaussianMetric(exact_surrogate(prior), objective)
    x = metric.start(torch.zeros(6, dtype=dtype)).double()
    residual = torch.where(objective.observed, op.bind((6,)).forward(x) - objective.y, 0.0)
    assert residual.abs().max() < (1e-10 if dtype == torch.float64 else 1e-4)
    # Along what was not measured nothing moves, in the prior's metric.
    A = matrix_of(op, 6)
    S = prior.covariance_
    for i, seen in enumerate(objective.observed.numpy()):
        a = A[seen]
        expected = prior.mean_ + S @ a.T @ np.linalg.pinv(a @ S @ a.T) @ (
            objective.y[i].double().numpy()[seen] - a @ prior.mean_
        )
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        np.testing.assert_allclose(x[i], expected, atol=tolerance)


def test_a_matrix_without_full_rank():
    prior, noise = gaussian_prior(), GaussianNoise(SIGMA)
    op = MatrixOperator(np.outer([1.0, 2.0, 3.0], np.arange(6.0)))
    y = np.random.default_rng(0).normal(size=(4, 3))
    objective = make_objective(prior.flow_, op, noise, y)
    metric = GaussianMetric(exact_surrogate(prior), objective)
    lam = torch.full((4,), 1e-3).double()
    np.testing.assert_allclose(metric.start(lam), prior.map_estimate(y, op, noise, 1e-3), atol=1e-5)


class Laplace(NoiseModel):
    """``|y - f(x)|``: no curvature anywhere but in the kink, and there no end of it."""

    def max_curvature(self):
        return math.inf

    def _penalty(self, residual):
        return residual.abs()


class PseudoHuber(NoiseModel):
    def max_curvature(self):
        return 9.0

    def _penalty(self, residual):
        return (1 + 9 * residual.square()).sqrt()


def test_the_noises_curvature_at_a_residual_of_zero():
    y = torch.tensor([[1.0, -2.0, np.nan]]).double()
    for noise, expected in ((PseudoHuber(), 9.0), (GaussianNoise(0.5), 4.0), (None, 2.0)):
        objective = make_objective(gaussian_prior(3).flow_, Denoising(), noise, y)
        metric = GaussianMetric(exact_surrogate(gaussian_prior(3)), objective)
        torch.testing.assert_close(metric.weight, torch.tensor([[expected, expected, 0]]).double())


def test_noise_without_curvature_is_that_of_its_unit_residual():
    """The parabola through |r| at 0 and 1; the solution is that of a linear programme of signs."""
    prior, y = GaussianPrior(np.zeros(3), np.eye(3)), np.array([[0.5, 3.0, -7.0], [-0.2, 0.9, 1.1]])
    objective = make_objective(prior.flow_, Denoising(), Laplace(), y)
    metric = GaussianMetric(exact_surrogate(prior), objective)
    torch.testing.assert_close(metric.weight, torch.full((1, 3), 2.0).double())
    for solver in ("hybrid", "lbfgs"):
        model = AIPORegressor(
            Denoising(), prior=prior, noise=Laplace(), solver=solver, max_evals=150
        )
        result = model.reconstruct(y)
        # |y - x| + x^2 / 2 has its minimum at y where |y| < 1, else at its sign.
        np.testing.assert_allclose(result.x, np.clip(y, -1, 1), atol=0.02)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("shape", [(1,), (3,), (300,)])
def test_a_flow_of_overflow_alone_has_diverged_and_not_crashed(shape):
    flow = Cliff(shape[0], -1.0)
    surrogate = surrogate_of(flow)
    np.testing.assert_allclose(dense_precision(surrogate), np.eye(shape[0]), atol=1e-12)
    model = AIPORegressor(Denoising(), prior=FlowPrior(flow=flow))
    result = model.reconstruct(np.ones((2, shape[0])))
    assert result.status.tolist() == ["diverged"] * 2
