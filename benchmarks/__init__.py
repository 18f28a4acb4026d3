"""Benchmarks and the reference model that they measure; every entry here but `shapes` is a `python -m benchmarks.NAME`.

convert: the converter's rate and memory, and what becomes of it on full disks and when it is killed.
cpu_moe: one layer on a CPU beside vLLM's own kernels; decode_profile: where the time of a decode step goes.
demo: what `make demo` runs.
gpu_moe: one layer on a GPU beside vLLM's own kernels; gpu_session: everything about a card in a few minutes.
gpu_static: the Triton engine's machine code without a GPU; triton_versions: the same with other versions of Triton.
quality: the loss of packed models beside other ways to shrink one.
reference_model: a real mixture-of-experts model to measure.
"""
