"""Kernels for training and shipping tiny language models."""
