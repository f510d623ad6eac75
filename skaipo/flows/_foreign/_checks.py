"""What a flow of another library must pass before it is used, and its base as an affine map."""

import math

import torch

from skaipo.flows._base import log_normal

__all__ = ["check_flow", "gaussian_of", "tolerance"]

# Points at which a flow is tried, and the temperature at which they are drawn: at 1 an imperfect
# flow has wild samples.
_N_POINTS = 4
_TEMPERATURE = 0.7
# Up to this dimension the Jacobian is formed by autograd, in one pass of as many rows.
_JACOBIAN = 256
# Up to this dimension a base may have a full covariance.
_FULL = 4096


def tolerance(dtype):
    """Allowed root mean square of an error in z: flows invert by bisection and by ODE solvers."""
    return 1e-4 if dtype == torch.float64 else 1e-2


def _allowed(value, d):
    """Allowed error of a log-density or log-determinant (n,), in nats."""
    return 1e-3 * (math.sqrt(d) + value.abs())


def gaussian_of(log_prob, like, d, name):
    """Location and factor of a Gaussian, from its log-density alone.

    Parameters
    ----------
    log_prob : callable
        Log-density (n,) of rows (n, d).
    like : torch.Tensor
        Its dtype and device are those of the rows.
    d : int
    name : str
        Of the distribution, for messages.

    Returns
    -------
    loc : torch.Tensor of shape (d,)
    factor : torch.Tensor of shape (d,) or (d, d)
        ``u = loc + factor * z``, or ``loc + factor @ z`` with a lower triangle, is from the
        distribution if ``z`` is standard normal.

    Raises
    ------
    ValueError
        If the distribution is not Gaussian.
    """
    # Gradient and Hessian at zero are all that a Gaussian has. Its precision times a vector of ones
    # is the precision itself where that is diagonal.
    ones = torch.ones(1, d, dtype=like.dtype, device=like.device)
    error = math.inf
    for directions in (ones, torch.eye(d, dtype=like.dtype, device=like.device)):
        gradient, curvature = _derivatives(log_prob, directions)
        if curvature is None or d > _FULL < len(directions):
            break
        gradient, precision = gradient[0].double(), -curvature.double()
        if len(directions) == 1 and d > 1:
            variance = 1 / precision[0]
            if not bool((variance > 0).all()):
                continue
            loc, factor = variance * gradient, variance.sqrt()
        else:
            root, failed = torch.linalg.cholesky_ex((precision + precision.T) / 2)
            if failed:
                break
            covariance = torch.cholesky_inverse(root)
            factor, failed = torch.linalg.cholesky_ex(covariance)
            loc = covariance @ gradient
            if d == 1:
                factor = factor[0]
        loc, factor = loc.to(like.dtype), factor.to(like.dtype)
        z = _draw(_N_POINTS, d, like, 2.0)
        if factor.ndim == 1:
            u, volume = loc + factor * z, factor.log().sum()
        else:
            u, volume = loc + z @ factor.T, factor.diagonal().log().sum()
        expected = log_normal(z) - volume
        with torch.no_grad():
            difference = (log_prob(u) - expected).abs()
        if bool((difference <= _allowed(expected, d)).all()):
            return loc, factor
        error = float(difference.max())
    how = "it has no Gaussian's curvature at zero"
    if math.isfinite(error):
        how = (
            f"its log-density differs by {error:.3g} nats from that of the Gaussian with the same "
            f"curvature"
        )
    raise ValueError(
        f"The base distribution of the flow, {name}, is not Gaussian: {how}. The latents of a "
        f"prior must be Gaussian; train the flow with a normal base."
    )


def _derivatives(log_prob, directions):
    """Gradient at zero, and the Hessian there times each direction; None where it has none."""
    with torch.inference_mode(False), torch.enable_grad():
        u = torch.zeros_like(directions).requires_grad_()
        value = log_prob(u).sum()
        if not value.requires_grad:
            return None, None
        (gradient,) = torch.autograd.grad(value, u, create_graph=True)
        if not gradient.requires_grad:
            return None, None
        (curvature,) = torch.autograd.grad((gradient * directions).sum(), u, allow_unused=True)
    return gradient.detach(), curvature


def _draw(n, d, like, scale):
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (scale * z).to(like)


