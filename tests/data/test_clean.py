import random
import sys

import ftfy
import pytest

from lorakeet.base.records import Conversation, LabelledText, Origin, Turn
from lorakeet.data.clean import _FTFY, _SOUND, clean_sample, clean_text, is_blank, texts_of
from lorakeet.data.sources import read_rows

HERE = Origin(path="a", line=1)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("l\u00c3\u00a9gal â€” ok", "légal — ok"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\x00\x1b[0mb\ufeff\u00ad", "ab"),
        ("a\u00a0b\u2003c", "a b c"),
        ("a  \n\n\n\n\tb\t\n", "a\n\n\tb"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("“引号”，全角：ＡＢＣ１２３！", "“引号”，全角：ＡＢＣ１２３！"),
        ("write &amp; and &lt;b&gt; — so", "write &amp; and &lt;b&gt; — so"),
        ("👩\u200d👩\u200d👧 family", "👩\u200d👩\u200d👧 family"),
        ("o\u0308l", "öl"),
        ("\x1b[31mred\x1b[0m", "red"),
    ],
)
def test_damage_is_repaired_and_meaning_is_kept(dirty, clean):
    assert clean_text(dirty) == clean
    assert clean_text(clean) == clean


def test_cleaning_twice_is_cleaning_once_on_real_text(shared):
    for name in ("alpaca_zh_demo.json", "alpaca_en_demo.json", "c4_demo.jsonl"):
        for row in read_rows(str(shared / "data/llamafactory_demo" / name), print):
            for text in map(str, row.fields.values()):
                once = clean_text(text)
                assert clean_text(once) == once


def test_ftfy_changes_no_text_that_skips_it():
    sound = [char for char in map(chr, range(sys.maxunicode)) if _SOUND.fullmatch(char)]
    few = [char for char in sound if char < "\u3000"]
    rng = random.Random(0)
    texts = [pair for a in few for b in few if not b.isascii()
             for pair in (f"{a}{b}", f"a{b}{a}b")]  # fmt: skip
    texts += ["".join(rng.choices(rng.choice([few, sound]), k=12)) for _ in range(1000)]
    assert [text for text in texts if ftfy.fix_text(text, _FTFY) != text] == []


def test_every_text_of_a_sample_is_cleaned_and_the_rest_stays():
    turns = (Turn(role="user", content=" a "), Turn(role="assistant", content="b\x00"))
    sample = clean_sample(Conversation(turns=turns, origin=HERE))
    assert texts_of(sample) == ("a", "b")
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    pair = LabelledText(text="a ", second_text=" b", label="x ", origin=HERE)
    assert clean_sample(pair) == LabelledText(text="a", second_text="b", label="x ", origin=HERE)


def test_invisible_text_is_blank():
    assert is_blank("\u200b\ufeff \n\x00") and not is_blank("\u200b0")
