"""Torch functions, modules and objects with ``forward``, and the physics of deepinv."""

import copy
import math
import numbers

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from skaipo.operators._checks import check_measures, layout_hint, probe
from skaipo.operators._foreign import TOLERANCES, ForeignOperator, Product
from skaipo.operators._nonlinear import NonlinearOperator

__all__ = ["PhysicsOperator", "TorchOperator"]


class TorchOperator(ForeignOperator):
    """A torch function or module, or any object with ``forward``, and maybe ``adjoint``.

    It takes batches of images ``(n, *in_shape)`` and returns ``(n, *out_shape)``, real numbers.
    Without an ``adjoint`` of its own it gets that of automatic differentiation. What computes in
    float32 gets float32 and gives back what came; modules are used in the dtype and on the device
    of the images, and in evaluation mode, as a copy where theirs differ.
    """

    def _methods(self, obj):
        """``f``, and its adjoint or None."""
        adjoint = getattr(obj, "adjoint", None)
        adjoint = adjoint if callable(adjoint) else None
        forward = getattr(obj, "forward", None)
        # Of a module the call, which runs its hooks.
        return (obj if isinstance(obj, nn.Module) or not callable(forward) else forward), adjoint

    def _identity(self):
        if not isinstance(self.obj, nn.Module):
            return ()
        own = next(_floats(self.obj), None)
        return () if own is None else (own.dtype, own.device, self.obj.training)

    def _held(self, like):
        """The object; of a module that is elsewhere or not in evaluation mode, a frozen copy."""
        if not isinstance(self.obj, nn.Module):
            return self.obj
        moved = any(t.dtype != like.dtype or t.device != like.device for t in _floats(self.obj))
        random = any(
            module.training and isinstance(module, _NormBase | _DropoutNd)
            for module in self.obj.modules()
        )
        if not (moved or random):
            return self.obj

        def make():
            module = copy.deepcopy(self._portable()).eval().requires_grad_(False)
            return module._apply(lambda t: _converted(t, like))

        return self._cached(("module", like.device, like.dtype), make)

    def _call(self, rows, transposed=False):
        """One call of the object, on flat rows, and what it returned."""
        dtype, device = self._place
        given = rows.to(device or rows.device, dtype or rows.dtype)
        function = self._methods(self._held(given))[transposed]
        shape = self._out_shape if transposed else self.in_shape_
        return function(given.reshape(len(rows), *shape))

    def _flat(self, out, rows):
        return out.reshape(len(rows), -1).to(rows.device, rows.dtype)

    def _raw(self, rows):
        return self._flat(self._call(rows), rows)

    def _product(self, rows, transposed):
        if transposed:
            return self._flat(self._call(rows, True), rows)
        return self.linear(rows)

    def forward(self, x):
        self._check(x)
        if self._found["adjoint"]:
            y = Product.apply(x, self, False)
            origin = self._origin(y)
            return y if origin is None else y + origin
        return self._raw(x)

    def linear(self, x):
        y = self._raw(x)
        origin = self._origin(y)
        return y if origin is None else y - origin

    def _origin(self, like):
        def make():
            zero = torch.zeros(1, self.n_features_in_, dtype=like.dtype, device=like.device)
            origin = self._raw(zero)
            return origin if bool(origin.any()) else None

        return self._cached(("origin", like.device, like.dtype), make)

    def adjoint(self, y):
        self._check_y(y)
        if self._found["adjoint"]:
            return Product.apply(y, self, True)
        return super().adjoint(y)

    def bind(self, event_shape):
        bound = super().bind(event_shape)
        if bound._found["linear"]:
            return bound
        made = NonlinearOperator(_Measure(bound), out_shape=bound.measurement_shape_)
        made = made.bind(event_shape)
        made.implied_sigma = bound.implied_sigma
        return made

    # ---------------------------------------------------------------------------------- examining

    def _places(self):
        """Where to try: (dtype, device), None for what the images have."""
        yield None, None
        yield torch.float32, None
        own = next(_floats(self.obj), None) if isinstance(self.obj, nn.Module) else None
        if own is not None:
            yield own.dtype, own.device
        elif torch.cuda.is_available():
            yield None, torch.device("cuda")
            yield torch.float32, torch.device("cuda")

    def _dry_run(self, x):
        first = None
        for place in self._places():
            self._place = place
            try:
                with torch.no_grad():
                    return self._call(x.clone())
            except Exception as error:
                first = error if first is None else first
        self._place = None, None
        function = self._methods(self._held(x))[0]
        raise ValueError(
            f"{self._name} failed on a batch of images of shape {(len(x), *self.in_shape_)}: "
            f"{type(first).__name__}: {first}. It must take torch tensors (n, *in_shape) and "
            f"return (n, *out_shape). {layout_hint(function, x, self.in_shape_)}"
        ) from first

    def _examine(self):
        d = self.n_features_in_
        x = probe(3, d, torch.zeros((), dtype=torch.float64))
        out = self._dry_run(x)
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"{self._name} returned {type(out).__name__}, not a tensor. Write it in torch; "
                "what is written in numpy goes in as scipy.sparse.linalg.LinearOperator."
            )
        if out.is_complex():
            raise TypeError(
                f"{self._name} returned complex numbers ({out.dtype}), and measurements are real. "
                "Return torch.view_as_real(y), and take its inverse in an adjoint."
            )
        if out.ndim < 1 or len(out) != len(x) or out.numel() == 0:
            raise ValueError(
                f"{self._name} made {tuple(out.shape)} of a batch {(len(x), *self.in_shape_)}: the "
                "first axis must stay. Pass torch.vmap(f) where f takes a single image."
            )
        self._out_shape = tuple(out.shape[1:]) or (1,)
        dtype, _ = self._place
        single = torch.float32 in (dtype, out.dtype) or out.dtype in (torch.float16, torch.bfloat16)
        precision = torch.float32 if single else torch.float64
        own = self._methods(self._held(x))[1] is not None
        found = {
            "shape": self._out_shape,
            "place": self._place,
            "precision": precision,
            "adjoint": own,
        }
        self._found, self.n_measurements_ = found, math.prod(self._out_shape)
        measured = self._finite_or_positive(x, precision)
        if measured is None:
            return found | {"linear": False}
        straight, error = self._check_all(
            self._raw,
            self.linear,
            lambda y: self.adjoint(y).detach(),
            x,
            self.n_measurements_,
            precision,
            self._remedy(own),
        )
        if not straight and own:
            self._refuse_nonlinear(error)
        return found | {"linear": straight}

    def _finite_or_positive(self, x, precision):
        """None where the object measures positive images only: logarithms, roots."""
        with torch.no_grad():
            if bool(self._raw(x).isfinite().all()) or not bool(self._raw(x.abs()).isfinite().all()):
                return x
            check_measures(self._name, self._raw, x.abs(), TOLERANCES[precision][0])
        return None

    def _remedy(self, own):
        if own:
            return (
                "Mend the adjoint, or leave it out: automatic differentiation gives the exact one."
            )
        return "Is part of it detached from the graph, in numpy or a custom autograd function?"

    def _refuse_nonlinear(self, error):
        raise ValueError(
            f"{self._name} has an adjoint but is not linear: f(a x + b y) - f(0) and a (f(x) - "
            f"f(0)) + b (f(y) - f(0)) differ by {error:.1e} of their size. Pass its forward alone, "
            "as a function, if it is not meant to be."
        )

    def _setup(self):
        super()._setup()
        self._out_shape, self._place = self._found["shape"], self._found["place"]


