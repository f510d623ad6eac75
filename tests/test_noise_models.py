"""Noise models other than white Gaussian against scipy: densities, MAP estimates, simulation."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from problems import drop_entries, gaussian_prior, random_flow
from scipy import optimize, stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
)
from skaipo.flows import Glow, RealNVP
from skaipo.noise import (
    BernoulliNoise,
    CorrelatedGaussianNoise,
    FlowNoise,
    GaussianNoise,
    LaplaceNoise,
    Likelihood,
    PoissonNoise,
    SquaredError,
    StudentTNoise,
    _gaussian,
)
from skaipo.operators import Denoising, Inpainting, MatrixOperator

M = 6
rng = np.random.default_rng(5)
SCALES = np.array([0.1, 0.5, 1.0, 2.0, 3.0, 0.7])
FACTOR = rng.normal(size=(M, M))
COVARIANCE = FACTOR @ FACTOR.T + 0.3 * np.eye(M)
THRESHOLDS = rng.normal(size=M)


def additive(distribution):
    """Up to the constant: zero where the residual is."""
    return lambda f, y: distribution.logpdf(0 * y) - distribution.logpdf(y - f)


def probit(f, y):
    t = (f - THRESHOLDS) / 0.8
    return -stats.norm.logcdf(np.where(y > 0, t, -t))


def logistic(f, y):
    t = (f - THRESHOLDS) / SCALES
    return -stats.logistic.logcdf(np.where(y > 0, t, -t))


def poisson(f, y):
    return stats.poisson.logpmf(y, y) - stats.poisson.logpmf(y, SCALES * f + 0.4)


# Model, and -log p of each entry by scipy.
SEPARATE = {
    "laplace": (LaplaceNoise(0.7, smoothing=0), additive(stats.laplace(scale=0.7))),
    "laplace per entry": (LaplaceNoise(SCALES, smoothing=0), additive(stats.laplace(scale=SCALES))),
    "student": (StudentTNoise(SCALES, df=1.5), additive(stats.t(1.5, scale=SCALES))),
    "poisson": (PoissonNoise(SCALES, 0.4), poisson),
    "probit": (BernoulliNoise(0.8, THRESHOLDS), probit),
    "logistic": (BernoulliNoise(SCALES, THRESHOLDS, link="logistic"), logistic),
}
FLOW = random_flow(RealNVP, (M,), smooth=True)
MODELS = {
    **{name: model for name, (model, _) in SEPARATE.items()},
    "smoothed laplace": LaplaceNoise(SCALES, smoothing=0.3),
    "correlated": CorrelatedGaussianNoise(COVARIANCE),
    "flow": FlowNoise(FLOW),
    "flow prior": FlowNoise(gaussian_prior(M)),
}
TAKES_NAN = [name for name in MODELS if not name.startswith("flow")]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def data(name, n=9):
    """Predictions, and measurements that the model could have made."""
    prediction = torch.rand(n, M, dtype=torch.float64) + 0.2
    noise = MODELS[name]
    y = noise.add_noise(prediction, random_state=1)
    observed = torch.rand(n, M) < 0.6
    observed[0], observed[1] = True, False
    return noise.bind(M), prediction, y, observed


# ---------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", SEPARATE)
def test_density_is_scipys_up_to_the_constant(name):
    noise, prediction, y, observed = data(name)
    terms = SEPARATE[name][1](prediction.numpy(), y.numpy())
    got = noise.nll(prediction, y)
    assert got.shape == (9,) and got.dtype == torch.float64
    np.testing.assert_allclose(got, terms.sum(1), rtol=1e-9, atol=1e-9)
    got = noise.nll(prediction, torch.where(observed, y, torch.nan), observed)
    np.testing.assert_allclose(got, (terms * observed.numpy()).sum(1), rtol=1e-9, atol=1e-9)
    assert got[1] == 0


def test_correlated_gaussian_and_its_marginals():
    noise, prediction, y, observed = data("correlated")
    observed[5] = observed[4]  # two rows of one pattern
    got = noise.nll(prediction, torch.where(observed, y, torch.nan), observed)
    for row, seen in enumerate(observed.numpy()):
        part = COVARIANCE[np.ix_(seen, seen)]
        residual = (y - prediction)[row].numpy()[seen]
        if seen.any():
            density = stats.multivariate_normal(np.zeros(seen.sum()), part)
            want = density.logpdf(0 * residual) - density.logpdf(residual)
            assert got[row].item() == pytest.approx(want, rel=1e-10)
        else:
            assert got[row] == 0
    whole = stats.multivariate_normal(np.zeros(M), COVARIANCE)
    want = whole.logpdf(np.zeros(M)) - whole.logpdf((y - prediction).numpy())
    np.testing.assert_allclose(noise.nll(prediction, y), want, rtol=1e-10)
    # A diagonal covariance is GaussianNoise.
    diagonal = CorrelatedGaussianNoise(np.diag(SCALES**2))
    torch.testing.assert_close(
        diagonal.nll(prediction, y, observed), GaussianNoise(SCALES).nll(prediction, y, observed)
    )


def many_patterns(n=200, m=200):
    """Rows that each miss entries of their own, some of them most; the last two are alike."""
    generator = np.random.default_rng(0)
    distance = np.abs(np.arange(m)[:, None] - np.arange(m))
    covariance = np.exp(-distance / 10) + 0.1 * np.eye(m)
    observed = generator.random((n, m)) > generator.uniform(0.05, 0.95, (n, 1))
    observed[0], observed[1], observed[-1] = False, True, observed[-2]
    prediction, y = generator.standard_normal((2, n, m))
    return covariance, *(torch.from_numpy(t) for t in (prediction, y, observed))


@pytest.mark.parametrize("kept", [2**28, 10**6], ids=["cached", "too large to cache"])
def test_marginals_of_many_patterns(monkeypatch, kept):
    """Values and gradients are those of each pattern's own factorisation, by numpy."""
    monkeypatch.setattr(_gaussian, "_KEPT", kept)
    covariance, prediction, y, observed = many_patterns()
    cholesky, calls = torch.linalg.cholesky, []
    monkeypatch.setattr(torch.linalg, "cholesky", lambda a: calls.append(1) or cholesky(a))
    noise = CorrelatedGaussianNoise(covariance).bind(len(covariance))

    def evaluate(rows=slice(None)):
        point = prediction[rows].clone().requires_grad_()
        value = noise.nll(point, y[rows], observed[rows])
        return value.detach(), torch.autograd.grad(value.sum(), point)[0]

    values, gradients = evaluate()
    for k, seen in enumerate(observed.numpy()):
        residual = (y - prediction)[k].numpy()[seen]
        pull = np.linalg.solve(covariance[np.ix_(seen, seen)], residual)
        assert values[k].item() == pytest.approx(residual @ pull / 2, rel=1e-10, abs=1e-300)
        np.testing.assert_allclose(gradients[k][seen], -pull, rtol=1e-9, atol=1e-10)
        assert (gradients[k][~seen] == 0).all()
    assert len(calls) < 40
    first = len(calls)
    # Other rows in other orders, some of them new to it, and rows alone: the same bits.
    for rows in ([7], [150, 3, 4, 199], list(range(0, 200, 3)), [198, 199, 0, 1]):
        value, gradient = evaluate(rows)
        assert torch.equal(value, values[rows]) and torch.equal(gradient, gradients[rows])
    assert (len(calls) == first) == (kept > 10**6)


