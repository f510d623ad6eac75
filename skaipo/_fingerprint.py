"""Fingerprints of values: the same in every process, for what pickles and means the same.

The bytes of a pickle will not do: they depend on which equal parts are one object, on the order of
sets and on caches. Here a value is taken apart as pickle would, and the parts are hashed by value.
"""

import ast
import copyreg
import dis
import hashlib
import inspect
import sys
import textwrap
import types
import weakref
from collections import OrderedDict

import numpy as np
import torch

from skaipo._validation import as_bytes, to_numpy

__all__ = ["fingerprint"]

# Attributes that change while a value is used and say nothing new about it: of flows, operators
# and noise models, and of scipy's sparse matrices.
_CACHES = {"_cache", "_known_moments"}
_CACHES |= {"_has_sorted_indices", "_has_canonical_format"}
# Of which every module of torch holds ten.
_EMPTY = OrderedDict()
# Code that has a version, which is for the caller to note where it matters. Of other code, the
# source is hashed.
_VERSIONED = {"skaipo", "torch", "numpy", "scipy", "sklearn", *sys.stdlib_module_names}


def fingerprint(value):
    """Hash a value by what it holds.

    The source of a user's own class or function counts, without its comments, and so do the
    numbers, strings and arrays among its defaults and the globals that it reads; what it calls does
    not. The device of a tensor and whether it requires a gradient do not count.

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


def _own(obj):
    """The code of a user's class or function, formatting aside, and the plain values it reads."""
    if (obj.__module__ or "").partition(".")[0] in _VERSIONED:
        return []
    functions = _functions(obj)
    try:
        code = _source(obj)
    except (OSError, TypeError, SyntaxError):
        # Typed at a prompt or piped into Python: what it was compiled to.
        code = [_code(function.__code__) for function in functions]
    return [code, [_read(function) for function in functions]]


# By class or function, for as long as it lives: inspect parses the whole file to find a class.
_SOURCES = weakref.WeakKeyDictionary()


def _source(obj):
    """The source of a class or function, formatting aside."""
    if (source := _SOURCES.get(obj)) is None:
        source = ast.dump(ast.parse(textwrap.dedent(inspect.getsource(obj))))
        _SOURCES[obj] = source
    return source


def _code(code):
    """What a code object does, as plain values."""
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, constants]


def _functions(obj):
    """A function, or those that a class defines."""
    if not isinstance(obj, type):
        return [obj]
    found = []
    for value in vars(obj).values():
        value = getattr(value, "__func__", value)
        parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
        found += [part for part in parts if isinstance(part, types.FunctionType)]
    return found


def _is_plain(value):
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes | np.generic | torch.Tensor
    )


def _codes(code):
    """A code object and those that it holds."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _read(function):
    """Numbers, strings and arrays that a function reads: its defaults and its module's globals.

    Not those that it writes, as one that counts its calls does.
    """
    names, written = set(), set()
    for code in _codes(function.__code__):
        names.update(code.co_names)
        written.update(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL")
    found = {name: v for name, v in function.__globals__.items() if name in names - written}
    defaults = dict(enumerate(function.__defaults__ or ()))
    return [
        {name: value for name, value in part.items() if _is_plain(value)}
        for part in (defaults, function.__kwdefaults__ or {}, found)
    ]


class _Walk:
    def __init__(self):
        # By identity: a digest, and the object itself, or another one might take over its id.
        self._known = {}
        self._path = {}
        self._libraries = ()

    def digest(self, obj):
        if type(obj) is OrderedDict and not obj and not vars(obj):
            obj = _EMPTY
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
            raw = to_numpy(as_bytes(obj)) if obj.numel() else b""
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
        return self._all("global", [(c.__module__, c.__qualname__, *_own(c)) for c in classes])

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
