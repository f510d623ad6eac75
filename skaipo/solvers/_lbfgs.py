"""Limited-memory BFGS for a batch of independent problems."""

import torch

from skaipo.solvers._base import Method, with_metric

__all__ = ["LBFGS"]


def _dot(a, b):
    return (a * b).sum(-1)


class LBFGS(Method):
    """L-BFGS (Nocedal & Wright, 2006, algorithm 7.4) with its own pairs and step for each row.

    One trial per row and iteration: a row whose trial fails the Armijo test shortens its step by
    quadratic interpolation and tries again in the next iteration, while its neighbours go on.
    The two terms' gradient differences are stored apart, so that the curvature pairs
    ``y = y_data + lam * y_prior`` stay exact when lambda changes.

    Parameters
    ----------
    memory : int, default=30
        Number of curvature pairs.
    first_step : float, default=0.05
        Length of the first step, per square root of the dimension, in units of the variable's
        typical size.
    preconditioner : {"gaussian", None}, default="gaussian"
        "gaussian": where the objective has a :class:`GaussianMetric` (in image space), the
        two-loop recursion starts from its inverse instead of a multiple of the identity.
    give_up : float in (0, 1), default=None
        A row has stalled when more than this share of its trials has failed, at least three, and
        its minimum is near: the squared Newton decrement is no more than the dimension, which is
        one standard deviation per coordinate. None: never for that reason.
    """

    def __init__(self, memory=30, first_step=0.05, preconditioner="gaussian", give_up=None):
        self.memory = memory
        self.first_step = first_step
        self.preconditioner = preconditioner
        self.give_up = give_up

    _metric = None

    def prepare(self, objective):
        give_up = 0.5 if self.give_up is None else self.give_up
        if not (self.memory >= 1 and self.first_step > 0 and 0 < give_up < 1):
            raise ValueError(
                f"LBFGS needs memory >= 1, first_step > 0 and 0 < give_up < 1 or None, got "
                f"{self!r}."
            )
        return with_metric(self, objective)

    # Sufficient decrease, and how small a step may get before the memory is dropped.
    _ARMIJO = 1e-4
    _MAX_TRIALS = 12
    # Failures before a row may give up: the first steps may be of the wrong length.
    _MIN_FAILED = 3
    # Twice what it takes to shorten the step, drop the memory and shorten the step again.
    patience = 4 * _MAX_TRIALS

    def start(self, objective, u, evaluation, lam):
        n, d = u.shape
        memory = dict(
            s=u.new_zeros(n, self.memory, d),
            y_data=u.new_zeros(n, self.memory, d),
            y_prior=u.new_zeros(n, self.memory, d),
            count=torch.zeros(n, dtype=torch.long, device=u.device),
            direction=torch.zeros_like(u),
            slope=torch.zeros_like(lam),
            step=torch.ones_like(lam),
            eps=torch.full_like(lam, objective.eps),
            length=torch.full_like(lam, self.first_step * objective.scale() * d**0.5),
            trials=torch.zeros(n, dtype=torch.long, device=u.device),
            steepest=torch.zeros(n, dtype=torch.bool, device=u.device),
            stuck=torch.zeros(n, dtype=torch.bool, device=u.device),
            # Rows that do without the metric: where its steps have failed.
            plain=torch.zeros(n, dtype=torch.bool, device=u.device),
            # The prior's curvature over the surrogate's, along the last step.
            ratio=torch.ones_like(lam),
            tried=torch.zeros_like(lam),
            failed=torch.zeros_like(lam),
            row=torch.arange(n, device=u.device),
        )
        self._aim(memory, evaluation, lam, torch.ones_like(memory["stuck"]))
        return memory

    def _aim(self, memory, evaluation, lam, rows):
        """Two-loop recursion: new search directions for the rows of a mask."""
        index = rows.nonzero().flatten()
        if len(index) == 0:
            return
        gradient = evaluation.rows(index).gradient(lam[index])
        count = memory["count"][index]
        # The pairs of all rows at once, the newest first: (pairs, rows, d).
        back = torch.arange(min(self.memory, int(count.max())), device=count.device)[:, None]
        slot = (count - 1 - back) % self.memory
        s_all = memory["s"][index, slot]
        y_all = torch.addcmul(
            memory["y_data"][index, slot], lam[index, None], memory["y_prior"][index, slot]
        )
        curvature, square = _dot(s_all, y_all), _dot(y_all, y_all)
        # A pair that was convex at another lambda need not be so at this one.
        convex = curvature > 1e-8 * square.sqrt() * _dot(s_all, s_all).sqrt()
        valid = (back < count) & convex
        rho_all = torch.where(valid, 1.0 / curvature, 0.0)
        q, pairs = gradient, []
        for s, y, rho in zip(s_all, y_all, rho_all, strict=True):
            alpha = rho * _dot(s, q)
            q = q - alpha[:, None] * y
            pairs.append((s, y, rho, alpha))
        norm = gradient.norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        first = memory["length"][index] / norm
        gamma = first
        if pairs:
            newest = valid.byte().argmax(0, keepdim=True)
            gamma = (curvature / square).gather(0, newest)[0]
            gamma = torch.where(valid.any(0), gamma, first)
        if self._metric is None:
            q = gamma[:, None] * q
        else:
            scaled = self._metric.solve(q, (memory["ratio"] * lam)[index], memory["row"][index])
            plain = memory["plain"][index] | ~scaled.isfinite().all(1)
            q = torch.where(plain[:, None], gamma[:, None] * q, scaled)
        for s, y, rho, alpha in reversed(pairs):
            q = q + (alpha - rho * _dot(y, q))[:, None] * s
        direction = -q
        slope = _dot(direction, gradient)
        # Rounding can spoil a direction; steepest descent is always one of descent.
        bad = ~(slope < 0) | ~direction.isfinite().all(1)
        direction = torch.where(bad[:, None], -first[:, None] * gradient, direction)
        memory["direction"][index] = direction
        memory["slope"][index] = torch.where(bad, -first * norm.square(), slope)
        memory["step"][index] = 1.0
        memory["trials"][index] = 0
        steepest = bad | (count == 0)
        if self._metric is not None:
            steepest &= bad | memory["plain"][index]
        memory["steepest"][index] = steepest

    def propose(self, memory, u, evaluation, lam, progress):
        return torch.addcmul(u, memory["step"][:, None], memory["direction"])

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        value, new = evaluation.value(lam), trial_evaluation.value(lam)
        slope, step = memory["slope"], memory["step"]
        decrease = new <= value + self._ARMIJO * step * slope
        # Near a minimum the decrease drowns in rounding; then the slope decides (the approximate
        # Wolfe condition of Hager & Zhang, 2005, eq. 4.1).
        noise = evaluation.rounding(lam, memory["eps"], ulps=4)
        new_slope = _dot(trial_evaluation.gradient(lam), memory["direction"])
        flat = (new <= value + noise) & (new_slope <= (2 * self._ARMIJO - 1) * slope)
        accept = ok & (decrease | flat)
        memory["tried"] += 1
        # (Failures within rounding are those of a row that has arrived.)
        memory["failed"] += ~(new <= value + evaluation.rounding(lam, memory["eps"]))

        index = accept.nonzero().flatten()
        if len(index):
            s = trial[index] - u[index]
            y_data = trial_evaluation.grad_data[index] - evaluation.grad_data[index]
            y_prior = trial_evaluation.grad_prior[index] - evaluation.grad_prior[index]
            y = torch.addcmul(y_data, lam[index, None], y_prior)
            good = _dot(s, y) > 1e-8 * s.norm(dim=1) * y.norm(dim=1)
            keep = index[good]
            slot = memory["count"][keep] % self.memory
            memory["s"][keep, slot] = s[good]
            memory["y_data"][keep, slot] = y_data[good]
            memory["y_prior"][keep, slot] = y_prior[good]
            memory["count"][keep] += 1
            if self._metric is not None:
                ratio = self._metric.prior_ratio(s, y_prior)
                memory["ratio"][index] = torch.where(
                    ratio.isnan(), memory["ratio"][index], ratio.clamp(1e-3, 1e3)
                )
            # What a restart may try first: about the length of the last good step.
            memory["length"][index] = s.norm(dim=1)
            self._aim(memory, evaluation.where(accept, trial_evaluation), lam, accept)

        # Minimum of the parabola through value, slope and the failed trial, safeguarded.
        shorter = -0.5 * slope * step / ((new - value) / step - slope)
        shorter = torch.where(shorter.isfinite(), shorter, 0.1 * step)
        shorter = torch.minimum(torch.maximum(shorter, 0.1 * step), 0.5 * step)
        memory["step"] = torch.where(accept, memory["step"], shorter)
        memory["trials"] += ~accept
        spent = ~accept & (memory["trials"] >= self._MAX_TRIALS)
        if spent.any():
            memory["stuck"] |= spent & memory["steepest"]
            self.soften(memory, spent)
            self._aim(memory, evaluation, lam, spent)
        return accept

    def retarget(self, memory, u, evaluation, lam, rows):
        memory["stuck"] &= ~rows
        self._aim(memory, evaluation, lam, rows)

    def renew(self, memory):
        # Whether to give up is asked anew; the curvature is kept.
        memory["tried"].zero_()
        memory["failed"].zero_()

    def forget(self, memory, rows):
        memory["count"][rows] = 0

    def soften(self, memory, rows):
        self.forget(memory, rows)
        memory["plain"] |= rows
        memory["length"][rows] *= 0.1

    def gave_up(self, memory):
        """Rows whose trials fail too often for a smooth objective, shape (n,)."""
        if self.give_up is None:
            return torch.zeros_like(memory["stuck"])
        few = memory["failed"] < self._MIN_FAILED
        often = memory["failed"] > self.give_up * memory["tried"]
        # -slope is the squared distance to the minimum, in standard deviations of the Gaussian
        # posterior, as far as the curvature is known. From afar nothing else gets there in time.
        near = -memory["slope"] <= memory["direction"].shape[1]
        return ~few & often & near

    def stalled(self, memory, idle):
        return memory["stuck"] | self.gave_up(memory) | super().stalled(memory, idle)