def test_marginals_in_single_precision_do_not_underflow():
    """A whitening matrix decays below what float32 holds, and that is slow, not small."""
    covariance, prediction, y, observed = many_patterns(n=40, m=400)
    noise = CorrelatedGaussianNoise(covariance).bind(400)
    want = noise.nll(prediction, y, observed)
    got = noise.nll(prediction.float(), y.float(), observed)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    patterns = observed[2:5].numpy()
    made = noise._make_whiteners(patterns, 400, torch.zeros(1))
    assert (made[made != 0].abs() > 1e-25).all() and (made == 0).any()


@pytest.mark.parametrize("flow", [FLOW, FlowPrior(flow=FLOW)], ids=["flow", "prior"])
def test_flow_noise_is_the_flows_density(flow):
    _, prediction, y, _ = data("flow")
    want = -FLOW.log_prob(y - prediction)
    torch.testing.assert_close(FlowNoise(flow).nll(prediction, y), want)
    gaussian = gaussian_prior(M)
    density = stats.multivariate_normal(gaussian.mean_, gaussian.covariance_)
    got = FlowNoise(gaussian).nll(prediction, y)
    np.testing.assert_allclose(got, -density.logpdf((y - prediction).numpy()), rtol=1e-10)


def test_gradient_against_finite_differences(name):
    noise, prediction, y, observed = data(name, n=3)
    observed = observed if name in TAKES_NAN else None
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: noise.nll(p, y, observed), prediction)
    weights = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: weights * noise.nll(p, y, observed), prediction)


def test_max_curvature_bounds_the_second_derivative(name):
    noise, prediction, y, _ = data(name)
    largest = noise.max_curvature()
    assert type(largest) is float and largest > 0
    typical = noise.typical_curvature()
    assert type(typical) is float and 0 < typical < np.inf
    if not np.isfinite(largest):
        return
    eye = torch.eye(M, dtype=torch.float64)
    for shift in (-3.0, -0.4, 0.05, 0.6, 4.0):
        for p, row in zip(prediction, y, strict=True):
            start, eps = (row + shift * p)[None].clone(), 1e-4
            base = start.expand(M, M)
            second = (
                noise.nll(base + eps * eye, row.expand(M, M))
                + noise.nll(base - eps * eye, row.expand(M, M))
                - 2 * noise.nll(base, row.expand(M, M))
            ) / eps**2
            assert second.max() <= largest * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("name", TAKES_NAN)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e300])
def test_what_is_not_observed_never_matters(name, junk):
    noise, prediction, y, observed = data(name)
    want = noise.nll(prediction, y, observed)
    dirty = torch.where(observed, prediction, junk).requires_grad_()
    got = noise.nll(dirty, torch.where(observed, y, junk), observed)
    assert torch.equal(got.detach(), want)
    (grad,) = torch.autograd.grad(got.sum(), dirty)
    assert (grad[~observed] == 0).all() and grad.isfinite().all()


def test_a_row_alone_equals_the_row_in_a_batch(name):
    noise, prediction, y, observed = data(name)
    observed = observed if name in TAKES_NAN else torch.ones_like(observed)
    prediction[4] = torch.nan  # a broken neighbour
    want = noise.nll(prediction, y, observed)
    for i in (0, 3, 8):
        row = slice(i, i + 1)
        got = noise.nll(prediction[row], y[row], observed[row])
        torch.testing.assert_close(got, want[row], rtol=1e-13, atol=1e-13)
    assert want.isnan().sum() == 1


def test_float32(name):
    noise, prediction, y, _ = data(name)
    want = noise.nll(prediction, y)
    prediction = prediction.float().requires_grad_()
    got = noise.nll(prediction, y.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(got.sum(), prediction)
    assert grad.dtype == torch.float32 and grad.isfinite().all()
    location, weight = noise.gaussian_fit(y.float())
    assert location.dtype == weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["poisson", "probit", "logistic", "student", "smoothed laplace"])
