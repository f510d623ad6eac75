"""Algorithm 1 of the paper, with constants that are known in closed form."""

from functools import cache

import numpy as np
import pytest
import torch

from skaipo import AIPORegressor, GaussianPrior
from skaipo.flows import Flow
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising, MatrixOperator
from skaipo.priors import FlowPrior
from skaipo.solvers import GradientDescent, TheorySchedule

D, SIGMA, LAM = 5, 0.8, 1.5


@cache
def problem(identity, seed=0):
    """A prior, an operator with a unique MLE, measurements, and the constants of the theory."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(D, D))
    covariance = 0.3 * factor @ factor.T / D + np.eye(D)
    prior = GaussianPrior(rng.normal(size=D), covariance)
    A = np.eye(D) if identity else np.eye(D) + 0.03 * rng.normal(size=(D, D))
    op = Denoising() if identity else MatrixOperator(A)
    Y = prior.sample(4, random_state=seed) @ A.T + SIGMA * rng.normal(size=(4, D))
    precision = np.linalg.inv(covariance)
    lams = np.linspace(0, LAM, 200)
    eigenvalues = [np.linalg.eigvalsh(A.T @ A / SIGMA**2 + lam * precision) for lam in lams]
    L, sigma = max(e[-1] for e in eigenvalues), 1 / min(e[0] for e in eigenvalues)
    noise = GaussianNoise(SIGMA)
    path = np.stack([prior.map_estimate(Y, op, noise, lam) for lam in lams])
    C = sigma * np.linalg.norm((path - prior.mean_) @ precision, axis=2).max()
    # The problem is convex, so that any ball will do: one that makes some ten stages.
    delta = 2 * L * sigma * C * LAM / 9.5
    return prior, op, noise, Y, dict(L=L, sigma=sigma, delta=delta, C=C)


@pytest.mark.parametrize("identity, epsilon", [(False, 1e-1), (True, 1e-3), (False, 1e-6)])
def test_algorithm_1_ends_within_epsilon_after_the_steps_of_the_formulas(identity, epsilon):
    prior, op, noise, Y, constants = problem(identity)
    schedule = TheorySchedule(**constants, epsilon=epsilon)
    L, mu = constants["L"], 1 / (constants["L"] * constants["sigma"] ** 2)
    delta = constants["delta"]
    delta_0 = 0.5 * delta * np.sqrt(mu / L)
    n = int(constants["C"] * LAM / delta_0) + 1
    rate = np.log(L / (L - mu))
    per_stage = int(2 * np.log(2 * delta / delta_0) / rate) + 1
    last = int(2 * np.log(2 * delta / epsilon) / rate) + 1
    steps = (n - 1) * per_stage + last
    assert n == 10 and per_stage > 1
    model = AIPORegressor(
        op,
        LAM,
        prior=prior,
        noise=noise,
        solver=GradientDescent(lipschitz=L),
        schedule=schedule,
        max_evals=3 * steps + 100,
        tol=1e-9,
    )
    result = model.reconstruct(Y, history=True)
    error = np.linalg.norm(result.x - prior.map_estimate(Y, op, noise, LAM), axis=1)
    assert (error <= epsilon).all()
    assert (result.status == "converged").all()
    for lams in result.lam_history:
        assert len(lams) == steps
        values, counts = np.unique(lams, return_counts=True)
        np.testing.assert_allclose(values, LAM * np.arange(1, n + 1) / n)
        assert (counts[:-1] == per_stage).all() and counts[-1] == last


def test_every_stage_ends_inside_the_radius():
    prior, op, noise, Y, constants = problem(identity=False, seed=3)
    schedule = TheorySchedule(**constants)
    # No more steps in the last stage than in the others.
    schedule.epsilon = schedule.radius
    model = AIPORegressor(
        op,
        LAM,
        prior=prior,
        noise=noise,
        solver=GradientDescent(lipschitz=constants["L"]),
        schedule=schedule,
        max_evals=10_000,
        tol=1e-9,
    )
    n = schedule.n_stages(LAM)
    for k in (1, n // 2, n - 1):
        lam = LAM * k / n
        x = model.set_params(lam=lam).predict(Y)
        exact = prior.map_estimate(Y, op, noise, lam)
        assert (np.linalg.norm(x - exact, axis=1) <= schedule.radius).all()


def test_too_small_a_budget_says_what_is_needed():
    prior, op, noise, Y, constants = problem(identity=True)
    model = AIPORegressor(
        op, LAM, prior=prior, noise=noise, schedule=TheorySchedule(**constants), max_evals=50
    )
    with pytest.raises(ValueError, match=r"takes \d+ gradient steps .* max_evals to at least"):
        model.predict(Y)


@pytest.mark.parametrize("change", [dict(L=-1.0), dict(epsilon=0.0), dict(sigma=1e-9)])
def test_impossible_constants(change):
    prior, op, noise, Y, constants = problem(identity=True)
    schedule = TheorySchedule(**{**constants, **change})
    model = AIPORegressor(op, LAM, prior=prior, noise=noise, schedule=schedule)
    with pytest.raises(ValueError, match=r"must be (a positive number|at least 1)"):
        model.predict(Y)


class TwoModes(Flow):
    """``z = Phi^-1(P(x))`` for a mixture of two normal distributions ``P``: two modes, exactly."""

    weights, means, width = (0.35, 0.65), (-2.0, 2.0), 0.5

    def __init__(self):
        super().__init__((1,))
        self.double()

    def _normalize(self, x):
        weights, width = x.new_tensor(self.weights), x.new_tensor(self.width)
        t = (x - x.new_tensor(self.means)) / width
        p = (weights * torch.special.ndtr(t)).sum(1, keepdim=True).clamp(1e-15, 1 - 1e-15)
        z = torch.special.ndtri(p)
        log_det = ((weights / width).log() - 0.5 * t.square()).logsumexp(1)
        return z, log_det + 0.5 * z.square().sum(1)

    def _generate(self, z):
        low, high = z.new_full(z.shape, -8.0), z.new_full(z.shape, 8.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._normalize(middle)[0] < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x = (low + high) / 2
        return x, -self._normalize(x)[1]


def test_continuation_finds_the_global_minimum_of_a_two_mode_prior():
    """AIPO from the MLE finds what a grid finds; descent from random starts often does not."""
    prior = FlowPrior(flow=TwoModes())
    noise, lam = GaussianNoise(1.0), 1.0
    Y = np.linspace(-3, 3, 13)[:, None] + 0.03
    grid = np.linspace(-6, 6, 24001)[:, None]
    density = prior.score_samples(grid)
    values = 0.5 * (Y - grid.T) ** 2 - lam * density
    best = grid[values.argmin(1), 0]
    ways = dict(
        paper=dict(schedule="linear", init="mle", mle_solver="pgd"),
        adaptive=dict(schedule="adaptive", init="mle", mle_solver="lbfgs"),
        # Without continuation: the best of three starts.
        starts=dict(schedule="direct", n_starts=3),
    )
    found = {}
    for name, way in ways.items():
        model = AIPORegressor(
            Denoising(), lam, prior=prior, noise=noise, solver="gd", max_evals=240, tol=1e-8, **way
        )
        found[name] = model.predict(Y)[:, 0]
    # Between the modes the two minima are nearly equal; away from there the start decides rightly.
    clear = np.abs(np.partition(values, 1, axis=1)[:, 0] - values.min(1)) < 1
    away = clear & (np.abs(Y[:, 0]) > 0.6)
    for name in ways:
        np.testing.assert_allclose(found[name][away], best[away], atol=1e-3, err_msg=name)

    # From every start to every measurement, at once.
    y, x = torch.tensor(Y[away]), torch.tensor(prior.sample(100, random_state=0)[:, 0])
    x = x.expand(len(y), -1)
    for _ in range(150):
        t = x.clone().requires_grad_()
        log_prob = prior.flow_.log_prob(t.reshape(-1, 1)).reshape(t.shape)
        (gradient,) = torch.autograd.grad((0.5 * (y - t) ** 2 - lam * log_prob).sum(), t)
        x = x - 0.05 * gradient
    failures = np.abs(x.numpy() - best[away, None]) > 0.1
    # Plain descent ends in the wrong mode from at least a quarter of the starts, over all y.
    assert np.mean(failures) > 0.25
