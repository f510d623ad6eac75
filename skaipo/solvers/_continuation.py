"""AIPO: follow the minimiser from lambda = 0 to the target."""

import math
from dataclasses import replace

import torch

from skaipo.solvers._base import CONVERGED, averaged_rows, minimize

__all__ = ["continuation", "continuation_path", "lattice_path"]

# How much of a step along the secant is taken before a stage of a lattice: docs/solvers.md.
_AHEAD = 0.7


def _copy(memory):
    return None if memory is None else {k: v.clone() for k, v in memory.items()}


def _state(solution):
    return solution.u, solution.evaluation, solution.memory


def _stage(objective, state, lam, method, limit, tol, history, anneal):
    u, evaluation, memory = state
    return minimize(
        objective,
        u,
        torch.zeros_like(evaluation.data) + lam,
        method,
        max_evals=limit,
        tol=tol,
        evaluation=evaluation,
        memory=_copy(memory),
        anneal=anneal,
        history=history,
    )


def _begin(objective, u, fallback):
    """The state at the start; and the fallback, which replaces lost rows, with its evaluation."""
    evaluation, spare = objective.evaluate(u), None
    if fallback is not None:
        spare = objective.evaluate(fallback)
        spare.prior[~spare.finite()] = torch.inf
        lost = ~evaluation.finite() & spare.finite()
        u = torch.where(lost[:, None], fallback, u)
        evaluation = evaluation.where(lost, spare)
    return (u, evaluation, None), [] if spare is None else [(fallback, spare)]


def _rescued(state, spares, target, method):
    """The state, with a spare point in rows whose objective at the target is lower there."""
    u, evaluation, memory = state
    lam = torch.full_like(evaluation.data, target)
    failed = torch.zeros_like(lam, dtype=torch.bool)
    for other, known in spares:
        lower = ~(evaluation.value(lam) <= known.value(lam)) & known.finite()
        if lower.any():
            u = torch.where(lower[:, None], other, u)
            evaluation = evaluation.where(lower, known)
            failed |= lower
    if memory is not None and failed.any():
        memory = _copy(memory)
        method.forget(memory, failed)
    return u, evaluation, memory


def _climb(objective, state, target, method, schedule, max_evals, history):
    """Follow the solution up to the last lambda before the target, each row at its own pace."""
    u, evaluation, memory = state
    lam = torch.zeros_like(evaluation.data)
    step = torch.full_like(lam, schedule.first * target)
    end = (objective.n_evals + schedule.climb(max_evals)).clamp_max(max_evals - 1)
    u_before, lam_before = u, lam
    while True:
        climbing = (lam + step < target) & (objective.n_evals < end) & evaluation.finite()
        if not climbing.any():
            return u, evaluation, memory
        ahead = torch.where(climbing, lam + step, lam)
        here = u
        # Predictor: the secant, for the rows that have one.
        rows = (climbing & (lam > lam_before) & (objective.n_evals < end - 1)).nonzero().flatten()
        if len(rows):
            slope = (u[rows] - u_before[rows]) / (lam - lam_before)[rows, None]
            guess = torch.addcmul(u[rows], (ahead - lam)[rows, None], slope)
            trial = objective.evaluate(guess, rows)
            better = trial.value(ahead[rows]) < evaluation.rows(rows).value(ahead[rows])
            better &= trial.finite()
            moved = rows[better]
            u = u.clone()
            u[moved] = guess[better]
            evaluation = evaluation.replace(moved, trial.rows(better))
        # Corrector. Rows that are done climbing have nothing to spend.
        before = objective.n_evals.clone()
        limit = torch.where(climbing, (before + schedule.stage_evals).minimum(end), before)
        solution = _stage(
            objective,
            (u, evaluation, memory),
            ahead,
            method,
            limit,
            torch.where(climbing, schedule.tol, 0.0),
            history,
            anneal=False,
        )
        mastered = solution.status == CONVERGED
        easy = mastered & (2 * (objective.n_evals - before) <= schedule.stage_evals)
        factor = torch.where(easy, 4.0, torch.where(mastered, 2.0, 0.5))
        step = torch.where(climbing, factor.to(step) * step, step)
        # A row that cannot take a step at all, however short, is left for the target.
        helpless = climbing & ~mastered & (objective.n_evals == before)
        step = torch.where(helpless, torch.inf, step)
        u_before = torch.where(climbing[:, None], here, u_before)
        lam_before = torch.where(climbing, lam, lam_before)
        u, evaluation, memory, lam = solution.u, solution.evaluation, solution.memory, ahead


