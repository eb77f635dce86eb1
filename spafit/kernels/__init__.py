"""The operations that cost the time, each with a plain form that defines it.

Every operation takes ``impl``: ``"reference"`` is the equation written out, ``"auto"`` chooses the
best form that the machine has, and any other name asks for that form and raises where it cannot be
had.
"""

from spafit.kernels.attention import attention
from spafit.kernels.lora_linear import lora_linear

__all__ = ["attention", "lora_linear"]
