"""The parts of `benchmarks.gpu_check`, a part a module, and compiling without a GPU."""