def continuation_path(
    objective, u, targets, method, schedule, *, max_evals, tol=1e-4, fallback=None, history=None
):
    """Solve at ascending targets along one trunk; yields a solution for each.

    The stages before a target are shared with the targets above it; the last stage, at the target
    itself, branches off and leaves the trunk as it was. With a schedule whose trunk does not
    depend on the target (:class:`GeometricSchedule`) every solution is the one that
    :func:`continuation` finds for that target alone.

    Parameters
    ----------
    objective : MAPObjective
    u : torch.Tensor of shape (n, d)
        Solution at lambda 0.
    targets : list of float
        Ascending.
    method : Method
    schedule : LinearSchedule, GeometricSchedule, TheorySchedule or AdaptiveSchedule
    max_evals : int
        Largest number of evaluations on the way to one target.
    tol : float
    fallback : torch.Tensor of shape (n, d), default=None
        Another start, for rows where the continuation fails: a row whose objective, on arrival at
        the target, is above the one here goes on from here. (A measurement far outside of the
        prior's support can lie where the flow's log-density is astronomically low and its
        gradient useless.) Costs one evaluation per row.
    history : list, default=None
        As in :func:`minimize`.

    Yields
    ------
    solution : Solution
    n_evals : torch.Tensor of shape (n,)
        Evaluations on the way to this target alone: its branch, and the trunk below it.
    trunk_evals : torch.Tensor of shape (n,)
        Those without the branch.
    """
    exact = getattr(schedule, "exact", False)
    state, spares = _begin(objective, u, None if exact else fallback)
    climbed = 0
    for target in targets:
        if hasattr(schedule, "climb"):
            # The steps depend on the target: nothing is shared but the start.
            trunk_evals = objective.n_evals.clone()
            u, evaluation, memory = _climb(
                objective, state, target, method, schedule, max_evals, history
            )
        else:
            lams, per_stage = schedule.stages(objective, target, max_evals)
            for lam in lams[climbed:]:
                limit = (objective.n_evals + per_stage).clamp_max(max_evals - 1)
                solution = _stage(
                    objective, state, lam, method, limit, schedule.tol, history, anneal=False
                )
                state = _state(solution)
            climbed = len(lams)
            u, evaluation, memory = state
            trunk_evals = objective.n_evals.clone()
        u, evaluation, memory = _rescued((u, evaluation, memory), spares, target, method)
        limit = (objective.n_evals + schedule.last(max_evals)).clamp_max(max_evals)
        solution = _stage(
            objective,
            (u, evaluation, memory),
            target,
            method,
            limit,
            schedule.tol if exact else tol,
            history,
            anneal=True,
        )
        if exact:
            # Assumption 3.3 turns the gradient into a distance: certify what was asked for.
            lam = torch.full_like(evaluation.data, target)
            distance = schedule.sigma * solution.evaluation.gradient(lam).norm(dim=1)
            solution.status[distance <= schedule.epsilon] = CONVERGED
        yield solution, objective.n_evals.clone(), trunk_evals
        # The next target's way does not lead through this branch.
        objective.n_evals.copy_(trunk_evals)


def _ahead(objective, u, evaluation, step, rows):
    """Points a step further, in rows of a mask where there is one and what is there is finite.

    Whether the objective is lower is not asked: in a flow with kinks it mostly is not, until the
    solver has averaged over them, and the next stage starts nearer to its end all the same.
    """
    rows = (rows & (step != 0).any(1)).nonzero().flatten()
    if len(rows) == 0:
        return u, evaluation
    guess = u[rows] + step[rows]
    trial = objective.evaluate(guess, rows)
    ok = trial.finite()
    u, moved = u.clone(), rows[ok]
    u[moved] = guess[ok]
    return u, evaluation.replace(moved, trial.rows(ok))


def _lowest(objective, solution, other, lam, method):
    """The solution, with another known point in rows where the objective is lower there.

    But for rows that converged, and those whose density was averaged: values say nothing there.
    """
    u, evaluation = other
    target = torch.full_like(evaluation.data, lam)
    lower = evaluation.value(target) < solution.evaluation.value(target)
    lower &= solution.status != CONVERGED
    lower &= ~averaged_rows(objective, method, solution.memory, lower)
    if not lower.any():
        return solution
    return replace(
        solution,
        u=torch.where(lower[:, None], u, solution.u),
        evaluation=solution.evaluation.where(lower, evaluation),
    )


