"""Flows of other libraries behind the interface of this package.

No library is imported here: an object says by its class where it comes from.
"""

import io
import math
import operator
import pickle
import weakref

import torch
from torch import nn
from torch.distributions import Distribution, Independent, TransformedDistribution
from torch.distributions.transforms import _InverseTransform

from skaipo._handle import Pickler
from skaipo.flows._base import Flow
from skaipo.flows._foreign_checks import check_flow, gaussian_of

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
                raise ValueError(f"{_name(obj)} {adapter}")
            if adapter is not None:
                return adapter
    if isinstance(obj, Distribution):
        return TorchFlow
    raise TypeError(
        f"flow must be a skaipo.flows.Flow, got {type(obj).__name__}. Subclass Flow with "
        f"_normalize(x) -> (z, log_det) and _generate(z) -> (x, log_det), or pass a flow of "
        f"normflows, zuko, nflows, FrEIA or torch.distributions."
    )


def _name(obj):
    library = next(
        (part for part in type(obj).__module__.split(".") if part in _ADAPTER_CLASSES), "torch"
    )
    return f"{library}'s {type(obj).__name__}"


class ForeignFlow(Flow):
    """A flow of another library: subclasses say how it is called.

    They write ``_encode(x) -> (latents, log_det)``, ``_decode(latents) -> (x, log_det)``,
    ``_base_log_prob(latents)`` and ``_their_log_prob(x)`` on the library's own shapes, where
    ``latents`` is a list of tensors; the last two may be None: standard normal latents, and no
    density of its own. What is not the library's is here: flat standard normal latents and rows
    that cannot harm others.

    Parameters
    ----------
    obj : object
        What is wrapped.
    event_shape : tuple of int or None
        What was asked for.
    own_shape : tuple of int or None
        The library's shape of one event; None: what was asked for.
    like : torch.Tensor
        Its dtype and device are those of the flow.

    Attributes
    ----------
    source : object
        What is wrapped.
    """

    # An inverse of as many passes as there are features is quicker in large batches.
    _batch = 256

    def __init__(self, obj, event_shape, own_shape, like):
        name = _name(obj)
        if own_shape is None and event_shape is None:
            raise ValueError(
                f"{name} does not say the shape of its data: pass event_shape, (d,) or (C, H, W)."
            )
        own_shape = event_shape if own_shape is None else tuple(own_shape)
        if event_shape is None:
            event_shape = own_shape or (1,)
            if len(event_shape) not in (1, 3):
                raise ValueError(
                    f"The data of {name} have shape {own_shape}; here one sample is (d,) or "
                    f"(C, H, W). Pass event_shape, for example (1, H, W)."
                )
        if math.prod(own_shape) != math.prod(event_shape):
            raise ValueError(
                f"event_shape {event_shape} has {math.prod(event_shape)} entries, but the data of "
                f"{name} have shape {own_shape}."
            )
        super().__init__(event_shape)
        self.own_shape = own_shape
        self.loc, self.scale = self.loc.to(like), self.scale.to(like)

    def _complete(self, obj):
        """Find out the rest by trying, and check all of it."""
        name = _name(obj)
        before = self._digest()
        self.eval()
        x = self.loc.new_zeros(2, *self.own_shape)
        try:
            with torch.no_grad():
                latents, _ = self._encode(x)
        except Exception as error:
            if _is_missing(error):
                raise ValueError(
                    f"{name} has no direction from data to latents ({_said(error)}), so that it "
                    f"has no density that could be a prior. Use an architecture with both."
                ) from error
            raise ValueError(
                f"{name} cannot be evaluated on data of shape {tuple(x.shape)}: {_said(error)}. "
                f"If the shape is wrong, pass event_shape. If the flow is conditional, fix its "
                f"context first: a flow of zuko called with one gives a distribution, which is "
                f"accepted."
            ) from error
        self.latent_shapes = [tuple(latent.shape[1:]) for latent in latents]
        if sum(math.prod(shape) for shape in self.latent_shapes) != self.n_features:
            raise ValueError(
                f"{name} maps data of shape {self.own_shape} to latents of shapes "
                f"{self.latent_shapes}: their number of entries must be the same."
            )
        self._standardisation()
        try:
            with torch.no_grad():
                self._generate(self.loc.new_zeros(2, self.n_features))
        except Exception as error:
            if not _is_missing(error):
                raise ValueError(
                    f"{name} fails on its way from latents to data: {_said(error)}"
                ) from error
            self.has_inverse = False
        theirs = self._their_log_prob
        check_flow(
            self,
            name,
            None if theirs is None else lambda x: theirs(x.reshape(-1, *self.own_shape)),
        )
        if self._digest() != before:
            raise ValueError(
                f"Evaluating {name} changed its parameters: it has layers that take their first "
                f"values from data. Train it, or pass data through it, before it is wrapped."
            )

    def _follow(self):
        """Take over the dtype and device of what is wrapped, which its owner may have changed."""

    def _standardisation(self):
        """Location and factor of the latents; computed again if the base was trained further."""
        tensors = self._base_tensors()
        key = tuple((id(t), t._version, t.dtype, t.device) for t in tensors)
        known = self.__dict__.get("_cache_of_base")
        if known is None or known[0] != key:
            known = key, None
            if self._base_log_prob is not None:
                loc, factor = gaussian_of(
                    lambda u: self._base_log_prob(self._latents(u)),
                    self.loc,
                    self.n_features,
                    self._base_name(),
                )
                if factor.ndim == 2 or bool((loc != 0).any()) or bool((factor != 1).any()):
                    known = key, (loc, factor)
            # With the tensors themselves, or another one might take over an id.
            known = (*known, tensors)
            self.__dict__["_cache_of_base"] = known
        return known[1]

    def __getstate__(self):
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_cache_of_base", "_cache", "_source")}

    def _latents(self, z):
        parts = z.split([math.prod(shape) for shape in self.latent_shapes], 1)
        shapes = self.latent_shapes
        return [p.reshape(-1, *s).contiguous() for p, s in zip(parts, shapes, strict=True)]

    def _normalize(self, x):
        x = x.reshape(len(x), -1)
        return _each_row(self._normalize_finite, x)

    def _normalize_finite(self, x):
        latents, log_det = self._encode(x.reshape(-1, *self.own_shape))
        u = torch.cat([latent.reshape(len(x), -1) for latent in latents], 1)
        log_det = _per_row(log_det, u)
        affine = self._standardisation()
        if affine is None:
            return u, log_det
        loc, factor = affine
        if factor.ndim == 1:
            return (u - loc) / factor, log_det - factor.log().sum()
        z = torch.linalg.solve_triangular(factor, (u - loc).T, upper=False).T
        return z, log_det - factor.diagonal().log().sum()

    def _generate(self, z):
        x, log_det = _each_row(self._generate_finite, z)
        return x.reshape(-1, *self.event_shape), log_det

    def _generate_finite(self, z):
        affine, volume = self._standardisation(), 0.0
        if affine is not None:
            loc, factor = affine
            if factor.ndim == 1:
                z, volume = loc + factor * z, factor.log().sum()
            else:
                z, volume = loc + z @ factor.T, factor.diagonal().log().sum()
        x, log_det = self._decode(self._latents(z))
        x = x.reshape(len(z), -1)
        return x, _per_row(log_det, x) + volume

    _base_log_prob = None
    _their_log_prob = None

    def _base_tensors(self):
        return []

    def _base_name(self):
        return "its base"


