"""Forms for a GPU: Triton kernels, CUDA graphs, and the choice among forms by measurement."""