def check_flow(flow, name, their_log_prob=None):
    """Try a flow at random points: directions, volumes, rows, and the library's own density.

    Parameters
    ----------
    flow : Flow
    name : str
        For messages.
    their_log_prob : callable, default=None
        Log-density (n,) of rows (n, d) by the library itself.

    Raises
    ------
    ValueError
        That says what disagrees, and by how much.
    """
    d = flow.n_features
    with torch.no_grad():
        x, z, back = _points(flow, name)
        z_again, log_det = flow(x)
        finite = z_again.isfinite().all(1) & log_det.isfinite()
        if not finite.all():
            raise ValueError(
                f"{name} gives non-finite latents or log-determinants at {int((~finite).sum())} of "
                f"{len(x)} random points. Was it trained, and in these units?"
            )
        repeated = flow(x)
        same = torch.stack([_rms(repeated[0] - z_again), (repeated[1] - log_det).abs()])
        _require(
            same,
            torch.stack([torch.full_like(log_det, 1e-6), _allowed(log_det, d) / 10]),
            f"{name} is random: called twice with the same x, it gives latents or "
            f"log-determinants that differ by {{error:.3g}} (allowed: {{allowed:.1g}}). A density "
            f"must be a function.",
        )
        alone = [flow(row[None]) for row in x]
        error = _rms(torch.cat([row[0] for row in alone]) - z_again)
        error = torch.maximum(error, (torch.cat([row[1] for row in alone]) - log_det).abs())
        _require(
            error,
            tolerance(x.dtype) + _allowed(log_det, d),
            f"The rows of a batch affect each other in {name}: alone, a row's latents or "
            f"log-determinant differ by {{error:.3g}} (allowed: {{allowed:.1g}}). Statistics of "
            f"the batch, as in batch normalisation, must be frozen.",
        )
        if z is not None:
            _require(
                _rms(z_again - z),
                torch.full_like(log_det, tolerance(x.dtype)),
                f"The two directions of {name} are not inverses of each other: z -> x -> z is off "
                f"by {{error:.3g}} (root mean square; allowed: {{allowed:.1g}}).",
            )
            _require(
                (back + log_det).abs(),
                _allowed(log_det, d),
                f"The log-determinants of the two directions of {name} do not cancel: "
                f"{float(log_det[0]):.6g} for x -> z and {float(back[0]):.6g} for z -> x at the "
                f"first point; they are off by {{error:.3g}} nats (allowed: {{allowed:.1g}})."
                + _sign(log_det, -back),
            )
        if their_log_prob is not None:
            ours, theirs = flow.log_prob(x), their_log_prob(x).to(x)
            _require(
                (ours - theirs).abs(),
                _allowed(theirs, d),
                f"The log-density of {name} by its own library is {float(theirs[0]):.6g} at the "
                f"first random point, by its latents and log-determinants {float(ours[0]):.6g}: "
                f"they are off by {{error:.3g}} nats (allowed: {{allowed:.1g}}).",
            )
    if d > _JACOBIAN:
        return
    for point, claimed in zip(x[:2], log_det[:2], strict=True):
        true = _log_det_by_autograd(flow, point, name)
        _require(
            (claimed - true).abs()[None],
            _allowed(true, d)[None],
            f"The log-determinant that {name} gives for x -> z, {float(claimed):.6g}, is not that "
            f"of its Jacobian, {float(true):.6g} by autograd: it is off by {{error:.3g}} nats "
            f"(allowed: {{allowed:.1g}})." + _sign(claimed, true),
        )


def _points(flow, name):
    """Points ``x``; the latents they are from and the log-determinants on the way, or None."""
    z = _draw(_N_POINTS, flow.n_features, flow.loc, _TEMPERATURE)
    if flow.has_inverse:
        x, back = flow.inverse_and_log_det(z)
        x = x.flatten(1)
        fine = x.isfinite().all(1) & back.isfinite()
        if not fine.any():
            raise ValueError(
                f"{name} gives non-finite samples or log-determinants at all of {len(z)} random "
                f"latents. Was it trained?"
            )
        return x[fine], z[fine], back[fine]
    # Where a flow that cannot sample has its mass is not known, but some have half of the line or
    # an interval for support.
    for x in (z, z.abs(), z.sigmoid()):
        if all(part.isfinite().all() for part in flow(x)):
            break
    return x, None, None


def _rms(difference):
    return difference.square().mean(1).sqrt()


def _require(error, allowed, message):
    if bool((error <= allowed).all()):
        return
    worst = (error / allowed).nan_to_num(math.inf).argmax()
    error, allowed = float(error.flatten()[worst]), float(allowed.flatten()[worst])
    raise ValueError(message.format(error=error, allowed=allowed))


def _sign(claimed, true):
    if bool(((claimed + true).abs() < 0.01 * true.abs()).all()):
        return " The sign is wrong: a layer returns the log-determinant of the other direction."
    return ""


def _log_det_by_autograd(flow, point, name):
    d = len(point)
    with torch.inference_mode(False), torch.enable_grad():
        rows = point.clone().expand(d, d).clone().requires_grad_()
        z, _ = flow(rows)
        if not z.requires_grad:
            raise ValueError(
                f"The latents of {name} cannot be differentiated with respect to x: somewhere it "
                f"leaves torch or detaches."
            )
        (jacobian,) = torch.autograd.grad(z, rows, torch.eye(d).to(z))
    return torch.linalg.slogdet(jacobian.double()).logabsdet.to(point)
