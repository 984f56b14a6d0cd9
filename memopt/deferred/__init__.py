"""Values that are not made until something needs them: rewriting a model while its own code runs.

Tracing a whole model fails where its Python branches on values or types; following the values does not. A *deferred
value* stands for the result of a call, travels through the model's code and its modules like the tensor it stands for,
and knows the operations on it that give another deferred value, or the final result by a cheaper way. For any other
operation the tensor is made, by the very calls it stands for, so every model keeps working and loses nothing.

The chain that is known here is attention over tokens, some of which may come from a rank-one product::

    Product  a (x) b              from einsum, broadcasting, bmm              (begun by `Products`)
    Line     u (x) c + b          a linear map of it, then cut into heads, scaled, moved
    Joined   lines and tensors    as tokens one after another
    Logits   queries times keys   the keys may be plain tensors               (begun by `Attentions`)
    Weights  their softmax        times values: one fused attention

A pass says in which modules a chain may begin, by a function mode that is active there. The rest follows from
``__torch_function__`` alone: also where a module's code runs again in backward, and under torch.compile and
torch.export, which see only the operations that are left.
"""

from memopt.deferred.attention import Attentions, Logits, Weights
from memopt.deferred.following import entered, followed, watched
from memopt.deferred.product import Joined, Line, Product, Products
from memopt.deferred.standin import StandIn, made
from memopt.deferred.value import HOOKING, Deferred, counting

__all__ = [
    "HOOKING",
    "Attentions",
    "Deferred",
    "Joined",
    "Line",
    "Logits",
    "Product",
    "Products",
    "StandIn",
    "Weights",
    "counting",
    "entered",
    "followed",
    "made",
    "watched",
]
