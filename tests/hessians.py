"""Hessians for tests of what works on them."""

import torch


def hessian_of(columns: int, seed: int, damping: float = 0.01) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    return gram + damping * gram.diagonal().mean() * torch.eye(columns)
