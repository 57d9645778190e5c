"""Token ids of checked rows: the ids that TRL 1.16's KTOTrainer gives the same rows, but nothing leaves unreported."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from prefopt.data.read import ON_BAD_ROW, LoadedRows
from prefopt.data.rows import BadRow, DataError, bad_rows_error
from prefopt.data.template import TemplateTimeout, render
from prefopt.errors import UserError

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # part of the cache key: raise it when the ids of the same rows change


@dataclass(frozen=True)
class Tokenized:
    """Token ids of the rows that can be trained on, and what was found on the way.

    ``dataset`` has the columns ``prompt_ids``, ``completion_ids`` (with the end of turn, and not yet cut to
    ``max_length``: the collator cuts, because a mismatched prompt may leave it more room), ``label``, ``group``,
    ``row``, the position in ``LoadedRows.rows``, and ``line``, the line in the source ``name``. ``bad`` has the rows
    that had to leave here. ``counts`` is that of ``LoadedRows``, with ``rows``, ``desirable``, ``undesirable``,
    ``groups`` and ``bad`` brought up to date, and ``truncated`` (rows that lose the end of their completion),
    ``truncated_tokens``, ``prompt_cut`` (rows whose prompt ends in tokens that the rendered conversation has not),
    ``prompt_tokens`` and ``completion_tokens`` (within ``max_length``). ``fingerprint`` depends on the rows, the
    tokenizer, its template and ``max_length`` alone. ``conversational`` is whether the rows were chat messages.
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
    """Encode every row and find where its completion begins.

    Chat rows are rendered by the tokenizer's template, text rows end in the EOS token. The completion begins where the
    ids of the prompt (with the generation prompt) and those of the whole row part.

    Args:
        loaded: what ``load_rows`` returned.
        tokenizer: of the model to be trained.
        max_length: tokens per sequence; a prompt that fills it makes a bad row, a longer row loses its end, counted.
        on_bad_row: "stop" raises ``DataError``; "skip" leaves the rows out and lists them in ``bad``.
        chat_template_kwargs: passed to the template, for example ``{"enable_thinking": False}``.

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
    except TemplateTimeout as error:  # it may do so on every row: none of them is tried again
        raise DataError(f"{loaded.name}:{encode.line}: {error}") from None
    return _judged(loaded, encoded, max_length, on_bad_row, _key(key, max_length))


def _judged(
    loaded: LoadedRows, encoded: Dataset, max_length: int | None, on_bad_row: str, fingerprint: str
) -> Tokenized:
    """Leave out the rows that cannot be trained on, and count what the rest loses."""
    columns = encoded.with_format("numpy")
    prompt, completion = columns["prompt_length"][:], columns["completion_length"][:]  # (n,)
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    bad, good = [], []
    lines = loaded.rows["line"][:]
    for row, problem in enumerate(encoded["problem"]):
        if not problem and prompt[row] >= limit:
            problem = f"prompt has {prompt[row]} tokens, max_length is {max_length}: no room for an answer"
        if problem:
            bad.append(BadRow(loaded.name, lines[row], problem))
        else:
            good.append(row)
    if bad and on_bad_row == "stop":
        raise bad_rows_error(bad, len(encoded), loaded.name)
    if not good:
        raise DataError(
            f"{loaded.name} has no rows to train on; all {len(bad)} are bad, the first: {bad[0]}",
            bad,
        )
    prompt, completion = prompt[good], completion[good]
    lost = np.maximum(prompt + completion - limit, 0)
    labels = np.asarray(loaded.rows["label"][:])[good]
    cut = int(columns["prompt_cut"][:][good].sum())
    if cut:
        logger.warning(
            "%s: in %d of %d rows the prompt alone is rendered differently from the same prompt with its answer; "
            "the tokens that differ are left out of the prompt",
            loaded.name,
            cut,
            len(good),
        )
    counts = loaded.counts | {
        "rows": len(good),
        "desirable": int(labels.sum()),
        "undesirable": int((~labels).sum()),
        "groups": len(set(np.asarray(loaded.rows["group"][:])[good].tolist())),
        "bad": len(loaded.bad) + len(bad),
        "truncated": int((lost > 0).sum()),
        "truncated_tokens": int(lost.sum()),
        "prompt_cut": cut,
        "prompt_tokens": int(prompt.sum()),
        "completion_tokens": int((completion - lost).sum()),
    }
    kept = encoded.select_columns(["prompt_ids", "completion_ids"])
    for name in ("label", "group", "line"):
        kept = kept.add_column(name, loaded.rows[name][:])
    kept = kept.add_column("row", list(range(len(kept))))
    if bad:
        kept = kept.select(good)
    return Tokenized(kept, bad, counts, fingerprint, max_length, loaded.name, loaded.conversational)


_FEATURES = Features(
    {
        "prompt_ids": datasets.List(Value("int32")),
        "completion_ids": datasets.List(Value("int32")),
        "prompt_length": Value("int64"),
        "completion_length": Value("int64"),
        "prompt_cut": Value("bool"),
        "problem": Value("string"),
    }
)


class Encode:
    """A batch of rows to ids; a row that the template refuses gets a ``problem`` instead.

    ``line`` is that of the last row that was rendered, where the batch has a column of lines.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool, template_kwargs: dict):
        self.tokenizer, self.chat, self.template_kwargs = tokenizer, chat, template_kwargs
        self.line: int | None = None

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        prompts, wholes, problems = [], [], []
        lines = batch.get("line", [None] * len(batch["prompt"]))
        rows = zip(batch["prompt"], batch["completion"], lines, strict=True)
        for prompt, completion, self.line in rows:
            text, whole, problem = self.texts(prompt, completion)
            prompts.append(text)
            wholes.append(whole)
            problems.append(problem)
        out: dict[str, list] = {name: [] for name in _FEATURES}
        for prompt, whole, problem in zip(self.ids(prompts), self.ids(wholes), problems, strict=True):
            length = common_prefix(prompt, whole)
            if not problem and length == 0:
                problem = "the prompt's first token changes once the completion follows it"
            if not problem and length == len(whole):
                problem = "completion has no tokens once it is rendered"
            out["prompt_ids"].append(whole[:length])
            out["completion_ids"].append(whole[length:])
            out["prompt_length"].append(length)
            out["completion_length"].append(len(whole) - length)
            out["prompt_cut"].append(length < len(prompt))
            out["problem"].append(problem)
        return out

    def texts(self, prompt: str | list, completion: str | list) -> tuple[str, str, str]:
        """(prompt, prompt and completion, problem)"""
        if not self.chat:
            eos = self.tokenizer.eos_token
            return prompt, prompt + completion + ("" if completion.endswith(eos) else eos), ""
        try:
            asked = render(self.tokenizer, prompt, self.template_kwargs, add_generation_prompt=True)
            return asked, render(self.tokenizer, prompt + completion, self.template_kwargs), ""
        except TemplateTimeout:
            raise
        except UserError as error:
            return "", "", str(error)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of rendered texts, one list each."""
        # A template writes its own special tokens; text gets those that the tokenizer adds.
        encoded = self.tokenizer(texts, add_special_tokens=not self.chat, verbose=False)
        return encoded["input_ids"]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the start.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the ids depend on: vocabulary, merges, normaliser, special tokens and template."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("padding"), core.pop("truncation")  # traces of the last call
    else:
        core = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _key(core, tokenizer.special_tokens_map, tokenizer.chat_template)


def _key(*parts: object) -> str:
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cache(key: str) -> dict:
    """Arguments of ``Dataset.map``: one file per key under the cache of datasets, unless caching is switched off."""
    if not datasets.is_caching_enabled():
        return {"keep_in_memory": True, "new_fingerprint": key[:32]}
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefopt"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "cache_file_name": str(folder / f"tokens-{key[:32]}.arrow"),
        "new_fingerprint": key[:32],
    }
