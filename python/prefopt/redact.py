"""Secrets stay out of every file: options named like one are dropped, and URLs lose their user and password."""

import re
from typing import Any

SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|passphrase|credentials?|api_?key|(access|account|auth|private|secret)_key)$"
)
# tokens of a vocabulary, in tokenizers' and chat templates' options
VOCABULARY = re.compile(r"(^|_)(pad|eos|bos|unk|sep|cls|mask|start|end|stop|special|image|video|audio|think)_token$")
# Its tokens are text, without which later commands would not render the template as training did.
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
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


def redacted(value: Any, inside: object = None) -> Any:
    """A copy of nested options without secrets; numbers, None and other objects stay as they are.

    Args:
        value: the options.
        inside: the name of the option that holds them.

    Example:
        >>> redacted({"hub_token": "hf_1", "eos_token": "</s>", "urls": ["https://me:pw@host/rows"]})
        {'eos_token': '</s>', 'urls': ['https://host/rows']}
        >>> redacted({"chat_template_kwargs": {"user_token": "<user>", "api_key": "k"}})
        {'chat_template_kwargs': {'user_token': '<user>'}}
    """
    if isinstance(value, dict):
        return {
            name: redacted(one, name)
            for name, one in value.items()
            if not (_is_dropped(name, inside) and isinstance(one, str | bytes))
        }
    if type(value) in (list, tuple):
        return type(value)(redacted(one, inside) for one in value)
    if type(value) is str:
        return USER_IN_URL.sub("", value)
    return value


def _is_dropped(name: object, inside: object) -> bool:
    of_template = inside == TEMPLATE_ARGUMENTS and str(name).lower().endswith("token")
    return is_secret(name) and not of_template
