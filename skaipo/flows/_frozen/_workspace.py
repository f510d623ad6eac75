"""Memory that is used again for every batch, and the programs that are run on it."""

import threading
import warnings

import torch

from skaipo._padding import padded_size

__all__ = ["Steps", "Workspace"]

_CAPTURING = threading.Lock()


class Steps(list):
    """The steps of a program. On a GPU they become one CUDA graph when they are first run again.

    Parameters
    ----------
    like : torch.Tensor
        On the device of the buffers.
    """

    def __init__(self, like):
        super().__init__()
        self.device = like.device
        # A graph repeats kernels, not what Python does between them.
        self.capturable = like.is_cuda
        self._ran = False
        self._graph = None

    def run(self):
        if self.device.type != "cuda":
            for step in self:
                step()
            return
        with torch.cuda.device(self.device):
            if self.capturable and self._ran and self._graph is None:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                for step in self:
                    step()
            self._ran = True

    def _capture(self):
        try:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # One at a time: they share a stream; and other threads may allocate meanwhile.
            with _CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for step in self:
                    step()
            self._graph = graph
        except RuntimeError as error:
            self.capturable = False
            warnings.warn(
                f"The flow's evaluation could not be captured as a CUDA graph ({error}); it goes "
                f"on without, slower for small batches.",
                RuntimeWarning,
                stacklevel=2,
            )


class Workspace:
    """Buffers for one batch at a time, used again for the next, and programs on them.

    New memory is slow: mapping its pages can take longer than computing what goes into them.

    Parameters
    ----------
    like : torch.Tensor
        Of the dtype and on the device of the buffers.
    keeps : bool
        Whether every operation has buffers of its own for what it keeps, or all share the same.
    pads : bool
        Whether batches are filled up to the sizes of :func:`~skaipo._padding.padded`.
    """

    _MAX_SIZES = 32

    def __init__(self, like, keeps, pads=False):
        self.like = like
        self.pads = pads
        self.keeps = keeps
        self.n = 0
        self.graphs = {}  # of networks that autograd differentiates
        self._storage = {}
        self._programs = {}

    def resize(self, n):
        """Prepare for ``n`` rows, or a few more, and return ``n``."""
        self.n = padded_size(n) if self.pads else n
        if self.like.is_cuda:  # few sizes, for few graphs
            self.n = max(16, 1 << (n - 1).bit_length())
        if self.n not in self._programs and len(self._programs) >= self._MAX_SIZES:
            del self._programs[next(iter(self._programs))]
        return n

    def program(self, key, plan, *args):
        """``plan(self, *args)``, once per ``key`` and number of rows."""
        known = self._programs.get(self.n, {}).get(key)
        if known is None:
            known = plan(self, *args)  # which may make the others void
            self._programs.setdefault(self.n, {})[key] = known
        return known

    def buffer(self, name, rows, *shape):
        """An array of shape ``(rows, *shape)``, zero at first; the same for the same name."""
        key = name, shape
        storage = self._storage.get(key)
        if storage is None or len(storage) < rows:
            # A tensor born in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                storage = self._storage[key] = self.like.new_zeros(rows, *shape)
            # Programs for fewer rows keep what they were planned with; let go of it.
            self._programs.clear()
        return storage[:rows]

    def other(self, role, h):
        """A buffer of the shape of ``h`` that is not ``h``."""
        first = self.buffer((role, 0), *h.shape)
        if first.data_ptr() != h.data_ptr():
            return first
        return self.buffer((role, 1), *h.shape)

    def kept(self, owner, name, *shape):
        """A buffer for what ``owner`` keeps for its pass back."""
        return self.buffer((name, id(owner)) if self.keeps else name, self.n, *shape)
