"""The generated reference is the code's own."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_reference_is_what_the_code_says():
    generate = runpy.run_path(str(DOCS / "generate_reference.py"), run_name="reference")
    for name, text in generate["pages"]().items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, name
