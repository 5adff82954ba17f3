"""Where loops of ours run as instructions of the processor, and what is said where not."""

import sys

import pytest

from lorakeet.base.native_code import NEEDED_FEATURES, find_native_code


def test_without_llvmlite_the_reference_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    found = find_native_code()
    assert (found.is_usable, found.found) == (False, "reference (llvmlite absent)")


@pytest.mark.parametrize("missing", NEEDED_FEATURES)
def test_a_processor_without_the_instructions_is_told(missing, monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")
    features = {name: name != missing for name in NEEDED_FEATURES}
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    found = find_native_code()
    assert (found.is_usable, found.found) == (False, f"reference (no {missing} here)")
