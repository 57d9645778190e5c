"""Token ids of checked rows, equal to those of TRL 1.16's KTOTrainer, with every loss of tokens reported."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from prefopt.data.read import ON_BAD_ROW, LoadedRows
from prefopt.data.rows import Text, bad_rows_error, common_prefix
from prefopt.data.template import TemplateTimeout, render
from prefopt.errors import BadRow, DataError, UserError

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # part of every fingerprint: raise it when the ids of the same rows change


@dataclass(frozen=True)
class Tokenized:
    """Token ids of the rows that can be trained on.

    Attributes:
        dataset: columns ``prompt_ids``; ``completion_ids``, with the end of turn and not cut to ``max_length`` (the
            collator cuts, because a mismatched prompt may leave more room); ``label``; ``group``; ``row``, the position
            in ``LoadedRows.rows``; ``line``, the line in the source.
        bad: the rows that could not be tokenised.
        counts: those of ``LoadedRows``, updated, and ``truncated`` (rows that lose the end of their completion),
            ``truncated_tokens``, ``prompt_cut`` (rows whose prompt, rendered alone, ends in other tokens than in the
            whole row), ``prompt_tokens`` and ``completion_tokens`` (within ``max_length``).
        fingerprint: depends on the rows, the tokenizer, its template and ``max_length`` only.
        max_length: tokens per sequence.
        name: of the source.
        conversational: whether the rows were chat messages.
    """

    dataset: Dataset
    bad: list[BadRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    max_length: int | None = None
    name: str = ""
    conversational: bool = True


def tokenize_rows(
    loaded: LoadedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    on_bad_row: str = "stop",
    chat_template_kwargs: Mapping | None = None,
) -> Tokenized:
    """Encode every row and split it into prompt and completion.

    The tokenizer's template renders chat rows; text rows end in the EOS token. The completion begins where the ids of
    the whole row differ from those of the prompt (with the generation prompt).

    Args:
        loaded: from ``load_rows``.
        tokenizer: of the model to be trained.
        max_length: tokens per sequence. A row whose prompt fills it is bad; a longer row loses its end.
        on_bad_row: "stop" raises ``DataError``; "skip" omits the rows and lists them in ``bad``.
        chat_template_kwargs: arguments of the template, for example ``{"enable_thinking": False}``.

    Raises:
        DataError: bad rows, no rows left, chat rows without a chat template, text rows without an EOS token.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row is {on_bad_row!r}; expected {' or '.join(ON_BAD_ROW)}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2 (a prompt and an answer)")
    if loaded.conversational and not tokenizer.chat_template:
        raise DataError(f"{loaded.name} holds chat messages, but the tokenizer has no chat template")
    if not loaded.conversational and tokenizer.eos_token is None:
        raise DataError(f"{loaded.name} holds text, but the tokenizer has no EOS token to end it with")
    encode = Encode(tokenizer, loaded.conversational, dict(chat_template_kwargs or {}))
    key = _key(loaded.fingerprint, _tokenizer_key(tokenizer), encode.template_kwargs)
    columns = ["prompt", "completion", "line"]
    try:
        encoded = loaded.rows.select_columns(columns).map(
            encode,
            batched=True,
            remove_columns=columns,
            features=_FEATURES,
            desc=f"Tokenizing {loaded.name}",
            **_cache(key),
        )
    except TemplateTimeout as error:  # it may time out on every row, so it is not retried
        raise DataError(f"{loaded.name}:{encode.line}: {error}") from None
    return _usable(loaded, encoded, max_length, on_bad_row, _key(key, max_length))


