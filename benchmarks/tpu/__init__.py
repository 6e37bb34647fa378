"""The TPU's compiler where there is no TPU: what `benchmarks.tpu_static` is made of."""
