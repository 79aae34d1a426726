"""Checks on a machine with a GPU: what `scripts/gpu_check.py` runs, without vLLM.

report     one JSON line per check; a check that fails does not stop the others
facts      the card, the versions, which attention `auto` takes and why
attention  every implementation against the float64 reference
rows       products, norms and activations: errors, and a row alone against it in a batch
tokens     the bundled checkpoint under many settings, CUDA against the CPU
steps      steps at LLaDA-8B's widths: time, kernels, waiting, memory, and the prediction
"""