def test_far_out_everything_stays_finite(name, dtype):
    """Solvers try such points: the value is large, finite, and the slope points back."""
    noise = MODELS[name].bind(M)
    y = torch.tensor([[0.0] * M, [1.0] * M], dtype=dtype)
    for size in (1e-30, 1e-3, 1.0, 1e3, 1e6):
        for sign in (-1, 1):
            prediction = torch.full_like(y, sign * size).requires_grad_()
            value = noise.nll(prediction, y)
            (grad,) = torch.autograd.grad(value.sum(), prediction)
            assert value.isfinite().all() and grad.isfinite().all()


def test_one_bit_tails_against_their_asymptotes():
    """Far in the tail the probit's nll is t^2 / 2 + log(t sqrt(2 pi)), the logistic one is t."""
    t = torch.tensor([[30.0, 100.0, 1000.0]], dtype=torch.float64)
    zero = torch.zeros_like(t)
    for shift, want in ((t, t.square() / 2 + (t * np.sqrt(2 * np.pi)).log()), (-t, zero)):
        got = BernoulliNoise().nll(shift.reshape(3, 1), zero.reshape(3, 1))
        torch.testing.assert_close(got, want[0], rtol=2e-3, atol=1e-12)
    got = BernoulliNoise(link="logistic").nll(t.reshape(3, 1), zero.reshape(3, 1))
    torch.testing.assert_close(got, t[0])
    # Both spellings of a bit are the same bit.
    prediction, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    noise = BernoulliNoise(0.5)
    assert torch.equal(noise.nll(prediction, y), noise.nll(prediction, 2 * y - 1))


def test_poisson_below_the_floor():
    """Value and slope are continuous at the floor, the curvature is y / floor^2 + 1 / floor."""
    floor, gain, background = 0.02, 2.0, 0.5
    noise = PoissonNoise(gain, background, floor=floor)
    for count in (0.0, 3.0):
        y = torch.full((3, 1), count, dtype=torch.float64)
        rate = torch.tensor([[floor * (1 - 1e-9)], [floor * (1 + 1e-9)], [floor / 2]]).double()
        prediction = ((rate - background) / gain).requires_grad_()
        value = noise.nll(prediction, y)
        (grad,) = torch.autograd.grad(value.sum(), prediction)
        assert value[0].item() == pytest.approx(value[1].item(), rel=1e-6)
        assert grad[0].item() == pytest.approx(grad[1].item(), rel=1e-6, abs=1e-6)
        curvature = (grad[1] - grad[2]) / (rate[1] - rate[2]) / gain
        assert curvature.item() == pytest.approx(count / floor**2 + 1 / floor, rel=1e-6)
    # Where nothing was counted a rate of zero is the most likely one.
    x = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)[:, None]
    assert x[PoissonNoise().nll(x, 0 * x).argmin()].item() == pytest.approx(0, abs=1e-12)


def test_laplace_smoothing_is_bounded_as_documented():
    residual = torch.linspace(-3, 3, 2001, dtype=torch.float64)[:, None]
    zero = torch.zeros_like(residual)
    for smoothing in (1e-3, 0.3):
        exact = LaplaceNoise(0.7, smoothing=0).nll(residual, zero)
        error = exact - LaplaceNoise(0.7, smoothing).nll(residual, zero)
        assert error.min() >= 0 and error.max() <= smoothing / 2 + 1e-12
        assert error.max() == pytest.approx(smoothing / 2)


# ------------------------------------------------------------------------------ MAP estimates

D, N = 4, 20


def map_problem(name, n=N):
    """Prior, operator, noise, and the measurements of ``n`` images."""
    generator = np.random.default_rng(11)
    prior = gaussian_prior(D)
    matrix = generator.normal(size=(M, D))
    noise = MODELS[name]
    x = generator.multivariate_normal(prior.mean_, prior.covariance_, size=n)
    if name == "poisson":
        matrix = np.abs(matrix)
        x = np.abs(x)
    return prior, matrix, noise, noise.add_noise(x @ matrix.T, random_state=2)


def exact_terms(name):
    """-log p(y | f) of one measurement, by scipy alone, where the package's own is no oracle.

    ``f`` may be several predictions, one per row.
    """
    if name in SEPARATE:
        return lambda f, y: SEPARATE[name][1](f, y).sum(-1)
    if name == "smoothed laplace":
        size = lambda f, y: np.abs(y - f) / SCALES  # noqa: E731
        return lambda f, y: np.where(
            size(f, y) < 0.3, size(f, y) ** 2 / 0.6, size(f, y) - 0.15
        ).sum(-1)
    if name == "white":
        terms = additive(stats.norm(scale=SCALES))
        return lambda f, y: terms(f, y).sum(-1)
    if name == "correlated":
        density = stats.multivariate_normal(np.zeros(M), COVARIANCE)
        return lambda f, y: -density.logpdf(y - f)
    if name == "flow prior":
        gaussian = gaussian_prior(M)
        density = stats.multivariate_normal(gaussian.mean_, gaussian.covariance_)
        return lambda f, y: -density.logpdf(y - f)
    return lambda f, y: -FLOW.log_prob(torch.tensor(np.atleast_2d(y - f))).numpy().reshape(len(f))


