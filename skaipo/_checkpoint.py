"""Finished chunks of a run on disk, so that a run that was killed goes on where it was.

A checkpoint is a directory with a manifest, which says what the results depend on, and one file
for each finished chunk. Files appear whole or not at all: they are written under another name,
flushed to disk and renamed. Nothing in them is a pickle.
"""

import contextlib
import importlib.metadata
import io
import json
import numbers
import os
import time
import uuid
import warnings
from dataclasses import fields

import numpy as np
import torch

from skaipo._fingerprint import fingerprint
from skaipo.flows._frozen import kernels
from skaipo.operators._base import describe

__all__ = ["Checkpoint", "describe_run"]

_FORMAT = 2
_MANIFEST = "manifest.json"
_PREFIX, _SUFFIX = ".skaipo-", ".tmp"
# Seconds after which a temporary file has been left behind. One that is younger may belong to
# another process that works in this directory at this moment, on whatever machine.
_STALE = 3600.0


# ------------------------------------------------------------------- what the results depend on


def describe_run(problem, y, start, batch_size, params=None):
    """Everything that the results of a run depend on, by name, as plain data for JSON.

    Parameters
    ----------
    problem : Problem
        Every field of it counts, but for the surrogate, which follows from the prior.
    y : torch.Tensor of shape (n, m)
        Measurements, NaN where there are none.
    start : str or torch.Tensor
    batch_size : int
    params : torch.Tensor of shape (n, ...), default=None
        What the operator takes per row.

    Returns
    -------
    run : dict
        Numbers and strings as they are; anything else as ``{"is": text, "sha256": digest}``, of
        which the digest alone counts.

    Raises
    ------
    TypeError
        If something that counts cannot be pickled.
    """
    missing = y.isnan()
    # The bits of a NaN say nothing.
    measured = torch.where(missing, torch.zeros_like(y), y)
    device = y.device.type
    if device == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(y.device)})"
    return dict(
        measurements={
            "is": f"{len(y)} rows of {y.shape[1]} values, {int(missing.sum())} of them missing",
            "sha256": fingerprint((missing, measured)),
        },
        **{
            f.name: _part(f.name, getattr(problem, f.name))
            for f in fields(problem)
            if f.name != "surrogate"
        },
        start=_part("start", start),
        op_params=_part("op_params", params),
        # Their results differ in the last bits.
        kernels=kernels(),
        batch_size=int(batch_size),
        dtype=str(y.dtype),
        device=device,
        versions=dict(skaipo=_own_version(), torch=str(torch.__version__), numpy=np.__version__),
    )


def _own_version():
    try:
        return importlib.metadata.version("skaipo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _part(name, value):
    if _is_plain(value):
        return _plain(value)
    text = describe(value)
    # Of a prior, the flow: how it was trained, and where from it was loaded, changes no result.
    contents = value.flow_ if name == "prior" else value
    try:
        digest = fingerprint(contents)
    except Exception as error:  # Pickling runs the objects' own code.
        what = {"op": "operator", "noise": "noise model", "method": "solver"}.get(name, name)
        raise TypeError(
            f"checkpoint needs a picklable {what}, to tell whether it is the same when the run "
            f"goes on, got {text}: {error}. Define its classes and functions at the top level of a "
            f"module, leave what cannot be pickled (open files, locks, lambdas) out in "
            f"__getstate__, or run without checkpoint."
        ) from error
    return {"is": text if len(text) <= 200 else f"{text[:197]}...", "sha256": digest}


def _is_plain(value):
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | numbers.Real)


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _essence(part):
    """What of a part counts."""
    if isinstance(part, dict):
        if "sha256" in part:
            return part["sha256"]
        return {name: _essence(inner) for name, inner in part.items()}
    return part


