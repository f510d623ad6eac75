"""Pickling of what plain pickle refuses: lambdas and local functions in other people's objects."""

import io
import pickle

try:
    import cloudpickle
except ImportError:  # joblib before 1.6 brings its own
    from joblib.externals import cloudpickle

__all__ = ["Packed", "packed"]


class _Sink(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        return memoryview(data).nbytes


class Packed:
    """What plain pickle does not take (lambdas, local functions), as cloudpickle wrote it."""

    def __init__(self, data, why):
        self.data = data
        # The bytes of equal lambdas may differ: they do not tell whether a run is the same.
        self.no_fingerprint = why

    def open(self):
        return pickle.loads(self.data)


def packed(obj, name):
    """The object, if it pickles, else packed such that it does; TypeError if nothing helps."""
    try:
        pickle.dump(obj, _Sink(), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            return Packed(cloudpickle.dumps(obj), str(error))
        except Exception:
            raise TypeError(
                f"{name} does not pickle: {error}. Other processes (n_jobs), checkpoints and files "
                "need it to: define functions and classes at the top level of a module, and keep "
                "open files, locks and handles of devices out of it. Without, use n_jobs=1."
            ) from error
    return obj