def refined(objective, start, smooth=True):
    """A local minimum from ``start`` by methods that know nothing but values.

    The objective is that of the rows of an array: all differences are one call.
    """
    steps = 1e-6 * np.concatenate((np.zeros((1, D)), np.eye(D), -np.eye(D)))

    def value_and_gradient(u):
        value, *around = objective(u + steps)
        return value, np.subtract(around[:D], around[D:]) / 2e-6

    options = {"gtol": 1e-8}
    best = optimize.minimize(value_and_gradient, start, jac=True, method="BFGS", options=options)
    if smooth:
        return best
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000}
    one = lambda u: objective(u[None])[0]  # noqa: E731
    return optimize.minimize(one, best.x, method="Nelder-Mead", options=options)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if not name.startswith("laplace")] + ["white"]
)
def test_map_agrees_with_an_independent_optimiser(name):
    n = 8
    if name == "white":
        prior, matrix, _, y = map_problem("correlated", n)
        noise = GaussianNoise(SCALES)
    else:
        prior, matrix, noise, y = map_problem(name, n)
    nll, precision = exact_terms(name), np.linalg.inv(prior.covariance_)
    model = AIPORegressor(MatrixOperator(matrix), prior=prior, noise=noise, tol=1e-8)
    model.set_params(solver="lbfgs", max_evals=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = model.reconstruct(y)
    convex = name not in ("student", "flow")
    for row, x in zip(y, result.x, strict=True):

        def objective(u, row=row):
            with np.errstate(all="ignore"):
                shift = u - prior.mean_
                value = nll(u @ matrix.T, row) + ((shift @ precision) * shift).sum(1) / 2
            return np.where(np.isfinite(value), value, 1e10)

        # Of a convex objective there is one minimum, wherever one starts.
        start = prior.mean_ if convex and name != "poisson" else x
        # (scipy's density of counts ends where the rate is zero, and gradients with it.)
        found = refined(objective, start, smooth=name != "poisson")
        # As documented: floor / 2 where nothing was counted at a rate below the floor.
        low = (SCALES * (matrix @ x) + 0.4 < 0.01).sum() if name == "poisson" else 0
        assert objective(x[None])[0] <= found.fun + 1e-6 * (1 + abs(found.fun)) + low * 0.005
        np.testing.assert_allclose(x, found.x, atol=5e-2 if low else 2e-3)


def test_map_under_the_exact_laplace_density():
    """As a linear programme's cousin: |r| = r+ + r-, a quadratic objective with linear rows."""
    prior, matrix, _, y = map_problem("laplace", 8)
    precision = np.linalg.inv(prior.covariance_)
    for smoothing, tol in ((1e-3, M * 1e-3 / 2), (1e-4, M * 1e-4 / 2)):
        noise = LaplaceNoise(0.7, smoothing)
        model = AIPORegressor(MatrixOperator(matrix), prior=prior, noise=noise, solver="lbfgs")
        result = model.set_params(max_evals=300, tol=1e-7).reconstruct(y)
        assert (result.status == "converged").all()
        for row, x in zip(y, result.x, strict=True):

            def exact(u, row=row):
                shift = u - prior.mean_
                return np.abs(row - matrix @ u).sum() / 0.7 + shift @ precision @ shift / 2

            # Dual: max_w  w^T (y - A mu) - w^T A S A^T w / 2  with |w| <= 1 / scale.
            gram, offset = matrix @ prior.covariance_ @ matrix.T, row - matrix @ prior.mean_
            dual = optimize.minimize(
                lambda w, gram=gram, offset=offset: (
                    w @ gram @ w / 2 - w @ offset,
                    gram @ w - offset,
                ),
                np.zeros(M),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-1 / 0.7, 1 / 0.7)] * M,
                options={"ftol": 1e-15, "gtol": 1e-10},
            )
            # Weak duality: no image has a lower objective than the dual's value.
            assert -1e-9 <= exact(x) + dual.fun <= tol


@pytest.mark.parametrize("name", ["poisson", "probit", "student", "smoothed laplace"])
def test_map_with_a_flow_as_prior(name):
    """Where gradients come from a flow, too: what is returned is a local minimum for scipy."""
    flow = random_flow(RealNVP, (D,), smooth=True)
    n = 8
    _, matrix, noise, _ = map_problem(name)
    clean = flow.sample(n, generator=torch.Generator().manual_seed(3)).numpy() @ matrix.T
    if name == "poisson":
        clean = np.abs(clean)
    y = noise.add_noise(clean, random_state=4)
    model = AIPORegressor(MatrixOperator(matrix), prior=FlowPrior(flow=flow), noise=noise)
    result = model.set_params(solver="lbfgs", max_evals=500, tol=1e-8).reconstruct(y)
    nll, good = exact_terms(name), 0
    for row, x in zip(y, result.x, strict=True):

        def objective(u, row=row):
            with np.errstate(all="ignore"):
                value = nll(u @ matrix.T, row) - flow.log_prob(torch.tensor(u)).numpy()
            return np.where(np.isfinite(value), value, 1e10)

        if name == "poisson" and (SCALES * (matrix @ x) + 0.4 < 0.01).any():
            continue  # scipy's density ends where the rate is zero
        good += 1
        found = refined(objective, x)
        assert objective(x[None])[0] <= found.fun + 1e-6 * (1 + abs(found.fun))
    assert good >= n // 2


def test_closed_form_of_correlated_noise():
    """GaussianPrior's own formula, with missing entries, against the solver."""
    prior, matrix, noise, y = map_problem("correlated")
    y = drop_entries(y)
    want = prior.map_estimate(y, MatrixOperator(matrix), noise, lam=0.7)
    model = AIPORegressor(MatrixOperator(matrix), 0.7, prior=prior, noise=noise, tol=1e-9)
    np.testing.assert_allclose(model.predict(y), want, atol=1e-5)


# ---------------------------------------------------------------------- Gaussian stand-ins


def test_gaussian_fit(name):
    noise, _, y, _ = data(name)
    location, weight = noise.gaussian_fit(y)
    assert location.shape == weight.shape == y.shape
    assert location.isfinite().all() and (weight > 0).all() and weight.isfinite().all()
    if noise.is_exact_fit:
        assert torch.equal(location, y)
        zero = torch.zeros_like(y)
        assert (noise.nll(y, y) <= noise.nll(y + 0.1, y) - 1e-4).all() and noise.nll(
            zero, zero
        ).abs().max() < 1e-12


