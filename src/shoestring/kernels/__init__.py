"""Triton kernels. Nothing here is imported before a GPU is at work; what each must compute stands in plain torch beside
its caller."""
