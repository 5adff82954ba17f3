"""Kernels as functions of this process: compiled in memory once, run on torch's own threads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from llvmlite import binding as llvm

from lorakeet.quant.kernel_code import POINTERS, SIZES, KernelForm, build_kernel

OPENMP_NAMES = ("libgomp*", "libomp*", "libiomp*")
MIN_WORK_OF_A_THREAD = 2**17  # multiplications; below, waking it costs more than it saves

_lock = threading.Lock()
_Numbers = ctypes.c_int64 * (len(POINTERS) + len(SIZES))


class Kernel:
    """A compiled kernel.  Threads may call it at the same time; the GIL is free while it runs."""

    def __init__(self, form: KernelForm) -> None:
        self.openmp = load_openmp()
        module = build_kernel(form, is_threaded=self.openmp is not None)
        self.engine = _compile(str(module))  # owns the code, so it lives as long as this
        self.address = self.engine.get_function_address("kernel")
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, numbers: Sequence[int], work: int) -> None:
        """Runs it.

        Args:
            numbers: addresses in the order of ``POINTERS``, 0 where the form reads none, then
                sizes in the order of ``SIZES``.
            work: multiplications in all; decides how many threads share it.
        """
        argument = _Numbers(*numbers)
        threads = min(torch.get_num_threads(), work // MIN_WORK_OF_A_THREAD)
        if threads > 1 and self.openmp is not None:
            self.openmp(self.address, ctypes.addressof(argument), threads, 0)
        else:
            self.run(ctypes.addressof(argument))


@cache
def load_kernel(
    num_rows: int, is_int8: bool = False, has_double_scales: bool = False, streams: bool = False
) -> Kernel:
    """The kernel of a form, compiled at the first call.

    Args: as of :class:`KernelForm`.

    Cost: 0.05 to 0.1 s the first time.
    """
    return Kernel(
        KernelForm(
            num_rows=num_rows,
            is_int8=is_int8,
            has_double_scales=has_double_scales,
            streams=streams,
        )
    )


@cache
def load_openmp() -> ctypes._CFuncPtr | None:
    """``GOMP_parallel`` of the OpenMP that torch runs on; None where torch brings none.

    The same threads as torch's: a second pool would fight the first for the cores.
    """
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        for path in (path for name in OPENMP_NAMES for path in sorted(folder.glob(name))):
            library = ctypes.CDLL(str(path))
            names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            if not all(hasattr(library, name) for name in names):
                continue
            for name in names[1:]:
                place = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                llvm.add_symbol(name, place)
            run = library.GOMP_parallel
            run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            run.restype = None
            return run
    return None


def _compile(text: str) -> llvm.ExecutionEngine:
    """Instructions of this processor for a module in LLVM's language."""
    with _lock:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(text)
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),
            opt=3,
            jit=True,
        )
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        return engine
