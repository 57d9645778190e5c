"""transformers' ``from_pretrained`` as every command calls it: it never prompts, and an error is one sentence."""

from typing import Any

from safetensors import SafetensorError

from prefopt.errors import UserError, first_line

# A broken file fails wherever it is used. Out of memory, a RuntimeError, is none of them.
FAILURES = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    SafetensorError,
)


def from_pretrained(
    kind: Any,
    path: str,
    failure: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Load a configuration, a tokenizer or a model from a folder or the hub.

    Args:
        kind: one of transformers' Auto classes.
        path, revision: where it is.
        failure: the first half of the error message, such as "cannot load a tokenizer from m".
        trust_remote_code: run Python code that comes with the model. Where the argument is left out, transformers asks
            on stdin, so it is always passed.
        options: passed on.

    Raises:
        UserError: it cannot be loaded, or needs code that is not trusted.
    """
    try:
        return kind.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code, **options)
    except FAILURES as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = (
                "it comes with Python code of its own, which is not run unless the recipe sets "
                "model.trust_remote_code to true; read that code first"
            )
        else:
            reason = first_line(error)
        raise UserError(f"{failure}: {reason}") from None