class PhysicsOperator(TorchOperator):
    """A deepinv ``Physics``: its ``A``, never the call, which adds noise.

    Images go in as ``(n, C, H, W)``. ``A_adjoint`` is the adjoint where there is one that works,
    else automatic differentiation of ``A`` (which is what ``A_vjp`` is). The sigma of a
    ``GaussianNoise`` inside is in ``implied_sigma``, and becomes the noise of an estimator that has
    none.
    """

    def _image_shape(self):
        shape = self.event_shape_
        if len(shape) == 2:
            return (1, *shape)
        if len(shape) == 1:
            size = getattr(self.obj, "img_size", None)
            if isinstance(size, tuple | list | torch.Size) and math.prod(size) == shape[0]:
                return tuple(size)
            raise ValueError(
                f"{self._name} takes images (C, H, W), and the prior's have shape {shape}. Say "
                f"which with as_operator(physics, in_shape=(C, H, W)), or give the prior its "
                f"event_shape."
            )
        return shape

    def _methods(self, obj):
        own = callable(getattr(obj, "A_adjoint", None)) and self._found_adjoint
        return obj.A, (obj.A_adjoint if own else None)

    _found_adjoint = True

    def _examine(self):
        if not callable(getattr(self.obj, "A_adjoint", None)):
            self._found_adjoint = False
        else:
            x = probe(2, self.n_features_in_, torch.zeros((), dtype=torch.float64))
            self._found_adjoint = False
            y = self._dry_run(x)
            self._found_adjoint = True
            try:
                with torch.no_grad():
                    self._methods(self._held(y))[1](y)
            except Exception:
                # (deepinv's own fallback wants to know img_size; autograd needs not ask.)
                self._found_adjoint = False
        return super()._examine() | {"own": self._found_adjoint}

    def _setup(self):
        super()._setup()
        self._found_adjoint = self._found["own"]
        self.implied_sigma = _sigma_of(getattr(self.obj, "noise_model", None))

    def _remedy(self, own):
        if not own:
            return super()._remedy(own)
        return (
            "Pass its A alone, as_operator(physics.A, in_shape=...), to have automatic "
            "differentiation give the exact one, and the noise as noise=GaussianNoise(sigma)."
        )

    def _portable(self):
        """Without the noise model, whose lambdas no pickle takes, but for its sigma."""
        noise = getattr(self.obj, "noise_model", None)
        if noise is None or not isinstance(self.obj, nn.Module):
            return self.obj
        shell = copy.copy(self.obj)
        shell._modules = dict(self.obj._modules)
        sigma = _sigma_of(noise)
        shell._modules.pop("noise_model", None)
        shell.__dict__.pop("noise_model", None)
        shell.__dict__["noise_model"] = None if sigma is None else GaussianNoise(sigma)
        return shell


