"""The operations that take most of the time: fused forms, and the plain form that defines each.

Every operation has a parameter ``impl``: ``"reference"`` is the equation written out
(``reference.py``), ``"auto"`` chooses the fastest form that the machine has, and any other name
asks for that form and raises an error if it is not available.
"""

from spafit.kernels import compiled
from spafit.kernels.add_norm import dropout_add_norm
from spafit.kernels.attention import attention
from spafit.kernels.dropout import dropout
from spafit.kernels.lora_linear import lora_linear, stacked_linear
from spafit.kernels.packed_attention import packed_attention
from spafit.kernels.parts import Part

__all__ = [
    "Part",
    "attention",
    "compiled",
    "dropout",
    "dropout_add_norm",
    "lora_linear",
    "packed_attention",
    "stacked_linear",
]
