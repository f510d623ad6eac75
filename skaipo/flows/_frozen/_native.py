"""Couplings of images in one compiled call each, where ``_couplings.cpp`` could be compiled."""

import ctypes
import zlib
from functools import cache
from pathlib import Path

import torch

__all__ = ["NativeCoupling", "library", "native_coupling"]

SOURCES = [Path(__file__).parent / name for name in ("_couplings.cpp", "_couplings.h")]
_MAX_LAYERS = 8
_GROUP = 16  # outputs that lie together


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "bias")],
        *[
            (name, ctypes.c_int64)
            for name in ("kernel_height", "kernel_width", "n_inputs", "n_outputs")
        ],
    ]


class _Coupling(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("back", ctypes.POINTER(_Layer)),
        *[
            (name, ctypes.c_int64)
            for name in ("n_layers", "height", "width", "channels")
            + ("source", "n_source", "target", "size")
        ],
        ("bound", ctypes.c_double),
        ("mask", ctypes.c_void_p),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("coupling", ctypes.POINTER(_Coupling)),
        *[
            (name, ctypes.c_int64)
            for name in ("rows", "times", "is_double", "pull", "divide", "threads", "instructions")
        ],
        *[(name, ctypes.c_void_p) for name in ("h", "kept", "tanh", "factor", "log_det")],
        ("log_det_stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("gates", ctypes.c_void_p * _MAX_LAYERS),
    ]


def _checksum():
    """Of the sources: a library of other sources would be called with the wrong arguments."""
    return zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))


@cache
def library():
    """The compiled library, or None where there is none of these sources.

    It is compiled at installation, on Linux, if there is a C++ compiler.
    """
    path = SOURCES[0].with_suffix(".native.so")
    try:
        # After torch, whose OpenMP it shares with its threads.
        found = ctypes.CDLL(str(path))
        found.skaipo_checksum.restype = ctypes.c_uint32
        if found.skaipo_checksum() != _checksum():
            return None
    except (OSError, AttributeError):  # not there, of another system, or something else
        return None
    found.skaipo_couple.argtypes = [ctypes.c_void_p]
    found.skaipo_couple.restype = ctypes.c_int64
    found.skaipo_instructions.restype = ctypes.c_int64
    return found


def _rounded(channels):
    return -(-channels // _GROUP) * _GROUP


class _Packed:
    """Layers as the library reads them.

    Parameters
    ----------
    layers : list of (weight, bias)
        Of shapes (n_outputs, n_inputs, height, width) and (n_outputs,), or None for no bias.
    """

    def __init__(self, layers):
        self._tensors = []  # the structures hold only their addresses
        self.structures = (_Layer * len(layers))()
        for structure, (weight, bias) in zip(self.structures, layers, strict=True):
            n_outputs, n_inputs, height, width = weight.shape
            packed = weight.new_zeros(_rounded(n_outputs), n_inputs, height, width)
            packed[:n_outputs] = weight
            packed = packed.unflatten(0, (-1, _GROUP)).permute(0, 3, 4, 2, 1).contiguous()
            structure.weight = self._hold(packed)
            if bias is not None:
                padded = bias.new_zeros(_rounded(n_outputs))
                padded[:n_outputs] = bias
                structure.bias = self._hold(padded)
            structure.kernel_height, structure.kernel_width = height, width
            structure.n_inputs, structure.n_outputs = n_inputs, n_outputs

    def _hold(self, tensor):
        self._tensors.append(tensor)
        return tensor.data_ptr()


class NativeCoupling:
    """Steps of a coupling whose network has convolutions with ReLU between them.

    Parameters
    ----------
    layers, back : list of (weight, bias)
        The network and its transpose: see :class:`_Packed`.
    shape : tuple of int
        Height and width.
    source, target : int
        First channel that the network reads, and that is mapped.
    n_source, size : int
        How many of them.
    bound : float
    mask : torch.Tensor of shape (height, width, channels), or None
        What the network reads: all else is mapped.
    """

    def __init__(self, layers, back, shape, source, n_source, target, size, bound, mask):
        self._arguments = layers, back, shape, source, n_source, target, size, bound, mask
        self._layers, self._back, self._mask = _Packed(layers), _Packed(back), mask
        self._is_double = layers[0][0].dtype == torch.float64
        item = layers[0][0].element_size()
        # Bytes, in buffers of numbers.
        self._gates = [_rounded(len(weight)) // item for weight, _ in layers[:-1]]
        self.kept_per_position = sum(self._gates)
        self._instructions = library().skaipo_instructions()
        self._options = dict(
            n_layers=len(layers),
            height=shape[0],
            width=shape[1],
            source=source,
            n_source=n_source,
            target=target,
            size=size,
            bound=bound,
            mask=None if mask is None else mask.data_ptr(),
        )

    def __reduce__(self):
        # A copy has weights of its own, at other addresses.
        return type(self), self._arguments

    def _call(self, h, kept, **options):
        if not h.is_contiguous():
            raise AssertionError("A coupling's buffer must be contiguous.")
        rows = len(kept[0])
        coupling = _Coupling(
            layers=self._layers.structures,
            back=self._back.structures,
            channels=h.shape[-1],
            **self._options,
        )
        call = _Call(
            coupling=ctypes.pointer(coupling),
            rows=rows,
            times=len(h) // rows,
            is_double=self._is_double,
            instructions=self._instructions,
            h=h.data_ptr(),
            **options,
        )
        call.kept, call.tanh, call.factor = (buffer.data_ptr() for buffer in kept)
        return call

    def _add_gates(self, call, space, shape):
        for i, size in enumerate(self._gates):
            call.gates[i] = space.kept(self, f"gates {i}", *shape, size).data_ptr()

    def _add_step(self, call, steps, *buffers):
        couple, address = library().skaipo_couple, ctypes.addressof(call)

        def step(held=(self, call, buffers)):
            call.threads = torch.get_num_threads()
            if couple(address):
                raise MemoryError("No memory for the hidden layers of a coupling.")

        steps.append(step)

    def plan(self, h, kept, divide, log_det, pulled, space, steps):
        """Map ``h`` in place."""
        call = self._call(h, kept, divide=divide, pull=False)
        if pulled:
            self._add_gates(call, space, h.shape[1:-1])
        if log_det is not None:
            call.log_det, call.log_det_stride = log_det.data_ptr(), log_det.stride(0)
        self._add_step(call, steps, h, kept, log_det)

    def plan_back(self, g, kept, divide, weights, space, steps):
        """Map gradients ``g`` in place."""
        call = self._call(g, kept, divide=divide, pull=True, weights=weights.data_ptr())
        self._add_gates(call, space, g.shape[1:-1])
        self._add_step(call, steps, g, kept, weights)


def native_coupling(net, shape, size, bound, source, n_source, target, mask=None):
    """The compiled form of a coupling with the network ``net``, or None if there is none."""
    layers, back = net.convolutions()
    if library() is None or not layers or len(shape) != 2 or len(layers) > _MAX_LAYERS:
        return None
    weight = layers[0][0]
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return None
    # Their exponential of single precision ends before torch's does.
    if not abs(bound) <= 80:
        return None
    return NativeCoupling(layers, back, shape, source, n_source, target, size, bound, mask)