def _said(error):
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_missing(error):
    """Whether an error says that a direction is not there."""
    return isinstance(error, NotImplementedError) or any(
        cls.__name__ == "InverseNotAvailable" for cls in type(error).__mro__
    )


def _per_row(log_det, x):
    """A log-determinant (n,): libraries also give a number, or one that all rows share."""
    if isinstance(log_det, torch.Tensor) and log_det.numel() == len(x):
        log_det = log_det.reshape(len(x))
    return x.new_zeros(len(x)) + log_det


def _each_row(function, x):
    """Call with rows (n, d); those that are not finite, or that it refuses, give NaN.

    Libraries refuse a whole batch where one value is outside of a spline's domain.
    """
    fine = x.isfinite().all(1)
    outputs = _in_halves(function, torch.where(fine[:, None], x, 0.0))
    return tuple(
        torch.where(fine.reshape(-1, *[1] * (out.ndim - 1)), out, torch.nan) for out in outputs
    )


def _in_halves(function, x):
    try:
        return function(x)
    except (AssertionError, ValueError) as error:
        # The errors of two or more rows together are those of the flow.
        if len(x) == 1 or _is_missing(error):
            raise
    half = len(x) // 2
    parts, refused = [], []
    for rows in (x[:half], x[half:]):
        try:
            parts.append(_in_halves(function, rows))
        except (AssertionError, ValueError) as error:
            parts.append(None)
            refused.append(error)
    if len(refused) == 2:
        raise refused[0]
    for k, rows in enumerate((x[:half], x[half:])):
        if parts[k] is None:
            parts[k] = tuple(
                torch.full_like(other[:1], torch.nan).expand(len(rows), *other.shape[1:])
                for other in parts[1 - k]
            )
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))


