"""The operations that cost the time, each with a plain form that defines it.

Every operation takes ``impl``: ``"reference"`` is the equation written out, ``"auto"`` chooses the
best form that the machine has, and any other name asks for that form and raises where it cannot be
had.
"""

from spafit.kernels import compiled
from spafit.kernels.add_norm import dropout_add_norm
from spafit.kernels.attention import attention
from spafit.kernels.bias_gelu import bias_gelu
from spafit.kernels.dropout import dropout
from spafit.kernels.lora_linear import lora_linear, stacked_linear
from spafit.kernels.packed_attention import packed_attention
from spafit.kernels.parts import Part

__all__ = [
    "Part",
    "attention",
    "bias_gelu",
    "compiled",
    "dropout",
    "dropout_add_norm",
    "lora_linear",
    "packed_attention",
    "stacked_linear",
]
