"""The evaluation of a frozen flow: values, log-determinants and products with the Jacobian.

The layers of :mod:`skaipo.flows._layers` are the reference. Here the same maps are laid out for
one purpose, to be evaluated with their gradient thousands of times while no parameter changes:
matrices are multiplied together once, constant log-determinants are added up once, channels lie
innermost in memory, and the backward pass is written out, so that it keeps two activations per
coupling or, inverting the flow as it goes back, none (Gomez et al., "The Reversible Residual
Network: Backpropagation Without Storing Activations", NeurIPS 2017).

The evaluators are in ``_evaluator``, the operations that a flow consists of and how they are read
from its layers in ``_operations``, the networks inside of couplings in ``_networks``, and the
memory that all of them work in, with the programs that are run on it, in ``_workspace``.
"""

from skaipo.flows._frozen._evaluator import FrozenEvaluator, ReferenceEvaluator, kernels
from skaipo.flows._frozen._operations import UnknownLayerError

__all__ = ["FrozenEvaluator", "ReferenceEvaluator", "UnknownLayerError", "kernels"]