def token_lengths(rows: Dataset, side: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt and completion, two (n,) int64 arrays; ``side`` prefixes the columns of a pair."""
    names = [f"{side}prompt_ids", f"{side}completion_ids"]
    table = rows.with_format("arrow", columns=names)[:]
    prompt, completion = (pyarrow.compute.list_value_length(table[name]).to_numpy().astype(np.int64) for name in names)
    return prompt, completion


def by_length(rows: Dataset) -> list[int]:
    """The rows or pairs by length, longest first."""
    sides = [side for side in ("", "chosen_", "rejected_") if f"{side}prompt_ids" in rows.column_names]
    lengths = np.sum([token_lengths(rows, side) for side in sides], axis=(0, 1))
    return np.argsort(-lengths, kind="stable").tolist()


def token_counts(rows: Dataset, max_length: int | None, side: str = "") -> dict[str, int]:
    """Tokens within ``max_length``, and what it truncates."""
    prompt, completion = token_lengths(rows, side)
    lost = np.maximum(prompt + completion - _limit(max_length), 0)
    return {
        "truncated": int((lost > 0).sum()),
        "truncated_tokens": int(lost.sum()),
        "prompt_tokens": int(prompt.sum()),
        "completion_tokens": int((completion - lost).sum()),
    }


def _limit(max_length: int | None) -> int:
    return np.iinfo(np.int64).max if max_length is None else max_length


def _usable(
    loaded: LoadedRows, encoded: Dataset, max_length: int | None, on_bad_row: str, fingerprint: str
) -> Tokenized:
    """Omit the rows that cannot be trained on, and count the rest."""
    prompt, _ = token_lengths(encoded)
    bad, good = [], []
    lines = loaded.rows["line"][:]
    for row, problem in enumerate(encoded["problem"]):
        if not problem and prompt[row] >= _limit(max_length):
            problem = f"prompt has {prompt[row]} tokens, max_length is {max_length}: no room for an answer"
        if problem:
            bad.append(BadRow(loaded.name, lines[row], problem))
        else:
            good.append(row)
    if bad and on_bad_row == "stop":
        raise bad_rows_error(bad, len(encoded), loaded.name)
    if not good:
        raise DataError(f"{loaded.name} has no rows to train on; all {len(bad)} are bad, the first: {bad[0]}", bad)
    dataset = datasets.concatenate_datasets(
        [
            encoded.select_columns(["prompt_ids", "completion_ids"]),
            loaded.rows.select_columns(["label", "group", "line"]),
            Dataset.from_dict({"row": range(len(encoded))}),
        ],
        axis=1,
    )
    if bad:
        dataset = dataset.select(good)
    cut = int(np.asarray(encoded["prompt_cut"][:])[good].sum())
    if cut:
        logger.warning(
            "%s: in %d of %d rows the prompt alone is rendered differently from the same prompt with its answer; "
            "the tokens that differ are left out of the prompt",
            loaded.name,
            cut,
            len(good),
        )
    desirable = sum(dataset["label"])
    counts = loaded.counts | token_counts(dataset, max_length)
    counts |= {
        "rows": len(good),
        "desirable": desirable,
        "undesirable": len(good) - desirable,
        "groups": len(set(dataset["group"])),
        "bad": len(loaded.bad) + len(bad),
        "prompt_cut": cut,
    }
    return Tokenized(dataset, bad, counts, fingerprint, max_length, loaded.name, loaded.conversational)


_FEATURES = Features(
    {
        "prompt_ids": datasets.List(Value("int32")),
        "completion_ids": datasets.List(Value("int32")),
        "prompt_cut": Value("bool"),
        "problem": Value("string"),
    }
)


class Encode:
    """Encodes a batch of rows; a row that the template refuses gets a ``problem``.

    ``line`` is the line of the last row rendered, if the batch has a column of lines.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool, template_kwargs: dict[str, Any]):
        self.tokenizer, self.chat, self.template_kwargs = tokenizer, chat, template_kwargs
        self.line: int | None = None

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rendered = []
        lines = batch.get("line", [None] * len(batch["prompt"]))
        for prompt, completion, self.line in zip(batch["prompt"], batch["completion"], lines, strict=True):
            rendered.append(self.texts(prompt, completion))
        prompts, wholes = (self.ids([texts[side] for texts in rendered]) for side in (0, 1))
        out: dict[str, list] = {name: [] for name in _FEATURES}
        for prompt, whole, (_, _, problem) in zip(prompts, wholes, rendered, strict=True):
            length = common_prefix(prompt, whole)
            if not problem and length == 0:
                problem = "the prompt's first token changes once the completion follows it"
            if not problem and length == len(whole):
                problem = "completion has no tokens once it is rendered"
            out["prompt_ids"].append(whole[:length])
            out["completion_ids"].append(whole[length:])
            out["prompt_cut"].append(length < len(prompt))
            out["problem"].append(problem)
        return out

    def texts(self, prompt: Text, completion: Text) -> tuple[str, str, str]:
        """(prompt, prompt and completion, problem) as text."""
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            eos = self.tokenizer.eos_token
            return prompt, prompt + completion + ("" if completion.endswith(eos) else eos), ""
        assert isinstance(completion, list)
        try:
            opened = render(self.tokenizer, prompt, self.template_kwargs, add_generation_prompt=True)
            return opened, render(self.tokenizer, prompt + completion, self.template_kwargs), ""
        except TemplateTimeout:
            raise
        except UserError as error:
            return "", "", str(error)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of rendered texts."""
        # a template writes special tokens itself; for text the tokenizer adds them
        encoded = self.tokenizer(list(texts), add_special_tokens=not self.chat, verbose=False)
        return encoded["input_ids"]


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary, merges, normaliser, special tokens and template."""
    core: Any
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("padding"), core.pop("truncation")  # state of the last call
    else:
        core = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _key(core, tokenizer.special_tokens_map, tokenizer.chat_template)


def _key(*parts: object) -> str:
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cache(key: str) -> dict[str, Any]:
    """Arguments of ``Dataset.map``: one file per key in the cache of datasets, unless caching is off."""
    if not datasets.is_caching_enabled():
        return {"keep_in_memory": True, "new_fingerprint": key[:32]}
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefopt"
    folder.mkdir(parents=True, exist_ok=True)
    return {"cache_file_name": str(folder / f"tokens-v2-{key[:32]}.arrow"), "new_fingerprint": key[:32]}
