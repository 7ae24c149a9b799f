"""Triton kernels, imported only by the call that needs them: this package needs the package triton, hf_fwp does not."""
