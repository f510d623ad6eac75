"""First-order update rules: gradient descent and Adam, one state per row."""

import math

import torch

from skaipo.solvers._base import Method, with_metric

__all__ = ["Adam", "GradientDescent"]

_BETAS = (0.9, 0.999)
_FINAL = 0.01
# Up to how many steps the preconditioned method takes its full learning rate.
_STEPS = 75.0
# Its learning rate's share in a stage that begins at the solution for a neighbouring lambda.
_WARM = 0.5


class Adam(Method):
    """Adam (Kingma & Ba, 2015) with moments, step count and step size per row.

    Parameters
    ----------
    learning_rate : float, default=None
        In units of the variable's typical size: the data's standard deviation in image space, 1
        in latent space. With the preconditioner, in standard deviations of the Gaussian posterior.
        None: 0.02; with the preconditioner at most 0.3, and less where the budget allows for more
        than some dozen steps, as the cube root of their number.
    betas : tuple of float, default=None
        None: ``(0.9, 0.999)``; with the preconditioner and 150 steps ahead or more, the first
        moment averages over a fifteenth of them, up to 50, and with fewer than 75 over less than
        ten, at least five.
    final_rate : float, default=None
        Share of the learning rate that is left when the budget ends, along half a cosine over the
        stage at the target lambda. 1 keeps it constant. None: 0.01; with the preconditioner and
        more than some dozen steps, less, as the inverse square of their number.
    warm_up : int, default=0
        Number of steps in which the learning rate rises to its value. (The first steps' moments are
        those of single gradients.)
    preconditioner : {"gaussian", None}, default=None
        "gaussian": where the objective has a :class:`GaussianMetric` (in image space), the moments
        are those of the gradient in coordinates that make its Gaussian posterior white, and that
        are local: pixels, spread over their surroundings.
    """

    def __init__(
        self,
        learning_rate=None,
        betas=None,
        final_rate=None,
        warm_up=0,
        preconditioner=None,
    ):
        self.learning_rate = learning_rate
        self.betas = betas
        self.final_rate = final_rate
        self.warm_up = warm_up
        self.preconditioner = preconditioner

    _metric = None
    bears_noise = True

    def prepare(self, objective):
        return with_metric(self, objective)

    def start(self, objective, u, evaluation, lam):
        row = torch.arange(len(u), device=u.device)
        moment = torch.zeros_like(u)
        if self._metric is not None:
            moment = torch.zeros_like(self._metric.whiten(u, lam, row))
        return dict(
            mean=moment,
            square=moment.clone(),
            row=row,
            steps=torch.zeros_like(lam),
            betas=lam.new_tensor(_BETAS if self.betas is None else self.betas).repeat(len(lam), 1),
            # betas to the power of the number of steps; products, because the vectorised power
            # rounds differently from row to row.
            powers=lam.new_ones(len(lam), 2),
            rate=torch.full_like(lam, self._rate(objective)),
            pace=torch.ones_like(lam),
            # Less than one in a stage that begins at its neighbour's solution.
            warm=torch.ones_like(lam),
            final=torch.full_like(lam, _FINAL if self.final_rate is None else self.final_rate),
        )

    def _rate(self, objective):
        if self._metric is not None:
            return 0.3 if self.learning_rate is None else self.learning_rate
        rate = 0.02 if self.learning_rate is None else self.learning_rate
        return rate * objective.scale()

    def plan(self, memory, steps, rows):
        if self._metric is None:
            return
        # Kinks are noise to the gradient. The more steps there are, the longer it pays to average
        # over it, the smaller steps get where the same way, and the finer the last ones can be.
        steps = steps[rows].clamp_min(1).to(torch.float64)
        share = (_STEPS / steps).clamp_max(1.0)
        if self.learning_rate is None:
            memory["pace"][rows] = (share ** (1 / 3)).to(memory["pace"].dtype)
        if self.final_rate is None:
            memory["final"][rows] = (_FINAL * share.square()).to(memory["final"].dtype)
        if self.betas is None:
            few = (steps / 7.5).clamp(5.0, 10.0)
            first = 1 - 1 / (steps / 15).maximum(few).clamp_max(50.0)
            memory["betas"][rows, 0] = first.to(memory["betas"].dtype)

    def direction(self, memory, gradient):
        """Update the moments by a gradient; return the bias-corrected step of unit rate."""
        memory["powers"] *= memory["betas"]
        first, second = memory["betas"][:, :1], memory["betas"][:, 1:]
        memory["mean"].lerp_(gradient, 1 - first)
        memory["square"].lerp_(gradient.square(), 1 - second)
        mean = memory["mean"] / (1 - memory["powers"][:, :1])
        square = memory["square"] / (1 - memory["powers"][:, 1:])
        return -mean / (square.sqrt() + torch.finfo(gradient.dtype).tiny ** 0.5)

    def propose(self, memory, u, evaluation, lam, progress):
        final = memory["final"]
        decay = final + (1 - final) * 0.5 * (1 + (math.pi * progress).cos())
        if self.warm_up > 0:
            memory["steps"] += 1
            decay = decay * (memory["steps"] / self.warm_up).clamp_max(1.0)
        gradient = evaluation.gradient(lam)
        if self._metric is None:
            step = self.direction(memory, gradient)
        else:
            row = memory["row"]
            step = self.direction(memory, self._metric.whiten(gradient, lam, row))
            step = self._metric.colour(step, lam, row)
        rate = memory["rate"] * memory["pace"] * memory["warm"]
        return u + (rate * decay)[:, None] * step

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        return ok

    def renew(self, memory):
        # The gradients' sizes are those of another lambda, and so was what steps were too long for.
        self.forget(memory, torch.ones_like(memory["pace"], dtype=torch.bool))
        memory["pace"].fill_(1.0)
        memory["warm"].fill_(_WARM)

    def forget(self, memory, rows):
        memory["mean"][rows] = memory["square"][rows] = 0.0
        memory["powers"][rows] = 1.0
        memory["steps"][rows] = 0.0

    def soften(self, memory, rows):
        self.forget(memory, rows)
        memory["pace"][rows] *= 0.1


