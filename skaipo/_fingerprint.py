"""Fingerprints of values: the same in every process, for what pickles and means the same.

The bytes of a pickle will not do: they depend on which equal parts are one object, on the order of
sets and on caches. Here a value is taken apart as pickle would, and the parts are hashed by value.
"""

import ast
import copyreg
import hashlib
import inspect
import sys
import textwrap
import types

import numpy as np
import torch

from skaipo._validation import to_numpy

__all__ = ["fingerprint"]

# Attributes that change while a value is used and say nothing new about it: of flows, operators
# and noise models, and of scipy's sparse matrices.
_CACHES = {"_cache", "_data_scale", "_typical_log_prob"}
_CACHES |= {"_has_sorted_indices", "_has_canonical_format"}
# Code that has a version, which is for the caller to note where it matters. Of other code, the
# source is hashed.
_VERSIONED = {"skaipo", "torch", "numpy", "scipy", "sklearn", *sys.stdlib_module_names}


def fingerprint(value):
    """Hash a value by what it holds.

    The source of a user's own class or function counts, without its comments; what that in turn
    calls does not. The device of a tensor and whether it requires a gradient do not count.

    Parameters
    ----------
    value : object
        Anything that pickles.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    TypeError, AttributeError, PicklingError
        If some part of it does not pickle.
    """
    return _Walk().digest(value).hex()


def _hash(kind, *parts):
    total = hashlib.sha256(kind.encode())
    for part in parts:
        part = memoryview(part)
        # With its length: what is hashed can be read in one way only.
        total.update(b"|%d|" % part.nbytes)
        total.update(part)
    return total.digest()


def _source(obj):
    """The code of a user's class or function, formatting aside; empty where it cannot be read."""
    if (obj.__module__ or "").partition(".")[0] in _VERSIONED:
        return ""
    try:
        return ast.dump(ast.parse(textwrap.dedent(inspect.getsource(obj))))
    except (OSError, TypeError, SyntaxError):
        return ""


def _code(code):
    """What a code object does, as plain values."""
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, constants]


class _Walk:
    def __init__(self):
        # By identity: a digest, and the object itself, or another one might take over its id.
        self._known = {}
        self._path = {}
        self._libraries = ()

    def digest(self, obj):
        key = id(obj)
        if key in self._known:
            return self._known[key][0]
        if key in self._path:
            return _hash("cycle", str(self._path[key]).encode())
        self._path[key] = len(self._path)
        try:
            digest = self._digest(obj)
        finally:
            del self._path[key]
        self._known[key] = digest, obj
        return digest

    def _all(self, kind, objects):
        return _hash(kind, *[self.digest(obj) for obj in objects])

    def _digest(self, obj):
        kind = type(obj)
        if obj is None or kind in (bool, int, float, complex):
            return _hash(kind.__name__, repr(obj).encode())
        if kind is str:
            return _hash("str", obj.encode("utf-8", "surrogatepass"))
        if kind in (bytes, bytearray):
            return _hash("bytes", obj)
        if kind in (list, tuple):
            return self._all(kind.__name__, obj)
        if kind in (set, frozenset):
            return _hash("set", *sorted(self.digest(item) for item in obj))
        if kind is dict:
            pairs = sorted(self.digest(k) + self.digest(v) for k, v in obj.items())
            return _hash("dict", *pairs)
        if kind in (np.ndarray, np.memmap):
            if obj.dtype.hasobject:
                return self._all("objects", (str(obj.dtype), obj.shape, obj.tolist()))
            raw = np.ascontiguousarray(obj).reshape(-1).view(np.uint8)
            return _hash("array", f"{obj.dtype} {obj.shape}".encode(), raw)
        if isinstance(obj, torch.Tensor) and obj.layout == torch.strided:
            flat = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            raw = to_numpy(flat.view(torch.uint8)) if len(flat) else b""
            return _hash("tensor", f"{obj.dtype} {tuple(obj.shape)}".encode(), raw)
        if isinstance(obj, type | types.FunctionType):
            return self._global(obj)
        return self._reduced(obj)

    def _global(self, obj):
        if "<" in obj.__qualname__:
            library = (obj.__module__ or "").partition(".")[0]
            if isinstance(obj, types.FunctionType) and library in self._libraries:
                return self._local(obj)
            raise TypeError(
                f"cannot pickle {obj.__qualname__}, which is not at a module's top level"
            )
        # What a class inherits is part of it.
        classes = inspect.getmro(obj) if isinstance(obj, type) else (obj,)
        return self._all("global", [(c.__module__, c.__qualname__, _source(c)) for c in classes])

    def _local(self, function):
        """A lambda or local function of a library, whose globals are the library's own."""
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = (function.__defaults__, function.__kwdefaults__, cells)
        name = function.__module__, function.__qualname__
        return self._all("local", (*name, _code(function.__code__), *parts))

    def _reduced(self, obj):
        if hasattr(obj, "fingerprinted"):
            # What had to be packed to pickle: itself, with the local functions of its library.
            self._libraries, before = obj.libraries, self._libraries
            try:
                return self.digest(obj.fingerprinted)
            finally:
                self._libraries = before
        reduce = copyreg.dispatch_table.get(type(obj))
        parts = obj.__reduce_ex__(4) if reduce is None else reduce(obj)
        if isinstance(parts, str):
            return self._all(
                "global", (getattr(obj, "__module__", None), type(obj).__name__, parts)
            )
        make, args, state, items, pairs = (*parts, None, None, None)[:5]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in _CACHES}
        items = None if items is None else list(items)
        pairs = None if pairs is None else list(pairs)
        return self._all("object", (make, args, state, items, pairs))
