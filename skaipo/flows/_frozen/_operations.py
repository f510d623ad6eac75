"""The operations that a flow consists of, planned as steps on buffers.

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

import math

import torch

from skaipo.flows._frozen._native import native_coupling
from skaipo.flows._frozen._networks import network_of
from skaipo.flows._layers import (
    ActNorm,
    AffineCoupling,
    InvertibleLinear,
    MaskedCoupling,
    Split,
    Squeeze,
)

__all__ = ["UnknownLayerError", "operations_of"]


class UnknownLayerError(TypeError):
    """A layer that is not one of this package's."""


class _Operation:
    """Has the methods ``plan`` and ``plan_back``: see the head of the module."""

    log_det = 0.0  # its constant part
    kept_per_row = 0  # numbers kept for the pass back
    bound = None  # of its log-scales, if it has any


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
    native : bool
        Whether to use the compiled form if there is one.
    """

    mask = None

    def __init__(self, layer, shape, native):
        first, second = layer.sizes
        groups = slice(0, first), slice(first, None)
        if getattr(layer, "swap", False):
            groups, first, second = groups[::-1], second, first
        self.source, self.target = groups
        # A split is a coupling the other way round: what leaves is (x - t) exp(-s).
        self._init(layer, shape, first, second, isinstance(layer, Split), native)

    def _init(self, layer, shape, n_inputs, size, flip, native):
        self.bound = layer.bound
        like = next(iter([*layer.parameters(), *layer.buffers(), torch.zeros(())]))
        self.net = network_of(layer.net, size, layer.bound, like.new_zeros(1, n_inputs, *shape))
        self.size, self.flip = size, flip
        self.native = None
        if native:
            starts = self.source.start or 0, n_inputs, self.target.start or 0
            self.native = native_coupling(
                self.net, shape, size, float(layer.bound), *starts, self.mask
            )
        kept = self.net if self.native is None else self.native
        self.kept_per_row = math.prod(shape) * (kept.kept_per_position + 3 * size)

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
        kept, tanh, factor = self._kept(space, h.shape[1:-1])
        if self.native is not None:
            self.native.plan(h, (kept, tanh, factor), divide, log_det, pulled, space, steps)
            return h
        outputs = self._plan_outputs(h, space, steps, pulled)
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
        if self.native is not None:
            self.native.plan_back(g, (kept, tanh, factor), divide, weights, space, steps)
            return g
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
    native : bool
    """

    source = target = slice(None)

    def __init__(self, layer, shape, channels, native):
        mask = layer.mask.detach().expand(channels, *shape)
        self.mask = mask.movedim(0, -1).contiguous()
        self.rest = 1.0 - self.mask
        self._init(layer, shape, channels, channels, False, native)

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


# ------------------------------------------------------------------------------- reading a flow


def _channels(layer):
    return len(layer.bias if isinstance(layer, ActNorm) else layer.lower)


def operations_of(flow, native):
    """The operations of a flow, in the direction from data to latents.

    ``native``: whether couplings may be compiled ones.
    """
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
                yield _Coupling(layer, shape[1:], native)
            elif type(layer) is MaskedCoupling:
                yield _MaskedCoupling(layer, shape[1:], shape[0], native)
            elif layer is not None:
                raise UnknownLayerError(f"No kernel for a {type(layer).__name__}.")
        if level < len(flow.splits):
            split = flow.splits[level]
            if type(split) is not Split:
                raise UnknownLayerError(f"No kernel for a {type(split).__name__}.")
            yield _Coupling(split, shape[1:], native)
            yield _Cut(split.sizes[0])
            shape = (split.sizes[0], *shape[1:])
