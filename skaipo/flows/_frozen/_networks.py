"""The networks inside of couplings, planned as steps on buffers."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["network_of"]

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

    def convolutions(self):
        """Weights (n_outputs, n_inputs, height, width) and biases, there and back."""
        return [[layer.convolution() for layer in layers] for layers in (self.layers, self.back)]

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

    def convolutions(self):
        """None: see :meth:`_ReLUNet.convolutions`."""
        return [], []

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

    def convolution(self):
        """The layer as a convolution: its weight and bias."""
        return self.matrix.T[:, :, None, None], self.bias

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

    def convolution(self):
        """See :meth:`_Dense.convolution`."""
        return self.weight, self.bias

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


def network_of(net, size, bound, event):
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
