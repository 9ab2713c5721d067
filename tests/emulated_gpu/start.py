"""Puts torch's operators on the emulated GPU, then runs a module (-m NAME) or a script."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

import torch

_operators = ctypes.CDLL(f"{os.environ['EMULATED_GPU']}/operators.so")
_names = [name.encode() for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")]
_operators.emulate_operators((ctypes.c_char_p * len(_names))(*_names), len(_names))

LARGE = "skinny_linear padded_attention add_norm snake resample istft decode_attention"
"""Ops whose kernels take minutes, thread by thread, at the sizes of a model."""
_asked = os.environ.get("EMULATED_GPU_BY_CPU_OP", "")
if _by_cpu_op := (LARGE if _asked == "large" else _asked).split():
    import chatterbox_fast._C  # noqa: F401

    for _name in _by_cpu_op:
        _operators.run_by_cpu_op(_name.encode())

if __name__ == "__main__":
    del os.environ["LD_PRELOAD"]  # a process that this one starts has no GPU
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