class GradientDescent(Method):
    """Gradient descent with step ``1 / L``, or with a step found by backtracking.

    Parameters
    ----------
    lipschitz : float, default=None
        ``L`` of Assumption 3.2 of Liu et al. (2023): every step has length ``1 / L`` and is
        taken. Default: each row looks for its own, accepting a trial that decreases the
        objective by at least half of what a step of that length promises.
    """

    def __init__(self, lipschitz=None):
        self.lipschitz = lipschitz

    @property
    def patience(self):
        """Halvings from a step that is far too long to one that is lost in rounding."""
        return None if self.lipschitz is not None else 64

    def start(self, objective, u, evaluation, lam):
        if self.lipschitz is not None:
            return dict(step=torch.full_like(lam, 1.0 / self.lipschitz))
        norm = evaluation.gradient(lam).norm(dim=1).clamp_min(torch.finfo(u.dtype).tiny)
        step = 0.05 * objective.scale() * u.shape[1] ** 0.5 / norm
        return dict(step=step, eps=torch.full_like(lam, objective.eps))

    def propose(self, memory, u, evaluation, lam, progress):
        return u - memory["step"][:, None] * evaluation.gradient(lam)

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        if self.lipschitz is not None:
            return ok
        value, new = evaluation.value(lam), trial_evaluation.value(lam)
        gradient = evaluation.gradient(lam)
        promised = 0.5 * memory["step"] * gradient.square().sum(1)
        enough = new <= value - promised
        # Where that drowns in rounding the slope decides: on a parabola a step gives half of what
        # it promises exactly if it does not lead beyond the minimum along its line.
        noise = evaluation.rounding(lam, memory["eps"], ulps=4)
        slope = (trial_evaluation.gradient(lam) * gradient).sum(1)
        short = (new <= value + noise) & (slope >= 0)
        enough = ok & torch.where(promised <= noise, short, enough)
        memory["step"] *= torch.where(enough, 1.5, 0.5)
        return enough

    def soften(self, memory, rows):
        memory["step"][rows] *= 0.1
