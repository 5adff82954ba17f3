"""Private data masked before a model can learn it: e-mail, phone, card and identity numbers.

A pattern proposes, arithmetic decides: card numbers must pass Luhn's check and
start like a card, Chinese identity numbers must hold a real date and pass
ISO 7064 MOD 11-2, IBANs must leave 1 modulo 97.  Patterns look for digits at
either side rather than for word boundaries, as Chinese text puts no space
between a word and a number.

It finds most and not all: names and addresses are not searched for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import date

from lorakeet.base.records import Sample
from lorakeet.data.clean import map_text

_FREE_LEFT = r"(?<![0-9A-Za-z.+_-])"  # neither inside a number nor inside an identifier
_FREE_RIGHT = r"(?![0-9A-Za-z_]|[.-][0-9])"
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9@])"
)
_CHINESE_ID = re.compile(rf"{_FREE_LEFT}[1-9]\d{{16}}[0-9Xx]{_FREE_RIGHT}")
_US_SSN = re.compile(
    rf"{_FREE_LEFT}(?!000|666|9\d\d)\d{{3}}-(?!00)\d{{2}}-(?!0000)\d{{4}}{_FREE_RIGHT}"
)
_IBAN = re.compile(rf"{_FREE_LEFT}[A-Z]{{2}}\d{{2}}(?: ?[0-9A-Z]{{4}}){{2,7}}(?: ?[0-9A-Z]{{1,3}})?"
                   r"(?![0-9A-Za-z])")  # fmt: skip
_CARD = re.compile(rf"{_FREE_LEFT}(?:\d{{15,19}}|\d{{4}}(?:[ -]\d{{4}}){{3}}(?:[ -]\d{{1,3}})?"
                   rf"|3[47]\d{{2}}[ -]\d{{6}}[ -]\d{{5}}){_FREE_RIGHT}")  # fmt: skip
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|35|6011|62|65")
_PHONE = re.compile(
    rf"{_FREE_LEFT}(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})"  # Chinese mobile
    r"|0\d{2,3}-\d{7,8}"  # Chinese landline
    r"|\(\d{3}\) ?\d{3}[-. ]\d{4}"  # North America
    r"|(?:\+?1[-. ])?[2-9]\d{2}([-.])[2-9]\d{2}\1\d{4}"
    rf"){_FREE_RIGHT}"
)
_INTERNATIONAL_PHONE = re.compile(
    r"(?<![0-9A-Za-z+])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,5}(?![0-9A-Za-z])"
)
# Every valid number but an IBAN has eight digits this near each other.
_EIGHT_DIGITS = re.compile(r"\d(?:[-. ()]{0,3}\d){7}")
_IBAN_HEAD = re.compile(r"(?<=[A-Z]{2})\d{2}")
_DIGITS = b"0123456789"
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"


def mask_private(text: str) -> tuple[str, dict[str, int]]:
    """The text with private data replaced by its kind in brackets, and how many of each.

    >>> mask_private("Mail ann@example.org or 13812345678")
    ('Mail [EMAIL] or [PHONE]', {'email': 1, 'phone': 1})
    """
    counts: Counter[str] = Counter()
    if "@" in text:
        text = _mask(text, "email", _EMAIL, _is_sure, counts)
    if _may_hold_number(text):
        for kind, pattern, is_valid in _NUMBERS:
            text = _mask(text, kind, pattern, is_valid, counts)
    return text, dict(counts)


def _may_hold_number(text: str) -> bool:
    """Whether the patterns of numbers are worth a try; most texts have too few digits."""
    if text.isascii():
        num_digits = len(text) - len(text.encode().translate(None, _DIGITS))
        if num_digits < 2:
            return False
        if num_digits < 8:
            return _IBAN_HEAD.search(text) is not None
    return bool(_EIGHT_DIGITS.search(text) or _IBAN_HEAD.search(text))


def mask_sample(sample: Sample) -> tuple[Sample, dict[str, int]]:
    """A sample with private data masked in every text, and how many of each kind."""
    counts: Counter[str] = Counter()

    def mask(text: str) -> str:
        masked, found = mask_private(text)
        counts.update(found)
        return masked

    return map_text(sample, mask), dict(counts)


def _mask(
    text: str,
    kind: str,
    pattern: re.Pattern[str],
    is_valid: Callable[[str], bool],
    counts: Counter[str],
) -> str:
    def replace(match: re.Match[str]) -> str:
        if not is_valid(match.group()):
            return match.group()
        counts[kind] += 1
        return f"[{kind.upper()}]"

    return pattern.sub(replace, text)


def _is_sure(_found: str) -> bool:
    return True


def is_chinese_id(number: str) -> bool:
    """Whether 18 characters are a resident identity number (GB 11643-1999).

    The sum of weighted digits modulo 11 selects the last character.

    >>> is_chinese_id("11010519491231002X"), is_chinese_id("110105194912310021")
    (True, False)
    """
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number, strict=False))
    return born.year >= 1900 and _ID_CHECKS[total % 11] == number[17].upper()


def is_card_number(number: str) -> bool:
    """Whether 15 to 19 digits start like a payment card and pass Luhn's check.

    Luhn: every second digit from the right is doubled, nines are cast out of
    the doubles, and the sum is a multiple of ten.

    >>> is_card_number("4111 1111 1111 1111"), is_card_number("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(char) for char in number if char.isdigit()]
    if not 15 <= len(digits) <= 19 or not _CARD_PREFIX.match("".join(map(str, digits))):
        return False
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + doubled) % 10 == 0


def is_iban(account: str) -> bool:
    """Whether an account number passes ISO 13616: letters as 10 to 35, remainder 1 modulo 97.

    >>> is_iban("DE89 3704 0044 0532 0130 00"), is_iban("DE88 3704 0044 0532 0130 00")
    (True, False)
    """
    bare = account.replace(" ", "")
    if not 15 <= len(bare) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in bare[4:] + bare[:4])) % 97 == 1


def _is_long_enough(number: str) -> bool:
    return 8 <= sum(char.isdigit() for char in number) <= 15  # ITU-T E.164


# In this order: an identity number holds digits that look like a mobile number.
_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("id", _CHINESE_ID, is_chinese_id),
    ("id", _US_SSN, _is_sure),
    ("account", _IBAN, is_iban),
    ("card", _CARD, is_card_number),
    ("phone", _PHONE, _is_sure),
    ("phone", _INTERNATIONAL_PHONE, _is_long_enough),
)
