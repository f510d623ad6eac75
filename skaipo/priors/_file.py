"""Files of fitted priors: safetensors, whose metadata say in JSON what the tensors are."""

import contextlib
import json
import os
import uuid

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["read_file", "unreadable", "write_file"]

_FORMAT = 1
# What a file holds, by the entry of its metadata that describes it.
_OWNERS = {"flow": "FlowPrior", "gaussian": "GaussianPrior"}


def write_file(path, tensors, info):
    """Write tensors and a description, whole or not at all.

    Parameters
    ----------
    path : str or path-like
    tensors : dict of torch.Tensor
    info : dict
        Plain data. One entry is named "flow" or "gaussian", for what the file holds.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps({"format": _FORMAT, **info}, sort_keys=True)
    # (Others may be writing to the same path.)
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.partial"
    try:
        save_file(tensors, temporary, metadata={"skaipo": text})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"Could not write {os.fspath(path)!r}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def read_file(path, kind):
    """Read what :func:`write_file` wrote. Nothing in the file is executed.

    Parameters
    ----------
    path : str or path-like
    kind : {"flow", "gaussian"}
        What is expected.

    Returns
    -------
    path : str
    info : dict
    tensors : dict of torch.Tensor

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, not a safetensors file, not a prior, or another kind of prior.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No file at {path!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path!r} is not a whole safetensors file ({error}). It may be truncated; save the "
            f"prior again with {_OWNERS[kind]}.save."
        ) from error
    try:
        info = json.loads(metadata["skaipo"])
        version, kinds = info["format"], [name for name in _OWNERS if name in info]
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, kind) from error
    if version != _FORMAT:
        raise ValueError(
            f"{path!r} has format {version}, this version of skaipo reads {_FORMAT}: update skaipo."
        )
    if kind not in kinds:
        if kinds:
            owner = _OWNERS[kinds[0]]
            raise ValueError(
                f"{path!r} holds a {owner}, not a {_OWNERS[kind]}: read it with {owner}.load(path)."
            )
        raise unreadable(path, kind)
    return path, info, tensors


def unreadable(path, kind):
    """The error for metadata that say nothing of a prior."""
    return ValueError(
        f"{path!r} is a safetensors file, but its metadata holds no skaipo prior: it was not "
        f"written by {_OWNERS[kind]}.save."
    )