def test_gaussian_fit_of_counts_and_bits():
    y = torch.tensor([[0.0, 3.0, 100.0]], dtype=torch.float64)
    location, weight = PoissonNoise(2.0, 1.0).gaussian_fit(y)
    torch.testing.assert_close(location, (y - 1) / 2)
    torch.testing.assert_close(weight, 4 / (y + 0.5))
    # Many counts: the nll's own curvature at its minimum.
    assert weight[0, 2].item() == pytest.approx(2.0**2 / 100, rel=0.01)
    location, weight = BernoulliNoise(0.5, 3.0).gaussian_fit(torch.tensor([[0.0, 1.0]]))
    p = torch.full((1, 2), 3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(
        BernoulliNoise(0.5, 3.0).nll(p, torch.tensor([[0.0, 1.0]])).sum(), p
    )
    torch.testing.assert_close(location, 3.0 - slope / weight)
    assert (location[0] - 3).sign().tolist() == [-1, 1]


# ------------------------------------------------------------------------------- simulation


def test_add_noise_has_the_right_distribution():
    n = 4000
    clean = np.random.default_rng(0).uniform(0, 3, M) * np.ones((n, 1))
    for noise, distribution in (
        (LaplaceNoise(SCALES), stats.laplace(scale=1)),
        (StudentTNoise(SCALES, df=3.0), stats.t(3)),
    ):
        e = (noise.add_noise(clean) - clean) / SCALES
        for column in e.T:
            assert stats.kstest(column, distribution.cdf).pvalue > 1e-3
    counts = PoissonNoise(SCALES, 0.4).add_noise(clean)
    rate = SCALES * clean[0] + 0.4
    np.testing.assert_allclose(counts.mean(0), rate, atol=5 * np.sqrt(rate.max() / n))
    np.testing.assert_allclose(counts.var(0), rate, rtol=0.15)
    for noise, cdf in (
        (BernoulliNoise(0.8, THRESHOLDS), stats.norm.cdf),
        (BernoulliNoise(0.8, THRESHOLDS, "logistic"), stats.logistic.cdf),
    ):
        bits = noise.add_noise(clean)
        assert set(np.unique(bits)) <= {0.0, 1.0}
        np.testing.assert_allclose(bits.mean(0), cdf((clean[0] - THRESHOLDS) / 0.8), atol=0.04)
    e = CorrelatedGaussianNoise(COVARIANCE).add_noise(clean) - clean
    np.testing.assert_allclose(np.cov(e.T), COVARIANCE, atol=0.1 * COVARIANCE.max())
    gaussian = gaussian_prior(M)
    e = FlowNoise(gaussian).add_noise(clean) - clean
    np.testing.assert_allclose(e.mean(0), gaussian.mean_, atol=0.15)
    np.testing.assert_allclose(np.cov(e.T), gaussian.covariance_, atol=0.4)


def test_add_noise_row_by_row(name):
    noise = MODELS[name]
    Y = np.random.default_rng(0).uniform(0.1, 2, (20, 2, 3))
    before = Y.copy()
    want = noise.add_noise(Y, random_state=3)
    np.testing.assert_array_equal(Y, before)
    assert want.shape == Y.shape and want.dtype == np.float64
    np.testing.assert_allclose(noise.add_noise(Y[:3], random_state=3), want[:3], rtol=1e-12)
    assert not np.array_equal(noise.add_noise(Y, random_state=4), want)
    tensor = noise.add_noise(torch.from_numpy(Y).float(), random_state=3)
    assert tensor.dtype == torch.float32
    Y[0, 0, 0] = np.nan
    holes = noise.add_noise(Y, random_state=3)
    np.testing.assert_array_equal(np.isnan(holes), np.isnan(Y))
    if not name.startswith("poisson"):
        np.testing.assert_array_equal(holes[1:], want[1:])


# ------------------------------------------------------------------------ clone and pickle


def test_bind_clone_and_pickle(name):
    noise, prediction, y, _ = data(name)
    want = noise.nll(prediction, y)
    copied = clone(noise)
    assert vars(copied).keys() == copied.get_params(deep=False).keys()
    for key, value in noise.get_params(deep=False).items():
        assert getattr(copied, key) is value
    loaded = pickle.loads(pickle.dumps(noise))
    assert "_cache" not in vars(loaded)
    for other in (copied.bind(M), loaded, copied, copy.deepcopy(noise)):
        torch.testing.assert_close(other.nll(prediction, y), want, rtol=1e-14, atol=0)
    assert len(repr(noise)) < 200


def test_set_params_after_use():
    for noise, change in (
        (LaplaceNoise(0.5), {"scale": 2.0}),
        (LaplaceNoise(0.5), {"smoothing": 0.5}),
        (StudentTNoise(0.5), {"df": 7.0}),
        (PoissonNoise(), {"gain": 3.0}),
        (BernoulliNoise(), {"threshold": 1.0}),
        (CorrelatedGaussianNoise(COVARIANCE), {"covariance": 2 * COVARIANCE}),
        (FlowNoise(FLOW), {"flow": gaussian_prior(M)}),
    ):
        noise = noise.bind(M)
        prediction = torch.rand(3, M, dtype=torch.float64)
        y = torch.ones_like(prediction)
        before = noise.nll(prediction, y)
        noise.set_params(**change)
        after = type(noise)(**noise.get_params(deep=False)).nll(prediction, y)
        torch.testing.assert_close(noise.nll(prediction, y), after)
        assert not torch.allclose(before, after)


def test_flow_noise_leaves_the_flow_as_it_is():
    flow = random_flow(RealNVP, (M,)).float().train().requires_grad_(True)
    noise = FlowNoise(flow).bind(M)
    prediction = torch.rand(3, M, dtype=torch.float64, requires_grad=True)
    value = noise.nll(prediction, torch.ones(3, M, dtype=torch.float64))
    value.sum().backward()
    assert value.dtype == torch.float64 and prediction.grad.abs().min() > 0
    assert flow.training and flow.loc.dtype == torch.float32
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_flow_noise_lets_go_of_its_workspaces(trainable):
    """What a solve leaves behind is the weights: not the memory that the evaluations took."""
    flow = random_flow(Glow, (1, 4, 4)).requires_grad_(trainable)
    noise = FlowNoise(flow)
    prior = GaussianPrior(np.zeros(16), np.eye(16), event_shape=(1, 4, 4))
    bound = noise.bind(16)
    y = torch.zeros(5, 16, dtype=torch.float64)
    before = bound.nll(y + 0.1, y)
    evaluator = bound._evaluator(y)
    assert any(evaluator._idle.values())
    bound.release_workspaces()
    assert not any(evaluator._idle.values())
    torch.testing.assert_close(bound.nll(y + 0.1, y), before, rtol=0, atol=0)

    made = []

    class Watched(FlowNoise):
        def bind(self, n_measurements):
            made.append(super().bind(n_measurements))
            return made[-1]

    model = AIPORegressor(Denoising(), prior=prior, noise=Watched(flow), max_evals=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.predict(noise.add_noise(np.zeros((3, 16))))
    used = [kept[1] for one in made for kept in one._cache.values() if len(kept) == 2]
    assert used and not any(any(evaluator._idle.values()) for evaluator in used)


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (LaplaceNoise(0), ValueError, r"LaplaceNoise\(scale\) must be positive and finite, got 0"),
        (LaplaceNoise(1, -1), ValueError, r"\(smoothing\) must be at least 0 and finite, got -1"),
        (LaplaceNoise("1"), TypeError, "got str '1'"),
        (StudentTNoise(1, 0), ValueError, r"StudentTNoise\(df\) must be positive"),
        (StudentTNoise(1, [1, 2]), TypeError, r"\(df\) must be a number, got list"),
        (StudentTNoise([1, 2]), ValueError, r"shape \(2,\), expected a scalar or shape \(6,\)"),
        (PoissonNoise(-1), ValueError, r"PoissonNoise\(gain\) must be positive"),
        (PoissonNoise(1, -1), ValueError, r"\(background\) must be at least 0"),
        (PoissonNoise(1, floor=0), ValueError, r"\(floor\) must be positive"),
        (BernoulliNoise(0), ValueError, r"BernoulliNoise\(scale\) must be positive"),
        (BernoulliNoise(1, np.nan), ValueError, r"\(threshold\) must be finite, got nan"),
        (BernoulliNoise(link="tanh"), ValueError, "'probit', 'logistic', got 'tanh'"),
        (CorrelatedGaussianNoise(np.eye(5)), ValueError, r"shape \(5, 5\), expected \(6, 6\)"),
        (CorrelatedGaussianNoise(2.0), ValueError, r"shape \(\), expected \(6, 6\)"),
        (CorrelatedGaussianNoise("a"), TypeError, "got str 'a'"),
        (CorrelatedGaussianNoise(np.triu(np.ones((6, 6)))), ValueError, "symmetric.* up to 1"),
        (CorrelatedGaussianNoise(np.ones((6, 6))), ValueError, "positive definite, but its least"),
        (CorrelatedGaussianNoise(np.full((6, 6), np.inf)), ValueError, "must be finite"),
        (FlowNoise(random_flow(RealNVP, (4,))), ValueError, "of 4 values, but there are 6"),
        (FlowNoise(torch.nn.Linear(2, 2)), TypeError, r"got Linear.*FlowPrior\(flow=module\)"),
        (FlowNoise(FlowPrior()), NotFittedError, "FlowPrior"),
    ],
)
def test_parameter_errors(noise, error, message):
    with pytest.raises(error, match=message):
        noise.bind(M)
    with pytest.raises(error, match=message):
        noise.add_noise(np.ones((2, M)))


