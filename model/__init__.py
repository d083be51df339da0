"""The thin model and training layer over `pgolf_kernels`."""
