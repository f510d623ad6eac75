"""What a solver says of a row is true, on ten thousand random problems; and rows are alone.

The statuses are judged by an implementation of their own, plain formulas in float64, and not by
the objective that the solvers minimise.
"""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import covering, make_objective, random_flow

from skaipo import AIPORegressor, FixedLambdaMAP, FlowPrior, GaussianPrior
from skaipo.flows import Glow, RealNVP
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting, MatrixOperator
from skaipo.solvers import (
    LBFGS,
    STATUS,
    Adam,
    AdaptiveSchedule,
    GaussianMetric,
    GeometricSchedule,
    GradientDescent,
    Hybrid,
    LinearSchedule,
    continuation_path,
    gaussian_start,
    minimize,
    mle_start,
    surrogate_of,
)

CONVERGED, BUDGET, STALLED, DIVERGED = range(4)
METHODS = {"adam": Adam, "lbfgs": LBFGS, "gd": GradientDescent, "hybrid": Hybrid}
SCHEDULES = {
    "fixed": lambda: None,
    "linear": lambda: LinearSchedule(n_stages=6),
    "geometric": lambda: GeometricSchedule(n_stages=5),
    "adaptive": AdaptiveSchedule,
}
SPACES, PENALTIES = ["image", "latent"], ["density", "latent"]
EXAMPLES, ROWS = 58, 175

# ------------------------------------------------------------------------------- random problems

problems = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**32 - 1),
        d=st.integers(2, 12),
        noise=st.sampled_from(["squared", "gaussian", "per entry"]),
        space=st.sampled_from(SPACES),
        penalty=st.sampled_from(PENALTIES),
        metric=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        tol=st.floats(-6, -2).map(lambda e: 10.0**e),
    )
)
# Dealt out and not drawn, so that any two of them meet.
KINDS = dict(
    method=METHODS,
    schedule=SCHEDULES,
    prior=["gaussian", "ill", "realnvp", "tanh"],
    operator=["denoising", "inpainting", "compressed", "ill", "deficient"],
    start=["mle", "mode", "random", "gaussian"],
    max_evals=[5, 8, 20, 60, 200],
)


