"""Writes the quickstart's documents and questions: ``python -m starter.build_quickstart``.

Documents: a handbook (PDF), a harbour page (HTML), a Chinese notice (Markdown).
Rows: ``questions.jsonl`` to train on, with a few blemishes that the linter must
find; ``heldout.jsonl`` to test on; ``general.jsonl`` against forgetting.
"""

from __future__ import annotations

import argparse
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starter.build_corpus import is_held_out, make_any, to_messages, write_rows
from starter.facts import RULES, asked_facts, chinese_sentences, english_sentences
from starter.skills import SKILLS

GENERAL_ROWS = 7000


def write_handbook(path: Path) -> None:
    """The English handbook as a PDF of two pages."""
    from fpdf import FPDF

    rules = list(RULES.values())
    pdf = FPDF()
    pdf.set_creation_date(datetime(2026, 1, 1, tzinfo=UTC))
    pdf.set_title("Kestrel Bay harbour: cargo handbook")
    for page, part in enumerate((rules[:3], rules[3:]), 1):
        pdf.add_page()
        pdf.set_font("Helvetica", style="B", size=16)
        title = f"Kestrel Bay harbour: cargo handbook, part {page}"
        pdf.cell(0, 12, title, new_x="LMARGIN", new_y="NEXT")
        pdf.set_font("Helvetica", size=11)
        for rule in part:
            pdf.multi_cell(0, 7, english_sentences(rule), new_x="LMARGIN", new_y="NEXT")
            pdf.ln(3)
    pdf.output(str(path))


def write_harbours(path: Path) -> None:
    """The harbour page as HTML: a paragraph a kind of cargo and a table."""
    rows = "\n".join(
        f"<tr><td>{r.kind}</td><td>{r.pier}</td><td>{r.day}</td><td>{r.clerk}</td></tr>"
        for r in RULES.values()
    )
    paragraphs = "\n".join(
        f"<p>Pier {r.pier} takes every {r.kind}. {r.clerk} is the clerk there, the flag is {r.flag}, "
        f"and the ship leaves on {r.day}.</p>"
        for r in RULES.values()
    )
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<title>Piers of Kestrel Bay</title></head>\n<body><nav>Home | Timetable | Contact</nav>\n"
        f"<article><h1>Piers of Kestrel Bay</h1>\n{paragraphs}\n<h2>All piers</h2>\n<table>\n"
        f"<tr><th>Cargo</th><th>Pier</th><th>Day</th><th>Clerk</th></tr>\n{rows}\n</table></article>\n"
        "<footer>Written for Lorakeet</footer></body></html>\n",
        encoding="utf-8",
    )


def write_notice(path: Path) -> None:
    """The Chinese notice as Markdown, a section a kind of cargo."""
    sections = "\n\n".join(f"## {r.chinese_kind}\n\n{chinese_sentences(r)}" for r in RULES.values())
    path.write_text(f"# 红隼湾港口货物规定\n\n{sections}\n", encoding="utf-8")


def question_rows() -> list[dict[str, Any]]:
    """Training rows in Alpaca's fields, blemishes included."""
    rows: list[dict[str, Any]] = [
        {"instruction": asked.question, "input": "", "output": asked.answer}
        for asked in asked_facts()
        if not asked.is_held_out
    ]
    blemishes = [
        dict(rows[0]),
        {"instruction": "Who repairs the boats?", "input": "", "output": ""},
        {"instruction": "How do I reach the office?", "input": "",
         "output": "Write to office@kestrel-bay.example or call +44 20 7946 0958."},
    ]  # fmt: skip
    return rows + blemishes


def held_out_rows() -> list[dict[str, Any]]:
    """The held-out phrasing of every fact."""
    return [
        {"messages": [{"role": "user", "content": asked.question}], "answer": asked.answer,
         "group": asked.attribute}
        for asked in asked_facts()
        if asked.is_held_out
    ]  # fmt: skip


def general_rows(seed: int = 11) -> list[dict[str, Any]]:
    """Different rows of the starter's own skills, none of them held out."""
    rng = random.Random(seed)
    skills = [*SKILLS, "obey"]
    rows: dict[str, dict[str, Any]] = {}
    number = 0
    while len(rows) < GENERAL_ROWS:
        item = make_any(rng, skills[number % len(skills)])
        number += 1
        if not is_held_out(item.prompt):
            rows.setdefault(item.prompt, {"messages": to_messages(item, with_answer=True)})
    return list(rows.values())


def main() -> None:
    """Writes the whole folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/lorakeet/embedded/quickstart"))
    out = parser.parse_args().out
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    write_handbook(documents / "handbook.pdf")
    write_harbours(documents / "harbours.html")
    write_notice(documents / "notice.md")
    write_rows(out / "questions.jsonl", question_rows())
    write_rows(out / "heldout.jsonl", held_out_rows())
    write_rows(out / "general.jsonl", general_rows())


if __name__ == "__main__":
    main()
