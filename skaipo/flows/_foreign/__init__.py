"""Flows of other libraries behind the interface of this package.

No library is imported here: an object says by its class where it comes from.
"""

import weakref

from torch import nn
from torch.distributions import Distribution

from skaipo.flows._base import Flow
from skaipo.flows._foreign._base import ForeignFlow, name_of
from skaipo.flows._foreign._distributions import TorchFlow, ZukoDistribution
from skaipo.flows._foreign._modules import (
    CLASSES,
    FreiaFlow,
    NflowsFlow,
    NormflowsFlow,
    NormflowsMultiscaleFlow,
    ZukoFlow,
)

__all__ = ["ForeignFlow", "as_flow", "is_flow"]

# Adapters in use, by the identity of what they wrap: clones of a prior share one.
_ADAPTERS = weakref.WeakValueDictionary()


def is_flow(obj):
    """Whether an object may be a trained flow: a module, or a distribution of torch's kind."""
    return isinstance(obj, nn.Module | Distribution)


def as_flow(obj, event_shape=None):
    """Make a flow of another library one of this package's.

    It is tried at random points first: the two directions must be inverses of each other, the
    log-determinants those of the Jacobian (by autograd, up to 256 dimensions) and of each other,
    the log-density that of the library itself, and each row must be by itself. A latent that is
    Gaussian, but not standard normal, is made so by an affine map that becomes part of the flow.

    Parameters
    ----------
    obj : object
        A :class:`Flow`, which is returned as it is; ``NormalizingFlow`` or ``MultiscaleFlow`` of
        normflows; ``Flow`` of zuko, or a ``NormalizingFlow``, which is what that returns (for a
        context, say); ``Flow`` of nflows; ``SequenceINN`` or ``GraphINN`` of FrEIA, whose forward
        direction leads from data to standard normal latents; or a distribution of torch, a
        ``TransformedDistribution`` of a Gaussian above all. A module is put in evaluation mode, and
        used as it is, without a copy; a distribution is left alone, and its tensors are shared.
    event_shape : tuple of int, default=None
        ``(d,)`` or ``(C, H, W)``. Default: that of the object, where it says so. A flow of vectors
        with the event shape of images gets them flattened.

    Returns
    -------
    flow : Flow
        The same for the same object, as long as it is in use.

    Raises
    ------
    TypeError
        If it is nothing of the above.
    ValueError
        If it fails a check, is conditional, has no direction from data to latents, or has a base
        that is not Gaussian.
    """
    shape = None if event_shape is None else tuple(int(s) for s in event_shape)
    if isinstance(obj, Flow):
        if shape not in (None, obj.event_shape):
            raise ValueError(
                f"event_shape is {shape}, but the flow {type(obj).__name__} has {obj.event_shape}: "
                f"leave event_shape out."
            )
        if isinstance(obj, ForeignFlow):
            obj._follow()
        return obj
    adapter = _ADAPTERS.get((id(obj), shape))
    if adapter is None or adapter.source is not obj:
        adapter = _adapter_of(obj)(obj, shape)
        _ADAPTERS[id(obj), shape] = adapter
    adapter._follow()
    return adapter


def _adapter_of(obj):
    for cls in type(obj).__mro__:
        libraries = _ADAPTER_CLASSES.keys() & set(cls.__module__.split("."))
        for library in libraries:
            adapter = _ADAPTER_CLASSES[library].get(cls.__name__)
            if isinstance(adapter, str):
                raise ValueError(f"{name_of(obj)} {adapter}")
            if adapter is not None:
                return adapter
    if isinstance(obj, Distribution):
        return TorchFlow
    raise TypeError(
        f"flow must be a skaipo.flows.Flow, got {type(obj).__name__}. Subclass Flow with "
        f"_normalize(x) -> (z, log_det) and _generate(z) -> (x, log_det), or pass a flow of "
        f"normflows, zuko, nflows, FrEIA or torch.distributions."
    )


# Library -> class -> adapter, or why it is refused.
_ADAPTER_CLASSES = {
    "normflows": {
        "NormalizingFlow": NormflowsFlow,
        "MultiscaleFlow": NormflowsMultiscaleFlow,
        "ClassCondFlow": CLASSES,
        "ConditionalNormalizingFlow": (
            "is conditional on a context: make a subclass of skaipo.flows.Flow that passes it one."
        ),
    },
    "zuko": {"Flow": ZukoFlow, "NormalizingFlow": ZukoDistribution},
    "nflows": {"Flow": NflowsFlow},
    "FrEIA": {"SequenceINN": FreiaFlow, "GraphINN": FreiaFlow},
}
