"""Kernels for training and shipping tiny language models."""

from pgolf_kernels.residual import combine, combine_norm

__all__ = [
    "combine",
    "combine_norm",
]