def test_measurements_that_cannot_be():
    prior = GaussianPrior(np.ones(3), np.eye(3))
    Y = np.ones((4, 3))

    def predict(noise, Y):
        return AIPORegressor(Denoising(), prior=prior, noise=noise).predict(Y)

    bad = Y.copy()
    bad[1, 2], bad[3, 0] = -2, -1
    with pytest.raises(ValueError, match=r"counts.*got -2 in row 1 \(2 rows: 1, 3\).*background="):
        predict(PoissonNoise(), bad)
    bad[1, 2], bad[3, 0] = 0.5, 1
    with pytest.raises(ValueError, match=r"bits, 0 and 1 or -1 and \+1, got 0.5 in row 1"):
        predict(BernoulliNoise(), bad)
    bad[1] = 0, -1, 1
    with pytest.raises(ValueError, match=r"either 0 and 1 or -1 and \+1 in a row, got 0 in row 1"):
        predict(BernoulliNoise(), bad)
    Y[2, 1] = np.nan
    flow = FlowNoise(gaussian_prior(3))
    with pytest.raises(ValueError, match=r"no marginals.*1 row\(s\): 2.*CorrelatedGaussianNoise"):
        predict(flow, Y)
    # The same, where the operator does not measure everything.
    with pytest.raises(ValueError, match=r"no marginals"):
        AIPORegressor(Inpainting([True, False, True]), prior=prior, noise=flow).predict(
            np.ones((2, 3))
        )
    with pytest.raises(ValueError, match=r"no marginals.*row\(s\): 1"):
        observed = torch.tensor([[True] * 3, [True, False, True]])
        flow.nll(torch.ones(2, 3), torch.ones(2, 3), observed)
    with pytest.raises(ValueError, match=r"got -1 in 1 of 2 rows, the first of them 1.*np\.clip"):
        PoissonNoise().add_noise(np.array([[0.0, 1.0], [1.0, -1.0]]))
    with pytest.raises(TypeError, match=r"GaussianNoise\(sigma\)\.add_noise"):
        SquaredError().add_noise(Y)


