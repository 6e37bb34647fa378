"""The TPU compiler where there is no TPU, for `benchmarks.tpu_static` and `benchmarks.tune_tpu`."""
