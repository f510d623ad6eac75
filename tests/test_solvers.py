"""The solvers against closed forms, scipy, torch.optim and gradients computed outside.

The problems with a normal prior have known answers; those with a flow are not convex, and there
the tests ask for stationarity, and for nothing about which minimum was found.
"""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import (
    Cliff,
    any_operator,
    covering,
    drop_entries,
    gaussian_prior,
    make_objective,
    random_flow,
)
from scipy.optimize import minimize as scipy_minimize
from sklearn.base import clone
from test_theory import TwoModes

from skaipo.flows import Glow, RealNVP
from skaipo.noise import GaussianNoise, NoiseModel, SquaredError
from skaipo.objective import MAPObjective
from skaipo.operators import CompressedSensing, Denoising, Inpainting
from skaipo.solvers import (
    LBFGS,
    MLE_SOLVERS,
    Adam,
    AdaptiveSchedule,
    DirectSchedule,
    GaussianMetric,
    GeometricSchedule,
    GradientDescent,
    Hybrid,
    LatticeSchedule,
    LinearSchedule,
    Method,
    continuation,
    continuation_path,
    gaussian_start,
    lattice_path,
    minimize,
    mle_start,
    surrogate_of,
)
from skaipo.solvers import _continuation as engine

SPACES = ["image", "latent"]
OPERATORS = ["denoising", "inpainting", "compressed"]
METHODS = {
    "adam": lambda: Adam(learning_rate=0.1),
    "lbfgs": LBFGS,
    "gd": GradientDescent,
    "hybrid": lambda: Hybrid(rough=Adam(learning_rate=0.1)),
}
# Every method in one space, both spaces.
EACH = [("adam", "image"), ("lbfgs", "latent"), ("gd", "latent"), ("hybrid", "image")]
SCHEDULES = [
    LinearSchedule(),
    GeometricSchedule(),
    AdaptiveSchedule(),
    DirectSchedule(),
    LatticeSchedule(),
]


def in_use(name, schedule, *_):
    """Every method along two schedules, and the others with the methods that hold most state."""
    return schedule in SCHEDULES[:2] or name in ("lbfgs", "hybrid")


CONVERGED, BUDGET, STALLED, DIVERGED = range(4)
SIGMA = 0.5


def rows_of(lam, n):
    return torch.full((n,), float(lam), dtype=torch.float64)


def gaussian_problem(operator="compressed", space="image", n=6, missing=True, seed=0):
    """Objective, prior, operator and measurements, some of them missing."""
    prior = gaussian_prior()
    op = any_operator(operator, 6)
    x = np.random.default_rng(seed).multivariate_normal(prior.mean_, prior.covariance_, size=n)
    y = GaussianNoise(SIGMA).add_noise(op(x), random_state=seed)
    y = drop_entries(y, seed) if missing else y
    objective = make_objective(prior.flow_, op, GaussianNoise(SIGMA), y, space)
    return objective, prior, op, y


def flow_problem(architecture=RealNVP, space="latent", n=6, operator="compressed", seed=0, **flow):
    """An objective that is not convex, and measurements of samples of the flow."""
    shape = (1, 4, 4) if architecture is Glow else (6,)
    flow = random_flow(architecture, shape, **flow)
    op = any_operator(operator, flow.n_features)
    x = flow.sample(n, generator=torch.Generator().manual_seed(seed)).flatten(1)
    y = GaussianNoise(SIGMA).add_noise(op(x.double().numpy()), random_state=seed)
    return make_objective(flow, op, GaussianNoise(SIGMA), drop_entries(y, seed), space)


def start_of(objective):
    """The variable at the mode of the latent space."""
    z = objective.y.new_zeros(len(objective), objective.n_features)
    return objective.in_space("latent").image(z) if objective.space == "image" else z


def lipschitz(objective, prior, op, lam):
    """Largest eigenvalue of the Hessian, for a method that needs it."""
    matrix = op.bind((6,)).forward(torch.eye(6, dtype=torch.float64)).numpy().T
    hessian = matrix.T @ matrix / SIGMA**2
    precision = np.linalg.inv(prior.covariance_)
    if objective.space == "latent":
        factor = np.linalg.cholesky(prior.covariance_)
        hessian, precision = factor.T @ hessian @ factor, np.eye(6)
    return float(np.linalg.eigvalsh(hessian + lam * precision)[-1])


def gradients_outside(objective, solution):
    """Both terms' gradients by autograd, from the definition: nothing of the objective's code."""
    u = solution.u.clone().requires_grad_()
    flow = objective.flow
    x = flow.inverse(u).flatten(1) if objective.space == "latent" else u
    residual = torch.where(objective.observed, objective.op.forward(x) - objective.y, 0.0)
    data = residual.square().sum(1) / (2 * SIGMA**2)
    (g_data,) = torch.autograd.grad(data.sum(), u, retain_graph=True)
    (g_prior,) = torch.autograd.grad(-flow.log_prob(x).sum(), u)
    return g_data, g_prior


def spy_on(objective):
    """Record which rows each evaluation is for."""
    calls, inner = [], objective.evaluate

    def evaluate(u, rows=None):
        calls.append(list(range(len(objective))) if rows is None else rows.tolist())
        return inner(u, rows)

    objective.evaluate = evaluate
    return calls


# ---------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    "name, operator, space", covering([*METHODS, "gd, 1/L"], OPERATORS, SPACES)
)
def test_every_method_reaches_the_closed_form(name, operator, space):
    """Every row that of a lambda of its own."""
    objective, prior, op, y = gaussian_problem(operator, space)
    lam = torch.tensor([3.0, 4.0, 5.0, 6.0, 10.0, 30.0]).double()
    if name == "gd, 1/L":
        lam = lam.clamp_max(5.0)
        method = GradientDescent(lipschitz=lipschitz(objective, prior, op, 5.0))
    else:
        method = METHODS[name]()
    solution = minimize(objective, start_of(objective), lam, method, max_evals=450, tol=1e-6)
    assert (solution.status == CONVERGED).all()
    assert torch.equal(solution.lam, lam)
    for i in range(6):
        expected = prior.map_estimate(y[i : i + 1], op, GaussianNoise(SIGMA), lam=float(lam[i]))
        np.testing.assert_allclose(solution.evaluation.x[i], expected[0], atol=1e-5)
    np.testing.assert_allclose(objective.image(solution.u), solution.evaluation.x, atol=1e-12)
    assert (objective.n_evals < 450).all()


@pytest.mark.parametrize(
    "name, schedule, space, operator",
    covering(
        METHODS,
        SCHEDULES,
        SPACES,
        ["denoising", "compressed"],
        # (On what is smooth the hybrid is L-BFGS.)
        only=lambda *case: in_use(*case) and not (case[0] == "hybrid" and case[1] in SCHEDULES[:2]),
    ),
)
def test_continuation_reaches_the_closed_form(name, schedule, space, operator):
    if isinstance(schedule, GeometricSchedule):
        schedule = GeometricSchedule(share=0.6)
    objective, prior, op, y = gaussian_problem(operator, space)
    x0, _ = mle_start(objective, max_evals=20)
    solution = continuation(
        objective,
        objective.variable(x0),
        2.0,
        METHODS[name](),
        schedule,
        max_evals=600,
        tol=1e-6,
    )
    expected = prior.map_estimate(y, op, GaussianNoise(SIGMA), lam=2.0)
    np.testing.assert_allclose(solution.evaluation.x, expected, atol=1e-3)
    converged = solution.status == CONVERGED
    np.testing.assert_allclose(solution.evaluation.x[converged], expected[converged], atol=2e-5)
    assert converged.all() if name in ("lbfgs", "hybrid") else converged.any()


# ---------------------------------------------------------------------------------- status


