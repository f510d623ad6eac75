"""Normalizing flows: invertible maps between data and a standard normal latent space."""

from skaipo.flows._base import Flow
from skaipo.flows._foreign import as_flow
from skaipo.flows._frozen import kernels
from skaipo.flows._glow import Glow
from skaipo.flows._realnvp import RealNVP

__all__ = ["Flow", "Glow", "RealNVP", "as_flow", "build_flow", "kernels"]

_ARCHITECTURES = {"glow": Glow, "realnvp": RealNVP}


def build_flow(name, event_shape, **options):
    """Build an untrained flow from its architecture's name.

    Parameters
    ----------
    name : {"glow", "realnvp"}
        Architecture, case-insensitive.
    event_shape : tuple of int
        ``(d,)`` for vectors, ``(C, H, W)`` for images.
    **options
        Keyword arguments of the architecture; those that are None keep its default.

    Returns
    -------
    flow : Flow

    Raises
    ------
    ValueError
        If the name is unknown or the event shape does not suit the architecture.
    """
    try:
        architecture = _ARCHITECTURES[str(name).lower()]
    except KeyError:
        raise ValueError(
            f"Unknown flow {name!r}; expected one of {sorted(_ARCHITECTURES)} or a trained flow "
            f"module."
        ) from None
    return architecture(event_shape, **{k: v for k, v in options.items() if v is not None})
