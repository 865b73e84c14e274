"""Low-bit grids and the solvers that choose codes: tensors in, tensors out."""
