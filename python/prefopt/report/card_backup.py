"""Keep a model card that was edited by hand when a new one is written.

A generated card ends in an HTML comment with the SHA-256 of the text above it. A card without a valid digest was
edited, unless it is PEFT's unfilled template, which comes with each adapter.
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


def with_digest(card: str, errors: str) -> str:
    """The card with its digest; ``errors`` as for ``str.encode``, and as the card is written with."""
    return f"{card}\n<!-- written by prefopt, sha256 {_digest(card.encode('utf-8', errors))} -->\n"


def back_up_if_edited(path: Path) -> Path | None:
    """Move an edited card to README.edited.md (-2, -3, ...) and log a warning; return its new path."""
    if not path.is_file() or _is_generated(path.read_bytes()):
        return None
    names = (f"{path.stem}.edited{f'-{n}' if n > 1 else ''}{path.suffix}" for n in count(1))
    kept = next(place for name in names if not (place := path.with_name(name)).exists())
    os.replace(path, kept)
    logger.warning("%s was changed by hand; it is kept as %s", path, kept.name)
    return kept


def _is_generated(card: bytes) -> bool:
    card = card.replace(b"\r\n", b"\n")  # some editors change line ends
    mark = MARK.search(card)
    if mark:
        return mark[1].decode() == _digest(card[: mark.start()])
    form = ModelCard.from_template(ModelCardData()).text
    return ModelCard(card.decode("utf-8", "replace"), ignore_metadata_errors=True).text.startswith(form)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
