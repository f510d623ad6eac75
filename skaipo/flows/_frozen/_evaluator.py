"""Evaluators of flows: values, log-determinants and products with the Jacobian."""

import math
import os
from contextlib import contextmanager
from functools import cached_property, partial

import torch

from skaipo._padding import padded
from skaipo.flows._frozen._native import library
from skaipo.flows._frozen._operations import operations_of
from skaipo.flows._frozen._workspace import Steps, Workspace

__all__ = ["FrozenEvaluator", "ReferenceEvaluator", "kernels"]

KERNELS = ("native", "fused", "reference")
MEMORY = ("auto", "store", "recompute")
# What "auto" lets one evaluation keep. Fixed: what is free just now differs from run to run, and
# with it would the last bits of the results.
_CPU_BYTES = 2**29
# Size of a workspace whose activations are not kept.
_CHUNK_BYTES = 3 * 2**24


def kernels():
    """Which kernels evaluate the flows of this package.

    The environment variable ``SKAIPO_KERNELS`` chooses, and worker processes inherit it.

    Returns
    -------
    name : {"native", "fused", "reference"}
        "native" for couplings of images that were compiled at installation, "fused" for torch's
        operations in their place, "reference" for the plain layers and autograd. If the variable
        is not set, "native" where something was compiled, else "fused".

    Raises
    ------
    ValueError
        If the variable is none of these, or "native" and nothing was compiled.
    """
    name = os.environ.get("SKAIPO_KERNELS")
    if name is None:
        return "fused" if library() is None else "native"
    if name not in KERNELS:
        raise ValueError(
            f"The environment variable SKAIPO_KERNELS must be one of {', '.join(KERNELS)}, got "
            f"{name!r}."
        )
    if name == "native" and library() is None:
        raise ValueError(
            "SKAIPO_KERNELS is native, but this installation has no compiled kernels: install "
            "skaipo again on Linux where there is a C++ compiler (g++), or unset the variable."
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
    native : bool, optional
        Whether to use compiled kernels where there are any; by default as :func:`kernels` says.

    Raises
    ------
    UnknownLayerError
        For layers that are not this package's.
    """

    def __init__(self, flow, memory="auto", native=None):
        if native is None:
            native = kernels() == "native"
        if memory not in MEMORY and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise ValueError(
                f"memory must be 'auto', 'store', 'recompute' or a number of bytes, got {memory!r}."
            )
        self.memory = memory
        self._event = _Layout(flow.event_shape)
        self._parts = [_Layout(shape) for shape in flow._latent_shapes()]
        self._loc, self._scale = float(flow.loc), float(flow.scale)
        self._operations = list(operations_of(flow, native))
        self._log_det = sum(op.log_det for op in self._operations)
        self._log_det -= flow.n_features * math.log(self._scale)
        self._like = flow.loc.detach().clone()
        self._item = self._like.element_size()
        self._bytes_per_row = self._item * sum(op.kept_per_row for op in self._operations)
        # How far an input may be from its own recomputation, in standard deviations.
        self._drift = 1e-4 if self._like.dtype == torch.float32 else 1e-9
        # With four pixels and more on the coarsest level a row's results were the same bits in
        # every batch, on the processors tried. Products of fewer rows are other routines', with
        # other orders of summation; and where a gradient is zero but for rounding, Adam makes as
        # large a step of it as of any other.
        self._pads = math.prod(self._parts[-1].outside[1:]) < 4
        self._idle = {True: [], False: []}

    def __getstate__(self):
        # The programs of a workspace work in its own memory.
        return {**vars(self), "_idle": {True: [], False: []}}

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
            return Workspace(self._like, keeps, self._pads)

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
        space = Workspace(self._like.to("meta"), keeps=False)
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

    def _kept(self, u):
        """Number of rows whose activations are kept for the way back."""
        if self.memory in ("store", "recompute"):
            return len(u) if self.memory == "store" else 0
        budget = self.memory
        if budget == "auto":
            budget = _CPU_BYTES
            if u.is_cuda:
                budget = torch.cuda.get_device_properties(u.device).total_memory // 4
        return min(len(u), budget // (self._bytes_per_row + self._scratch_per_row))

    def _linearize(self, u, inverse):
        u = u.detach()
        kept = self._kept(u)
        if kept == 0 and len(u):
            u = u.clone()  # it is needed again
            value, log_det = self._map_in_chunks(u, inverse)
            return value, log_det, partial(self._pull_along_inverse, u, value, inverse)
        # Chunks as well, but larger ones: each has a workspace of its own until its way back. Rows
        # for which there is no room are mapped once more by then: a row's gradient must not depend
        # on how many rows there are, as that along the inverse would, by rounding.
        u, rest = u[:kept], u[kept:].clone()
        chunks = u.split(2 * self._chunk)
        spaces = [self._borrow(True) for _ in chunks]
        pairs = zip(chunks, spaces, strict=True)
        maps = [self._map(chunk, inverse, space) for chunk, space in pairs]
        sizes = [len(value) for value, _ in maps]
        later = rest.split(min(kept, 2 * self._chunk)) if len(rest) else ()
        if later:
            maps.append(self._map_in_chunks(rest, inverse))
        values, log_dets = zip(*maps, strict=True)
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
            for chunk in later:
                rows = slice(start, start := start + len(chunk))
                chosen = [(None if v is None else v[rows], c) for v, c in cotangents]
                gradients.append(self._pull_anew(chunk, inverse, chosen))
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
            chosen = [(None if v is None else v[rows], c) for v, c in cotangents]
            parts = self._pull_anew(u[rows], inverse, chosen)
            for whole, part in zip(gradients, parts, strict=True):
                whole[rows] = part
        return gradients

    def _pull_anew(self, u, inverse, cotangents):
        """Gradients with activations that are computed, and kept, for them alone."""
        space = self._borrow(True)
        self._map(u, inverse, space)
        gradients = self._pull(cotangents, inverse, space, len(u))
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
            Steps(space.like),
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
        g, g_parts, steps = g_ends[-1], list(g_ends[:-1]), Steps(space.like)
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
