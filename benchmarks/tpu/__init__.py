"""The TPU's compiler where there is no TPU: what `benchmarks.tpu_static` and
`benchmarks.tune_tpu` are made of.
"""