# ------------------------------------------------------------------------------------ modules


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
                    f"{_name(obj)} is not trained: its {type(module).__name__} layers take their "
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
                raise ValueError(f"{_name(obj)} {_CLASSES}")
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
        return _zuko_encode(self.inner(), x)

    def _decode(self, latents):
        return _zuko_decode(self.inner(), latents)

    def _base_log_prob(self, latents):
        return self.inner().base.log_prob(latents[0])

    def _base_tensors(self):
        return self._of_bases(self.inner.base)

    def _base_name(self):
        return str(self.inner().base)

    def _their_log_prob(self, x):
        return self.inner().log_prob(x)


def _zuko_encode(flow, x):
    z, log_det = flow.transform.call_and_ladj(x)
    return [z], log_det.reshape(len(x), -1).sum(1)


def _zuko_decode(flow, latents):
    x, log_det = flow.transform.inv.call_and_ladj(latents[0])
    return x, log_det.reshape(len(x), -1).sum(1)


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
                f"{_name(obj)} is conditional: make a subclass of skaipo.flows.Flow that passes "
                f"it its conditions."
            )
        if len(obj.dims_in) != 1:
            raise ValueError(
                f"{_name(obj)} has {len(obj.dims_in)} inputs; a prior has one, the data."
            )
        return tuple(obj.dims_in[0])

    def _encode(self, x):
        z, log_det = self.inner(x)
        return [z] if isinstance(z, torch.Tensor) else list(z), log_det

    def _decode(self, latents):
        x, log_det = self.inner(latents if len(latents) > 1 else latents[0], rev=True)
        return (x if isinstance(x, torch.Tensor) else x[0]), log_det


# ------------------------------------------------------------------------------ distributions


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
                f"{_name(obj)} cannot be taken apart, because part of it does not pickle: {error}"
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
                f"{_name(obj)} is a batch of {batch} distributions of shape {event}; a prior is "
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
        return _zuko_encode(self._built(), x)

    def _decode(self, latents):
        return _zuko_decode(self._built(), latents)

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
            raise ValueError(f"{_name(obj)} is no flow: {bad} is not invertible.")
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


_CLASSES = (
    "is conditional on a class, and a prior has no label to give it: train it without classes, or "
    "make a subclass of skaipo.flows.Flow that passes it the label."
)
# Library -> class -> adapter, or why it is refused.
_ADAPTER_CLASSES = {
    "normflows": {
        "NormalizingFlow": NormflowsFlow,
        "MultiscaleFlow": NormflowsMultiscaleFlow,
        "ClassCondFlow": _CLASSES,
        "ConditionalNormalizingFlow": (
            "is conditional on a context: make a subclass of skaipo.flows.Flow that passes it one."
        ),
    },
    "zuko": {"Flow": ZukoFlow, "NormalizingFlow": ZukoDistribution},
    "nflows": {"Flow": NflowsFlow},
    "FrEIA": {"SequenceINN": FreiaFlow, "GraphINN": FreiaFlow},
}