def _differences(there, here):
    """What differs between two runs: a list of texts."""
    found = []
    for name in {**here, **there}:
        if name not in there or name not in here:
            found.append(f"{name} (only {'here' if name in here else 'there'})")
            continue
        old, new = there[name], here[name]
        if _essence(old) == _essence(new):
            continue
        if name == "versions":
            packages = [p for p in new if old.get(p) != new[p]]
            found += [f"version of {p} ({old.get(p)} there, {new[p]} here)" for p in packages]
            continue
        old, new = (v["is"] if isinstance(v, dict) else repr(v) for v in (old, new))
        texts = "other contents" if old == new else f"{old} there, {new} here"
        found.append(f"{name} ({texts})")
    return found


# ------------------------------------------------------------------------------- the directory


class Checkpoint:
    """The finished chunks of one run, in a directory of their own.

    It may be sent to other processes and machines that see the same directory.

    Parameters
    ----------
    directory : path-like
        Made, with its parents, where it is missing.
    run : dict
        From :func:`describe_run`.

    Raises
    ------
    ValueError
        If the directory belongs to another run, or to something else.
    TypeError
        If ``directory`` is no path.
    OSError
        If the directory cannot be made, read or written.
    """

    def __init__(self, directory, run):
        try:
            path = os.fsdecode(directory)
        except TypeError:
            raise TypeError(
                f"checkpoint must be the path of a directory, a string or a pathlib.Path, got "
                f"{directory!r}."
            ) from None
        if not path:
            raise ValueError("checkpoint must be the path of a directory, got an empty string.")
        # Workers have working directories of their own.
        self.directory = os.path.abspath(path)
        os.makedirs(self.directory, exist_ok=True)
        names = os.listdir(self.directory)
        manifest = os.path.join(self.directory, _MANIFEST)
        if not os.path.exists(manifest):
            # A run that was killed before its manifest was there leaves a temporary file at most.
            foreign = sorted(name for name in names if not _is_temporary(name))
            if foreign and not os.path.exists(manifest):
                shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
                raise ValueError(
                    f"checkpoint={self.directory!r} holds files ({shown}) but no {_MANIFEST}: it "
                    f"is no checkpoint. Pass a directory that is empty or does not exist yet."
                )
            content = dict(
                about="Finished chunks of one run of skaipo. To start anew, delete the directory.",
                format=_FORMAT,
                run=run,
            )
            # Not over the manifest of another process that was faster.
            self._write(_MANIFEST, json.dumps(content, indent=2).encode(), _link)
        there = self._check(manifest, run)
        # Each chunk says which run it is of; by the manifest, for 1 and 1.0 are the same setting.
        self._run = fingerprint(_essence(there))
        for name in filter(_is_temporary, names):
            # Tidying is not worth an error: another process may have been faster.
            with contextlib.suppress(OSError):
                temporary = os.path.join(self.directory, name)
                if time.time() - os.stat(temporary).st_mtime > _STALE:
                    os.unlink(temporary)

    def _check(self, manifest, run):
        fix = "Pass another directory, or delete this one to start anew."
        with open(manifest, "rb") as file:
            raw = file.read()
        try:
            content = json.loads(raw)
            version, there = content["format"], content["run"]
            differences = _differences(there, run) if version == _FORMAT else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"checkpoint={self.directory!r} holds a {_MANIFEST} that is not skaipo's, or is "
                f"damaged ({error!r}). {fix}"
            ) from error
        if version != _FORMAT:
            raise ValueError(
                f"checkpoint={self.directory!r} has format {version!r}, this version of skaipo "
                f"reads {_FORMAT}. {fix}"
            )
        if differences:
            hint = ""
            if any(text.startswith("start ") for text in differences):
                hint = " (Random starts are the same again only if random_state is an integer.)"
            raise ValueError(
                f"checkpoint={self.directory!r} belongs to another run. What differs: "
                f"{'; '.join(differences)}.{hint} {fix}"
            )
        return there

    def _name(self, k):
        return f"chunk-{k:06d}.npz"

    def load(self, k):
        """The result of chunk ``k``; None if it is not there.

        One that cannot be read counts as not there, with a ``UserWarning``.
        """
        path = os.path.join(self.directory, self._name(k))
        try:
            with open(path, "rb") as file:
                result, run = _decode(file.read())
            if run != self._run:
                raise ValueError("it is of another run")
        except FileNotFoundError:
            return None
        except Exception as error:  # Damage may show as anything.
            warnings.warn(
                f"The chunk {path!r} cannot be read ({error}) and is solved again.",
                UserWarning,
                stacklevel=2,
            )
            return None
        return result

    def save(self, k, result):
        """Keep the result of chunk ``k``, on disk when this returns.

        Parameters
        ----------
        k : int
        result : nested dict, list and tuple of arrays, numbers and strings
        """
        self._write(self._name(k), _encode(result, self._run), os.replace)

    def solve(self, k, function, *args):
        """Call ``function(*args)``, keep what it returns as chunk ``k``, and return it."""
        result = function(*args)
        self.save(k, result)
        return result

    def _write(self, name, data, place):
        temporary = os.path.join(self.directory, f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                # Before the new name: after a power cut it must not lead to half a file.
                os.fsync(file.fileno())
            place(temporary, os.path.join(self.directory, name))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _is_temporary(name):
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _link(source, target):
    """Give a file a second name, if nobody else has it."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        # File systems without links. Two runs that start here in the same instant could then both
        # take the directory for theirs; as each chunk says whose it is, they still do not mix.
        os.replace(source, target)


# ------------------------------------------------------------------------------------ a file


def _encode(result, run):
    arrays = {}

    def put(array):
        if array.dtype.hasobject:
            raise TypeError(f"A checkpoint holds numbers and strings only, got {describe(array)}.")
        arrays[f"array{len(arrays)}"] = array
        return len(arrays) - 1

    def tree(obj):
        if isinstance(obj, np.ndarray | np.generic):
            return {"array": put(np.asarray(obj)), "scalar": isinstance(obj, np.generic)}
        if obj is None or type(obj) in (str, bool, int, float):
            return {"value": obj}
        if isinstance(obj, list) and _is_ragged(obj):
            # Thousands of histories are two arrays, not thousands.
            lengths = np.array([len(row) for row in obj], dtype=np.int64)
            return {"ragged": put(np.concatenate(obj)), "lengths": put(lengths)}
        if isinstance(obj, list | tuple):
            return {type(obj).__name__: [tree(item) for item in obj]}
        if isinstance(obj, dict) and all(isinstance(key, str) for key in obj):
            return {"dict": [[key, tree(value)] for key, value in obj.items()]}
        raise TypeError(f"A checkpoint cannot hold a {type(obj).__name__}.")

    text = json.dumps(dict(format=_FORMAT, run=run, tree=tree(result)))
    # In memory first: what fails on a full disk is then a plain write.
    file = io.BytesIO()
    np.savez(file, tree=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
    return file.getbuffer()


def _is_ragged(rows):
    if not rows or not all(isinstance(row, np.ndarray) and row.ndim for row in rows):
        return False
    return len({(row.dtype, row.shape[1:]) for row in rows}) == 1


def _decode(data):
    # Reading a member checks its CRC.
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays["tree"].tobytes())

    def build(node):
        if "array" in node:
            array = arrays[f"array{node['array']}"]
            return array[()] if node["scalar"] else array
        if "value" in node:
            return node["value"]
        if "ragged" in node:
            ends = np.cumsum(arrays[f"array{node['lengths']}"])
            rows = np.split(arrays[f"array{node['ragged']}"], ends[:-1])
            return [row.copy() for row in rows]
        if "dict" in node:
            return {key: build(value) for key, value in node["dict"]}
        ((kind, items),) = node.items()
        return {"list": list, "tuple": tuple}[kind](build(item) for item in items)

    return build(header["tree"]), header["run"]
