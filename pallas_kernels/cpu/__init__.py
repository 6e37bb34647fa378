"""Attention over the pool in C++, called inside jit through `jax.ffi`."""
