"""A model card that somebody wrote or changed by hand is kept beside the new one.

The card ends in a comment, which no reader of Markdown is shown, with a digest of what stands above it: it tells the
card that was written from one that was changed since. The empty form that PEFT leaves with an adapter is nobody's work.
"""

import hashlib
import logging
import os
import re
from itertools import count
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

MARK = re.compile(rb"\n<!-- written by prefopt, sha256 ([0-9a-f]{64}) -->\n?\Z")

logger = logging.getLogger(__name__)


def marked(card: str, errors: str) -> str:
    """The card with its mark; ``errors`` as ``str.encode``, and as the card is written with."""
    return f"{card}\n<!-- written by prefopt, sha256 {_digest(card.encode('utf-8', errors))} -->\n"


def keep_if_edited(path: Path) -> Path | None:
    """Move a card that is not as it was written to README.edited.md (-2, -3, ...), and say so; where it is now."""
    if not path.is_file() or _untouched(path.read_bytes()):
        return None
    names = (f"{path.stem}.edited{f'-{n}' if n > 1 else ''}{path.suffix}" for n in count(1))
    kept = next(place for name in names if not (place := path.with_name(name)).exists())
    os.replace(path, kept)
    logger.warning("%s was changed by hand; it is kept as %s", path, kept.name)
    return kept


def _untouched(card: bytes) -> bool:
    card = card.replace(b"\r\n", b"\n")  # which some editors change, and nothing else
    mark = MARK.search(card)
    if mark:
        return mark[1].decode() == _digest(card[: mark.start()])
    form = ModelCard.from_template(ModelCardData()).text
    return ModelCard(card.decode("utf-8", "replace"), ignore_metadata_errors=True).text.startswith(form)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
