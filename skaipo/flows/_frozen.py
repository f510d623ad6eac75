"""The evaluation of a frozen flow: values, log-determinants and products with the Jacobian.

The layers of :mod:`skaipo.flows._layers` are the reference. Here the same maps are laid out for
one purpose, to be evaluated with their gradient thousands of times while no parameter changes:
matrices are multiplied together once, constant log-determinants are added up once, channels lie
innermost in memory, and the backward pass is written out, so that it keeps two activations per
coupling or, inverting the flow as it goes back, none (Gomez et al., "The Reversible Residual
Network: Backpropagation Without Storing Activations", NeurIPS 2017).

Shapes being known in advance, an evaluation is a program: a list of functions without arguments on
buffers that stay where they are. A batch is an array ``h`` of shape ``(n, H, W, C)``, or ``(n, d)``
for vectors, and a list of the parts that have left at a split. Every operation has two methods.
``plan(h, parts, inverse, log_det, space, steps)`` appends the steps that map one way or the other,
and returns their output. ``plan_back(g, parts, inverse, weights, space, steps)`` appends those that
turn gradients with respect to the output into gradients with respect to the input; ``weights`` are
those with respect to the log-determinant. Steps may overwrite what they read. What the way back
needs of the way there stays in the workspace ``space``, and a coupling leaves the same there
whichever way it was mapped: that is what lets a pass back along the inverse serve as well as one
along stored activations.
"""

import copy
import math
import os
import threading
import warnings
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import nn
from torch.nn import functional as F

from skaipo._padding import padded
from skaipo.flows._layers import (
    ActNorm,
    AffineCoupling,
    InvertibleLinear,
    MaskedCoupling,
    Split,
    Squeeze,
)

__all__ = ["FrozenEvaluator", "ReferenceEvaluator", "UnknownLayerError", "kernels"]

KERNELS = ("fused", "reference")
MEMORY = ("auto", "store", "recompute")
# What "auto" lets one evaluation keep. Fixed: what is free just now differs from run to run, and
# with it would the last bits of the results.
_CPU_BYTES = 2**29
# Size of a workspace whose activations are not kept.
_CHUNK_BYTES = 3 * 2**24


class UnknownLayerError(TypeError):
    """A layer that is not one of this package's."""


def kernels():
    """Which kernels evaluate flows: "fused", or "reference" for the plain layers and autograd.

    The environment variable ``SKAIPO_KERNELS``; worker processes inherit it.
    """
    name = os.environ.get("SKAIPO_KERNELS", "fused")
    if name not in KERNELS:
        raise ValueError(
            f"The environment variable SKAIPO_KERNELS must be one of {', '.join(KERNELS)}, got "
            f"{name!r}."
        )
    return name


class ReferenceEvaluator:
    """Any flow as it is, differentiated by autograd.

    Parameters
    ----------
    flow : Flow
    """

    def __init__(self, flow):
        self.flow = flow

    def forward(self, x):
        """Latents ``z`` (n, d) and ``log |det dz/dx|`` (n,) of ``x`` (n, d)."""
        with torch.no_grad():
            return padded(self.flow, x)

    def inverse(self, z):
        """Images ``x`` (n, d) and ``log |det dx/dz|`` (n,) of ``z`` (n, d)."""
        with torch.no_grad():
            x, log_det = padded(self.flow.inverse_and_log_det, z)
        return x.flatten(1), log_det

    def linearize(self, x):
        """Evaluate at ``x`` for products with the Jacobian there.

        Parameters
        ----------
        x : torch.Tensor of shape (n, d)

        Returns
        -------
        z : torch.Tensor of shape (n, d)
        log_det : torch.Tensor of shape (n,)
        pull : callable
            ``pull((v, c), ...)`` returns, for each pair of ``v`` (n, d) or None for zeros and
            number ``c``, the gradient in ``x`` of ``(v * z).sum() + c * log_det.sum()``, of shape
            (n, d). To be called once.
        """
        return self._linearize(self.flow, x)

    def linearize_inverse(self, z):
        """The same for ``x`` as a function of ``z``."""
        return self._linearize(self.flow.inverse_and_log_det, z)

    def release(self):
        """Let go of memory that is kept for the next evaluation."""

    @staticmethod
    def _linearize(function, u):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value, log_det = padded(function, u)
            value = value.flatten(1)

        def pull(*cotangents):
            gradients = []
            for v, c in cotangents:
                outputs, weights = [], []
                if v is not None:
                    outputs, weights = [value], [v]
                # The volume of a flow may not depend on where it is: a Gaussian's does not.
                if c != 0 and log_det.requires_grad:
                    outputs, weights = [*outputs, log_det], [*weights, torch.full_like(log_det, c)]
                if not outputs:
                    gradients.append(torch.zeros_like(u))
                    continue
                retain = len(gradients) + 1 < len(cotangents)
                gradients += torch.autograd.grad(outputs, u, weights, retain_graph=retain)
            return gradients

        return value.detach(), log_det.detach(), pull


