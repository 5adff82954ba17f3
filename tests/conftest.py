"""Fixtures for real data and models that lie beside the checkout and are not ours to ship."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real data and models (../shared) are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_llama(shared: Path) -> Path:
    """A real Llama of 260,032 parameters, trained on TinyStories; no chat template."""
    return shared / "models" / "tinyllama-stories-260k"


@pytest.fixture(scope="session")
def chat_tokenizer_folder(shared: Path) -> Path:
    """MiniMind's bilingual tokenizer of 6,400 tokens with a ChatML template."""
    return shared / "tokenizers" / "minimind"
