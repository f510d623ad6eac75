"""Adapters of flows that are no modules: distributions of zuko and torch."""

import io
import operator
import pickle

import torch
from torch.distributions import Independent, TransformedDistribution
from torch.distributions.transforms import _InverseTransform

from skaipo._handle import Pickler
from skaipo.flows._foreign._base import ForeignFlow, name_of
from skaipo.flows._foreign._modules import zuko_decode, zuko_encode

__all__ = ["TorchFlow", "ZukoDistribution"]


class _DistributionPickler(Pickler):
    def reducer_override(self, obj):
        # torch forgets what an inverse is the inverse of: Transform.__getstate__ drops it.
        if type(obj) is _InverseTransform:
            return operator.attrgetter("inv"), (obj._inv,)
        return super().reducer_override(obj)


class _DistributionFlow(ForeignFlow):
    """A flow that is no module: its tensors become buffers, the rest is kept as a pickle.

    With the buffers the object is built again when it is needed, so that it follows the adapter to
    another dtype, device or process.
    """

    def __init__(self, obj, event_shape):
        essence, file = self._essence(obj), io.BytesIO()
        pickler = _DistributionPickler(file)
        try:
            pickler.dump(essence)
        except Exception as error:
            raise TypeError(
                f"{name_of(obj)} cannot be taken apart, because part of it does not pickle: {error}"
            ) from error
        tensors = [tensor.detach() for tensor in pickler.tensors]
        like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        super().__init__(obj, event_shape, self._shape_of(obj), like)
        self.__dict__["_source"] = obj
        self._structure = file.getvalue()
        self._n_tensors = len(tensors)
        for k, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{k}", tensor)
        self._complete(obj)

    @property
    def source(self):
        return self.__dict__.get("_source")

    def _essence(self, obj):
        return obj

    def _tensors(self):
        return [self._buffers[f"tensor{k}"] for k in range(self._n_tensors)]

    def _built(self):
        tensors = self._tensors()
        known = self.__dict__.get("_cache")
        if known is None or any(a is not b for a, b in zip(known[0], tensors, strict=True)):
            unpickler = pickle.Unpickler(io.BytesIO(self._structure))
            unpickler.persistent_load = tensors.__getitem__
            known = self.__dict__["_cache"] = tensors, unpickler.load()
        return known[1]

    def _shape_of(self, obj):
        batch, event = tuple(obj.batch_shape), tuple(obj.event_shape)
        if batch and event:
            raise ValueError(
                f"{name_of(obj)} is a batch of {batch} distributions of shape {event}; a prior is "
                f"one. Give it one context, without a batch axis; or make the batch one event by "
                f"torch.distributions.Independent."
            )
        # Numbers that are each from a distribution of their own are independent entries.
        return batch or event

    def _base_tensors(self):
        return self._tensors()


class ZukoDistribution(_DistributionFlow):
    """zuko's ``NormalizingFlow``."""

    def _encode(self, x):
        return zuko_encode(self._built(), x)

    def _decode(self, latents):
        return zuko_decode(self._built(), latents)

    def _base_log_prob(self, latents):
        return _sum(self._built().base.log_prob(latents[0]))

    def _base_name(self):
        return str(self._built().base)

    def _their_log_prob(self, x):
        return _sum(self._built().log_prob(x))


class TorchFlow(_DistributionFlow):
    """torch's ``TransformedDistribution``: transformations from latents to data, one by one."""

    def _essence(self, obj):
        base, transforms = obj, []
        while isinstance(base, TransformedDistribution | Independent):
            if isinstance(base, TransformedDistribution):
                transforms = [*base.transforms, *transforms]
            base = base.base_dist
        if not all(transform.bijective for transform in transforms):
            bad = next(t for t in transforms if not t.bijective)
            raise ValueError(f"{name_of(obj)} is no flow: {bad} is not invertible.")
        return obj, base, transforms

    def _encode(self, y):
        total = y.new_zeros(len(y))
        for transform in reversed(self._built()[2]):
            x = transform.inv(y)
            total = total - _sum(transform.log_abs_det_jacobian(x, y))
            y = x
        return [y], total

    def _decode(self, latents):
        x = latents[0]
        total = x.new_zeros(len(x))
        for transform in self._built()[2]:
            y = transform(x)
            total = total + _sum(transform.log_abs_det_jacobian(x, y))
            x = y
        return x, total

    def _base_log_prob(self, latents):
        return _sum(self._built()[1].log_prob(latents[0]))

    def _base_name(self):
        return str(self._built()[1])

    def _their_log_prob(self, x):
        return _sum(self._built()[0].log_prob(x))


def _sum(values):
    return values.reshape(len(values), -1).sum(1)
