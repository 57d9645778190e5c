"""How much of a text is Arabic: a share of letters, not a guess at the language.

Counted are the letters of the Arabic alphabet, U+0621 to U+064A without the tatweel, after NFKC (which turns
presentation forms into letters). Digits, punctuation, vowel signs and emoji do not count at all. Persian and Urdu are
written mostly with the same letters, and pass a threshold of one half; where a source says which language a row is in
(oasst1), ask it.
"""

import unicodedata

from prefopt.data.rows import Text

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
    """Whether a row is in a language: prompt and answer each reach the share, as far as they have letters."""
    if language is None:
        return True
    shares = [arabic_share(_text(side)) for side in (prompt, completion)]
    known = [one for one in shares if one is not None]
    return bool(known) and min(known) >= share


def _text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
