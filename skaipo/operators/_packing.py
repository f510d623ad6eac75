"""Pickling of what plain pickle refuses: lambdas and local functions in other people's objects."""

import contextlib
import io
import pickle
import weakref

from skaipo._handle import cloudpickle

__all__ = ["Packed", "packed"]

# What was seen to pickle is not tried in each task that is sent to a worker.
_PLAIN = weakref.WeakSet()


class _Sink(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        return memoryview(data).nbytes


class Packed:
    """What plain pickle does not take (lambdas, local functions), as cloudpickle wrote it.

    Attributes
    ----------
    fingerprinted : object
        The thing itself, which tells whether two are the same; the bytes of equal lambdas differ.
    libraries : set of str
        Whose lambdas are code with a name, as functions of a module are. A lambda of a script or a
        notebook is not: what it finds in its surroundings may have changed.
    """

    def __init__(self, obj, data):
        self.data = data
        self.fingerprinted = obj
        modules = {kind.__module__.partition(".")[0] for kind in type(obj).__mro__}
        self.libraries = modules - {"builtins", "__main__"}

    def open(self):
        return pickle.loads(self.data)

    def __reduce__(self):
        return _packed, (self.data,)


def _packed(data):
    other = object.__new__(Packed)
    other.data = data
    return other


def packed(obj, name):
    """The object, if it pickles, else packed such that it does; TypeError if nothing helps."""
    if _is_plain(obj):
        return obj
    try:
        pickle.dump(obj, _Sink(), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            return Packed(obj, cloudpickle.dumps(obj))
        except Exception:
            raise TypeError(
                f"{name} does not pickle: {error}. Other processes (n_jobs), checkpoints and files "
                "need it to: define functions and classes at the top level of a module, and keep "
                "open files, locks and handles of devices out of it. Without, use n_jobs=1."
            ) from error
    with contextlib.suppress(TypeError):
        _PLAIN.add(obj)
    return obj


def _is_plain(obj):
    try:
        return obj in _PLAIN
    except TypeError:  # no hash
        return False