def lattice_path(
    objective,
    u,
    targets,
    method,
    schedule,
    *,
    max_evals,
    tol=1e-4,
    fallback=None,
    low=None,
    history=None,
):
    """Solve at targets along a lattice of lambdas, from its middle to both ends.

    A target on the lattice is one of its stages; another one branches off from the last stage
    before it. Either way its solution does not depend on the other targets.

    Parameters
    ----------
    objective, u, targets, method, max_evals, tol, fallback, history
        As in :func:`continuation_path`; ``u`` is a start for the middle.
    schedule : LatticeSchedule
    low : callable, default=None
        ``low(lam) -> u`` (n, d), a start for a small lambda. Before the way down that of
        ``schedule.low`` is solved for, and where a row's objective is lower there than where the
        way has led so far, it goes on from there: at small lambdas there can be another valley,
        that of the measurement with its noise, into which the way from above falls too late.

    Yields
    ------
    position : int
        Which of the targets it is: they come in the lattice's order.
    solution : Solution
    n_evals : torch.Tensor of shape (n,)
        Evaluations on the way to this target alone, start included.
    so_far : torch.Tensor of shape (n,)
        Evaluations for all targets up to this one.
    """
    lams, middle = schedule.lattice(objective, max_evals)
    up, down = _stages_of(lams, middle, targets)
    state, spares = _begin(objective, u, fallback)
    left = (max_evals - objective.n_evals).clamp_min(0)
    budgets = schedule.budgets(middle, max_evals, left)
    so_far = objective.n_evals.clone()
    spacing = math.log(lams[1] / lams[0])

    def solve(state, lam, limit, spares, step=None):
        """The solution of one stage, and the rows in which it is that of the way up to here."""
        limit = limit.clamp_max(max_evals)
        u, evaluation, memory = _rescued(state, spares, lam, method)
        stays = (u == state[0]).all(1)
        if memory is not None:
            # What is annealed begins anew in every stage; what is known of the curvature stays.
            memory = _copy(memory)
            method.renew(memory)
        before, behind = objective.n_evals.clone(), (u, evaluation)
        if step is not None:
            rows = stays & (before < limit)
            u, evaluation = _ahead(objective, u, evaluation, step, rows)
        state = u, evaluation, memory
        solution = _stage(objective, state, lam, method, limit, tol, history, anneal=True)
        solution = _lowest(objective, solution, behind, lam, method)
        so_far.add_(objective.n_evals - before)
        return solution, stays

    def ahead(slope, lam, target):
        """The step to a stage's start: along the secant in log(lambda), and not all of the way."""
        if slope is None:
            return None
        reach = min(abs(math.log(target / lam)), spacing)
        return _AHEAD * math.copysign(reach, target - lam) * slope

    def served(k, solution, slope, spares, here):
        """The targets of a stage: it is their solution, or they branch off."""
        n_evals = objective.n_evals.clone()
        for position, on_lattice in here:
            result = solution
            if not on_lattice:
                state = _state(solution)
                lam, limit = targets[position], n_evals + (budgets[k] // 2).clamp_min(1)
                beyond = not lams[0] < lam < lams[-1]
                limit = torch.full_like(limit, max_evals) if beyond else limit
                result, _ = solve(state, lam, limit, spares, ahead(slope, lams[k], lam))
            yield position, result, objective.n_evals.clone(), so_far.clone()
            objective.n_evals.copy_(n_evals)

    def way(step, stages, spares):
        """From the root to the last stage of one side that serves a target."""
        solution, slope = root, None
        end = max(stages) if step > 0 else min(stages)
        for k in range(middle, end + step, step):
            if k != middle:
                state, limit = _state(solution), objective.n_evals + budgets[k]
                predicted = ahead(slope, lams[k - step], lams[k])
                solution, stays = solve(state, lams[k], limit, spares, predicted)
                slope = (solution.u - state[0]) / math.log(lams[k] / lams[k - step])
                # From one valley to another there is no slope; what converges needs none.
                stays &= solution.status != CONVERGED
                slope = torch.where(stays[:, None], slope, 0.0)
            yield from served(k, solution, slope, spares, stages.get(k, ()))

    root, _ = solve(state, lams[middle], objective.n_evals + budgets[middle], spares)
    n_evals = objective.n_evals.clone()
    if up:
        yield from way(1, up, spares)
    if down:
        objective.n_evals.copy_(n_evals)
        k = schedule.low(middle, max_evals)
        if low is not None and k is not None:
            u = low(lams[k])
            state = u, objective.evaluate(u), None
            so_far.add_(objective.n_evals - n_evals)
            valley, _ = solve(state, lams[k], n_evals + budgets[k], spares)
            spares = [*spares, (valley.u, valley.evaluation)]
        yield from way(-1, down, spares)


def _stages_of(lams, middle, targets):
    """The ways up and down: for each stage the targets that it serves, as pairs.

    Their position, and whether they are its lambda.
    """
    up, down = {}, {}
    for position, target in enumerate(targets):
        near = min(range(len(lams)), key=lambda k: abs(math.log(lams[k] / target)))
        on_lattice = math.isclose(lams[near], target, rel_tol=1e-9)
        falls = near < middle if on_lattice else target < lams[middle]
        if not on_lattice:
            # The stage before it, on the way from the middle.
            if falls:
                near = min(k for k in range(middle + 1) if lams[k] > target)
            else:
                near = max(k for k in range(middle, len(lams)) if lams[k] < target)
        (down if falls else up).setdefault(near, []).append((position, on_lattice))
    return up, down


def continuation(objective, u, target, method, schedule, **options):
    """Solve at one target; see :func:`continuation_path` for the parameters."""
    path = lattice_path if hasattr(schedule, "lattice") else continuation_path
    (step,) = path(objective, u, [target], method, schedule, **options)
    solution, n_evals = step[-3:-1]
    objective.n_evals.copy_(n_evals)
    return solution
