import gzip
import lzma

import orjson
import pytest
from fpdf import FPDF

from lorakeet.base.errors import DataError
from lorakeet.data.encodings import detect_encoding
from lorakeet.data.passages import split_block, to_passages
from lorakeet.data.sources import list_files, read_rows


def read(path):
    dropped = []
    return list(read_rows(str(path), dropped.append)), dropped


def lines_of(rows):
    return [row.origin.line for row in rows]


def codes_of(dropped):
    return [(row.origin.line, row.code) for row in dropped]


def test_each_bad_jsonl_row_is_reported_and_each_good_row_kept(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n'
        b'{"text": "bad \xff\xfe byte"}\n'
        b'{"text": "trunc\n'
        b"[1, 2]\n"
        b"\n"
        b'"text"\n'
        b'{"text": "\xe4\xb8\xad"}\r\n'
        b'{"text": "last, without a line end"}'
    )
    rows, dropped = read(path)
    assert lines_of(rows) == [1, 7, 8]
    assert rows[1].fields == {"text": "中"}
    assert codes_of(dropped) == [
        (2, "bad-encoding"),
        (3, "bad-json"),
        (4, "not-an-object"),
        (6, "not-an-object"),
    ]
    assert "breaks off" in dropped[1].reason and "0xff" in dropped[0].reason
    assert all(row.origin.path == str(path) and len(row.preview) <= 120 for row in dropped)
    orjson.dumps([row.preview for row in dropped])  # no lone surrogates are left


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "empty"),
        ("blank.txt", b" \n\n", "empty"),
        ("header.csv", b"question,answer\n", "no rows"),
        ("none.json", b"[]", "no rows"),
        ("object.json", b'{"a": 1, "b": 2}', "'a', 'b'"),
        ("number.json", b"3", "single value"),
        ("words.json", b"hello", "not JSON"),
        ("binary.txt", b"abc\0\0\xff\x80", "binary data"),
        ("broken.pdf", b"%PDF-1.4 nonsense", "cannot be read as PDF"),
        ("empty.pdf", b"", "empty"),
        ("script.html", b"<html><body><script>run()</script></body></html>", "no readable text"),
        ("broken.parquet", b"PAR1 nonsense", "Parquet"),
        ("broken.jsonl.gz", b"\x1f\x8b nonsense", "damaged"),
        ("unknown.docx", b"PK", ".docx is not known"),
    ],
)
def test_a_file_without_rows_is_an_error_that_names_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_an_error(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"no such file|is empty|no file matches"):
            read(path)


def test_a_folder_reports_its_bad_file_and_goes_on(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.txt").write_text("A paragraph.")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF nonsense")
    (tmp_path / ".hidden.txt").write_text("not for us")
    rows, dropped = read(tmp_path)
    assert [row.fields["text"] for row in rows] == ["A paragraph."]
    assert [(row.code, row.origin.path) for row in dropped] == [
        ("unreadable-file", str(tmp_path / "bad.pdf"))
    ]


def test_a_folder_of_bad_files_only_is_an_error(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "b.json").write_bytes(b"{")
    with pytest.raises(DataError, match="none of its 2 files"):
        read(tmp_path)


def test_a_glob_reads_its_matches_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    rows, _ = read(tmp_path / "*.txt")
    assert [row.fields["text"] for row in rows] == ["a.txt", "b.txt"]


def test_csv_rows_keep_the_line_they_begin_on(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer\n"two\nlines",yes\nshort\n"a ""quoted"" word",no\nbad\xff,x\n'
    )
    rows, dropped = read(path)
    assert lines_of(rows) == [2, 5]
    assert rows[0].fields == {"question": "two\nlines", "answer": "yes"}
    assert rows[1].fields["question"] == 'a "quoted" word'
    assert codes_of(dropped) == [(4, "wrong-columns"), (6, "bad-encoding")]


