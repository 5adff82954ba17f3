"""Whether loops of ours can be turned into instructions of this processor."""

from __future__ import annotations

from dataclasses import dataclass

NEEDED_FEATURES = ("avx2", "fma")


@dataclass(frozen=True, kw_only=True)
class NativeCode:
    """What was found.

    Args:
        is_usable: llvmlite is here, and the processor has the instructions.
        found: for the user.
    """

    is_usable: bool
    found: str


def find_native_code() -> NativeCode:
    """Looks for llvmlite and for AVX2 with FMA; without either, the references in torch compute.

    Cost: 50 ms for the import of llvmlite, no torch.
    """
    try:
        from llvmlite import __version__
        from llvmlite import binding as llvm
    except (ImportError, OSError):
        return NativeCode(is_usable=False, found="reference (llvmlite absent)")
    features = llvm.get_host_cpu_features()
    missing = [name for name in NEEDED_FEATURES if not features.get(name)]
    if missing:
        return NativeCode(is_usable=False, found=f"reference (no {' and '.join(missing)} here)")
    return NativeCode(is_usable=True, found=f"compiled for AVX2 (llvmlite {__version__})")
