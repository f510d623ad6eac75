"""Adapters of flows that are modules: normflows, zuko, nflows, FrEIA."""

import torch

from skaipo.flows._foreign._base import ForeignFlow, name_of

__all__ = [
    "CLASSES",
    "FreiaFlow",
    "NflowsFlow",
    "NormflowsFlow",
    "NormflowsMultiscaleFlow",
    "ZukoFlow",
    "zuko_decode",
    "zuko_encode",
]

CLASSES = (
    "is conditional on a class, and a prior has no label to give it: train it without classes, or "
    "make a subclass of skaipo.flows.Flow that passes it the label."
)


class _ModuleFlow(ForeignFlow):
    """A flow that is a module: it becomes a submodule, and is not copied."""

    def __init__(self, obj, event_shape):
        self._refuse_untrained(obj)
        like = self._like(obj)
        was_training = obj.training
        obj.eval()
        try:
            super().__init__(obj, event_shape, self._shape_of(obj, event_shape, like), like)
            self.inner = obj
            self._complete(obj)
        except Exception:
            # What is refused is left as it came.
            obj.train(was_training)
            raise

    @property
    def source(self):
        return self.inner

    def _follow(self):
        like = self._like(self.inner)
        if (like.dtype, like.device) != (self.loc.dtype, self.loc.device):
            self.loc, self.scale = self.loc.to(like), self.scale.to(like)

    @staticmethod
    def _like(obj):
        tensors = (*obj.parameters(), *obj.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))

    @staticmethod
    def _refuse_untrained(obj):
        for module in obj.modules():
            done = getattr(module, "data_dep_init_done", True)  # normflows
            if not bool(done) or getattr(module, "init_on_next_batch", False):  # FrEIA
                raise ValueError(
                    f"{name_of(obj)} is not trained: its {type(module).__name__} layers take their "
                    f"scale from the first batch of data, and have not seen one. Train it, or load "
                    f"its weights, before it is wrapped."
                )

    @staticmethod
    def _of_bases(*bases):
        return [t for base in bases for t in (*base.parameters(), *base.buffers())]


class NormflowsFlow(_ModuleFlow):
    """normflows: ``forward`` of its layers leads from latents to data, ``inverse`` to latents."""

    def _shape_of(self, obj, event_shape, like):
        bases = self._bases(obj)
        for base in bases:
            labelled = getattr(base, "class_cond", False) or "ClassCond" in type(base).__name__
            if labelled:
                raise ValueError(f"{name_of(obj)} {CLASSES}")
        shapes = [getattr(base, "shape", None) for base in bases]
        if any(shape is None for shape in shapes):
            return None
        latents = [like.new_zeros(2, *shape) for shape in shapes]
        try:
            with torch.no_grad():
                return tuple(self._push(obj, latents)[0].shape[1:])
        except Exception:  # What is wrong with it, checks find out; the shape is then the base's.
            return None if len(shapes) > 1 or event_shape is not None else shapes[0]

    def _bases(self, obj):
        return [obj.q0]

    def _push(self, obj, latents):
        (x,) = latents
        return _through(obj.flows, x)

    def _encode(self, x):
        z, log_det = _through([flow.inverse for flow in reversed(self.inner.flows)], x)
        return [z], log_det

    def _decode(self, latents):
        return self._push(self.inner, latents)

    def _base_log_prob(self, latents):
        bases = self._bases(self.inner)
        return sum(base.log_prob(z) for base, z in zip(bases, latents, strict=True))

    def _base_tensors(self):
        return self._of_bases(*self._bases(self.inner))

    def _base_name(self):
        return " and ".join(sorted({type(base).__name__ for base in self._bases(self.inner)}))

    def _their_log_prob(self, x):
        return self.inner.log_prob(x)