def test_counts_that_were_divided_by_the_gain():
    generator = np.random.default_rng(0)
    gain, background = np.array([50.0, 20.0, 8.0]), 3.0
    counts = torch.tensor(generator.poisson(30, size=(6, 3)).astype(float))
    counts[2, 1] = torch.nan
    tensor = torch.tensor(gain)
    for y, how in (
        (counts / tensor, r"Y \* gain"),
        ((counts / tensor).float(), r"Y \* gain"),
        (((counts - background) / tensor).clamp_min(0.0), r"Y \* gain"),
        (((counts - 0.5) / tensor).clamp_min(0.0), r"Y \* gain \+ background"),
    ):
        noise = PoissonNoise(gain, 0.5)
        with pytest.warns(UserWarning, match=rf"but {how} are, with gain=26: .* pass {how}\."):
            noise.check_measurements(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise.check_measurements(counts)
        # Not whole, nor made so by the gain: as they are.
        for y in (counts / 7, counts + 0.3, counts * torch.rand(6, 3), counts[:1] / tensor):
            noise.check_measurements(y)
        PoissonNoise().check_measurements(counts / tensor)
    # And they have the nll that is documented, zero where the rate is the measurement.
    y = counts[:2] + 0.25
    rate = 1.5 * y
    want = (rate - y - y * (rate / y).log()).sum(1)
    torch.testing.assert_close(PoissonNoise().nll(rate, y), want)
    assert PoissonNoise().nll(y, y).abs().max() == 0


def test_base_class_of_general_likelihoods_names_what_is_missing():
    class Mine(Likelihood):
        pass

    with pytest.raises(TypeError, match="abstract class Mine .*gaussian_fit.*max_curvature"):
        Mine()

    class Half(Likelihood):
        def max_curvature(self):
            return 1.0

        def gaussian_fit(self, y):
            return y, torch.ones_like(y)

    with pytest.raises(TypeError, match=r"Half must define _terms\(prediction, y\), or _nll"):
        Half().nll(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(TypeError, match="Half cannot simulate"):
        Half().add_noise(np.ones((1, 1)))


# --------------------------------------------------------------------------- in estimators


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("laplace", "probit")])
def test_rows_do_not_depend_on_each_other(name):
    prior, matrix, noise, y = map_problem(name)
    model = AIPORegressor(MatrixOperator(matrix), prior=prior, noise=noise, max_evals=15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = model.predict(y)
        np.testing.assert_allclose(model.predict(y[3:4]), whole[3:4], rtol=1e-6, atol=1e-8)
        twin = model.set_params(batch_size=13, n_jobs=1).predict(y)
    np.testing.assert_allclose(twin, whole, rtol=1e-6, atol=1e-8)


def search_problem(name):
    prior, matrix, noise, y = map_problem(name)
    x = np.random.default_rng(0).normal(size=(N, D))
    return dict(op=MatrixOperator(matrix), prior=prior, noise=noise), x, y


@pytest.mark.parametrize("name", ["poisson", "correlated", "flow"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_searches(name):
    params, x, y = search_problem(name)
    model = AIPORegressor(**params, max_evals=8)
    search = GridSearchCV(model, {"lam": [0.5, 1.0]}, cv=2, error_score="raise").fit(y, x)
    assert search.predict(y).shape == x.shape


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_paths(name):
    params, x, y = search_problem(name)
    path = AIPORegressorCV(**params, lams=2, cv=2, max_evals=12).fit(y, x)
    assert np.isfinite(path.lams_).all() and (path.lams_ > 0).all()


# ---------------------------------------------------------------------------- sigma="estimate"


def smooth_images(n, size, seed=0):
    """Gradients: nothing at the finest scale."""
    a, b = np.random.default_rng(seed).normal(size=(2, n, 1, 1, 1))
    grid = np.linspace(-5, 5, size)
    return a * grid + b * grid[:, None]


@pytest.mark.parametrize("sigma", [0.1, 3.0])
def test_estimate_from_wavelets(sigma):
    x = smooth_images(8, 31)
    y = GaussianNoise(sigma).add_noise(x)
    op = Denoising().bind((1, 31, 31))
    got = GaussianNoise("estimate").estimate(torch.tensor(y).flatten(1), op)
    assert isinstance(got.sigma, float) and got.sigma == pytest.approx(sigma, rel=0.06)
    # Missing pixels take the blocks that they are in with them.
    y[np.random.default_rng(1).random(y.shape) < 0.1] = np.nan
    got = GaussianNoise("estimate").estimate(torch.tensor(y).flatten(1), op)
    assert got.sigma == pytest.approx(sigma, rel=0.08)


@pytest.mark.parametrize("sigma", [0.01, 3.0])
def test_estimate_from_least_squares(sigma):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(12, 5))
    y = GaussianNoise(sigma).add_noise(generator.normal(0, 9, size=(500, 5)) @ matrix.T)
    op = MatrixOperator(matrix).bind((5,))
    got = GaussianNoise("estimate").estimate(torch.tensor(y), op).sigma
    assert got == pytest.approx(sigma, rel=0.05)
    # Wild entries hardly matter, missing ones and rows that are fitted exactly do not.
    y[::50, 3] = 1e6
    y[1::2, ::4] = np.nan
    y[7, 2:] = np.nan
    got = GaussianNoise("estimate").estimate(torch.tensor(y), op).sigma
    assert got == pytest.approx(sigma, rel=0.15)


def test_estimated_sigma_is_fitted():
    generator = np.random.default_rng(0)
    prior = GaussianPrior(np.zeros(3), np.eye(3))
    matrix = generator.normal(size=(9, 3))
    x = generator.normal(size=(60, 3))
    y = GaussianNoise(0.3).add_noise(x @ matrix.T)
    model = AIPORegressor(MatrixOperator(matrix), prior=prior, noise=GaussianNoise("estimate"))
    for call in (model.predict, clone(model).fit(prior).predict):
        with pytest.raises(NotFittedError, match=r"still to be estimated: call fit\(Y\)"):
            call(y)
    model.fit(y)
    assert model.noise.sigma == "estimate"
    sigma = model.noise_.sigma
    assert sigma == pytest.approx(0.3, rel=0.1)
    want = AIPORegressor(MatrixOperator(matrix), prior=prior, noise=GaussianNoise(sigma))
    np.testing.assert_array_equal(model.predict(y), want.predict(y))
    np.testing.assert_array_equal(model.predict(5 * y[:1]), want.predict(5 * y[:1]))
    assert not hasattr(clone(model), "noise_")
    with pytest.raises(NotFittedError):
        clone(model).predict(y)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.predict(y), want.predict(y))
    # A number that is set later is what counts, and fit without measurements forgets.
    model.set_params(noise=GaussianNoise(2.0))
    np.testing.assert_array_equal(
        model.predict(y), want.set_params(noise=GaussianNoise(2.0)).predict(y)
    )
    model.set_params(noise=GaussianNoise("estimate")).fit(prior)
    with pytest.raises(NotFittedError):
        model.predict(y)


def test_estimated_sigma_in_searches():
    generator = np.random.default_rng(0)
    prior = GaussianPrior(np.zeros(3), np.eye(3))
    op = MatrixOperator(generator.normal(size=(9, 3)))
    x = generator.normal(size=(30, 3))
    y = GaussianNoise(0.3).add_noise(np.asarray(op.bind((3,))(x)))
    params = dict(prior=prior, noise=GaussianNoise("estimate"))
    lams = [1.0, 20.0]
    grid = GridSearchCV(
        AIPORegressor(op, schedule="geometric", **params),
        {"lam": lams},
        scoring="neg_mean_squared_error",
        cv=2,
        error_score="raise",
    ).fit(y, x)
    path = AIPORegressorCV(op, lams=lams, cv=2, **params).fit(y, x)
    np.testing.assert_allclose(
        path.cv_results_["mean_test_score"], grid.cv_results_["mean_test_score"], rtol=1e-3
    )
    assert path.noise_.sigma == pytest.approx(0.3, rel=0.2)
    np.testing.assert_allclose(path.predict(y), grid.predict(y), atol=1e-3)


def test_every_estimator_estimates():
    generator = np.random.default_rng(0)
    prior = GaussianPrior(np.zeros(3), np.eye(3))
    op = MatrixOperator(generator.normal(size=(9, 3)))
    y = GaussianNoise(0.3).add_noise(np.asarray(op.bind((3,))(generator.normal(size=(60, 3)))))
    want = AIPORegressor(op, prior=prior, noise=GaussianNoise("estimate")).fit(y)
    for make in (AIPOTransformer, FixedLambdaMAP):
        model = make(op, prior=prior, noise=GaussianNoise("estimate")).fit(y)
        assert model.noise_.sigma == want.noise_.sigma == pytest.approx(0.3, rel=0.1)
    images = AIPOTransformer(op, prior=prior, noise=GaussianNoise("estimate")).fit_transform(y)
    np.testing.assert_allclose(images, want.predict(y), atol=1e-6)


def test_what_cannot_be_estimated():
    noise = GaussianNoise("estimate")
    prior = GaussianPrior(np.zeros(16), np.eye(16))
    with pytest.raises(ValueError, match=r"no more measurements than the 16.*are no images"):
        AIPORegressor(Denoising(), prior=prior, noise=noise).fit(np.ones((3, 16)))
    prior = GaussianPrior(np.zeros(16), np.eye(16), event_shape=(1, 4, 4))
    checked = np.indices((4, 4)).sum(0).ravel() % 2 == 0
    with pytest.raises(ValueError, match="no 2 x 2 pixels are measured together"):
        AIPORegressor(Inpainting(checked), prior=prior, noise=noise).fit(np.ones((3, 16)))
    with pytest.raises(ValueError, match="found no noise"):
        AIPORegressor(Denoising(), prior=prior, noise=noise).fit(np.ones((3, 16)))
    with pytest.raises(ValueError, match=r"has not been estimated yet"):
        noise.bind(3)
    with pytest.raises(ValueError, match=r"has not been estimated yet"):
        noise.add_noise(np.ones((2, 3)))


@pytest.mark.parametrize("method", ["fit", "predict"])
def test_what_the_operator_does_not_measure_is_not_checked(method):
    prior = GaussianPrior(np.ones(3), np.eye(3))
    op = Inpainting([True, True, False])
    Y = np.array([[1.0, 2.0, -999.0]])
    counted = AIPORegressor(op, prior=prior, noise=PoissonNoise())
    getattr(counted, method)(Y)
    flow = AIPORegressor(op, prior=prior, noise=FlowNoise(prior))
    with pytest.raises(ValueError, match=r"needs every measurement.* 1 row\(s\): 0\."):
        getattr(flow, method)(Y)
