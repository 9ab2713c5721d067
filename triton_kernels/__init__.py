"""Triton twins of the CUDA kernels, installed as ``chatterbox_fast.triton_kernels``.

One file per op, named as the op: ``triton_kernels/OP.py``.
"""