@pytest.mark.parametrize("architecture, name, space", covering([RealNVP, Glow], METHODS, SPACES))
def test_converged_means_stationary_and_budget_means_spent(architecture, name, space):
    n, tol = 8, 5e-2
    objective = flow_problem(architecture, space, n, smooth=True)
    lam = torch.logspace(0, 2, n, dtype=torch.float64)
    max_evals = torch.tensor([80, 8]).repeat(n // 2)
    solution = minimize(
        objective, start_of(objective), lam, METHODS[name](), max_evals=max_evals, tol=tol
    )
    g_data, g_prior = gradients_outside(objective, solution)
    relative = (g_data + lam[:, None] * g_prior).norm(dim=1) / (
        g_data.norm(dim=1) + lam * g_prior.norm(dim=1)
    )
    converged, budget = solution.status == CONVERGED, solution.status == BUDGET
    assert (converged | budget).all() and converged.any() and budget.any()
    assert (relative[converged] <= tol * (1 + 1e-6)).all()
    assert (relative[budget] > tol).all()
    assert (objective.n_evals[budget] == max_evals[budget]).all()
    assert (objective.n_evals <= max_evals).all()


class Kinked(NoiseModel):
    """Laplacian noise: the negative log-likelihood has its minimum in a kink."""

    def max_curvature(self):
        return np.inf

    def _penalty(self, residual):
        return residual.abs()


@pytest.mark.parametrize("name", ["lbfgs", "gd"])
def test_stalled_means_that_no_step_makes_progress(name):
    # |y - x| + x^2 / 2 for a standard normal: the minimum is y where |y| < 1, a kink; else 1.
    y = torch.tensor([[0.5], [-0.25], [3.0], [-7.0]]).double()
    objective = make_objective(Cliff(1, 1e9), Denoising(), Kinked(), y)
    start = torch.full((4, 1), 0.1, dtype=torch.float64)
    solution = minimize(objective, start, rows_of(1, 4), METHODS[name](), max_evals=4000, tol=1e-6)
    assert solution.status.tolist() == [STALLED, STALLED, CONVERGED, CONVERGED]
    assert (objective.n_evals < 4000).all()
    expected = torch.tensor([[0.5], [-0.25], [1.0], [-1.0]]).double()
    torch.testing.assert_close(solution.u, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_start_that_overflows_is_diverged_at_once(name):
    y = torch.tensor([[0.3, 0.6, -0.9], [0.3, 0.3, 0.3], [1.2, 0.0, 0.9]]).double()
    objective = make_objective(Cliff(3, 5.0), Denoising(), None, y)
    u = torch.tensor([[1.0, 2, 3], [9, 9, 9], [0, 1, 0]]).double()
    solution = minimize(objective, u, rows_of(1, 3), METHODS[name](), max_evals=400, tol=1e-5)
    assert solution.status.tolist() == [CONVERGED, DIVERGED, CONVERGED]
    assert objective.n_evals[1] == 1
    assert torch.equal(solution.u[1], u[1])
    torch.testing.assert_close(solution.u[[0, 2]], y[[0, 2]] / 1.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_that_keeps_overflowing_is_given_up_where_it_was(name):
    # Finite at the origin only: every step fails, however small.
    objective = make_objective(Cliff(3, 0.0), Denoising(), None, torch.ones(2, 3).double())
    u = torch.zeros(2, 3).double()
    solution = minimize(objective, u, rows_of(1, 2), METHODS[name](), max_evals=400, max_failures=8)
    assert solution.status.tolist() == [DIVERGED, DIVERGED]
    assert objective.n_evals.tolist() == [10, 10], "the start, and nine failures"
    assert torch.equal(solution.u, u)
    assert solution.evaluation.finite().all()


# ---------------------------------------------------------------------------------- rolling back


def cliff_problem(radius):
    """Rows 0, 1 step over the edge on their way, rows 2, 3 never come near it.

    The minimum for a standard normal prior, squared error and lambda 1 is at 2/3 of y.
    """
    directions = torch.tensor([[3.0, 4, 0], [0, -4, 3], [1, 1, 1], [1, -1, 1]]).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    minimum = torch.tensor([0.95, 0.93, 0.3, 0.2]).double()[:, None] * directions
    start = torch.tensor([0.0, 0.1, -0.8, -0.7]).double()[:, None] * directions
    # In latent space, where steps are measured in units of 1.
    objective = make_objective(Cliff(3, radius), Denoising(), None, 1.5 * minimum, "latent")
    return objective, start, minimum


@pytest.mark.parametrize(
    "method",
    [
        LBFGS(first_step=1.5 / 3**0.5),
        Adam(learning_rate=0.1),
        GradientDescent(),
        Hybrid(LBFGS(first_step=1.5 / 3**0.5, give_up=0.25)),
    ],
    ids=["lbfgs", "adam", "gd", "hybrid"],
)
def test_overflow_is_rolled_back_and_leaves_the_neighbours_alone(method):
    outcome = {}
    if isinstance(method, GradientDescent):
        # A first step of length 1.5 whatever the gradient.
        method.start = lambda objective, u, evaluation, lam: dict(
            step=1.5 / evaluation.gradient(lam).norm(dim=1), eps=torch.full_like(lam, objective.eps)
        )
    for radius in (1.0, 1e9):
        objective, start, minimum = cliff_problem(radius)
        non_finite = []
        inner = objective.evaluate

        def evaluate(u, rows=None, inner=inner, non_finite=non_finite):
            result = inner(u, rows)
            non_finite.extend(rows[~result.finite()].tolist() if rows is not None else [])
            return result

        objective.evaluate = evaluate
        tol = 1e-2 if isinstance(method, Adam) else 1e-6
        solution = minimize(objective, start, rows_of(1, 4), method, max_evals=300, tol=tol)
        assert (solution.status == CONVERGED).all()
        torch.testing.assert_close(solution.u, minimum, atol=2 * tol, rtol=0)
        outcome[radius] = solution, objective.n_evals, set(non_finite)
    assert outcome[1.0][2] == {0, 1} and outcome[1e9][2] == set()
    steep, flat = outcome[1.0][0], outcome[1e9][0]
    assert torch.equal(outcome[1.0][1][2:], outcome[1e9][1][2:])
    tolerance = 1e-12 if isinstance(method, Adam) else 0.0  # its cosine may round by position
    torch.testing.assert_close(steep.u[2:], flat.u[2:], atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------- independence


def bitwise_here(objective, sizes):
    """Whether this processor's kernels give a row the same bits in batches of these sizes."""
    u = torch.randn(len(objective), objective.n_features, dtype=objective.y.dtype)
    whole = objective.evaluate(u)
    objective.n_evals.zero_()
    for size in sizes:
        for rows in torch.arange(len(objective)).split(size)[:4]:
            part = objective.evaluate(u[rows], rows)
            if any(not torch.equal(v, getattr(whole, k)[rows]) for k, v in vars(part).items()):
                return False
        objective.n_evals.zero_()
    return True


def subset(objective, rows):
    y = torch.where(objective.observed[rows], objective.y[rows], torch.nan)
    return make_objective(
        objective.flow, objective.op, objective.noise, y, objective.space, objective.penalty
    )


@pytest.mark.parametrize("name, space", EACH)
def test_rows_do_not_depend_on_the_batch(name, space):
    """On a problem with one minimum, to the tolerance; batches of 1, 7 and 64 rows."""
    objective, prior, op, y = gaussian_problem("compressed", space, n=64)
    lam = torch.logspace(-1, 1, 64, dtype=torch.float64)
    options = dict(max_evals=70, tol=1e-4)
    together = minimize(objective, start_of(objective), lam, METHODS[name](), **options)
    x, status = together.evaluation.x, together.status
    for rows in ([5], list(range(10, 17))):
        part = subset(objective, rows)
        alone = minimize(part, start_of(part), lam[rows], METHODS[name](), **options)
        torch.testing.assert_close(alone.evaluation.x, x[rows], atol=1e-9, rtol=0)
        assert torch.equal(alone.status, status[rows])
        assert torch.equal(part.n_evals, objective.n_evals[rows])


@pytest.mark.parametrize(
    "name, space, dtype", covering(METHODS, SPACES, [torch.float64, torch.float32])
)
def test_rows_are_the_same_bits_in_every_batch(name, space, dtype):
    """Where the flow's kernels allow it: the solvers then add nothing of their own.

    Each row stops in its own time, so that rows leave the batch and others move up.
    """
    n = 21
    objective = flow_problem(Glow, space, n, operator="inpainting", dtype=dtype)
    if not bitwise_here(objective, (1, 5, n)):
        pytest.skip("this processor's kernels round differently in batches of different sizes")
    lam = torch.logspace(-1, 1, n, dtype=dtype)
    max_evals = 5 + torch.arange(n) * 8 % 17
    calls = spy_on(objective)
    together = minimize(
        objective, start_of(objective), lam, METHODS[name](), max_evals=max_evals, tol=1e-3
    )
    sizes = [len(call) for call in calls]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 5, "rows leave the batch"
    for rows in ([4], [0, 20, 7, 3, 11]):
        part = subset(objective, rows)
        alone = minimize(
            part, start_of(part), lam[rows], METHODS[name](), max_evals=max_evals[rows], tol=1e-3
        )
        for key, value in vars(alone.evaluation).items():
            assert torch.equal(value, getattr(together.evaluation, key)[rows]), key
        assert torch.equal(alone.status, together.status[rows])
        assert torch.equal(part.n_evals, objective.n_evals[rows])


@pytest.mark.parametrize(
    "name, schedule, dtype",
    [
        ("adam", LinearSchedule(n_stages=4), torch.float64),
        ("lbfgs", LinearSchedule(n_stages=4), torch.float32),
        ("gd", LinearSchedule(n_stages=4), torch.float64),
        ("hybrid", LinearSchedule(n_stages=4), torch.float32),
        ("lbfgs", AdaptiveSchedule(first=0.1), torch.float64),
    ],
)
def test_poisoned_neighbours(name, schedule, dtype):
    """A row of 1e30, a constant one, one with a single measurement: the others stay as they are."""
    n, poisoned = 20, [3, 8, 15]
    others = [i for i in range(n) if i not in poisoned]

    def solve(poison):
        objective = flow_problem(Glow, "image", n, operator="inpainting", dtype=dtype)
        exact = not poison and bitwise_here(objective, (5, 8, n - 1, n))
        if poison:
            objective.y[3] = 1e30
            objective.y[8] = 0.25
            objective.observed[15, 1:] = False
        x0, _ = mle_start(objective, max_evals=10)
        solution = continuation(
            objective, x0, 1.0, METHODS[name](), schedule, max_evals=40, tol=1e-3
        )
        return exact, solution, objective.n_evals

    exact, clean, clean_evals = solve(False)
    _, spoilt, spoilt_evals = solve(True)
    x, z = clean.evaluation.x[others], spoilt.evaluation.x[others]
    assert x.isfinite().all()
    assert not torch.allclose(clean.evaluation.x[poisoned], spoilt.evaluation.x[poisoned])
    if exact:
        assert torch.equal(x, z)
        assert torch.equal(clean_evals[others], spoilt_evals[others])
    else:
        torch.testing.assert_close(x, z, rtol=0, atol=1e-6 if dtype == torch.float64 else 1e-2)


# ---------------------------------------------------------------------------------- best iterate


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", [Adam(learning_rate=0.7), LBFGS(), GradientDescent(), Hybrid()])
def test_a_row_that_ran_out_of_budget_returns_the_best_it_saw(method, space):
    n = 10
    objective = flow_problem(RealNVP, space, n)
    lam = torch.logspace(-1, 0.5, n, dtype=torch.float64)
    start = start_of(objective)
    seen = [[] for _ in range(n)]
    inner = objective.evaluate

    def evaluate(u, rows=None):
        result = inner(u, rows)
        index = torch.arange(n) if rows is None else rows
        for i, value in zip(index.tolist(), result.value(lam[index]).tolist(), strict=True):
            seen[i].append(value)
        return result

    objective.evaluate = evaluate
    history = []
    solution = minimize(objective, start, lam, method, max_evals=12, tol=1e-9, history=history)
    assert (solution.status == BUDGET).all()
    best = torch.tensor([min(values) for values in seen], dtype=torch.float64)
    assert torch.equal(solution.evaluation.value(lam), best)
    # It is the objective at the point that is returned.
    torch.testing.assert_close(inner(solution.u).value(lam), best)
    taken = torch.stack([value for _, _, value in history])
    assert (best <= taken.min(dim=0).values).all()
    if isinstance(method, Adam):
        assert (taken[-1] > best).any(), "the last iterate is meant not to be the best"
    else:
        assert (taken.diff(dim=0) <= 1e-9).all(), "these methods only go downhill"


def test_history_has_an_entry_per_evaluation_after_the_start():
    objective = flow_problem(n=5)
    lam = torch.logspace(-2, 1, 5, dtype=torch.float64)
    history = []
    minimize(objective, start_of(objective), lam, LBFGS(), max_evals=40, tol=1e-2, history=history)
    counts = torch.ones(5, dtype=torch.long)
    for rows, lam_now, value in history:
        assert torch.equal(lam_now, lam[rows]) and value.shape == rows.shape
        counts[rows] += 1
    assert torch.equal(counts, objective.n_evals)
    assert len(set(counts.tolist())) > 1


# ---------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "name, schedule, max_evals", covering(METHODS, SCHEDULES, [4, 5, 13, 40], only=in_use)
)
def test_the_budget_holds_everything_that_was_evaluated(name, schedule, max_evals):
    objective = flow_problem(space="image", n=9)
    calls = spy_on(objective)
    x0, _ = mle_start(objective, max_evals=max(1, max_evals // 3))
    fallback = start_of(objective)
    continuation(
        objective, x0, 2.0, METHODS[name](), schedule, max_evals=max_evals, fallback=fallback
    )
    counts = np.bincount(np.concatenate(calls), minlength=9)
    assert objective.n_evals.tolist() == counts.tolist()
    assert max(counts) <= max_evals
    if not isinstance(schedule, GeometricSchedule | LatticeSchedule):
        assert max(counts) == max_evals


def test_what_was_spent_before_counts():
    objective = flow_problem(n=4)
    objective.n_evals += torch.tensor([0, 5, 29, 40])
    solution = minimize(
        objective, start_of(objective), rows_of(1, 4), Adam(), max_evals=30, tol=0.0
    )
    # The start is always evaluated.
    assert objective.n_evals.tolist() == [30, 30, 30, 41]
    assert (solution.status == BUDGET).all()


def test_a_budget_for_each_row():
    objective = flow_problem(n=3)
    limits = torch.tensor([3, 10, 1])
    minimize(objective, start_of(objective), rows_of(1, 3), LBFGS(), max_evals=limits, tol=0.0)
    assert objective.n_evals.tolist() == limits.tolist()


# ---------------------------------------------------------------------------------- methods


def test_adam_is_that_of_torch():
    objective = flow_problem(RealNVP, "latent", n=5)
    lam = torch.logspace(-1, 1, 5, dtype=torch.float64)
    u = start_of(objective)
    method = Adam(learning_rate=0.05, betas=(0.8, 0.95), final_rate=1.0)
    history = []
    minimize(objective, u, lam, method, max_evals=25, tol=0.0, history=history)

    tiny = torch.finfo(torch.float64).tiny ** 0.5
    parameter = torch.nn.Parameter(u.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.05, betas=(0.8, 0.95), eps=tiny)
    for _, _, value in history:
        parameter.grad = objective.evaluate(parameter.detach()).gradient(lam)
        optimizer.step()
        expected = objective.evaluate(parameter.detach()).value(lam)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


def test_adams_rate_falls_along_half_a_cosine():
    method = Adam(learning_rate=0.3, final_rate=0.1)
    objective = flow_problem(RealNVP, "latent", n=3)
    u = start_of(objective)
    lam = rows_of(1, 3)
    evaluation = objective.evaluate(u)
    steps = []
    for progress in (0.0, 0.5, 1.0):
        memory = method.start(objective, u, evaluation, lam)
        trial = method.propose(memory, u, evaluation, lam, rows_of(progress, 3))
        steps.append((trial - u).abs())
    # Adam's first step has the length of the rate in every entry.
    for step, rate in zip(steps, (0.3, 0.3 * 0.55, 0.03), strict=True):
        torch.testing.assert_close(step, torch.full_like(step, rate))


@pytest.mark.parametrize("space, scale", [("latent", 1.0), ("image", None)])
def test_steps_are_measured_in_units_of_the_variable(space, scale):
    objective = flow_problem(RealNVP, space, n=2)
    scale = objective.flow.data_scale() if scale is None else scale
    u, lam = start_of(objective), rows_of(1, 2)
    evaluation = objective.evaluate(u)
    memory = Adam(learning_rate=0.1).start(objective, u, evaluation, lam)
    torch.testing.assert_close(memory["rate"], rows_of(0.1 * scale, 2))
    for method in (LBFGS(), GradientDescent()):
        memory = method.start(objective, u, evaluation, lam)
        step = method.propose(memory, u, evaluation, lam, rows_of(0, 2)) - u
        expected = rows_of(0.05 * scale * 6**0.5, 2)
        torch.testing.assert_close(step.norm(dim=1), expected)
        # Both begin along the negative gradient.
        cosine = torch.cosine_similarity(step, -evaluation.gradient(lam))
        torch.testing.assert_close(cosine, torch.ones(2).double())


def test_descent_with_a_given_lipschitz_constant_takes_those_steps():
    objective = flow_problem(RealNVP, "latent", n=4)
    lam, u = rows_of(0.5, 4), start_of(objective)
    history = []
    method = GradientDescent(lipschitz=40.0)
    minimize(objective, u, lam, method, max_evals=20, tol=0.0, history=history)
    assert len(history) == 19
    for _, _, value in history:
        u = u - objective.evaluate(u).gradient(lam) / 40.0
        torch.testing.assert_close(value, objective.evaluate(u).value(lam))


def test_lbfgs_finds_what_scipy_finds():
    n = 3
    objective = flow_problem(RealNVP, "latent", n, smooth=True)
    lam = torch.logspace(-1, 0.5, n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = 0.5 * torch.randn(n, 6, dtype=torch.float64, generator=generator)
    solution = minimize(objective, start, lam, LBFGS(), max_evals=400, tol=1e-7)
    assert (solution.status == CONVERGED).all()
    evals = objective.n_evals.clone()
    for i in range(n):
        row = torch.tensor([i])

        def value_and_gradient(u, row=row):
            evaluation = objective.evaluate(torch.tensor(u)[None], row)
            value = evaluation.value(lam[row]).item()
            return value, evaluation.gradient(lam[row])[0].numpy()

        reference = scipy_minimize(
            value_and_gradient,
            start[i].numpy(),
            jac=True,
            method="L-BFGS-B",
            options=dict(maxiter=1000, ftol=1e-15, gtol=1e-9),
        )
        value = solution.evaluation.value(lam)[i].item()
        assert value == pytest.approx(reference.fun, abs=1e-6)
        # And at a cost that is not of another order.
        assert evals[i] < 3 * reference.nfev + 20


def dense_bfgs_direction(pairs, gamma, gradient):
    """-H g with the BFGS inverse Hessian as a matrix (Nocedal & Wright, eq. 6.17)."""
    d = len(gradient)
    H = gamma * np.eye(d)
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = np.eye(d) - rho * np.outer(y, s)
        H = V.T @ H @ V + rho * np.outer(s, s)
    return -H @ gradient


def test_lbfgs_keeps_its_curvature_when_lambda_changes():
    """The direction after the change is that of BFGS with the pairs of the new objective."""
    n, pairs_kept = 3, 4
    objective, prior, op, y = gaussian_problem("denoising", n=n, missing=False)
    method = LBFGS(memory=pairs_kept)
    first = minimize(objective, start_of(objective), rows_of(0.2, n), method, max_evals=9, tol=0.0)
    memory, u, evaluation = first.memory, first.u, first.evaluation
    assert (memory["count"] >= pairs_kept).all()
    before = memory["count"].clone()
    lam = rows_of(5.0, n)
    method.retarget(memory, u, evaluation, lam, torch.ones(n, dtype=torch.bool))
    assert torch.equal(memory["count"], before)
    precision = np.linalg.inv(prior.covariance_)
    for i in range(n):
        order = [(int(memory["count"][i]) - pairs_kept + k) % pairs_kept for k in range(4)]
        s = memory["s"][i, order].numpy()
        # The two Hessians are known: the pairs at the new lambda are exact.
        np.testing.assert_allclose(memory["y_data"][i, order], s / SIGMA**2, atol=1e-9)
        np.testing.assert_allclose(memory["y_prior"][i, order], s @ precision, atol=1e-9)
        y_new = (memory["y_data"] + 5.0 * memory["y_prior"])[i, order].numpy()
        pairs = list(zip(s, y_new, strict=True))
        s_last, y_last = pairs[-1]
        gradient = evaluation.gradient(lam)[i].numpy()
        expected = dense_bfgs_direction(pairs, s_last @ y_last / (y_last @ y_last), gradient)
        np.testing.assert_allclose(memory["direction"][i], expected, rtol=1e-8, atol=1e-10)
        assert memory["slope"][i].item() == pytest.approx(expected @ gradient)


def test_lbfgs_is_warm_at_the_next_lambda():
    objective = flow_problem(RealNVP, "latent", n=6, smooth=True)
    first = minimize(
        objective, start_of(objective), rows_of(1.0, 6), LBFGS(), max_evals=300, tol=1e-4
    )
    evals = []
    for memory in (None, {k: v.clone() for k, v in first.memory.items()}):
        objective.n_evals.zero_()
        solution = minimize(
            objective,
            first.u,
            rows_of(1.3, 6),
            LBFGS(),
            max_evals=300,
            tol=1e-4,
            memory=memory,
            evaluation=first.evaluation,
        )
        assert (solution.status == CONVERGED).all()
        evals.append(objective.n_evals.sum().item())
    cold, warm = evals
    assert warm < cold


def test_methods_are_estimators_with_a_contract():
    method = clone(LBFGS(memory=3, first_step=0.2, preconditioner=None))
    expected = dict(memory=3, first_step=0.2, preconditioner=None, give_up=None)
    assert method.get_params() == expected
    hybrid = clone(Hybrid(smooth=method, rough=Adam(learning_rate=0.1)))
    assert hybrid.smooth is not method and hybrid.smooth.get_params() == expected
    assert hybrid.rough.learning_rate == 0.1 and repr(Hybrid()) == "Hybrid()"
    assert repr(Adam(learning_rate=0.5)) == "Adam(learning_rate=0.5)"
    for call in (
        lambda m: m.start(None, None, None, None),
        lambda m: m.propose(None, None, None, None, None),
        lambda m: m.update(None, None, None, None, None, None, None),
    ):
        with pytest.raises(TypeError, match="Method does not implement"):
            call(Method())


def test_a_method_of_ones_own():
    """The loop asks for three functions: here Newton's method for a quadratic."""

    class Newton(Method):
        def __init__(self, inverse_hessian):
            self.inverse_hessian = inverse_hessian

        def start(self, objective, u, evaluation, lam):
            return {}

        def propose(self, memory, u, evaluation, lam, progress):
            return u - evaluation.gradient(lam) @ self.inverse_hessian

        def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
            return ok

    objective, prior, op, y = gaussian_problem("denoising", missing=False)
    hessian = np.eye(6) / SIGMA**2 + 0.7 * np.linalg.inv(prior.covariance_)
    method = Newton(torch.tensor(np.linalg.inv(hessian)))
    solution = minimize(objective, start_of(objective), rows_of(0.7, 6), method, max_evals=9)
    assert (solution.status == CONVERGED).all()
    assert objective.n_evals.tolist() == [2] * 6
    expected = prior.map_estimate(y, op, GaussianNoise(SIGMA), lam=0.7)
    np.testing.assert_allclose(solution.evaluation.x, expected, atol=1e-10)


# ---------------------------------------------------------------------------------- hybrid


@pytest.mark.parametrize("kind", ["gaussian", "tanh"])
def test_the_hybrid_is_lbfgs_where_the_objective_is_smooth(kind):
    def solve(method):
        if kind == "gaussian":
            objective = gaussian_problem("compressed")[0]
        else:
            objective = flow_problem(RealNVP, "latent", smooth=True)
        lam = torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)
        solution = minimize(objective, start_of(objective), lam, method, max_evals=200, tol=1e-5)
        return solution, objective.n_evals

    hybrid, n_evals = solve(Hybrid())
    assert (hybrid.status == CONVERGED).all() and not hybrid.memory["changed"].any()
    alone, evals_alone = solve(LBFGS())
    assert torch.equal(hybrid.u, alone.u) and torch.equal(n_evals, evals_alone)


def kinked_problem(rows=slice(None), operator="compressed", n=20):
    """Sum of ``|A x - y|`` and a normal prior: convex, and most minima lie in kinks.

    The last rows measure next to nothing beside the prior: smooth where they end.
    """
    prior, op = gaussian_prior(), any_operator(operator, 6)
    y = op(prior.sample(n, random_state=0)) + np.random.default_rng(1).normal(size=(n, 1))
    y[-3:] = 40.0 * np.sign(y[-3:] + 1e-9)
    return make_objective(prior.flow_, op, Kinked(), y[rows])


def test_what_follows_lbfgs_is_told_how_many_steps_are_left():
    class Recorded(Adam):
        """Remembers what it was told, per row."""

        def start(self, *args):
            return super().start(*args) | dict(told=torch.full_like(args[-1], -1))

        def plan(self, memory, steps, rows):
            memory["told"] = torch.where(rows, steps.to(memory["told"].dtype), memory["told"])

    objective = kinked_problem()
    method = Hybrid(rough=Recorded(0.1))
    budget = 60 + torch.arange(20)
    solution = minimize(
        objective, start_of(objective), rows_of(1, 20), method, max_evals=budget, tol=0.0
    )
    changed, told = solution.memory["changed"], solution.memory["rough.told"]
    assert changed.any() and not changed.all() and (told[~changed] == -1).all()
    # The row's clock, which starts after one evaluation, was stopped when it changed over.
    clock = 1 - solution.memory["since"][changed]
    torch.testing.assert_close(told[changed], (budget[changed] - 1) * clock)
    assert told[changed].min() > 0


def minimum_of_kinked(objective, i, lam):
    """By scipy, as a smooth problem with bounds: ``|r| = p + q`` with ``r = p - q``."""
    matrix = objective.op.forward(torch.eye(6, dtype=torch.float64)).numpy().T
    mean = objective.flow.mean.numpy()
    precision = np.linalg.inv(objective.flow.cholesky.numpy() @ objective.flow.cholesky.numpy().T)
    y, m = objective.y[i].numpy(), len(matrix)
    # Dual: max over |v| <= 1 of v (A mean - y) - v A S A^T v / (2 lam).
    gram = matrix @ np.linalg.inv(precision) @ matrix.T / lam
    offset = matrix @ mean - y
    dual = scipy_minimize(
        lambda v: (0.5 * v @ gram @ v - v @ offset, gram @ v - offset),
        np.zeros(m),
        jac=True,
        bounds=[(-1, 1)] * m,
        method="L-BFGS-B",
        options=dict(ftol=1e-15, gtol=1e-12, maxiter=5000),
    )
    return -dual.fun - lam * objective.flow.log_prob(objective.flow.mean[None].double()).item()


def test_the_hybrid_changes_over_at_kinks_and_ends_low():
    lam = torch.linspace(0.2, 2.0, 20, dtype=torch.float64)
    objective = kinked_problem()
    solution = minimize(objective, start_of(objective), lam, Hybrid(), max_evals=300, tol=1e-6)
    assert (objective.n_evals <= 300).all()
    changed = solution.memory["changed"]
    assert changed.sum() > 10 and not changed.all(), "each row decides for itself"
    assert (solution.status[~changed] == CONVERGED).all()
    exact = np.array([minimum_of_kinked(objective, i, float(lam[i])) for i in range(20)])
    above = solution.evaluation.value(lam).numpy() - exact
    assert above.min() > -1e-7, "the dual is a lower bound"
    assert above.max() < 0.05


def test_where_kinks_are_many_the_hybrid_is_no_worse_than_lbfgs():
    """A flow of ReLU networks on images, whose log-density has a kink wherever a unit switches."""
    values, flow = {}, random_flow(Glow, (1, 8, 8), noise=0.1)
    op, noise = Inpainting(np.arange(64) % 3 == 1), GaussianNoise(SIGMA)
    x = flow.sample(8, generator=torch.Generator().manual_seed(0)).flatten(1)
    for name, method in (("hybrid", Hybrid()), ("lbfgs", LBFGS())):
        objective = make_objective(flow, op, noise, noise.add_noise(op(x.numpy())))
        objective.metric = GaussianMetric(surrogate_of(flow), objective)
        lam = rows_of(1, 8)
        u = gaussian_start(objective, lam)
        solution = minimize(objective, u, lam, method, max_evals=100, tol=1e-5)
        assert (objective.n_evals <= 100).all()
        values[name] = solution.evaluation.value(lam).numpy()
        if name == "hybrid":
            assert solution.memory["changed"].sum() >= 4
    # (In nats, of about a hundred.)
    assert values["hybrid"].mean() <= values["lbfgs"].mean() + 0.01
    assert (values["hybrid"] <= values["lbfgs"] + 0.1).all()


def test_rows_change_over_by_themselves():
    """In batches of 1, 7 and 20 and beside a row of 1e30: on dense problems, to rounding."""
    lam = torch.linspace(0.2, 2.0, 20, dtype=torch.float64)

    def solve(rows, poison=()):
        objective = kinked_problem(operator="denoising")
        for i in poison:
            objective.y[i] = 1e30
        part = subset(objective, rows)
        solution = minimize(part, start_of(part), lam[rows], Hybrid(), max_evals=80, tol=1e-6)
        return solution, part.n_evals

    everyone = list(range(20))
    whole, evals = solve(everyone)
    assert whole.memory["changed"].any() and not whole.memory["changed"].all()
    for rows, poison in (([5], ()), (list(range(12, 19)), ()), (everyone, (0, 11))):
        part, part_evals = solve(rows, poison)
        keep = [k for k, i in enumerate(rows) if i not in poison]
        rows = [rows[k] for k in keep]
        torch.testing.assert_close(part.u[keep], whole.u[rows], atol=1e-9, rtol=0)
        assert torch.equal(part_evals[keep], evals[rows])
        for key in ("changed", "since"):
            assert torch.equal(part.memory[key][keep], whole.memory[key][rows])


def test_the_hybrids_memory_goes_to_another_lambda():
    objective = kinked_problem()
    calls = spy_on(objective)
    options = dict(method=Hybrid(), tol=1e-6)
    first = minimize(objective, start_of(objective), rows_of(1.0, 20), max_evals=60, **options)
    changed = first.memory["changed"]
    assert changed.any() and not changed.all()
    assert (first.memory["since"][changed] > 0).all()
    before = first.evaluation.value(rows_of(1.5, 20))
    second = minimize(
        objective,
        first.u,
        rows_of(1.5, 20),
        max_evals=120,
        evaluation=first.evaluation,
        memory=first.memory,
        **options,
    )
    assert second.memory["changed"][changed].all(), "a kink stays a kink"
    assert (second.memory["since"][changed] == 0).all(), "the new stage is annealed from its start"
    after = second.evaluation.value(rows_of(1.5, 20))
    assert (after <= before).all() and (after < before - 1e-3).sum() > 10
    exact = [minimum_of_kinked(objective, i, 1.5) for i in range(20)]
    np.testing.assert_allclose(after, exact, atol=0.3)
    counts = np.bincount(np.concatenate(calls), minlength=20)
    assert objective.n_evals.tolist() == counts.tolist() and max(counts) <= 120


def test_a_rollback_does_not_turn_back_the_clock():
    """The annealing of a row that changed over goes on where it was."""
    objective = kinked_problem()
    solution = minimize(
        objective, start_of(objective), rows_of(1, 20), Hybrid(), max_evals=60, tol=1e-6
    )
    memory = solution.memory
    since, changed = memory["since"].clone(), memory["changed"]
    method, lam = Hybrid().prepare(objective), rows_of(1, 20)
    method.soften(memory, changed)
    method.retarget(memory, solution.u, solution.evaluation, lam, changed)
    # Half of the way from where the rows changed over to the end.
    progress = (1 + since) / 2
    memory["rough.rate"][:] = memory["rough.pace"][:] = 1.0
    memory["rough.steps"][:] = 10.0  # warm already
    trial = method.propose(memory, solution.u, solution.evaluation, lam, progress)
    step = (trial - solution.u).abs().amax(1)[changed]
    # Adam's first step: the rate, of which half a cosine leaves a half and the final rate.
    torch.testing.assert_close(step, torch.full_like(step, 0.01 + 0.99 * 0.5), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------- schedules


def lambdas_of_rows(history, n):
    lams = [[] for _ in range(n)]
    for rows, lam, _ in history:
        for i, value in zip(rows.tolist(), lam.tolist(), strict=True):
            lams[i].append(value)
    return lams


@pytest.mark.parametrize(
    "name, schedule, max_evals",
    covering(
        METHODS,
        [schedule for schedule in SCHEDULES if not isinstance(schedule, DirectSchedule)],
        [4, 6, 20, 80],
        only=in_use,
    ),
)
def test_lambda_rises_to_the_target_and_ends_there(name, schedule, max_evals):
    n, target = 5, 1.7
    objective = flow_problem(RealNVP, "image", n)
    x0, _ = mle_start(objective, max_evals=max(1, max_evals // 3))
    history = []
    solution = continuation(
        objective,
        x0,
        target,
        METHODS[name](),
        schedule,
        max_evals=max_evals,
        tol=1e-12,
        history=history,
    )
    assert (solution.lam == target).all()
    for lams in lambdas_of_rows(history, n):
        falls = isinstance(schedule, LatticeSchedule) and lams[0] > target
        assert all(a >= b if falls else a <= b for a, b in pairwise(lams))
        assert lams and lams[-1] == target, "every row gets to the target, bit by bit"
        if max_evals >= 60 and not isinstance(schedule, LatticeSchedule):
            # (A step that needs no correction leaves no trace in the history.)
            few = 1 if isinstance(schedule, AdaptiveSchedule) else 5
            assert len(set(lams)) > few and lams[0] < 0.2 * target
    value = solution.evaluation.value(rows_of(target, n))
    torch.testing.assert_close(value, solution.evaluation.data + target * solution.evaluation.prior)


def test_linear_schedule_by_its_formula():
    objective = flow_problem(n=2)
    lams, per_stage = LinearSchedule(n_stages=20, share=0.5).stages(objective, 3.0, 300)
    np.testing.assert_allclose(lams, 3.0 * np.arange(1, 20) / 20)
    assert per_stage == 5  # half of what the start leaves, 200, in 20 stages
    # Fewer evaluations than stages: larger steps.
    lams, per_stage = LinearSchedule(n_stages=20, share=0.5).stages(objective, 3.0, 15)
    np.testing.assert_allclose(lams, 3.0 * np.arange(1, 5) / 5)
    assert per_stage == 1


@pytest.mark.parametrize("space", SPACES)
def test_every_row_takes_the_steps_that_it_can_follow(space):
    """At its own pace, never past its budget, and to the minimum that the direct way finds."""
    results = {}
    for schedule in (AdaptiveSchedule(), DirectSchedule()):
        objective, prior, op, y = gaussian_problem("compressed", space, n=9)
        x0, _ = mle_start(objective, max_evals=50, solver="lbfgs")
        u0, before, history = objective.variable(x0), objective.n_evals.clone(), []
        solution = continuation(
            objective, u0, 0.7, LBFGS(), schedule, max_evals=200, tol=1e-7, history=history
        )
        assert (solution.status == CONVERGED).all() and (objective.n_evals <= 200).all()
        expected = prior.map_estimate(y, op, GaussianNoise(SIGMA), lam=0.7)
        np.testing.assert_allclose(solution.evaluation.x, expected, atol=1e-5)
        results[type(schedule)] = lambdas_of_rows(history, 9), objective.n_evals - before
    climbs, _ = results[AdaptiveSchedule]
    assert len({tuple(sorted(set(lams))) for lams in climbs}) > 1, "rows differ in their steps"
    assert all(set(lams) == {0.7} for lams in results[DirectSchedule][0])


def test_adaptive_steps_grow_and_shrink():
    """A problem that is easy from one lambda to the next, and one that cannot be followed."""
    objective, *_ = gaussian_problem("denoising", n=3)
    u = start_of(objective)

    def steps(method, **params):
        history = []
        schedule = AdaptiveSchedule(first=0.01, share=0.9, **params)
        objective.n_evals.zero_()
        continuation(objective, u, 1.0, method, schedule, max_evals=100, tol=0.0, history=history)
        return [sorted(set(lams)) for lams in lambdas_of_rows(history, 3)]

    for lams in steps(GradientDescent(lipschitz=1e6), stage_evals=10, tol=1e-9):
        # Never mastered: each step is half as long as the one before, up to the last.
        np.testing.assert_allclose(np.diff(lams[:5]), 0.005 * 0.5 ** np.arange(4))
    for lams in steps(LBFGS(), stage_evals=40, tol=1e-3):
        taken = np.diff([0.0, *lams[:-1]])
        assert (taken[1:] >= 2 * taken[:-1] - 1e-12).all()


def test_geometric_trunk_does_not_depend_on_the_target():
    objective = flow_problem(n=2)
    schedule = GeometricSchedule(n_stages=5, span=100.0)
    anchor = objective.flow.data_scale() ** 2 / SIGMA**2
    trunk = [anchor / 100, anchor / 100**0.75, anchor / 10, anchor / 100**0.25, anchor]
    np.testing.assert_allclose(schedule.trunk(objective), trunk)
    for target in (anchor / 1000, anchor / 20, 0.9 * anchor, 10 * anchor):
        lams, _ = schedule.stages(objective, target, 300)
        np.testing.assert_allclose(lams, [lam for lam in trunk if lam < target])


def test_the_lattice_does_not_depend_on_the_target():
    objective = flow_problem(n=2)
    schedule = LatticeSchedule(n_stages=7, top=30.0, span=1e3, middle=0.12)
    lams, middle = schedule.lattice(objective, 300)
    # As many above.
    np.testing.assert_allclose(lams, 30 * 10 ** np.linspace(-3, 3, 13))
    assert lams[middle] == pytest.approx(3.0)
    # Nats have a scale, that of Bayes.
    lams, middle = LatticeSchedule().lattice(objective, 300)
    np.testing.assert_allclose(lams[:20], np.geomspace(0.01, 1, 20))
    assert middle == 19
    # The squared error has none but that of the data.
    objective.noise = SquaredError().bind(len(objective.y[0]))
    lams, middle = LatticeSchedule().lattice(objective, 300)
    top = 2 * objective.flow.data_scale() ** 2
    np.testing.assert_allclose(lams[:20], top * np.geomspace(1e-3, 1, 20))
    assert lams[middle] == pytest.approx(0.1 * top, rel=0.2)
    # A stage of less than a dozen evaluations is none.
    assert len(LatticeSchedule().lattice(objective, 60)[0]) == 9
    for wrong in (dict(n_stages=1), dict(top=0.0), dict(span=1.0), dict(middle=0), dict(share=1.0)):
        with pytest.raises(ValueError, match=r"needs n_stages >= 2, top > 0.*got LatticeSched"):
            LatticeSchedule(**wrong).lattice(objective, 300)


@pytest.mark.parametrize("n, middle", [(20, 19), (20, 13), (6, 2), (3, 0), (3, 1)])
def test_a_lattice_spends_its_budget_and_no_more(n, middle):
    left = torch.tensor([0, 7, 100, 600, 897])
    budgets = LatticeSchedule(n_stages=n).budgets(middle, 900, left)
    assert len(budgets) == 2 * n - 1 and all((stage >= 1).all() for stage in budgets)
    # What is left is for the low valley and a branch.
    core = sum(budgets[:n])
    assert (core[3:] <= left[3:]).all() and (core[3:] >= (1 - 2 / n) * left[3:]).all()
    for k in range(2 * n - 1):
        nearer = k + 1 if k < middle else k - 1
        if nearer != middle != k:
            assert (budgets[k] <= budgets[nearer]).all()


@pytest.mark.parametrize("low", [False, True])
def test_the_way_down_finds_the_other_valley(low):
    """Between two modes: the way comes from the one, and the measurement is nearer to the other."""
    y = torch.linspace(-0.35, -0.15, 6, dtype=torch.float64)[:, None]
    lams = np.geomspace(0.01, 1, 20)
    objective = make_objective(TwoModes(), Denoising(), GaussianNoise(1.0), y, "image")
    x = torch.linspace(-4, 4, 16001, dtype=torch.float64)[:, None]
    density = objective.flow.log_prob(x)
    values = [0.5 * (y - x.T) ** 2 - lam * density for lam in lams]
    best = [x[value.argmin(1)] for value in values]
    start, wrong = torch.full_like(y, 2.0), 0
    for position, solution, n_evals, _ in lattice_path(
        objective,
        start,
        lams.tolist(),
        LBFGS(),
        LatticeSchedule(),
        max_evals=900,
        low=(lambda lam: y.clone()) if low else None,
    ):
        assert (n_evals <= 900).all()
        if position <= LatticeSchedule().low(19, 900):
            wrong += int(((solution.u - best[position]).abs() > 0.05).sum())
    assert wrong == 0 if low else wrong > 0


@pytest.mark.parametrize(
    "name, space, singles",
    [("lbfgs", "latent", (6, 9)), ("hybrid", "image", (0, 3))],
)
def test_a_lattice_is_its_single_solves_and_costs_one_way_down_and_one_up(name, space, singles):
    schedule = LatticeSchedule(n_stages=6, top=30.0, span=1e3, middle=0.3)
    options = dict(max_evals=120, tol=1e-2)

    def begin():
        objective = flow_problem(RealNVP, space, n=5)
        x0, _ = mle_start(objective, max_evals=5)
        return objective, objective.variable(x0), start_of(objective)

    objective, u, fallback = begin()
    options.update(fallback=fallback, low=lambda lam: u)
    lams, middle = schedule.lattice(objective, 120)
    assert schedule.low(middle, 120) < middle < 5
    lams = lams[:7]
    # All of the lattice to one above its top, one between, and one beyond each end.
    targets = [lams[0] / 9, *lams[:2], (lams[1] * lams[2]) ** 0.5, *lams[2:], 2000 * lams[-1]]
    solved, order, before = {}, [], None
    for position, solution, n_evals, so_far in lattice_path(
        objective, u, targets, METHODS[name](), schedule, **options
    ):
        order.append(targets[position])
        solved[targets[position]] = n_evals, so_far
        assert (n_evals <= 120).all()
        if position in singles:
            single, u_single, _ = begin()
            alone = continuation(
                single, u_single, targets[position], METHODS[name](), schedule, **options
            )
            assert torch.equal(solution.u, alone.u) and torch.equal(solution.status, alone.status)
            assert torch.equal(n_evals, single.n_evals)
        assert before is None or (so_far >= before).all()
        before = so_far
    assert sorted(order) == targets and order[0] == lams[middle]
    # The stages of the lattice are counted once, and the branches.
    down, up, start = solved[lams[0]][0], solved[targets[-1]][0], solved[lams[middle]][0]
    branches = sum(
        solved[lam][0] - solved[parent][0]
        for lam, parent in ((targets[0], lams[0]), (targets[3], lams[2]))
    )
    assert middle > 2 and torch.equal(before, down + up - start + branches)


@pytest.mark.parametrize("case", ["flow", "two valleys"])
def test_a_stage_begins_ahead_on_the_secant(case, monkeypatch):
    """Where each begins, from the two solutions before it; and what is told of that point."""
    if case == "flow":
        objective = flow_problem(Glow, "image", n=6, noise=0.1)
        u, method = start_of(objective), Hybrid(LBFGS(give_up=0.15), Adam(0.05))
        valley = u + 0.3
    else:
        valley = torch.linspace(-0.35, -0.15, 6, dtype=torch.float64)[:, None]
        objective = make_objective(TwoModes(), Denoising(), GaussianNoise(1.0), valley, "image")
        u, method = torch.full_like(valley, 2.0), Adam(0.05)
    schedule = LatticeSchedule(n_stages=6, top=1.0, span=1e3, middle=1.0)
    lams, middle = schedule.lattice(objective, 300)
    stages, rescues = [], []

    def minimise(problem, u, lam, *args, evaluation, **options):
        fresh = subset(problem, list(range(6))).evaluate(u)
        assert torch.equal(evaluation.value(lam), fresh.value(lam))
        torch.testing.assert_close(evaluation.gradient(lam), fresh.gradient(lam))
        solution = minimize(problem, u, lam, *args, evaluation=evaluation, **options)
        stages.append((float(lam[0]), u, solution.u, solution.status))
        return solution

    def rescue(state, *args, rescued=engine._rescued):
        result = rescued(state, *args)
        rescues.append(((result[0] != state[0]).any(1), result[0]))
        return result

    monkeypatch.setattr(engine, "_rescued", rescue)
    monkeypatch.setattr(engine, "minimize", minimise)
    below, between = lams[0] / 1e3, (lams[1] * lams[2]) ** 0.5
    targets = [below, lams[0], between]
    options = dict(max_evals=300, tol=1e-9, low=lambda lam: valley.clone())
    for _, _, n_evals, _ in lattice_path(objective, u, targets, method, schedule, **options):
        assert (n_evals <= 300).all()
    # The root; the low valley; the way down, of which the branches come after their stages.
    order = [lams[5], lams[2], *lams[4:1:-1], between, lams[1], lams[0], below]
    assert [lam for lam, *_ in stages] == pytest.approx(order)
    way = {lam: k for k, (lam, *_) in enumerate(stages) if k != 1}
    parents = {between: lams[2], below: lams[0]} | dict(pairwise(lams[:6]))
    ahead = jumps = 0
    for lam, parent in parents.items():
        grandparent = parents.get(parent)
        _, begun, _, _ = stages[way[lam]]
        _, _, before, status = stages[way[parent]]
        moved, spare = rescues[way[lam]]
        if grandparent is None:
            expected = before
        else:
            # At most as far as from one lambda of the lattice to the next.
            reach = min(math.log(parent / lam), math.log(lams[1] / lams[0]))
            step = before - stages[way[grandparent]][2]
            still = rescues[way[parent]][0] | (status == CONVERGED)
            step[still] = 0.0
            expected = before + 0.7 * reach / math.log(lams[1] / lams[0]) * step
            ahead += int(((step != 0).any(1) & ~moved).sum())
        torch.testing.assert_close(begun[~moved], expected[~moved], rtol=1e-9, atol=1e-12)
        assert torch.equal(begun[moved], spare[moved])
        jumps += int(moved.sum())
    assert ahead > 3 and (jumps > 0 or case == "flow")


def test_stages_that_converge_begin_where_the_last_one_ended(monkeypatch):
    objective, *_ = gaussian_problem()
    steps = []

    def ahead(objective, u, evaluation, step, rows):
        steps.append(step)
        return u, evaluation

    monkeypatch.setattr(engine, "_ahead", ahead)
    targets, schedule = [0.02, 0.3], LatticeSchedule(n_stages=8)
    for *_, solution, _, _ in lattice_path(
        objective, start_of(objective), targets, LBFGS(), schedule, max_evals=400
    ):
        assert (solution.status == CONVERGED).all()
    assert len(steps) > 4 and all((step == 0).all() for step in steps)


@pytest.mark.parametrize("max_evals", [3, 5, 8, 13, 25])
def test_what_is_spent_ahead_is_of_the_budget(max_evals):
    objective = flow_problem(n=3)
    targets, fallback = [1e-4, 0.01, 0.5, 40.0], start_of(objective) + 0.1
    for _, _, n_evals, _ in lattice_path(
        objective,
        start_of(objective),
        targets,
        Adam(0.1),
        LatticeSchedule(),
        max_evals=max_evals,
        fallback=fallback,
    ):
        assert (n_evals <= max_evals).all()


def test_nothing_is_spent_ahead_of_a_stage_that_has_nothing():
    """The stage after the one that took all begins, and ends, where that one did."""

    class Greedy(LatticeSchedule):
        def budgets(self, middle, max_evals, left):
            shares = [left for _ in super().budgets(middle, max_evals, left)]
            shares[middle] = torch.full_like(left, 10)
            return shares

    objective = flow_problem(n=3)
    schedule = Greedy(top=1.0, span=100.0, middle=1.0)
    lams, middle = schedule.lattice(objective, 60)
    steps = list(
        lattice_path(
            objective,
            start_of(objective),
            lams[: middle + 1],
            Adam(0.1),
            schedule,
            max_evals=60,
            tol=0.0,
        )
    )
    assert len(steps) > 4
    # (And one for the start.)
    assert [int(n_evals.max()) for _, _, n_evals, _ in steps] == [11] + [60] * (len(steps) - 1)
    assert all(torch.equal(steps[1][1].u, solution.u) for _, solution, _, _ in steps[2:])


def test_no_stage_ends_above_where_the_one_before_it_ended():
    """Also where the step ahead was in vain: both points are known."""
    objective = flow_problem(Glow, "image", n=6, noise=0.2)
    lams = np.geomspace(0.01, 1, 20).tolist()
    way = list(
        lattice_path(
            objective,
            start_of(objective),
            lams,
            Adam(0.3),
            LatticeSchedule(),
            max_evals=250,
            tol=0.0,
        )
    )
    solutions = [solution for _, solution, _, _ in sorted(way, key=lambda step: -step[0])]
    stayed = 0
    for lam, (before, after) in zip(lams[-2::-1], pairwise(solutions), strict=True):
        lam = torch.full_like(after.lam, lam)
        value = after.evaluation.value(lam)
        assert (value <= before.evaluation.value(lam)).all()
        again = objective.evaluate(after.u)
        torch.testing.assert_close(again.value(lam), value)
        stayed += int((after.u == before.u).all(1).sum())
    assert stayed > 0


@pytest.mark.parametrize("kind", ["exact", "smooths_all", "smooths_rough"])
def test_a_lower_point_is_not_taken_where_values_say_nothing(kind):
    objective = flow_problem(n=4)
    u = start_of(objective)
    lam, low = rows_of(1.0, 4), u - 1e-3 * objective.evaluate(u).gradient(rows_of(1.0, 4))
    evaluation, lower = objective.evaluate(u), objective.evaluate(low)
    assert (lower.value(lam) < evaluation.value(lam)).all()
    method = Hybrid(rough=Adam(0.1))
    memory = method.start(objective, u, evaluation, lam)
    memory["changed"] = torch.tensor([False, False, True, True])
    status = torch.tensor([CONVERGED, BUDGET, BUDGET, CONVERGED])
    solution = minimize(objective, u, lam, method, max_evals=0)
    solution = replace(solution, u=u, evaluation=evaluation, status=status, memory=memory)
    expected = {"exact": [0, 1, 1, 0], "smooths_all": [0] * 4, "smooths_rough": [0, 1, 0, 0]}[kind]
    # (Of the objective nothing but this is asked.)
    asked = SimpleNamespace(**({} if kind == "exact" else {kind: True}))
    found = engine._lowest(asked, solution, (low, lower), 1.0, method)
    taken = torch.tensor(expected, dtype=torch.bool)
    assert torch.equal(found.u, torch.where(taken[:, None], low, u))
    assert torch.equal(found.evaluation.data, torch.where(taken, lower.data, evaluation.data))
    assert torch.equal(found.status, status)


def test_what_cannot_be_evaluated_ahead_stays():
    objective = flow_problem(n=4)
    u = start_of(objective)
    evaluation, step = objective.evaluate(u), torch.ones_like(u)
    step[1], step[2] = torch.inf, 0.0
    rows = torch.tensor([True, True, True, False])
    before = objective.n_evals.clone()
    moved, there = engine._ahead(objective, u, evaluation, step, rows)
    assert (objective.n_evals - before).tolist() == [1, 1, 0, 0]
    assert torch.equal(moved[1:], u[1:]) and torch.equal(moved[0], u[0] + 1)
    assert torch.equal(there.data[1:], evaluation.data[1:]) and there.data[0] != evaluation.data[0]


def test_a_row_that_changes_over_before_its_first_step_plans_for_all_of_them():
    """The clock of the stage before had run out."""
    objective = flow_problem(n=3)
    u = start_of(objective)
    evaluation, lam = objective.evaluate(u), rows_of(1, 3)
    rows, steps = torch.ones_like(lam, dtype=torch.bool), torch.full_like(lam, 300)
    planned = []

    class Recording(Adam):
        def plan(self, memory, steps, rows):
            planned.append((steps.tolist(), rows.tolist()))

    method = Hybrid(rough=Recording(0.1)).prepare(objective)
    memory = method.start(objective, u, evaluation, lam)
    method.plan(memory, steps, rows)
    method.propose(memory, u, evaluation, lam, torch.full_like(lam, 0.99))
    method.plan(memory, steps, rows)
    planned.clear()
    method._hand_over(memory, torch.tensor([True, False, True]))
    assert planned == [([300.0] * 3, [True, False, True])]


def test_a_new_stage_keeps_the_curvature_and_forgets_the_moments():
    objective = flow_problem(n=3)
    u = start_of(objective)
    for method in (LBFGS(), Hybrid(rough=Adam(0.1)), Adam(0.1)):
        memory = minimize(objective, u, rows_of(1, 3), method, max_evals=9, tol=0.0).memory
        method.soften(memory, torch.tensor([True, False, False]))
        before = {key: value.clone() for key, value in memory.items()}
        method.renew(memory)
        for key, value in memory.items():
            name = key.removeprefix("rough.")
            if name in ("mean", "square", "steps", "tried", "failed"):
                assert (value == 0).all()
            elif name in ("pace", "powers"):
                assert (value == 1).all()
            elif name == "warm":
                assert ((value > 0) & (value < before[key])).all()
            else:
                assert torch.equal(value, before[key])
        assert "pace" not in before or before["pace"][0] < before["pace"][1]
        objective.n_evals.zero_()


@pytest.mark.parametrize("name, space", EACH)
def test_a_path_is_its_single_solves(name, space):
    targets, schedule = [0.03, 0.2, 0.25, 8.0], GeometricSchedule(n_stages=6)

    def begin():
        objective = flow_problem(RealNVP, space, n=5)
        x0, _ = mle_start(objective, max_evals=5)
        return objective, objective.variable(x0), start_of(objective)

    options = dict(max_evals=40, tol=1e-3)
    objective, u, fallback = begin()
    path = continuation_path(
        objective, u, targets, METHODS[name](), schedule, fallback=fallback, **options
    )
    for target, (solution, n_evals, trunk_evals) in zip(targets, path, strict=True):
        single, u, fallback = begin()
        alone = continuation(
            single, u, target, METHODS[name](), schedule, fallback=fallback, **options
        )
        assert torch.equal(solution.u, alone.u)
        assert torch.equal(solution.status, alone.status)
        assert torch.equal(n_evals, single.n_evals)
        assert (trunk_evals <= n_evals).all() and (n_evals <= 40).all()


def test_rows_that_lose_their_way_go_on_from_the_fallback():
    # Beyond the cliff nothing is finite; row 1 starts there, row 2 far from its minimum.
    y = torch.tensor([[0.6, 0.0], [0.3, 0.3], [0.0, 0.9]]).double()
    u = torch.tensor([[0.5, 0.0], [7.0, 7.0], [-4.0, -2.0]]).double()
    schedule = LinearSchedule(n_stages=2)

    def solve(fallback):
        objective = make_objective(Cliff(2, 5.0), Denoising(), None, y)
        method = GradientDescent(lipschitz=1e4)  # too short to get anywhere by itself
        options = dict(max_evals=30, tol=1e-3, fallback=fallback)
        return continuation(objective, u, 1.0, method, schedule, **options), objective.n_evals

    without, _ = solve(None)
    assert without.status.tolist() == [BUDGET, DIVERGED, BUDGET]
    with_it, n_evals = solve(torch.zeros(3, 2).double())
    assert (with_it.status == BUDGET).all() and (n_evals == 30).all()
    torch.testing.assert_close(with_it.u[0], without.u[0], atol=1e-2, rtol=0)
    assert (with_it.u[1:].norm(dim=1) < 0.1).all(), "from the origin, a little"


# ---------------------------------------------------------------------------------- MLE start


def null_projector(objective, i):
    """Orthogonal projector on the null space of the observed measurements of one row, dense."""
    d = objective.n_features
    matrix = objective.op.forward(torch.eye(d, dtype=torch.float64)).numpy().T
    seen = matrix[objective.observed[i].numpy()]
    return np.eye(d) - np.linalg.pinv(seen) @ seen


@pytest.mark.parametrize(
    "architecture, operator, dtype, solver",
    covering(
        [RealNVP, Glow],
        ["inpainting", "compressed"],
        [torch.float64, torch.float32],
        MLE_SOLVERS,
        # (Slow, and each two of them meet elsewhere.)
        only=lambda *case: (case[0], case[1], case[3]) != (Glow, "compressed", "pgd"),
    ),
)
def test_the_start_is_feasible_and_stationary(architecture, operator, dtype, solver):
    n, tol = 6, 2e-2
    objective = flow_problem(architecture, "image", n, operator, dtype=dtype, smooth=True)
    x, converged = mle_start(objective, max_evals=110, tol=tol, solver=solver)
    assert x.dtype == dtype
    residual = torch.where(objective.observed, objective.op.forward(x) - objective.y, 0.0)
    eps = torch.finfo(dtype).eps
    assert residual.abs().max() < 50 * eps * (1 + x.abs().max())
    assert converged.sum() >= n // 2
    if dtype == torch.float32:
        return
    v = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.flow.log_prob(v).sum(), v)
    for i in converged.nonzero().flatten().tolist():
        g = gradient[i].numpy()
        along = null_projector(objective, i) @ g
        across = g - along
        assert np.linalg.norm(along) <= 1.001 * tol * (np.linalg.norm(across) + np.linalg.norm(g))
    assert (gradient.norm(dim=1) > 1e-3).all(), "the constraint is meant to bind"


@pytest.mark.parametrize("solver, method", [("pgd", None), ("pgd", LBFGS()), ("lbfgs", None)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_start_is_the_closed_form_at_lambda_zero(operator, solver, method):
    objective, prior, op, y = gaussian_problem(operator)
    x, converged = mle_start(objective, max_evals=300, tol=1e-7, solver=solver, method=method)
    if solver == "lbfgs":
        assert (objective.n_evals <= 100).all()
    assert converged.all()
    expected = prior.map_estimate(y, op, GaussianNoise(SIGMA), lam=0.0)
    np.testing.assert_allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("solver", MLE_SOLVERS)
def test_denoising_starts_at_the_measurement_for_one_evaluation(solver):
    objective, _, _, y = gaussian_problem("denoising", missing=False)
    x, converged = mle_start(objective, max_evals=100, solver=solver)
    np.testing.assert_array_equal(x, y)
    assert objective.n_evals.tolist() == [1] * 6
    assert converged.all()


def test_rows_without_freedom_cost_nothing_beside_those_that_have_some():
    objective, prior, op, y = gaussian_problem("denoising")
    free = ~objective.observed.all(1)
    assert free.any() and not free.all()
    x, converged = mle_start(objective, max_evals=200, tol=1e-7, solver="lbfgs")
    assert (objective.n_evals[~free] == 1).all() and (objective.n_evals[free] > 2).all()
    np.testing.assert_array_equal(x[~free], y[~free])
    assert converged.all()
    expected = prior.map_estimate(y, op, GaussianNoise(SIGMA), lam=0.0)
    np.testing.assert_allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("architecture", [RealNVP, Glow])
def test_lbfgs_starts_at_least_as_high_as_projected_gradient(architecture):
    """The same budget on the same problem; in the mean, for neither is global."""
    log_prob = {}
    for solver in MLE_SOLVERS:
        objective = flow_problem(architecture, "image", 12, "inpainting", smooth=True)
        x, _ = mle_start(objective, max_evals=40, solver=solver)
        assert (objective.n_evals <= 40).all()
        kept = torch.where(objective.observed, x - objective.y, 0.0)
        assert kept.abs().max() < 1e-12
        log_prob[solver] = objective.flow.log_prob(x)
    assert log_prob["lbfgs"].mean() >= log_prob["pgd"].mean() - 0.1


@pytest.mark.parametrize("solver", MLE_SOLVERS)
def test_measured_pixels_are_kept_and_missing_ones_filled(solver):
    objective = flow_problem(Glow, "image", 4, "denoising")
    x, _ = mle_start(objective, max_evals=50, solver=solver)
    assert not objective.observed.all()
    assert torch.equal(x[objective.observed], objective.y[objective.observed])
    # The others are not left at zero, nor at the projection's start.
    mode = start_of(objective)
    assert ((x - mode)[~objective.observed].abs() > 1e-3).all()


@pytest.mark.parametrize("operator", ["inpainting", "compressed"])
def test_the_best_feasible_iterate_is_kept(operator):
    """With steps that are far too long the log-density falls below that of the first point."""

    def start(max_evals, method=None):
        objective = flow_problem(RealNVP, "image", 8, operator)
        x, _ = mle_start(objective, max_evals=max_evals, tol=1e-9, method=method)
        assert (objective.n_evals == max_evals).all()
        return objective.flow.log_prob(x)

    first = start(1)
    wild = Adam(learning_rate=3.0, final_rate=1.0)
    assert (start(2, wild) <= first + 5).all()
    for max_evals in (2, 5, 20):
        for method in (None, wild):
            assert (start(max_evals, method) >= first - 1e-12).all()
    assert (start(60) > first + 0.1).any()


@pytest.mark.parametrize("solver", MLE_SOLVERS)
def test_the_start_counts_what_it_spends(solver, monkeypatch):
    """Against a count of the evaluations that go through any view of the objective."""
    counts, inner = torch.zeros(5, dtype=torch.long), MAPObjective.evaluate
    objective = flow_problem(n=5, space="latent")

    def evaluate(self, u, rows=None):
        # (Rows of a selection, all five of them here, are in order.)
        counts[slice(None) if rows is None else rows] += 1
        return inner(self, u, rows)

    monkeypatch.setattr(MAPObjective, "evaluate", evaluate)
    mle_start(objective, max_evals=17, tol=1e-12, solver=solver)
    assert objective.n_evals.tolist() == counts.tolist()
    assert (counts == 17).all() if solver == "pgd" else (counts <= 17).all()


@pytest.mark.parametrize("solver", MLE_SOLVERS)
def test_an_overdetermined_or_contradictory_system_has_a_least_squares_start(solver):
    prior = gaussian_prior()
    matrix = np.vstack((np.eye(6)[:2], np.eye(6)[:2]))  # two pixels, each measured twice
    y = np.array([[1.0, 2.0, 3.0, 5.0]])
    objective = make_objective(prior.flow_, matrix, None, y)
    x, converged = mle_start(objective, max_evals=300, tol=1e-7, solver=solver)
    assert converged.all()
    np.testing.assert_allclose(x[0, :2], [2.0, 3.5], atol=1e-9)
    expected = prior.map_estimate([[2.0, 3.5]], np.eye(6)[:2], lam=0.0)
    np.testing.assert_allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("solver", MLE_SOLVERS)
def test_all_rows_of_a_wide_mask_and_of_a_random_matrix_agree_with_their_own_missing_entries(
    solver,
):
    """Every row has its own pattern of missing entries; each is solved as if it were alone."""
    prior = gaussian_prior()
    rng = np.random.default_rng(4)
    for op in (CompressedSensing(4, random_state=1), Inpainting(np.arange(6) != 2)):
        m = op.bind((6,)).n_measurements_
        y = drop_entries(rng.normal(size=(8, m)), seed=2, share=0.5)
        objective = make_objective(prior.flow_, op, None, y)
        x, _ = mle_start(objective, max_evals=250, tol=1e-7, solver=solver)
        expected = np.vstack([prior.map_estimate(row[None], op, lam=0.0) for row in y])
        np.testing.assert_allclose(x, expected, atol=1e-5)