def random_matrix(kind, d, rng):
    """Singular values over six decades, or dependent rows."""
    m = int(rng.integers(1, d + 4))
    rank = min(m, d)
    left = np.linalg.qr(rng.normal(size=(m, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    values = np.geomspace(1.0, 1e-6, rank)
    if kind == "deficient":
        values = np.where(np.arange(rank) < max(1, rank // 2), 1.0, 0.0)
    return left * values @ right.T


def random_operator(kind, d, rng):
    """An operator, and the matrix that it stands for."""
    if kind == "denoising":
        return Denoising(), np.eye(d)
    if kind == "inpainting":
        mask = rng.random(d) < 0.6
        mask[rng.integers(d)] = True
        return Inpainting(mask), np.diag(mask.astype(float))
    if kind == "compressed":
        op = CompressedSensing(int(rng.integers(1, d + 1)), random_state=int(rng.integers(99)))
        return op, op.bind((d,)).matrix_
    matrix = random_matrix(kind, d, rng)
    return MatrixOperator(matrix), matrix


def random_prior(kind, d, rng):
    """A flow in float64: that of a normal distribution, or a RealNVP with ReLU or tanh."""
    if kind in ("realnvp", "tanh"):
        return random_flow(RealNVP, (d,), seed=int(rng.integers(2**31)), smooth=kind == "tanh")
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    deviations = np.geomspace(1.0, 1e-3 if kind == "ill" else 0.3, d) * 10 ** rng.uniform(-1, 1)
    covariance = axes * deviations**2 @ axes.T
    return GaussianPrior(rng.normal(size=d), (covariance + covariance.T) / 2).flow_


def random_measurements(clean, rng, dtype):
    """Rows of every size, constant ones, absurd ones, and each with its own missing entries."""
    n, m = clean.shape
    y = clean + 0.3 * rng.normal(size=clean.shape)
    sized = rng.random(n) < 0.4
    y[sized] *= 10 ** rng.uniform(-6, 6, size=(sized.sum(), 1))
    absurd = rng.random(n) < 0.06
    y[absurd] *= 10 ** rng.uniform(6, 37, size=(absurd.sum(), 1))
    constant = rng.random(n) < 0.05
    y[constant] = rng.choice([0.0, 1.0, -3.5, 1e30], size=(constant.sum(), 1))
    y = np.clip(y, -3e38, 3e38)
    missing = rng.random((n, m)) < rng.choice([0.0, 0.2, 0.6], size=(n, 1))
    missing[np.arange(n), rng.integers(m, size=n)] = False
    missing[rng.random(n) < 0.02] = True
    y[missing] = np.nan
    return torch.tensor(y, dtype=dtype)


class Problem:
    """A batch of random problems from what hypothesis drew."""

    def __init__(self, drawn, n=ROWS):
        vars(self).update(drawn)
        rng = np.random.default_rng(self.seed)
        flow = random_prior(self.prior, self.d, rng).to(self.dtype)
        op, matrix = random_operator(self.operator, self.d, rng)
        m = len(matrix)
        sigma = {
            "squared": lambda: None,
            "gaussian": lambda: 10 ** rng.uniform(-2, 1),
            "per entry": lambda: 10 ** rng.uniform(-2, 1, size=m),
        }[self.noise]()
        noise = None if sigma is None else GaussianNoise(sigma)
        x = flow.sample(n, generator=torch.Generator().manual_seed(self.seed % 2**31))
        y = random_measurements(x.flatten(1).double().numpy() @ matrix.T, rng, self.dtype)
        self.objective = make_objective(flow, op, noise, y, self.space, self.penalty)
        if self.metric or self.start == "gaussian":
            self.objective.metric = GaussianMetric(surrogate_of(flow), self.objective)
        # The weights of the squared residuals; half of an inverse variance.
        weights = np.ones(m) if sigma is None else 0.5 * np.broadcast_to(sigma, m) ** -2.0
        observed = ~y.isnan() & torch.tensor(np.asarray(op.bind((self.d,)).measured_))
        self.oracle = Oracle(flow, matrix, weights, y.double(), observed, self.space, self.penalty)
        lam = np.where(rng.random(n) < 0.1, 0.0, 10 ** rng.uniform(-4, 4, size=n))
        if self.schedule != "fixed":
            lam[:] = 10 ** rng.uniform(-4, 4)  # continuation has one target
        self.lam = torch.tensor(lam, dtype=self.dtype)
        z = torch.tensor(rng.normal(size=(n, self.d)), dtype=self.dtype)
        self.latents = z if self.start == "random" else torch.zeros_like(z)

    def solve(self):
        """Solution, the evaluations each row is entitled to, and a record of what happened."""
        objective, method = self.objective, METHODS[self.method]()
        mode = torch.zeros_like(self.latents)
        fallback = objective.in_space("latent").image(mode) if self.space == "image" else mode
        if self.start == "mle":
            x, _ = mle_start(objective, max_evals=max(1, self.max_evals // 3), tol=self.tol)
            assert (objective.n_evals <= max(1, self.max_evals // 3)).all()
            u = objective.variable(x)
        elif self.start == "gaussian":
            u = gaussian_start(objective, self.lam, max_evals=self.max_evals // 3)
        elif self.space == "image":
            u = objective.in_space("latent").image(self.latents)
        else:
            u = self.latents
        record = Record(objective, self.lam)
        options = dict(max_evals=self.max_evals, tol=self.tol)
        if self.schedule == "fixed":
            solution = minimize(objective, u, self.lam, method, **options)
            return solution, torch.full_like(objective.n_evals, self.max_evals), record
        schedule = SCHEDULES[self.schedule]()
        ((solution, n_evals, trunk),) = continuation_path(
            objective, u, [float(self.lam[0])], method, schedule, fallback=fallback, **options
        )
        objective.n_evals.copy_(n_evals)
        # The last stage's share: all that is left, or what the schedule keeps for it.
        share = schedule.last(self.max_evals) if self.schedule == "geometric" else self.max_evals
        return solution, (trunk + share).clamp_max(self.max_evals), record


class Record:
    """Looks over the solver's shoulder: what every evaluation of a row gave."""

    def __init__(self, objective, lam):
        n = len(objective)
        self.before = objective.n_evals.clone()
        self.calls = torch.zeros(n, dtype=torch.long)
        self.broken = torch.zeros(n, dtype=torch.long)
        self.first = torch.full((n,), math.nan, dtype=lam.dtype)
        inner = objective.evaluate

        def evaluate(u, rows=None):
            result = inner(u, rows)
            rows = torch.arange(n) if rows is None else rows
            value = result.data + lam[rows] * result.prior
            # A gradient whose square overflows is none that a method could work with.
            gradient = result.grad_data + lam[rows, None] * result.grad_prior
            parts = [result.x.sum(1), result.data, result.prior, value, gradient.square().sum(1)]
            fine = torch.stack(parts).isfinite().all(0)
            new = self.calls[rows] == 0
            self.first[rows[new]] = value[new]
            self.broken[rows] += ~fine
            self.calls[rows] += 1
            return result

        objective.evaluate = evaluate


# ------------------------------------------------------------------------------- the other opinion


class Oracle:
    """Objective and gradients by autograd over plain formulas, in float64.

    A solver cannot know its gradient better than its arithmetic does. Each operation rounds, and
    what it returns is the exact result of operands that are wrong by a relative eps / 2 (backward
    error; Higham, Accuracy and Stability, ch. 3): with every number that enters the formulas
    multiplied by ``1 + eps * xi``, ``|xi| <= 1``, float64 shows how much of that reaches the
    gradient (Monte Carlo arithmetic; Parker, 1997). A sum of k products adds up to k such errors,
    ``k eps / 2``; here k is at most 16, the width of a network's input and one for the bias, so
    that 8 times the largest of some draws covers it. It is no constant: rows whose arithmetic is
    benign get an allowance of a few eps.
    """

    FACTOR, DRAWS = 8.0, 4

    def __init__(self, flow, matrix, weights, y, observed, space, penalty):
        self.eps = torch.finfo(flow.loc.dtype).eps
        self.flow = copy.deepcopy(flow).double()
        self.matrix, self.weights = torch.tensor(matrix), torch.tensor(weights)
        self.observed, self.y = observed, torch.where(observed, y, 0.0)
        self.space, self.penalty = space, penalty
        self.generator = torch.Generator().manual_seed(0)

    def _wiggle(self, t, eps):
        if eps == 0:
            return t
        xi = 2 * torch.rand(t.shape, generator=self.generator, dtype=t.dtype) - 1
        return t * (1 + eps * xi)

    def _wiggled_flow(self, eps):
        if eps == 0:
            return self.flow
        flow = copy.deepcopy(self.flow)
        for name, t in [*flow.named_parameters(), *flow.named_buffers()]:
            if not name.endswith("mask"):
                t.data = self._wiggle(t.data, eps)
        return flow

    def terms(self, u, eps=0.0):
        """Image, data term, penalty and the two gradients at ``u``, with operands off by eps."""
        flow = self._wiggled_flow(eps)
        u = u.double().clone().requires_grad_()
        # Normal prior: the formulas themselves.
        gaussian = hasattr(flow, "cholesky")
        if gaussian:
            base = torch.distributions.MultivariateNormal(flow.mean, scale_tril=flow.cholesky)
        if self.space == "latent":
            z = u
            if gaussian:
                x, log_det = flow.mean + z @ flow.cholesky.T, flow.cholesky.diag().log().sum()
            else:
                x, log_det = flow.inverse_and_log_det(z)
            log_prob = -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) - log_det
        else:
            x = u
            if gaussian:
                centred = self._wiggle(x - flow.mean, eps)
                z = torch.linalg.solve_triangular(flow.cholesky, centred.T, upper=False).T
                log_prob = base.log_prob(flow.mean + centred)
            else:
                z, log_det = flow(x)
                log_prob = log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        measured = self._wiggle(self._wiggle(x, eps) @ self._wiggle(self.matrix, eps).T, eps)
        residual = torch.where(self.observed, self.y - measured, 0.0)
        data = (self._wiggle(self.weights, eps) * residual.square()).sum(1)
        prior = -log_prob if self.penalty == "density" else 0.5 * z.square().sum(1)
        (g_data,) = torch.autograd.grad(data.sum(), u, retain_graph=True)
        (g_prior,) = torch.autograd.grad(prior.sum(), u)
        # What the density adds up from, without the signs.
        size = 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        size = size + (flow.cholesky.diag().log().abs().sum() if gaussian else log_det.abs())
        return x.detach(), data.detach(), prior.detach(), g_data, g_prior, size.detach()

    def judge(self, u, lam):
        """Objective, ``||g||``, ``||g_data|| + lam ||g_prior||``, and the rounding in each."""
        lam = lam.double()
        u = torch.where(u.isfinite(), u, 0.0)  # of diverged rows, of which nothing is claimed
        x, data, prior, g_data, g_prior, size = self.terms(u)
        value, gradient = data + lam * prior, g_data + lam[:, None] * g_prior
        scale = _norm(g_data) + lam * _norm(g_prior)
        off = dict(x=0.0, value=0.0, gradient=0.0, scale=0.0)
        for _ in range(self.DRAWS):
            x2, data2, prior2, g_data2, g_prior2, _ = self.terms(u, self.eps)
            gradient2 = g_data2 + lam[:, None] * g_prior2
            scale2 = _norm(g_data2) + lam * _norm(g_prior2)
            seen = dict(
                x=_norm(x2 - x),
                value=(data2 - data).abs() + lam * (prior2 - prior).abs(),
                gradient=_norm(gradient2 - gradient),
                scale=(scale2 - scale).abs(),
            )
            off = {k: torch.maximum(torch.as_tensor(off[k]).double(), v) for k, v in seen.items()}
        off = {k: self.FACTOR * v for k, v in off.items()}
        # The two terms' own roundings, and that of their sum.
        off["value"] += 8 * self.eps * (data + lam * size)
        off["gradient"] += 2 * self.eps * scale
        return x, value, _norm(gradient), scale, off


def _norm(v):
    """Row norms that do not overflow."""
    largest = v.abs().amax(1).clamp_min(1e-300)
    return largest * (v / largest[:, None]).norm(dim=1)


# ------------------------------------------------------------------------------- the truth


def check_truth(problem, tally):
    """Solve, and hold every row's status against what can be found out without the solver."""
    solution, entitled, record = problem.solve()
    objective, lam, status = problem.objective, problem.lam, solution.status
    evaluation = solution.evaluation
    n_evals = objective.n_evals
    converged, budget, stalled, diverged = (status == code for code in range(4))
    assert (converged | budget | stalled | diverged).all()
    for code, name in enumerate(STATUS):
        tally[name] += int((status == code).sum())

    # Counting.
    assert torch.equal(n_evals - record.before, record.calls)
    assert (n_evals <= problem.max_evals).all()
    assert torch.equal(n_evals[budget], entitled[budget])
    assert (n_evals <= entitled).all()

    # Nothing that is not a number, but in rows that say so.
    value = evaluation.data + lam * evaluation.prior
    fine = evaluation.x.isfinite().all(1) & solution.u.isfinite().all(1) & value.isfinite()
    assert fine[~diverged].all()
    gradient = evaluation.grad_data + lam[:, None] * evaluation.grad_prior
    workable = fine & gradient.square().sum(1).isfinite()
    # Nothing to begin with, or one failure more than minimize's max_failures.
    assert ((record.broken >= 9) | ~workable)[diverged].all()
    assert (record.broken > 0)[diverged].all()
    assert torch.equal(solution.lam, lam)

    # The objective is that at x.
    x, truth, gradient, scale, off = problem.oracle.judge(solution.u, lam)
    at_u = (evaluation.x.double() - x).abs().amax(1) <= off["x"] + 1e-12 * x.abs().amax(1)
    assert at_u[fine].all()
    same = (value.double() - truth).abs() <= off["value"] + 1e-30
    assert same[fine].all()

    # Converged means stationary.
    allowed = problem.tol * (scale + off["scale"]) + off["gradient"] + 1e-37
    assert (gradient <= allowed)[converged].all()
    tally["not even in float64"] += int((gradient > problem.tol * scale)[converged].sum())
    dull = off["gradient"] > 0.5 * problem.tol * scale
    tally["allowance above tol / 2"] += int((dull & converged).sum())

    # Never worse than the start, or, for a stationary row, by rounding only.
    if problem.schedule == "fixed":
        start = record.first
        assert (value <= start)[(budget | stalled) & start.isfinite()].all()
        slack = 64 * problem.oracle.eps * (evaluation.data.abs() + (lam * evaluation.prior).abs())
        assert (value <= start + 1.001 * slack)[converged].all()

    # Stalled means that another method does not get on either.
    if stalled.any():
        tally["stalled for good"] += int(is_stuck(problem, solution, stalled).sum())


def is_stuck(problem, solution, rows, n_evals=50):
    """Rows of a mask that a fresh L-BFGS takes no further down than by 1e-4 of its terms."""
    objective = problem.objective
    y = torch.where(objective.observed, objective.y, torch.nan)[rows]
    again = make_objective(
        objective.flow, objective.op, objective.noise, y, objective.space, objective.penalty
    )
    u, lam = solution.u[rows], problem.lam[rows]
    before = again.evaluate(u)
    after = minimize(
        again, u, lam, LBFGS(), max_evals=n_evals + 1, tol=0.0, evaluation=before
    ).evaluation
    size = before.data.abs() + (lam * before.prior).abs()
    return after.value(lam) >= before.value(lam) - 1e-4 * size


def test_ten_thousand_problems_end_truthfully():
    tally, deck, dealt = Counter(), covering(*KINDS.values()), {}
    assert len(deck) <= EXAMPLES

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(problems)
    def solve(drawn):
        # (The same again when hypothesis tries an example again.)
        kinds = dealt.setdefault(str(drawn), deck[len(dealt) % len(deck)])
        check_truth(Problem(drawn | dict(zip(KINDS, kinds, strict=True))), tally)

    solve()
    total = sum(tally[name] for name in STATUS)
    print(f"{total} problems: {dict(tally)}")
    assert total >= EXAMPLES * ROWS
    # (Infeasible is what the MLE of an operator that is not linear may be, no solver's status.)
    others = [name for name in STATUS if name != "infeasible"]
    assert min(tally[name] for name in others) > 50, "every status is meant to occur"
    # The allowance for rounding is not what makes rows pass: most pass in float64, as they are.
    assert tally["not even in float64"] < 0.05 * tally["converged"]
    # (Those that are not stuck are gradient descent on absurd rows, and float32 on ill ones.)
    assert tally["stalled for good"] >= 0.9 * tally["stalled"]


# ------------------------------------------------------------------------------- regressions


def test_a_gradient_whose_square_underflows_is_not_zero():
    y = torch.full((2, 3), torch.nan)
    objective = make_objective(
        GaussianPrior(np.zeros(3), np.eye(3)).flow_.float(), Denoising(), None, y
    )
    u = torch.tensor([[1e-25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    # Nothing is measured: only the mode itself is stationary.
    evaluation = objective.evaluate(u)
    assert evaluation.relative_gradient(torch.ones(2)).tolist() == [1.0, 0.0]


def test_gradients_whose_squares_overflow_do_not_cancel():
    y = torch.zeros(1, 2)
    objective = make_objective(
        GaussianPrior(np.zeros(2), np.eye(2)).flow_.float(), Denoising(), None, y
    )
    evaluation = objective.evaluate(torch.zeros(1, 2))
    evaluation.grad_data = torch.tensor([[3e20, 2e19]])
    evaluation.grad_prior = torch.tensor([[-3e20, 1e19]])
    relative = evaluation.relative_gradient(torch.ones(1))
    torch.testing.assert_close(relative, torch.tensor([3e19 / 6e20]), rtol=1e-2, atol=0)
    assert evaluation.finite().all() and not evaluation.finite(torch.ones(1)).any()


@pytest.mark.parametrize("name", METHODS)
def test_an_objective_that_overflows_at_its_lambda_has_diverged(name):
    y = torch.tensor([[1.0, 2.0]])
    objective = make_objective(
        GaussianPrior(np.zeros(2), np.eye(2)).flow_.float(), Denoising(), None, y
    )
    u = torch.full((1, 2), 1e16)  # either term is finite, and lam times the second is not
    solution = minimize(objective, u, torch.tensor([1e9]), METHODS[name](), max_evals=50)
    assert solution.evaluation.finite().all()
    assert solution.status.tolist() == [DIVERGED] and objective.n_evals.tolist() == [1]


def test_descent_goes_on_where_the_decrease_drowns_in_rounding():
    # The second measurement cannot be explained: its misfit hides the first one's digits.
    op, y = MatrixOperator([[1.0], [0.0]]), torch.tensor([[2.0, 1e6]])
    objective = make_objective(GaussianPrior([0.0], [[1.0]]).flow_.float(), op, None, y)
    u = torch.ones(1, 1)
    solution = minimize(objective, u, torch.ones(1), GradientDescent(), max_evals=60, tol=1e-3)
    assert solution.status.tolist() == [CONVERGED]
    torch.testing.assert_close(solution.u, torch.tensor([[4 / 3]]), atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------- rows are alone


FLOWS = {
    "glow": lambda: random_flow(Glow, (1, 4, 4), dtype=torch.float32),
    "image realnvp": lambda: random_flow(RealNVP, (1, 4, 4), dtype=torch.float32),
    "dense realnvp": lambda: random_flow(RealNVP, (6,), smooth=True),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "name, method, space, penalty, schedule",
    covering(FLOWS, METHODS, SPACES, PENALTIES, SCHEDULES),
)
def test_a_row_is_the_same_in_batches_of_1_7_and_64_and_beside_poison(
    name, method, space, penalty, schedule
):
    """Bit for bit with convolutions; dense layers round by the size of the batch."""
    prior = FlowPrior(flow=FLOWS[name]())
    d = prior.flow_.n_features
    op = Inpainting(np.arange(d) % 3 != 1)
    Y = GaussianNoise(0.3).add_noise(op(prior.sample(64, random_state=0)), 0).reshape(64, d)
    options = dict(
        prior=prior,
        noise=GaussianNoise(0.3),
        solver=METHODS[method](),
        space=space,
        penalty=penalty,
        max_evals=9,
        tol=1e-3,
        batch_size=64,
    )
    if schedule == "fixed":
        model = FixedLambdaMAP(op, init="zero", **options)
    else:
        # Few stages, so that the budget has evaluations for each of them.
        short = (LinearSchedule if schedule == "linear" else GeometricSchedule)(n_stages=3)
        model = AIPORegressor(op, schedule=short, **options)
    whole = model.reconstruct(Y)

    def same(result, rows, among=slice(None)):
        for key in ("x", "objective", "log_prob"):
            a, b = getattr(result, key)[among], getattr(whole, key)[rows]
            a, b = a.reshape(len(b), -1), b.reshape(len(b), -1)
            if name == "dense realnvp":
                np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=key)
            else:
                assert np.array_equal(a, b), key
        assert np.array_equal(result.status[among], whole.status[rows])
        assert np.array_equal(result.n_evals[among], whole.n_evals[rows])

    poison = np.array([np.full(d, 1e30), np.full(d, 0.5), np.full(d, np.nan)])
    poison[2, 0] = 1.0  # a row of NaN alone is refused
    same(model.reconstruct(Y[[17]]), [17])
    rows = np.arange(20, 27)
    same(model.reconstruct(Y[rows]), rows)
    spoilt = Y[rows].copy()
    spoilt[[0, 3, 4]] = poison
    same(model.reconstruct(spoilt), rows[[1, 2, 5, 6]], [1, 2, 5, 6])
    spoilt = Y.copy()
    spoilt[[0, 17, 40]] = poison
    rest = np.delete(np.arange(64), [0, 17, 40])
    same(model.reconstruct(spoilt), rest, rest)


@pytest.mark.parametrize(
    "method, schedule",
    [
        *[("adam", "fixed"), ("adam", "linear"), ("lbfgs", "linear"), ("lbfgs", "adaptive")],
        *[("gd", "geometric"), ("gd", "adaptive"), ("hybrid", "fixed"), ("hybrid", "geometric")],
    ],
)
def test_a_row_without_any_measurement_leaves_its_neighbours_alone(method, schedule):
    """Below the estimators, which refuse such a row."""

    def solve(empty):
        generator = torch.Generator().manual_seed(1)
        y = torch.randn(7, 16, generator=generator)
        y[empty] = torch.nan
        objective = make_objective(FLOWS["glow"](), Denoising(), GaussianNoise(0.3), y)
        x, _ = mle_start(objective, max_evals=4)
        if schedule == "fixed":
            return minimize(objective, x, torch.ones(7), METHODS[method](), max_evals=14)
        steps = continuation_path(
            objective, x, [1.0], METHODS[method](), SCHEDULES[schedule](), max_evals=14
        )
        return next(iter(steps))[0]

    clean, spoilt = solve([]), solve([2, 6])
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(clean.u[rest], spoilt.u[rest])
    assert torch.equal(clean.status[rest], spoilt.status[rest])
    assert spoilt.u.isfinite().all()