class GaussianNoise:
    """Stands in for deepinv's noise model of that name, of which nothing but sigma is used."""

    def __init__(self, sigma):
        self.sigma = sigma


def _sigma_of(noise):
    """The standard deviation of a Gaussian noise model of deepinv, or None."""
    if not any(kind.__name__ == "GaussianNoise" for kind in type(noise).__mro__):
        return None
    sigma = getattr(noise, "sigma", None)
    if isinstance(sigma, torch.Tensor):
        sigma = float(sigma) if sigma.numel() == 1 else None
    known = isinstance(sigma, numbers.Real) and math.isfinite(sigma) and sigma > 0
    return float(sigma) if known else None


class _Measure:
    """A bound foreign operator as a function of images, for :class:`NonlinearOperator`."""

    def __init__(self, op):
        self.op = op

    def __call__(self, x):
        y = self.op._raw(x.reshape(len(x), -1))
        return y.reshape(len(x), *self.op.measurement_shape_)

    def __repr__(self):
        return repr(self.op.obj)


def _converted(tensor, like):
    """A module's tensor in the precision of another one; complex numbers stay complex."""
    if tensor.is_complex():
        return tensor.to(like.device, torch.promote_types(like.dtype, torch.complex32))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _floats(module):
    """Parameters and buffers that have a precision."""
    for tensors in (module.parameters(), module.buffers()):
        yield from (t for t in tensors if t.is_floating_point())
