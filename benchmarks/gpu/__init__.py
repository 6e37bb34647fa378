"""The parts of `benchmarks.gpu_check`: what is checked and measured on a GPU, a part a module."""