def test_an_open_quotation_mark_is_reported_with_its_lines(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('text,label\ngood,1\n"open,2\nlost,3\n')
    rows, dropped = read(path)
    assert len(rows) == 1
    assert codes_of(dropped) == [(3, "bad-csv")] and "lines 3 to 4" in dropped[0].reason


def test_tab_separated_text_may_hold_quotation_marks(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text('label\ttext\n1\t"open mark\n0\t"whole ""value"""\n')
    rows, dropped = read(path)
    assert [row.fields["text"] for row in rows] == ['"open mark', 'whole "value"'] and not dropped


def test_json_lists_and_data_objects_and_misnamed_lines_are_read(tmp_path):
    texts = {
        "list.json": '[{"text": "a"}, 3, {"text": "b"}]',
        "data.json": '{"version": 1, "data": [{"text": "a"}, [], {"text": "b"}]}',
        "lines.json": '{"text": "a"}\n"no"\n{"text": "b"}\n',
        "list.jsonl": '[\n{"text": "a"},\n"no",\n{"text": "b"}\n]',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        rows, dropped = read(tmp_path / name)
        assert [row.fields["text"] for row in rows] == ["a", "b"], name
        assert lines_of(rows) == [1, 3] and codes_of(dropped) == [(2, "not-an-object")], name


def test_a_json_list_that_breaks_off_keeps_the_rows_before(tmp_path):
    path = tmp_path / "cut.json"
    path.write_bytes(b'[{"text": "a"},\n {"text": "bad \xff"},\n {"text": "b"},\n {"text": "c')
    rows, dropped = read(path)
    assert [row.fields["text"] for row in rows] == ["a", "b"]
    assert codes_of(dropped) == [(2, "bad-encoding"), (4, "bad-json")]


def test_a_compressed_file_that_breaks_off_keeps_the_rows_before(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "row %d"}\n' % n for n in range(200_000)))
    path.write_bytes(whole[: len(whole) // 2 * 2 - 1000])
    rows, dropped = read(path)
    assert len(rows) > 1000
    assert [row.code for row in dropped[-1:]] == ["unreadable-file"]
    assert "breaks off after line" in dropped[-1].reason


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "big5"])
def test_chinese_text_is_read_in_its_own_encoding(tmp_path, encoding):
    text = (
        "合同是民事主體之間設立、變更、終止民事法律關係的協議。婚姻、收養有關身份關係的協議。" * 20
    )
    (tmp_path / "law.txt").write_bytes(text.encode(encoding))
    rows, _ = read(tmp_path / "law.txt")
    assert "".join(row.fields["text"] for row in rows) == text
    row = orjson.dumps({"text": text}).decode()
    (tmp_path / "law.jsonl").write_bytes(f"{row}\n{row}\n".encode(encoding))
    rows, dropped = read(tmp_path / "law.jsonl")
    assert [row.fields["text"] for row in rows] == [text] * 2 and not dropped


def test_gb2312_is_read_as_gb18030():
    text = "中华人民共和国合同法第一百条规定，当事人应当按照约定全面履行自己的义务。\n" * 8
    assert detect_encoding(text.encode("gb2312")) == "gb18030"


def test_compressed_files_are_read_like_plain_ones(tmp_path):
    content = b'{"text": "a"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(content))
    rows, dropped = read(tmp_path)
    assert len(rows) == 2 and not dropped


def test_parquet_rows_are_numbered(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [f"row {n}" for n in range(3000)], "label": [1] * 3000})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows, _ = read(tmp_path / "rows.parquet")
    assert lines_of(rows) == list(range(1, 3001))
    assert rows[-1].fields == {"text": "row 2999", "label": 1}


def make_pdf(path, pages):
    pdf = FPDF()
    for lines in pages:
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        for number, line in enumerate(lines):
            pdf.text(20, 20 + 6 * number, line)
    pdf.output(str(path))


def test_pdf_lines_become_paragraphs_and_hyphens_are_joined(tmp_path):
    make_pdf(tmp_path / "a.pdf", [["This is a long line that speaks of adap-", "tation. End."], []])
    rows, dropped = read(tmp_path / "a.pdf")
    assert [row.fields["text"] for row in rows] == [
        "This is a long line that speaks of adaptation. End."
    ]
    assert codes_of(dropped) == [(2, "page-without-text")]


def test_a_scanned_pdf_is_an_error_that_names_ocr(tmp_path):
    make_pdf(tmp_path / "scan.pdf", [[], []])
    with pytest.raises(DataError, match="none of its 2 pages holds text.*OCR"):
        read(tmp_path / "scan.pdf")


def test_passages_are_bounded_and_hold_every_word(shared):
    for path in list_files(str(shared / "data" / "docs")):
        rows, _ = read(path)
        assert rows and all(len(row.fields["text"]) <= 1500 for row in rows), path
    for path in (shared / "data/docs/zh_laws").glob("*.md"):
        joined = "".join("".join(row.fields["text"].split()) for row in read(path)[0])
        text = path.read_text(encoding="utf-8").removeprefix("---\nsidebar: auto\n---\n")
        for paragraph in text.split("\n\n"):
            head = "".join(paragraph.split())[:200]
            assert head in joined, (path, head)


def test_a_markdown_passage_says_what_it_is_about(shared):
    rows, _ = read(shared / "data/docs/zh_laws/civil-and-commercial__company-law.md")
    assert all(row.fields["text"].startswith("# 中华人民共和国公司法") for row in rows)
    assert "## 第" in rows[-1].fields["text"]


def test_words_are_never_cut():
    words = [f"word{number}" for number in range(500)]
    pieces = split_block(" ".join(words), 97)
    assert " ".join(pieces).split() == words and max(map(len, pieces)) <= 97


def test_a_heading_inside_a_code_block_is_code():
    lines = ["# Title", "", "```", "# comment", "", "code", "```", "", "## Empty", "## Next", "x"]
    (passage,) = to_passages(lines, is_markdown=True)
    assert "```\n# comment\n\ncode\n```" in passage
    assert passage.index("# Title") < passage.index("## Empty") < passage.index("## Next")


def test_real_documents_read_as_expected(shared):
    docs = shared / "data" / "docs"
    duck, _ = read(docs / "en_wikipedia_duck.html")
    assert duck[0].fields["text"].startswith("# Duck")
    assert any("## Etymology" in row.fields["text"] for row in duck)
    assert any("| Kingdom: | Animalia |" in row.fields["text"] for row in duck)
    poems, _ = read(docs / "zh_poems.pdf")
    assert lines_of(poems) == [1, 2, 3, 4, 5, 6]
    assert "——孟郊《雪》" in poems[0].fields["text"]  # one poem over two printed lines


def test_real_rows_are_all_read(shared):
    rows, dropped = read(shared / "data/dolly15k/dolly.jsonl.xz")
    assert len(rows) == 14996 and rows[-1].origin.line == 14996 and not dropped
    rows, dropped = read(shared / "data/llamafactory_demo/alpaca_zh_demo.json")
    assert len(rows) == 1000 and not dropped


def test_half_a_surrogate_pair_never_passes(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('[{"text": "\\ud800"}, {"text": "good"}, {"text": "cut')
    rows, dropped = read(path)
    assert [row.fields["text"] for row in rows] == ["good"]
    assert codes_of(dropped) == [(1, "bad-encoding"), (3, "bad-json")]
