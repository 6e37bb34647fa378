"""Kernels for Hopper GPUs (compute capability 9.0) through Pallas's Mosaic GPU, JAX 0.11 on."""
