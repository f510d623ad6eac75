"""What the estimators say in their warnings."""

import math

import numpy as np
import torch

from skaipo._validation import to_numpy
from skaipo.flows._base import bulk

__all__ = ["averaged", "far_off", "other_units", "unfinished"]

# From here on an objective is no matter of bad luck, nor of a prior that is somewhat off.
_FAR = 10.0
# Ratio of spreads from which on two sets of images cannot be in the same units.
_SPREAD = 8.0
# Clean images that are looked at for it.
_FEW = 32


def far_off(result, flow, penalty):
    """What to say where most objectives are far above those of true images, under Gaussian noise.

    The true image is a candidate like any other. Its misfit is half of the number of measurements
    and its log-density that of the prior's own images, give or take, so that no minimiser lies far
    above the two together, whatever lambda. One that does tells that the truth is none for this
    prior and this noise, for its units, say.

    Parameters
    ----------
    result : Reconstruction
    flow : Flow
    penalty : {"density", "latent"}

    Returns
    -------
    message : str
        Empty where there is nothing to say. (One odd row is the row's own affair.)
    """
    size = 0.5 * flow.n_features
    typical = size if penalty == "latent" else -flow.typical_log_prob()
    half = 0.5 * result.n_observed
    excess = result.objective - half - result.lam * typical
    far = (excess > _FAR * (half + result.lam * size)) & (result.status != "diverged")
    if 2 * int(far.sum()) <= len(far):
        return ""
    quotient = np.median(2 * result.misfit[far] / result.n_observed[far])
    return (
        f"{int(far.sum())} of {len(far)} results are far from what prior and noise expect of any "
        f"image: residuals of {math.sqrt(quotient):.3g} sigma, log-density "
        f"{np.median(result.log_prob[far]):.4g} where images of the prior have "
        f"{flow.typical_log_prob():.4g} (medians). Are the measurements, sigma and the images that "
        f"the prior was trained on in the same units, and is the operator the right one?"
    )


def other_units(clean, flow):
    """What to say where clean images are spread quite differently from those of the prior.

    What is compared with them, the error by which a search chooses lambda say, would then tell
    nothing. (Their log-density would not do: what is a hundred times too small is a flat image,
    and likely.)

    Parameters
    ----------
    clean : array-like of shape (n_samples, ...)
    flow : Flow

    Returns
    -------
    message : str
        Empty where there is nothing to say.
    """
    clean = to_numpy(clean) if isinstance(clean, torch.Tensor) else clean
    low, high = bulk(np.asarray(clean[:_FEW], dtype=float))
    own_low, own_high = flow.typical_range()
    spread, own_spread = high - low, own_high - own_low
    # (A plain image has no spread, and says nothing of its units.)
    if not min(spread, own_spread) > 0 or 1 / _SPREAD < spread / own_spread < _SPREAD:
        return ""
    return (
        f"The clean images lie between {low:.3g} and {high:.3g}, those of the prior between "
        f"{own_low:.3g} and {own_high:.3g} (quantiles of 5 and 95 %). Reconstructions have the "
        f"units of the prior: give the clean images, and the measurements, in these as well."
    )


def unfinished(result, max_evals, tol, smoothing, rough_only):
    """What to say of the rows that did not converge, one message per kind.

    Parameters
    ----------
    result : Reconstruction
    max_evals, tol
        The estimator's.
    smoothing, rough_only
        The problem's.

    Yields
    ------
    message : str
    """
    counts, n = result.counts(), len(result.status)
    if counts["infeasible"]:
        yield (
            f"No image was found that explains the measurements of {counts['infeasible']} of "
            f"{n} rows; what is returned for them is the one that came "
            f"closest. With noise that is to be expected at lam=0: use a lam above it."
        )
    if smoothing and not rough_only and result.lam > 0:
        # That they end with the budget is what was asked for.
        if counts["stalled"]:
            yield (
                f"{counts['stalled']} of {n} rows stalled: the noise of smoothing={smoothing:g} is "
                f"too much for the solver. Take solver='hybrid' or 'adam', or less smoothing."
            )
    elif short := counts["budget"] + counts["stalled"]:
        rough = int((result.smoothed & np.isin(result.status, ("budget", "stalled"))).sum())
        message = (
            f"{short} of {n} rows stopped before they converged "
            f"({counts['budget']} ran out of evaluations with max_evals={max_evals}, "
            f"{counts['stalled']} stalled). "
            + (
                f"{averaged(rough, n)} Compare with twice the max_evals, and see "
                f"reconstruct(Y).smoothed. "
                if rough
                else ""
            )
            + (
                f"Raise max_evals, or, where that changes little, tol={tol:g}: a row that has "
                f"stalled gets no further. See reconstruct(Y).status."
                if short > rough
                else ""
            )
        )
        yield message.rstrip()


def averaged(rough, n):
    """What to say of the rows that "auto" smooths."""
    return (
        f"In {rough} of the {n} the density is too rough for L-BFGS: they are solved by its "
        f"average (smoothing='auto') and never called converged."
    )
