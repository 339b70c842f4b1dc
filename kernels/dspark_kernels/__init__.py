"""Kernels of dspark-serving, one operation a file: the torch reference beside the Triton kernel."""