class NormflowsMultiscaleFlow(NormflowsFlow):
    """normflows' ``MultiscaleFlow``: a latent for each level, the coarsest first."""

    def _bases(self, obj):
        return list(obj.q0)

    def _push(self, obj, latents):
        x, total = latents[0], 0.0
        for level, flows in enumerate(obj.flows):
            if level:
                x, log_det = obj.merges[level - 1]([x, latents[level]])
                total = total + log_det
            x, log_det = _through(flows, x)
            total = total + log_det
        if obj.transform is not None:
            x, log_det = obj.transform(x)
            total = total + log_det
        return x, total

    def _encode(self, x):
        return self.inner.inverse_and_log_det(x)

    def _their_log_prob(self, x):
        return self.inner.log_prob(x, None)


def _through(layers, x):
    # The library's own loops add up in single precision, whatever the flow's.
    total = x.new_zeros(len(x))
    for layer in layers:
        x, log_det = layer(x)
        total = total + log_det
    return x, total


class ZukoFlow(_ModuleFlow):
    """zuko's lazy ``Flow``: a transformation from data to latents, and a base."""

    def _shape_of(self, obj, event_shape, like):
        try:
            return tuple(obj().event_shape)
        except Exception:  # A conditional one is told so when it is evaluated.
            return None if event_shape is not None else tuple(obj.base().event_shape)

    def _encode(self, x):
        return zuko_encode(self.inner(), x)

    def _decode(self, latents):
        return zuko_decode(self.inner(), latents)

    def _base_log_prob(self, latents):
        return self.inner().base.log_prob(latents[0])

    def _base_tensors(self):
        return self._of_bases(self.inner.base)

    def _base_name(self):
        return str(self.inner().base)

    def _their_log_prob(self, x):
        return self.inner().log_prob(x)


class NflowsFlow(_ModuleFlow):
    """nflows: ``transform`` leads from data to noise."""

    def _shape_of(self, obj, event_shape, like):
        shape = getattr(obj._distribution, "_shape", None)
        if shape is None:
            return None
        try:
            with torch.no_grad():
                return tuple(obj._transform.inverse(like.new_zeros(2, *shape))[0].shape[1:])
        except Exception:  # No such direction: data of another shape than the noise are unheard of.
            return tuple(shape)

    def _encode(self, x):
        z, log_det = self.inner._transform(x)
        return [z], log_det

    def _decode(self, latents):
        return self.inner._transform.inverse(latents[0])

    def _base_log_prob(self, latents):
        return self.inner._distribution.log_prob(latents[0])

    def _base_tensors(self):
        return self._of_bases(self.inner._distribution)

    def _base_name(self):
        return type(self.inner._distribution).__name__

    def _their_log_prob(self, x):
        return self.inner.log_prob(x)


class FreiaFlow(_ModuleFlow):
    """FrEIA's networks have no base: by its documentation, forward leads to a standard normal."""

    def _shape_of(self, obj, event_shape, like):
        if any(condition is not None for condition in getattr(obj, "conditions", ())) or getattr(
            obj, "condition_nodes", ()
        ):
            raise ValueError(
                f"{name_of(obj)} is conditional: make a subclass of skaipo.flows.Flow that passes "
                f"it its conditions."
            )
        if len(obj.dims_in) != 1:
            raise ValueError(
                f"{name_of(obj)} has {len(obj.dims_in)} inputs; a prior has one, the data."
            )
        return tuple(obj.dims_in[0])

    def _encode(self, x):
        z, log_det = self.inner(x)
        return [z] if isinstance(z, torch.Tensor) else list(z), log_det

    def _decode(self, latents):
        x, log_det = self.inner(latents if len(latents) > 1 else latents[0], rev=True)
        return (x if isinstance(x, torch.Tensor) else x[0]), log_det


def zuko_encode(flow, x):
    z, log_det = flow.transform.call_and_ladj(x)
    return [z], log_det.reshape(len(x), -1).sum(1)


def zuko_decode(flow, latents):
    x, log_det = flow.transform.inv.call_and_ladj(latents[0])
    return x, log_det.reshape(len(x), -1).sum(1)
