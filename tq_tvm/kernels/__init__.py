"""The TensorIR: factories specialised by a `CacheSpec`, returning PrimFuncs.

``FUNCTIONS`` names every function of a library and the kernel that it belongs to.
"""

from tq_tvm import _fast_stack as _fast_stack
from tq_tvm.spec import FUNCTIONS as FUNCTIONS

__all__ = ["FUNCTIONS"]
