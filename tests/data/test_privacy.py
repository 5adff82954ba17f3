import pytest

from lorakeet.base.records import Conversation, Origin, Turn
from lorakeet.data.privacy import is_card_number, mask_private, mask_sample


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to Ann.Lee+x@mail.example.co.uk.", "write to [EMAIL]."),
        ("邮箱zhang@example.cn，谢谢", "邮箱[EMAIL]，谢谢"),
        ("电话13812345678，", "电话[PHONE]，"),
        ("+86 138 1234 5678", "[PHONE]"),
        ("总机010-62345678转8", "总机[PHONE]转8"),
        ("call (212) 555-0142 or 212-555-0142", "call [PHONE] or [PHONE]"),
        ("call +44 20 7946 0958.", "call [PHONE]."),
        ("身份证号11010519491231002X。", "身份证号[ID]。"),
        ("SSN 078-05-1120", "SSN [ID]"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("卡号6222020000000000004", "卡号[CARD]"),
        ("amex 3782 822463 10005", "amex [CARD]"),
        ("IBAN DE89 3704 0044 0532 0130 00 ok", "IBAN [ACCOUNT] ok"),
    ],
)
def test_private_data_is_masked(text, masked):
    if text.startswith("卡号"):  # complete the number with its Luhn digit
        body = text[2:-1]
        text = next(f"卡号{body}{d}" for d in range(10) if is_card_number(f"{body}{d}"))
    assert mask_private(text)[0] == masked
    assert mask_private(masked) == (masked, {})


@pytest.mark.parametrize(
    "text",
    [
        "1984年9月20日第六届全国人民代表大会",
        "2021-11-19 20:00, ISBN 978-7-5366-9293-0",
        "order 4111111111111112 of 2024",  # fails Luhn
        "pi is 3.14159265358979323846",
        "110105194912310021",  # fails its check digit
        "abc13812345678def and id_13812345678",
        "192.168.100.200 and 1,234,567,890",
        "x = 5552368 + 1000000",
        "a @ b, user@localhost, @name",
        "range 100-200-3000, version 1.2.3",
        "12-34-56-78-90 and 2 + 2 = 4",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert mask_private(text) == (text, {})


def test_counts_are_by_kind():
    text = "a@b.org c@d.org 13812345678"
    assert mask_private(text)[1] == {"email": 2, "phone": 1}


def test_every_turn_of_a_sample_is_masked():
    turns = (Turn(role="user", content="a@b.org"), Turn(role="assistant", content="or c@d.org"))
    sample, counts = mask_sample(Conversation(turns=turns, origin=Origin(path="a", line=1)))
    assert [turn.content for turn in sample.turns] == ["[EMAIL]", "or [EMAIL]"]
    assert counts == {"email": 2}


def test_a_law_text_holds_nothing_private(shared):
    for path in (shared / "data/docs/zh_laws").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert mask_private(text) == (text, {})
