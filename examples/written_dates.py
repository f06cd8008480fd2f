"""Written dates from Babel's locale data: the training data of dates.py.

The full, long, medium and short formats of 75 locales. A reader gets the characters, not the locale. So formats that
are ambiguous without the locale are left out: years of two digits, and months in numbers (3/4/2021) unless the order
is year, month, day.
"""

import re
from collections.abc import Callable
from datetime import date
from functools import partial

import numpy as np
from babel import Locale
from babel.dates import DateTimePattern, get_date_format

LOCALES = (
    "af am ar_EG az be bg bn bs ca cs cy da de de_AT el en en_GB es et eu fa fi fil fr fr_CA ga gl gu he hi hr hu hy "
    "id is it ja ka kk km kn ko lt lv mk ml mn mr ms my nb ne nl pl pt ro ru sk sl sq sr sr_Latn sv sw ta te th tr uk "
    "ur uz vi zh zh_Hant zu"
)
# Code points of zeros: Babel knows which digits a locale uses, but writes 0 to 9.
ZEROS = {"arab": 0x660, "arabext": 0x6F0, "beng": 0x9E6, "deva": 0x966, "mymr": 0x1040}


def find_styles(locales: str) -> list[Callable[[date], str]]:
    """The formats that are unambiguous without the locale, as functions that write a day."""

    def write(day: date, pattern: DateTimePattern, locale: Locale, zero: int) -> str:
        return pattern.apply(day, locale).translate({ord("0") + digit: zero + digit for digit in range(10)})

    styles: list[Callable[[date], str]] = []
    for locale in map(Locale.parse, locales.split()):
        zero = ZEROS.get(locale.default_numbering_system, ord("0"))
        formats = [get_date_format(length, locale) for length in ("full", "long", "medium", "short")]
        for pattern in {pattern.pattern: pattern for pattern in formats}.values():
            fields = re.sub(r"'[^']*'|[^yMd]", "", pattern.pattern)  # drops the text in d 'de' MMMM 'de' y
            if "yy" not in fields and ("MMM" in fields or re.fullmatch("yM+d+", fields)):
                styles.append(partial(write, pattern=pattern, locale=locale, zero=zero))
    return styles


def make_pairs(locales: str, seed: int) -> list[tuple[str, str]]:
    """Every day of 1900 to 2099 once, as (written in a random style, in ISO 8601), in random order."""
    rng, styles = np.random.default_rng(seed), find_styles(locales)
    ordinals = rng.permutation(np.arange(date(1900, 1, 1).toordinal(), date(2100, 1, 1).toordinal()))
    choices = rng.integers(len(styles), size=len(ordinals))
    days = [date.fromordinal(ordinal) for ordinal in ordinals]
    return [(styles[choice](day), day.isoformat()) for choice, day in zip(choices, days, strict=True)]