class FrozenEvaluator:
    """The multi-scale flows of this package, laid out for evaluation.

    It has the methods of :class:`ReferenceEvaluator`, and the same results to rounding. Threads can
    share one.

    Parameters
    ----------
    flow : MultiscaleFlow
        Its parameters are copied: later changes do not show.
    memory : {"auto", "store", "recompute"} or int, default="auto"
        Whether a pass back uses activations that were kept, or computes them again from the
        outputs, for about half as much time more. A number is a budget in bytes above which they
        are computed again; "auto" is one of 512 MiB, on a GPU of a quarter of its memory.

    Raises
    ------
    UnknownLayerError
        For layers that are not this package's.
    """

    def __init__(self, flow, memory="auto"):
        if memory not in MEMORY and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise ValueError(
                f"memory must be 'auto', 'store', 'recompute' or a number of bytes, got {memory!r}."
            )
        self.memory = memory
        self._event = _Layout(flow.event_shape)
        self._parts = [_Layout(shape) for shape in flow._latent_shapes()]
        self._loc, self._scale = float(flow.loc), float(flow.scale)
        self._operations = list(_operations(flow))
        self._log_det = sum(op.log_det for op in self._operations)
        self._log_det -= flow.n_features * math.log(self._scale)
        self._like = flow.loc.detach().clone()
        self._item = self._like.element_size()
        self._bytes_per_row = self._item * sum(op.kept_per_row for op in self._operations)
        # How far an input may be from its own recomputation, in standard deviations.
        self._drift = 1e-4 if self._like.dtype == torch.float32 else 1e-9
        # A product with a single row is another routine's, with another order of summation.
        # Otherwise a row's results were the same bits in every batch, on the processors tried.
        self._min_rows = 2 if math.prod(self._parts[-1].outside[1:]) < 4 else 1
        self._idle = {True: [], False: []}

    def forward(self, x):
        """Latents ``z`` (n, d) and ``log |det dz/dx|`` (n,) of ``x`` (n, d)."""
        return self._map_in_chunks(x, False)

    def inverse(self, z):
        """Images ``x`` (n, d) and ``log |det dx/dz|`` (n,) of ``z`` (n, d)."""
        return self._map_in_chunks(z, True)

    def linearize(self, x):
        """See :meth:`ReferenceEvaluator.linearize`."""
        return self._linearize(x, False)

    def linearize_inverse(self, z):
        """See :meth:`ReferenceEvaluator.linearize_inverse`."""
        return self._linearize(z, True)

    def release(self):
        """Let go of memory that is kept for the next evaluation."""
        for spaces in self._idle.values():
            spaces.clear()

    # Workspaces that nobody uses just now; a list's pop and append are atomic.

    def _borrow(self, keeps):
        try:
            return self._idle[keeps].pop()
        except IndexError:
            return _Workspace(self._like, keeps, self._min_rows)

    def _give_back(self, space):
        self._idle[space.keeps].append(space)

    @contextmanager
    def _borrowed(self):
        space = self._borrow(False)
        yield space
        self._give_back(space)

    @cached_property
    def _scratch_per_row(self):
        """Bytes of a workspace that keeps nothing."""
        # Planned on a device without memory, only to add up the sizes of the buffers.
        space = _Workspace(self._like.to("meta"), keeps=False)
        space.resize(8)
        self._plan_pull(space, False, 1, True)
        numbers = sum(buffer.numel() for buffer in space._storage.values()) // 8
        return self._item * max(numbers, *(op.kept_per_row for op in self._operations))

    @cached_property
    def _chunk(self):
        """Rows for which a workspace that keeps nothing stays small and in the caches."""
        rows = max(8, _CHUNK_BYTES // self._scratch_per_row // 8 * 8)
        # On a GPU there is room, few large steps are faster than many small ones, and workspaces
        # have a power of two of rows.
        return 1 << (16 * rows).bit_length() - 1 if self._like.is_cuda else rows

    def _map_in_chunks(self, u, inverse):
        with self._borrowed() as space:
            parts = [self._map(rows, inverse, space) for rows in u.split(self._chunk)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _stores(self, u):
        if self.memory in ("store", "recompute"):
            return self.memory == "store"
        budget = self.memory
        if budget == "auto":
            budget = _CPU_BYTES
            if u.is_cuda:
                budget = torch.cuda.get_device_properties(u.device).total_memory // 4
        return len(u) * (self._bytes_per_row + self._scratch_per_row) <= budget

    def _linearize(self, u, inverse):
        u = u.detach()
        if not self._stores(u):
            u = u.clone()  # it is needed again
            value, log_det = self._map_in_chunks(u, inverse)
            return value, log_det, partial(self._pull_along_inverse, u, value, inverse)
        # Chunks as well, but larger ones: each has a workspace of its own until its way back.
        chunks = u.split(2 * self._chunk)
        spaces = [self._borrow(True) for _ in chunks]
        pairs = zip(chunks, spaces, strict=True)
        maps = [self._map(chunk, inverse, space) for chunk, space in pairs]
        values, log_dets = zip(*maps, strict=True)

        sizes = [len(value) for value in values]
        value = torch.cat(values)

        def pull(*cotangents):
            self._check(cotangents, value)
            mine, spaces[:] = spaces[:], []
            if not mine:
                raise RuntimeError("pull was called before: linearize again.")
            gradients, start = [], 0
            for space, size in zip(mine, sizes, strict=True):
                rows = slice(start, start := start + size)
                chosen = [(None if v is None else v[rows], c) for v, c in cotangents]
                gradients.append(self._pull(chosen, inverse, space, size))
                self._give_back(space)
            return [torch.cat(parts) for parts in zip(*gradients, strict=True)]

        return value, torch.cat(log_dets), pull

    @staticmethod
    def _check(cotangents, value):
        for v, _ in cotangents:
            if v is not None and v.shape != value.shape:
                raise ValueError(
                    f"A cotangent must have the shape of the value, {tuple(value.shape)}, got "
                    f"{tuple(v.shape)}."
                )

    def _pull_along_inverse(self, u, value, inverse, *cotangents):
        """Gradients without stored activations."""
        self._check(cotangents, value)
        with self._borrowed() as space:
            parts = []
            for start in range(0, len(u), self._chunk):
                rows = slice(start, start + self._chunk)
                chosen = [(None if v is None else v[rows], c) for v, c in cotangents]
                some = value[rows]
                parts.append(self._pull(chosen, inverse, space, len(some), some))
        *gradients, back = (torch.cat(part) for part in zip(*parts, strict=True))
        # Rows that the inverse did not lead back to where they came from, and that could have
        # been: their activations are stored after all, a few rows at a time.
        u = u.reshape(len(u), -1)
        near = (back - u).abs().amax(1) <= self._drift * (1.0 if inverse else self._scale)
        astray = ~near & u.isfinite().all(1) & value.isfinite().all(1)
        for rows in astray.nonzero()[:, 0].split(16) if astray.any() else ():
            space = self._borrow(True)
            self._map(u[rows], inverse, space)
            chosen = [(None if v is None else v[rows], c) for v, c in cotangents]
            parts = self._pull(chosen, inverse, space, len(rows))
            for whole, part in zip(gradients, parts, strict=True):
                whole[rows] = part
            self._give_back(space)
        return gradients

    # Programs, and how batches get in and out of them.

    @torch.no_grad()
    def _map(self, u, inverse, space):
        n = space.resize(len(u))
        ends, outputs, steps, log_dets, signs = space.program(
            ("map", inverse), self._plan_map, inverse
        )
        self._load(u, ends, latent=inverse)
        steps.run()
        # Row by row, not as a product with a matrix, whose sums depend on the number of rows.
        log_det = (log_dets * signs).sum(1)[:n]
        log_det += -self._log_det if inverse else self._log_det
        return self._unload(outputs, n, latent=not inverse), log_det

    def _plan_map(self, space, inverse):
        ends = self._ends(space, "h", space.n, latent=inverse)
        couplings = sum(op.bound is not None for op in self._operations)
        log_dets, signs, steps = (
            space.buffer("log-dets", space.n, couplings),
            [],
            _Steps(space.like),
        )
        h, parts = ends[-1], list(ends[:-1])
        for op in reversed(self._operations) if inverse else self._operations:
            total = None
            if op.bound is not None:
                total = log_dets[:, len(signs)]
                signs.append(op.bound if inverse == op.flip else -op.bound)
            h = op.plan(h, parts, inverse, total, space, steps)
        return ends, [*parts, h], steps, log_dets, self._like.new_tensor(signs)

    @torch.no_grad()
    def _pull(self, cotangents, inverse, space, n, value=None):
        """Gradients per cotangent; given ``value``, along the inverse from there, and to where.

        Several cotangents go back as one batch: what an operation keeps serves them all.
        """
        space.resize(n)
        ends, g_ends, weights, outputs, g_outputs, steps = space.program(
            ("pull", inverse, len(cotangents), value is not None),
            self._plan_pull,
            inverse,
            len(cotangents),
            value is not None,
        )
        for i, (v, c) in enumerate(cotangents):
            rows = slice(i * space.n, (i + 1) * space.n)
            weights[rows] = c
            if v is None:
                for end in g_ends:
                    end[rows] = 0.0
                continue
            self._load(v, [end[rows] for end in g_ends], latent=not inverse, gradient=True)
        if value is not None:
            self._load(value, ends, latent=not inverse)
        steps.run()
        results = [
            self._unload([g[i : i + space.n] for g in g_outputs], n, latent=inverse, gradient=True)
            for i in range(0, len(weights), space.n)
        ]
        if value is not None:
            results.append(self._unload(outputs, n, latent=inverse))
        return results

    def _plan_pull(self, space, inverse, times, along_inverse):
        rows = times * space.n
        g_ends = self._ends(space, "g", rows, latent=not inverse)
        weights = space.buffer("weights", rows)
        g, g_parts, steps = g_ends[-1], list(g_ends[:-1]), _Steps(space.like)
        ends = h = None
        parts = []
        if along_inverse:
            ends = self._ends(space, "h", space.n, latent=not inverse)
            h, parts = ends[-1], list(ends[:-1])
        for op in self._operations if inverse else reversed(self._operations):
            if along_inverse:
                h = op.plan(h, parts, not inverse, None, space, steps)
            g = op.plan_back(g, g_parts, inverse, weights, space, steps)
        return ends, g_ends, weights, [*parts, h], [*g_parts, g], steps

    def _layouts(self, latent):
        return self._parts if latent else [self._event]

    def _ends(self, space, role, rows, latent):
        """Buffers for the rows that come in."""
        return [
            space.buffer((role, "in", i), rows, *layout.inside)
            for i, layout in enumerate(self._layouts(latent))
        ]

    def _load(self, u, ends, latent, gradient=False):
        layouts, n = self._layouts(latent), len(u)
        pieces = u.reshape(n, -1).split([layout.size for layout in layouts], 1)
        for layout, piece, end in zip(layouts, pieces, ends, strict=True):
            end[:n] = layout.view_inside(piece)
            if n < len(end):
                end[n:] = end[n - 1]
            if not latent and gradient:
                end.mul_(self._scale)
            elif not latent:
                end.sub_(self._loc).div_(self._scale)

    def _unload(self, outputs, n, latent, gradient=False):
        layouts = self._layouts(latent)
        pieces = [
            layout.view_outside(output[:n]).reshape(n, -1)
            for layout, output in zip(layouts, outputs, strict=True)
        ]
        u = torch.cat(pieces, dim=1)
        if latent:
            return u
        return u.div_(self._scale) if gradient else u.mul_(self._scale).add_(self._loc)


class _Layout:
    """Rows as they are outside, channels outermost, and inside, channels innermost."""

    def __init__(self, shape):
        self.outside = tuple(shape)
        self.inside = (*self.outside[1:], self.outside[0])
        self.size = math.prod(shape)

    def view_inside(self, rows):
        rows = rows.reshape(-1, *self.outside)
        return rows.movedim(1, -1)

    @staticmethod
    def view_outside(h):
        return h.movedim(-1, 1)


_CAPTURING = threading.Lock()


class _Steps(list):
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


class _Workspace:
    """Buffers for one batch at a time, used again for the next, and programs on them.

    New memory is slow: mapping its pages can take longer than computing what goes into them.

    Parameters
    ----------
    like : torch.Tensor
        Of the dtype and on the device of the buffers.
    keeps : bool
        Whether every operation has buffers of its own for what it keeps, or all share the same.
    min_rows : int
        Smaller batches are filled up.
    """

    _MAX_SIZES = 32

    def __init__(self, like, keeps, min_rows=1):
        self.like = like
        self.min_rows = min_rows
        self.keeps = keeps
        self.n = 0
        self.graphs = {}  # of networks that autograd differentiates
        self._storage = {}
        self._programs = {}

    def resize(self, n):
        """Prepare for ``n`` rows, or a few more, and return ``n``."""
        self.n = max(n, self.min_rows)
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


# ------------------------------------------------------------------------------- the operations


class _Operation:
    """See the head of the module."""

    log_det = 0.0  # its constant part
    kept_per_row = 0  # numbers kept for the pass back
    bound = None  # of its log-scales, if it has any

    def plan(self, h, parts, inverse, log_det, space, steps):
        raise NotImplementedError

    def plan_back(self, g, parts, inverse, weights, space, steps):
        raise NotImplementedError


class _Permutation(_Operation):
    """Its transpose is its inverse."""

    def plan_back(self, g, parts, inverse, weights, space, steps):
        return self._plan(g, parts, not inverse, space, steps, "g")

    def plan(self, h, parts, inverse, log_det, space, steps):
        return self._plan(h, parts, inverse, space, steps, "h")


class _SpaceToDepth(_Permutation):
    """Blocks of 2 x 2 pixels become channels, in the order of ``pixel_unshuffle``."""

    def _plan(self, h, parts, inverse, space, steps, role):
        n, height, width, channels = h.shape
        if inverse:
            output = space.buffer((role, 0), n, 2 * height, 2 * width, channels // 4)
            fine, coarse = output, h
        else:
            output = space.buffer((role, 0), n, height // 2, width // 2, 4 * channels)
            fine, coarse = h, output
        n, height, width, channels = fine.shape
        fine = fine.view(n, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 5, 2, 4)
        coarse = coarse.view(n, height // 2, width // 2, channels, 2, 2)
        source, target = (coarse, fine) if inverse else (fine, coarse)
        steps.append(lambda: target.copy_(source))
        return output


class _Cut(_Permutation):
    """The channels after the first ``size`` leave."""

    def __init__(self, size):
        self.size = size

    def _plan(self, h, parts, inverse, space, steps, role):
        if inverse:
            part = parts.pop()
            width = h.shape[-1] + part.shape[-1]
            output = space.buffer((role, 0), *h.shape[:-1], width)
            steps.append(lambda: torch.cat((h, part), dim=-1, out=output))
            return output
        # The part stays where it is: no later level has buffers of this one's shape.
        parts.append(h[..., self.size :])
        kept = h[..., : self.size]
        output = space.buffer((role, 0), *kept.shape)
        steps.append(lambda: output.copy_(kept))
        return output


class _Affine(_Operation):
    """One affine map of the channels: ActNorm and 1x1 convolutions in a row, multiplied together.

    Parameters
    ----------
    layers : list of ActNorm or InvertibleLinear
    positions : int
        Pixels per channel.
    """

    def __init__(self, layers, positions):
        like = next(layers[0].parameters())
        matrix = back = torch.eye(_channels(layers[0]), dtype=torch.float64)
        bias, log_det = matrix.new_zeros(len(matrix)), 0.0
        for layer in layers:  # of rows: h @ matrix + bias
            weight, shift, log_scale = layer.affine()
            matrix, bias = matrix @ weight.T, bias @ weight.T + shift
            back = torch.linalg.inv(weight.T) @ back
            log_det += float(log_scale)
        self.log_det = positions * log_det
        self.diagonal = all(isinstance(layer, ActNorm) for layer in layers)
        back_bias = -bias @ back
        parts = [matrix, bias, back, back_bias, matrix.T, back.T]
        if self.diagonal:
            parts = [part.diagonal() if part.ndim == 2 else part for part in parts]
        parts = (part.contiguous().to(like.dtype).to(like.device) for part in parts)
        self.matrix, self.bias, self.back, self.back_bias, *self.transposes = parts

    def plan(self, h, parts, inverse, log_det, space, steps):
        matrix, bias = (self.back, self.back_bias) if inverse else (self.matrix, self.bias)
        if self.diagonal:
            steps.append(lambda: torch.addcmul(bias, h, matrix, out=h))
            return h
        output = space.other("h", h)
        flat, flat_output = h.view(-1, len(bias)), output.view(-1, len(bias))
        # Not addmm: with a place to write to, it copies the bias there first.
        steps.append(lambda: torch.mm(flat, matrix, out=flat_output).add_(bias))
        return output

    def plan_back(self, g, parts, inverse, weights, space, steps):
        matrix = self.transposes[inverse]
        if self.diagonal:
            steps.append(lambda: g.mul_(matrix))
            return g
        output = space.other("g", g)
        flat, flat_output = g.view(-1, len(matrix)), output.view(-1, len(matrix))
        steps.append(lambda: torch.mm(flat, matrix, out=flat_output))
        return output


class _Coupling(_Operation):
    """``y = x exp(s) + t`` of some channels, ``s`` and ``t`` a network's of the others.

    Parameters
    ----------
    layer : AffineCoupling or Split
    shape : tuple of int
        Height and width, or nothing for vectors.
    """

    def __init__(self, layer, shape):
        first, second = layer.sizes
        groups = slice(0, first), slice(first, None)
        if getattr(layer, "swap", False):
            groups, first, second = groups[::-1], second, first
        self.source, self.target = groups
        # A split is a coupling the other way round: what leaves is (x - t) exp(-s).
        self._init(layer, shape, first, second, flip=isinstance(layer, Split))

    def _init(self, layer, shape, n_inputs, size, flip):
        self.bound = layer.bound
        like = next(iter([*layer.parameters(), *layer.buffers(), torch.zeros(())]))
        self.net = _network(layer.net, size, layer.bound, like.new_zeros(1, n_inputs, *shape))
        self.size, self.flip = size, flip
        self.kept_per_row = math.prod(shape) * (self.net.kept_per_position + 3 * size)

    def _kept(self, space, shape):
        """What the derivative of the output by ``s`` is up to its sign, ``tanh``, and ``exp(s)``.

        The first is ``x exp(s)`` for ``y = x exp(s) + t``, and ``x`` for its inverse.
        """
        return [space.kept(self, name, *shape, self.size) for name in ("by s", "tanh", "factor")]

    def _plan_outputs(self, h, space, steps, pulled):
        """A function that gives ``s / bound`` before its tanh, and ``t``, after the steps."""
        return self.net.plan(h[..., self.source], space, steps, pulled)

    def _plan_sum(self, g, pair, sign, space, steps):
        """Add to the gradient what goes back through the network."""
        source = g[..., self.source]
        more = self.net.plan_back(pair.movedim(0, -2), source.shape, space, steps)
        steps.append(lambda: source.add_(more(), alpha=sign))

    def plan(self, h, parts, inverse, log_det, space, steps):
        divide = inverse != self.flip
        # Without a sum to add to, this is the way back along the inverse.
        pulled = space.keeps or log_det is None
        outputs = self._plan_outputs(h, space, steps, pulled)
        kept, tanh, factor = self._kept(space, h.shape[1:-1])
        target, bound = h[..., self.target], self.bound
        flat = tanh.view(len(tanh), -1)

        def step():
            raw, shift = outputs()
            torch.tanh(raw, out=tanh)
            torch.mul(tanh, bound, out=factor).exp_()
            if divide and log_det is None:
                torch.sub(target, shift, out=kept)
                torch.div(kept, factor, out=target)
            elif divide:
                torch.sub(target, shift, out=kept).div_(factor)
                target.copy_(kept)
            elif log_det is None:
                kept.copy_(target)
                torch.addcmul(shift, kept, factor, out=target)
            else:
                torch.mul(target, factor, out=kept)
                torch.add(kept, shift, out=target)
            if log_det is not None:
                torch.sum(flat, 1, out=log_det)

        steps.append(step)
        return h

    def plan_back(self, g, parts, inverse, weights, space, steps):
        divide = inverse != self.flip
        kept, tanh, factor = self._kept(space, g.shape[1:-1])
        # Each of the two in one piece: their channels are few, and rows of few numbers are slow.
        pair = space.buffer("d output", 2 * len(g), *g.shape[1:-1], self.size)
        d_raw, d_shift = pair.split(len(g))
        target = g[..., self.target]
        chunks = [
            (target[rows], d_raw[rows], weights[rows].view(-1, *(1,) * (kept.ndim - 1)))
            for rows in (slice(i, i + len(kept)) for i in range(0, len(g), len(kept)))
        ]

        def step():
            if not divide:
                d_shift.copy_(target)
            for d_target, d_log, weight in chunks:
                # For x = (y - t) exp(-s), log-determinant -s, both outputs' with the sign turned.
                torch.addcmul(weight, d_target, kept, out=d_log)
                torch.ops.aten.tanh_backward.grad_input(d_log, tanh, grad_input=d_log)
                if divide:
                    d_target.div_(factor)
                else:
                    d_target.mul_(factor)
            if divide:
                d_shift.copy_(target)

        steps.append(step)
        self._plan_sum(g, pair.view(2, *d_shift.shape), -1.0 if divide else 1.0, space, steps)
        return g


class _MaskedCoupling(_Coupling):
    """The same with a mask in place of groups of channels.

    Parameters
    ----------
    layer : MaskedCoupling
    shape : tuple of int
        Height and width, or nothing for vectors.
    channels : int
    """

    source = target = slice(None)

    def __init__(self, layer, shape, channels):
        mask = layer.mask.detach().expand(channels, *shape)
        self.mask = mask.movedim(0, -1).contiguous()
        self.rest = 1.0 - self.mask
        self._init(layer, shape, channels, channels, flip=False)

    def _plan_outputs(self, h, space, steps, pulled):
        mask, rest = self.mask, self.rest
        masked = space.buffer("masked", *h.shape)
        steps.append(lambda: torch.mul(h, mask, out=masked))
        outputs = self.net.plan(masked, space, steps, pulled)
        return lambda: [output.mul_(rest) for output in outputs()]

    def _plan_sum(self, g, pair, sign, space, steps):
        mask, rest = self.mask, self.rest
        steps.append(lambda: pair.mul_(rest))
        more = self.net.plan_back(pair.movedim(0, -2), g.shape, space, steps)
        steps.append(lambda: g.addcmul_(more(), mask, value=sign))


# --------------------------------------------------------------------------------- the networks

_RECTIFIED = object()


class _ReLUNet:
    """Convolutions or dense layers with ReLU between them.

    Parameters
    ----------
    layers : list of _Dense or _Convolution
        The layers, the last as :func:`_network` scales it.
    back : list of _Dense or _Convolution
        Their transposes, the last first.
    """

    def __init__(self, layers, back):
        self.layers = layers
        self.back = back
        self.kept_per_position = sum(layer.n_outputs for layer in layers[:-1])

    def _hidden(self, space, shape):
        return [
            space.kept(self, f"hidden {i}", *shape, layer.n_outputs)
            for i, layer in enumerate(self.layers[:-1])
        ]

    def plan(self, h, space, steps, pulled):
        """Append the steps; return a function that gives both halves of the outputs after them.

        ``pulled``: whether a pass back will follow.
        """
        shape, gate = h.shape[1:-1], None
        last, halves = self.layers[-1].plan_halves(space, space.n, *shape)
        for layer, output in zip(self.layers, [*self._hidden(space, shape), last], strict=True):
            layer.plan(h, gate, output, space, steps)
            h, gate = output, _RECTIFIED
        return lambda: halves

    def plan_back(self, g, shape, space, steps):
        """The same for the transpose; ``shape`` is that of the inputs."""
        gates = [None, *self._hidden(space, shape[1:-1])[::-1]]
        for i, (layer, gate) in enumerate(zip(self.back, gates, strict=True)):
            # Two in turn: one is read while the other is written.
            output = space.buffer(f"d hidden {i % 2}", *shape[:-1], layer.n_outputs)
            layer.plan(g, gate, output, space, steps)
            g = output
        return lambda: g


class _AutogradNet:
    """Any other network, differentiated by autograd.

    Parameters
    ----------
    net : torch.nn.Module
    size : int
        How many outputs are raw log-scales.
    bound : float
    event : torch.Tensor
        One input, of zeros.
    """

    def __init__(self, net, size, bound, event):
        self.net = copy.deepcopy(net)
        self.size = size
        self.bound = bound
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.net(event.requires_grad_())
        self.kept_per_position = sum(saved) // max(1, math.prod(event.shape[2:]))

    def plan(self, h, space, steps, pulled):
        """See :meth:`_ReLUNet.plan`."""
        steps.capturable = False
        graphs = space.graphs

        def outputs():
            # A copy: what comes in is overwritten before the pass back.
            inputs = h.detach().clone().requires_grad_(pulled)
            with torch.set_grad_enabled(pulled):
                output = self.net(inputs.movedim(-1, 1)).movedim(1, -1)
            if pulled:
                graphs[id(self)] = inputs, output
            output = output.detach().clone(memory_format=torch.contiguous_format)
            output[..., : self.size] /= self.bound
            return output.split(self.size, dim=-1)

        return outputs

    def plan_back(self, g, shape, space, steps):
        """See :meth:`_ReLUNet.plan_back`."""
        steps.capturable = False
        graphs = space.graphs

        def gradients():
            inputs, output = graphs.pop(id(self))
            if not output.requires_grad:  # a constant
                return g.new_zeros(shape)
            parts = g.flatten(-2).split(len(inputs))
            options = dict(allow_unused=True, materialize_grads=True)
            return torch.cat(
                [
                    torch.autograd.grad(
                        output, inputs, part, retain_graph=i + 1 < len(parts), **options
                    )[0]
                    for i, part in enumerate(parts)
                ]
            )

        return gradients


def _plan_gate(h, gate, output, steps):
    """Write to ``output`` ``h``, or ``h`` rectified, or ``h`` where ``gate`` is positive.

    An ``h`` without gate may have its channels in two halves, in an axis before the last.
    """
    if gate is _RECTIFIED:
        steps.append(lambda: torch.clamp_min(h, 0, out=output))
    elif gate is not None:
        threshold = torch.ops.aten.threshold_backward.grad_input
        for i in range(0, len(h), len(gate)):
            source, target = h[i : i + len(gate)], output[i : i + len(gate)]
            steps.append(
                lambda source=source, target=target: threshold(source, gate, 0, grad_input=target)
            )
    elif output is not h:
        output = output.unflatten(-1, h.shape[output.ndim - 1 :])
        steps.append(lambda: output.copy_(h))


class _Dense:
    """A dense layer, or a 1x1 convolution.

    Parameters
    ----------
    matrix : torch.Tensor of shape (n_inputs, n_outputs)
    bias : torch.Tensor of shape (n_outputs,), or None
    """

    def __init__(self, matrix, bias):
        self.matrix = matrix.contiguous()
        self.bias = bias
        self.n_outputs = matrix.shape[1]

    def transpose(self):
        return _Dense(self.matrix.T, None)

    def plan_halves(self, space, *shape):
        """A buffer for outputs, and views of its two halves."""
        output = space.buffer("output", *shape, self.n_outputs)
        return output, output.chunk(2, dim=-1)

    def scaled(self, factors):
        """The same with its outputs multiplied."""
        return _Dense(self.matrix * factors, None if self.bias is None else self.bias * factors)

    def plan(self, h, gate, output, space, steps):
        """Append the steps from inputs ``h`` that ``gate`` lets pass to ``output``."""
        matrix, bias = self.matrix, self.bias
        inputs = h if h.is_contiguous() else space.buffer("dense", *h.shape)
        _plan_gate(h, gate, inputs, steps)
        flat, flat_output = inputs.view(-1, len(matrix)), output.view(-1, self.n_outputs)
        steps.append(lambda: torch.mm(flat, matrix, out=flat_output))
        if bias is not None:
            steps.append(lambda: flat_output.add_(bias))


class _Convolution:
    """A convolution with an odd kernel and zero padding that keeps the image's size.

    On CPUs 3x3 kernels are matrix products: of the neighbourhoods of all pixels, or, where few
    channels come out, of each pixel's neighbours in its row with the kernel's three rows at once,
    which are then added up shifted. Both read an image's padded copy as overlapping windows.

    Parameters
    ----------
    weight : torch.Tensor of shape (n_outputs, n_inputs, *kernel)
    bias : torch.Tensor of shape (n_outputs,), or None
    """

    def __init__(self, weight, bias):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias
        self.n_outputs, self.n_inputs, *self.kernel = weight.shape
        self.by_rows = 2 * self.n_inputs > 3 * self.n_outputs
        if self.kernel != [3, 3] or weight.is_cuda:
            self.matrix = None
        elif self.by_rows:
            self.matrix = weight.permute(3, 1, 2, 0).reshape(3 * self.n_inputs, -1)
        else:
            self.matrix = weight.permute(2, 3, 1, 0).reshape(-1, self.n_outputs)
            if bias is not None:  # of a column of ones
                self.matrix = torch.cat((self.matrix, bias[None]))

    def transpose(self):
        # The kernel turned round.
        return _Convolution(self.weight.transpose(0, 1).flip(2, 3), None)

    def scaled(self, factors):
        """The same with its outputs multiplied."""
        bias = None if self.bias is None else self.bias * factors
        return _Convolution(self.weight * factors[:, None, None, None], bias)

    def plan_halves(self, space, n, *shape):
        """See :meth:`_Dense.plan_halves`."""
        if self.matrix is None or not self.by_rows:
            output = space.buffer("output", n, *shape, self.n_outputs)
            return output, output.chunk(2, dim=-1)
        # Sums can go anywhere: each half in one piece.
        half = self.n_outputs // 2
        pair = space.buffer("outputs", 2 * n, *shape, half).view(2, n, *shape, half)
        return pair.movedim(0, -2), pair.unbind()

    def plan(self, h, gate, output, space, steps):
        """See :meth:`_Dense.plan`."""
        if self.matrix is None:
            self._plan_any(h, gate, output, space, steps)
        elif self.by_rows:
            self._plan_rows(h, gate, output, space, steps)
        else:
            self._plan_windows(h, gate, output, space, steps)

    def _plan_any(self, h, gate, output, space, steps):
        inputs = h if h.is_contiguous() else space.buffer("dense", *h.shape)
        _plan_gate(h, gate, inputs, steps)
        image = inputs.flatten(3).permute(0, 3, 1, 2)
        padding = [k // 2 for k in self.kernel]
        flat = output.flatten(3).permute(0, 3, 1, 2)
        weight, bias = self.weight, self.bias
        if not (weight.is_cuda and torch.backends.cudnn.is_available()):
            steps.append(lambda: flat.copy_(F.conv2d(image, weight, bias, padding=padding)))
            return
        # The last argument: without TF32, which would round every factor to 11 bits, and which
        # cuDNN, unlike matrix products, takes by default.
        options = padding, [1, 1], [1, 1], 1, False, False, False
        steps.append(lambda: flat.copy_(torch.cudnn_convolution(image, weight, *options)))
        if bias is not None:
            steps.append(lambda: output.add_(bias))

    def _plan_windows(self, h, gate, output, space, steps):
        n, height, width, channels = *h.shape[:3], self.n_inputs
        padded = space.buffer("padded", n, height + 2, width + 2, channels)
        _plan_gate(h, gate, padded[:, 1:-1, 1:-1], steps)
        image, row, pixel, _ = padded.stride()
        # Three neighbours in a row lie next to each other.
        windows = padded.as_strided(
            (n, height, width, 3, 3 * channels), (image, row, pixel, row, 1)
        )
        matrix, ones = self.matrix, int(self.bias is not None)
        columns = space.buffer(("columns", ones), n, height, width, 9 * channels + ones)
        target = columns[..., : 9 * channels].unflatten(-1, (3, 3 * channels))
        if ones:
            columns[..., -1] = 1.0
        flat, flat_output = columns.view(-1, len(matrix)), output.view(-1, self.n_outputs)
        steps.append(lambda: target.copy_(windows))
        steps.append(lambda: torch.mm(flat, matrix, out=flat_output))

    def _plan_rows(self, h, gate, output, space, steps):
        n, height, width, channels = *h.shape[:3], self.n_inputs
        padded = space.buffer("padded in rows", n, height, width + 2, channels)
        _plan_gate(h, gate, padded[:, :, 1:-1], steps)
        image, row, pixel, _ = padded.stride()
        windows = padded.as_strided((n, height, width, 3 * channels), (image, row, pixel, 1))
        columns = space.buffer("columns in rows", n, height, width, 3 * channels)
        products = space.buffer("products", n, height, width, 3 * self.n_outputs)
        matrix = self.matrix
        flat, flat_products = columns.view(-1, len(matrix)), products.view(-1, matrix.shape[1])
        # The outputs may have their channels in two halves.
        channels = output.shape[3:]
        above, middle, below = products.unflatten(-1, (3, *channels)).unbind(3)
        above, below = above[:, :-1], below[:, 1:]
        lower, upper = output[:, 1:], output[:, :-1]
        bias = None if self.bias is None else self.bias.view(channels)

        def step():
            columns.copy_(windows)
            torch.mm(flat, matrix, out=flat_products)
            if bias is None:
                output.copy_(middle)
            else:
                torch.add(middle, bias, out=output)
            lower.add_(above)
            upper.add_(below)

        steps.append(step)


# ------------------------------------------------------------------------------- reading a flow


def _channels(layer):
    return len(layer.bias if isinstance(layer, ActNorm) else layer.lower)


def _operations(flow):
    """The operations of a flow, in the direction from data to latents."""
    shape = flow.event_shape
    for level, layers in enumerate(flow.levels):
        linear = []
        for layer in (*layers, None):
            if type(layer) in (ActNorm, InvertibleLinear):
                linear.append(layer)
                continue
            if linear:
                yield _Affine(linear, math.prod(shape[1:]))
                linear = []
            if type(layer) is Squeeze:
                yield _SpaceToDepth()
                shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
            elif type(layer) is AffineCoupling:
                yield _Coupling(layer, shape[1:])
            elif type(layer) is MaskedCoupling:
                yield _MaskedCoupling(layer, shape[1:], shape[0])
            elif layer is not None:
                raise UnknownLayerError(f"No kernel for a {type(layer).__name__}.")
        if level < len(flow.splits):
            split = flow.splits[level]
            if type(split) is not Split:
                raise UnknownLayerError(f"No kernel for a {type(split).__name__}.")
            yield _Coupling(split, shape[1:])
            yield _Cut(split.sizes[0])
            shape = (split.sizes[0], *shape[1:])


def _network(net, size, bound, event):
    """The network with its first ``size`` outputs divided by ``bound``; see :class:`_Coupling`.

    Dense layers and convolutions with ReLU between them, and anything else as it is.
    """
    modules = list(net) if type(net) is nn.Sequential else [net]
    idle = (nn.Dropout, nn.Dropout2d, nn.Identity)  # in evaluation
    # What a hook or another forward does cannot be read from the modules.
    plain = not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in net.modules()
    )
    modules = [module for module in modules if type(module) not in idle]
    layers = [_layer(module, image=event.ndim == 4) for module in modules[::2]]
    between = all(type(module) is nn.ReLU for module in modules[1::2])
    if not plain or None in layers or not between or len(modules) % 2 == 0:
        return _AutogradNet(net, size, bound, event)
    # The transposes are those of the network itself: the derivative of bound * tanh(raw / bound)
    # is 1 - tanh^2, the bound cancels.
    back = [layer.transpose() for layer in reversed(layers)]
    like = modules[-1].weight
    factors = torch.cat((like.new_full((size,), 1 / bound), like.new_ones(len(like) - size)))
    return _ReLUNet([*layers[:-1], layers[-1].scaled(factors)], back)


def _layer(module, image):
    """The kernel of a layer, or None."""
    if type(module) is not (nn.Conv2d if image else nn.Linear):
        return None
    weight = module.weight.detach().clone()
    bias = None if module.bias is None else module.bias.detach().clone()
    if not image:
        return _Dense(weight.T, bias)
    kernel, padding = module.kernel_size, module.padding
    same = all(k % 2 == 1 for k in kernel) and padding in (tuple(k // 2 for k in kernel), "same")
    plain = (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    if not (same and plain and module.padding_mode == "zeros"):
        return None
    if kernel == (1, 1):
        return _Dense(weight[:, :, 0, 0].T, bias)
    return _Convolution(weight, bias)
