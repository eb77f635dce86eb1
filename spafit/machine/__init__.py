"""What the machine offers: memory, versions, random number generators, the terminal."""

PRECISIONS = ("auto", "float32", "tf32", "bf16", "fp16")
"""The precisions by name; they stand here because the command line names them without torch."""
