"""Packages that are not required: which versions were tested, and classes that are defined on first use."""

import importlib.metadata
from collections.abc import Callable


def why_untested(package: str, name: str, tested: tuple[str, ...]) -> str | None:
    """Why the installed version of ``package`` is not supported; None if its major.minor is in ``tested``.

    >>> why_untested("no-such-package", "No such package", ("1.0",))
    'No such package is not installed'
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    if any(version == each or version.startswith(f"{each}.") for each in tested):
        return None
    return f"{name} is {version}; tested with {' and '.join(tested)}"


def lazy_classes(module: str, **makers: Callable[[], type]) -> Callable[[str], type]:
    """The ``__getattr__`` of a module whose classes derive from a package that is imported on first use."""

    def get(name: str) -> type:
        if name not in makers:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return makers[name]()

    return get
