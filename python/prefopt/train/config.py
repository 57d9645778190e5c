"""Every option of a preference run, checked all at once before anything is loaded."""

import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from prefopt.errors import UserError
from prefopt.redact import redacted
from prefopt.train.checks import problems, unknown
from prefopt.train.methods import METHODS, RATED, Method, in_force


@dataclass(repr=False)  # the inherited __repr__ masks tokens
class PreferenceConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what preference training adds to them.

    Args:
        method: from rows with a thumb: "kto" (arXiv:2402.01306), "apo_zero" (arXiv:2408.06266: KTO with its reference
            point at 0, so no passes over mismatched completions), "enhanced_kto" (KTO with the rest of prospect
            theory), "bco" (arXiv:2404.04656). From pairs: "dpo" (arXiv:2305.18290), "ipo" (arXiv:2310.12036), and
            without a reference model "cpo" (arXiv:2401.08417), "simpo" (arXiv:2405.14734), "orpo" (arXiv:2403.07691).
            "sft": from desirable answers alone, those of pairs included.

    The options of a method. One that is left out, None, takes the method's default; one that the method has no use for
    is refused.

    Args:
        beta: inverse temperature, 1/nats, above 0; 0.1, and 2.0 for simpo, whose log-probabilities are per token. For ipo
            it is the paper's tau.
        desirable_weight, undesirable_weight: multiply the loss of the rows of each label; 1. kto, apo_zero, enhanced_kto.
        kl_estimator: where the reference point of kto and enhanced_kto comes from. "window" (default): once per
            optimizer step, from pairs made over all its micro-batches, so that accumulation does not change the
            gradient. "ema": an exponential average of those, with ``kl_decay`` (0.9). "microbatch": from each
            micro-batch alone, as TRL's KTOTrainer does; for comparisons with it.
        loss_aversion, alpha, kappa, win_weighting, decision_weighting, decision_clip: of enhanced_kto, see
            :func:`prefopt_kernels.enhanced_kto_loss`; 2.25, 0.88, 0.1, "off", "tversky-kahneman", (0.5, 2.0). The
            decision weights have mean 1 over the rows of an optimizer step. For cpo, ``alpha`` is the weight of the
            chosen answers' likelihood, 1.
        odds_weight: of enhanced_kto's odds term and of orpo's (the paper's lambda, TRL's beta); 0.1.
        main_bound, odds_bound: bounds on the pull of enhanced_kto's two terms on a row, 1/nats and 1/nats per token; 0 is
            none. With a shift ``beta / 4`` and ``2 * odds_weight``, otherwise none.
        shift: BCO's baseline, estimated once per optimizer step from the rewards of all its rows: "window", half the
            sum of the two classes' means; "ema", the same of exponential averages, with ``shift_decay`` (0.9);
            "cumulative", the mean of all rewards so far; "off". "window" for bco, "off" for enhanced_kto.
        shift_bound: largest size of the shift, reward units; none (0) for bco, 0.5 for enhanced_kto.
        shift_start, shift_ramp: shares of all steps after which the shift comes in, and over which it does; 0 and 0 for bco,
            0.3 and 0.1 for enhanced_kto. shift_start "plateau": when the margin has not risen for a tenth of the logs.
        label_smoothing: dpo; probability that a pair is the wrong way round, below 0.5; 0. ``robust``: with the unbiased
            form of arXiv:2403.00409; False.
        gamma: simpo's target margin, reward units; 1.

    Options of every method.

    Args:
        sampler: order of the training rows. "label_balanced" (default for rows with a thumb) and "random" (default for
            pairs and sft) are seeded by ``data_seed`` (or ``seed``); "sequential" keeps the order of the data.
        max_length: tokens per sequence, prompt and completion; None for no limit.
        on_bad_row: "stop" before training, or "skip" and list the rows in bad_rows.jsonl.
        disable_dropout: sets every dropout of policy and reference to 0, as TRL does. Without it the log-ratio of two
            equal models is not 0.
        precompute_ref_logps: score all rows with the reference before training, keep the results in a cache on disk
            and free the reference. Every row then has one fixed mismatched completion.
        precompute_batch_size: rows per forward pass of that; the batch size of evaluation if left out.
        reference_cache_dir: folder of that cache; beside the cache of ``datasets`` if left out.
        backend: of ``prefopt_kernels.linear_logprob``.

    A batch size counts pairs where the method learns from pairs: both answers are always in one micro-batch.

    Differences to the defaults of TrainingArguments: ``learning_rate`` is 1e-6 and ``logging_nan_inf_filter`` is off,
    because a loss that is not finite stops the run.

    Raises:
        UserError: unknown names and values out of range, all of them in one message.

    Example:
        >>> config = PreferenceConfig(output_dir="run", use_cpu=True, method="simpo", gamma=0.5)
        >>> config.beta, config.gamma, config.sampler, config.kl_estimator
        (2.0, 0.5, 'random', None)
        >>> PreferenceConfig(output_dir="run", betta=0.2, sampler="balanced")
        Traceback (most recent call last):
            ...
        prefopt.errors.UserError: 2 options of PreferenceConfig are not valid:
          betta is not an option; did you mean beta?
          sampler is 'balanced'; expected one of label_balanced, random, sequential; did you mean label_balanced?
    """

    method: str = "kto"
    beta: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    kl_estimator: str | None = None
    kl_decay: float | None = None
    loss_aversion: float | None = None
    alpha: float | None = None
    kappa: float | None = None
    win_weighting: str | None = None
    decision_weighting: str | None = None
    decision_clip: tuple[float, float] | None = None
    odds_weight: float | None = None
    main_bound: float | None = None
    odds_bound: float | None = None
    shift: str | None = None
    shift_decay: float | None = None
    shift_bound: float | None = None
    shift_start: float | str | None = None
    shift_ramp: float | None = None
    label_smoothing: float | None = None
    robust: bool | None = None
    gamma: float | None = None
    sampler: str | None = None
    max_length: int | None = 1024
    on_bad_row: str = "stop"
    disable_dropout: bool = True
    precompute_ref_logps: bool = False
    precompute_batch_size: int | None = None
    reference_cache_dir: str | None = None
    backend: str = "auto"
    learning_rate: float = field(default=1e-6)
    logging_nan_inf_filter: bool = field(default=False)

    def __new__(cls, *args: Any, **kwargs: Any):
        # Before the generated __init__, which would stop at the first unknown name and suggest nothing.
        if args or kwargs:  # neither: being copied or unpickled
            names = [option.name for option in fields(cls) if option.init]
            given = dict(zip(names, args, strict=False)) | kwargs
            _raise_for(cls, unknown(given, names) + problems(_with_defaults(cls, given)))
        return super().__new__(cls)

    def __post_init__(self):
        self.check()
        for name, value in in_force(vars(self)).items():
            setattr(self, name, value)
        if self.sampler is None:
            self.sampler = "label_balanced" if self.spec.data == RATED else "random"
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
        _raise_for(type(self), problems(vars(self)))

    @property
    def spec(self) -> Method:
        """The method's row in the table of methods."""
        return METHODS[self.method]

    @property
    def needs_kl(self) -> bool:
        """Whether the loss has KTO's reference point to estimate."""
        return "kl_estimator" in self.spec.options

    @property
    def needs_window(self) -> bool:
        """Whether the loss of a row depends on the scores of all rows of its optimizer step."""
        return (self.shift or "off") != "off" or (self.decision_weighting or "off") != "off"


def _with_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {option.name: option.default if option.default is not MISSING else None for option in fields(cls)}
    return defaults | given


def _raise_for(cls: type, found: list[str]) -> None:
    if found:
        count = "1 option" if len(found) == 1 else f"{len(found)} options"
        verb = "is" if len(found) == 1 else "are"
        listed = "\n  ".join(found)
        raise UserError(f"{count} of {cls.__name__} {verb} not valid:\n  {listed}")
