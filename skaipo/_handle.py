"""Frozen modules that pickle as one flat array.

joblib writes an array to a memmap once, however many tasks refer to it, if it is the same object
each time. A module's tensors are therefore packed into one cached array, with a pickle of the
module's structure beside it.
"""

import io
import math
import pickle
import weakref

import numpy as np
import torch

from skaipo._validation import as_bytes, checksum, to_numpy

try:
    import cloudpickle
except ImportError:  # joblib < 1.6 brings its own
    from joblib.externals import cloudpickle

__all__ = ["Pickler", "pack_module", "unpack_module"]

_ALIGNMENT = 64
# Module -> (what its tensors are, packed state); a module that changed is packed again.
_PACKED = weakref.WeakKeyDictionary()


class Pickler(cloudpickle.CloudPickler):
    """Pickles an object's structure; its tensors become indices into the list ``tensors``."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors = []
        self._index = {}

    def persistent_id(self, obj):
        if not isinstance(obj, torch.Tensor):
            return None
        # The same tensor twice (tied weights) is one entry, and one tensor again when unpacked.
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]


def _state(module):
    tensors = [*module.parameters(), *module.buffers()]
    parts = tuple((id(t), t.data_ptr(), t.device, t.dtype) for t in tensors)
    return parts, checksum(*tensors)


def pack_module(module):
    """Return a module's state as plain data around one flat array.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    state : dict
        ``flat`` is the same uint8 array at every call, as long as the module does not change.
    """
    now = _state(module)
    known = _PACKED.get(module)
    if known is not None and known[0] == now:
        return known[1]
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(module)
    table, parts, offset = [], [], 0
    for tensor in pickler.tensors:
        raw = to_numpy(as_bytes(tensor))
        padding = -len(raw) % _ALIGNMENT
        table.append(
            (
                offset,
                tuple(tensor.shape),
                tensor.dtype,
                isinstance(tensor, torch.nn.Parameter),
                tensor.requires_grad,
                str(tensor.device),
            )
        )
        parts += [raw, np.zeros(padding, dtype=np.uint8)]
        offset += len(raw) + padding
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    state = dict(structure=file.getvalue(), table=tuple(table), flat=flat)
    _PACKED[module] = (now, state)
    return state


def unpack_module(state):
    """Build the module that :func:`pack_module` packed; on the CPU where its device is missing."""
    tensors = []
    for offset, shape, dtype, is_parameter, requires_grad, device in state["table"]:
        size = math.prod(shape) * dtype.itemsize
        # A copy: the flat array may be a read-only memmap.
        raw = np.array(state["flat"][offset : offset + size])
        # An empty array has strides that torch cannot view as another type.
        tensor = torch.from_numpy(raw).view(dtype) if size else torch.empty(0, dtype=dtype)
        tensor = tensor.reshape(shape)
        if not device.startswith("cuda") or torch.cuda.is_available():
            tensor = tensor.to(device)
        if is_parameter:
            tensor = torch.nn.Parameter(tensor, requires_grad=requires_grad)
        tensors.append(tensor)
    unpickler = pickle.Unpickler(io.BytesIO(state["structure"]))
    unpickler.persistent_load = tensors.__getitem__
    module = unpickler.load()
    _PACKED[module] = (_state(module), state)
    return module
