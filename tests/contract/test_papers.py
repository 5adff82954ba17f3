"""``docs/papers.md`` names every paper that the code names, and files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "lorakeet"
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def test_every_paper_that_the_code_names_is_on_the_page():
    named = {
        number
        for path in SOURCE.rglob("*.py")
        for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8"))
    }
    assert not sorted(number for number in named if f"arXiv:{number}" not in PAGE)


def test_every_file_on_the_page_exists():
    paths = re.findall(r"`(\w+/\w+\.py)`", PAGE)
    assert paths and not [path for path in paths if not (SOURCE / path).is_file()]
