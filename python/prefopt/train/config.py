"""Every option of a preference run, checked all at once before anything is loaded."""

import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from prefopt.errors import UserError
from prefopt.options import MethodOptions, in_force
from prefopt.redact import redacted
from prefopt.train.checks import problems, unknown
from prefopt.train.methods import METHODS, UNPAIRED, Method


@dataclass(repr=False)  # the inherited __repr__ masks tokens
class PreferenceConfig(TrainingArguments, MethodOptions):
    """``transformers.TrainingArguments`` and the options of preference training.

    ``prefopt.options.MethodOptions`` declares the options with their help, bounds and the methods that have them;
    docs/recipes.md lists them. An option that is None takes the method's default; one that the method does not use is
    refused. Methods: "kto" (arXiv:2402.01306), "apo_zero" (arXiv:2408.06266), "enhanced_kto"
    (:func:`prefopt_kernels.enhanced_kto_loss`), "bco" (arXiv:2404.04656), "dpo" (arXiv:2305.18290), "ipo"
    (arXiv:2310.12036), "cpo" (arXiv:2401.08417), "simpo" (arXiv:2405.14734), "orpo" (arXiv:2403.07691) and "sft".

    A batch size counts pairs where the method learns from pairs: both answers are always in one micro-batch.

    Differences to the defaults of TrainingArguments: ``learning_rate`` is 1e-6 and ``logging_nan_inf_filter`` is off,
    because a loss that is not finite stops the run.

    Raises:
        UserError: unknown names and values out of range, all of them in one message.

    Example:
        >>> config = PreferenceConfig(output_dir="run", use_cpu=True, method="simpo", gamma=0.5)
        >>> config.beta, config.gamma, config.sampler, config.kl_estimator
        (2.0, 0.5, 'random', None)
        >>> PreferenceConfig(output_dir="run", betta=0.2, beta=-1.0)
        Traceback (most recent call last):
            ...
        prefopt.errors.UserError: 2 options of PreferenceConfig are not valid:
          betta is not an option; did you mean beta?
          beta is -1.0; expected a number above 0
    """

    learning_rate: float = field(default=1e-6)
    logging_nan_inf_filter: bool = field(default=False)

    def __new__(cls, *args: Any, **kwargs: Any):
        # Before the generated __init__, which would stop at the first unknown name and suggest nothing.
        if args or kwargs:  # neither: being copied or unpickled
            options = [option for option in fields(cls) if option.init]
            positional = [option.name for option in options if not option.kw_only]
            given = dict(zip(positional, args, strict=False)) | kwargs
            found = unknown(given, [option.name for option in options])
            _raise_for(cls, found + problems(_with_defaults(cls, given), cls))
        return super().__new__(cls)

    def __post_init__(self):
        self.check()
        for name, value in in_force(vars(self), type(self)).items():
            setattr(self, name, value)
        if self.sampler is None:
            self.sampler = "label_balanced" if self.spec.data == UNPAIRED else "random"
        if self.sampler != "label_balanced":
            self.train_sampling_strategy = self.sampler
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: Trainer saves its arguments as training_args.bin, where a token has no place."""
        return redacted(vars(self))

    def __copy__(self) -> "PreferenceConfig":
        """Copies keep the token; ``copy`` would take ``__getstate__``."""
        return self._with_all(dict(vars(self)))

    def __deepcopy__(self, memo: dict) -> "PreferenceConfig":
        return self._with_all(copy.deepcopy(vars(self), memo))

    def _with_all(self, state: dict[str, Any]) -> "PreferenceConfig":
        copied = type(self).__new__(type(self))
        copied.__dict__.update(state)
        return copied

    def check(self) -> None:
        """Raise ``UserError`` with every option that does not make sense, alone or beside the others."""
        _raise_for(type(self), problems(vars(self), type(self)))

    @property
    def spec(self) -> Method:
        """The method's row in the table of methods."""
        return METHODS[self.method]

    @property
    def needs_kl(self) -> bool:
        """Whether the loss has KTO's reference point to estimate."""
        return self.kl_estimator is not None

    @property
    def needs_window(self) -> bool:
        """Whether the loss of a row depends on the policy's scores of all rows of its optimizer step."""
        return self.window_values is not None


def _with_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {option.name: option.default if option.default is not MISSING else None for option in fields(cls)}
    return defaults | given


def _raise_for(cls: type, found: list[str]) -> None:
    if found:
        count = "1 option" if len(found) == 1 else f"{len(found)} options"
        verb = "is" if len(found) == 1 else "are"
        listed = "\n  ".join(found)
        raise UserError(f"{count} of {cls.__name__} {verb} not valid:\n  {listed}")
