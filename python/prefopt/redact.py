"""Secrets stay out of every file: options named like one are dropped, and URLs lose their user and password."""

import re
from typing import Any

SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|passphrase|credentials?|api_?key|(access|account|auth|private|secret)_key)$"
)
# tokens of a vocabulary, in tokenizers' and chat templates' options
VOCABULARY = re.compile(
    r"(^|_)(pad|eos|bos|unk|sep|cls|mask|start|end|stop|special|image|video|audio|think)_token$"
)
USER_IN_URL = re.compile(r"(?<=://)[^/?#\s@]+@")


def is_secret(name: object) -> bool:
    """Whether an option of this name holds a secret.

    Example:
        >>> [is_secret(name) for name in ("hub_token", "apiKey", "pad_token", "max_new_tokens")]
        [True, True, False, False]
    """
    if not isinstance(name, str):
        return False
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return SECRET.search(name) is not None and VOCABULARY.search(name) is None


def redacted(value: Any) -> Any:
    """A copy of nested options without secrets; numbers, None and other objects stay as they are.

    Example:
        >>> redacted({"hub_token": "hf_1", "eos_token": "</s>", "urls": ["https://me:pw@host/rows"]})
        {'eos_token': '</s>', 'urls': ['https://host/rows']}
    """
    if isinstance(value, dict):
        return {
            name: redacted(one)
            for name, one in value.items()
            if not (is_secret(name) and isinstance(one, str | bytes))
        }
    if type(value) in (list, tuple):
        return type(value)(map(redacted, value))
    if type(value) is str:
        return USER_IN_URL.sub("", value)
    return value
