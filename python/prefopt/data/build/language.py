"""The share of Arabic letters in a text.

Arabic letters are U+0621 to U+064A without the tatweel, after NFKC, which maps presentation forms to letters. Digits,
punctuation, vowel signs and emoji are ignored. This does not identify the language: most Persian and Urdu texts reach a
share of one half. Prefer a source's own language field, as in oasst1.
"""

import unicodedata

from prefopt.data.rows import Text, plain_text

LANGUAGES = ("ar",)


def arabic_share(text: str) -> float | None:
    """The share of Arabic letters among all letters; None for a text without letters.

    Example:
        >>> arabic_share("\u0642\u0644 hi"), arabic_share("42!")
        (0.5, None)
    """
    letters = [char for char in unicodedata.normalize("NFKC", text) if char.isalpha()]
    letters = [char for char in letters if char != "\u0640"]  # tatweel only stretches a word
    if not letters:
        return None
    return sum("\u0621" <= char <= "\u064a" for char in letters) / len(letters)


def is_in(language: str | None, prompt: Text, completion: Text, share: float) -> bool:
    """Whether prompt and answer each reach the share; a text without letters is ignored."""
    if language is None:
        return True
    shares = [arabic_share(plain_text(side)) for side in (prompt, completion)]
    known = [one for one in shares if one is not None]
    return bool(known) and min(known) >= share
