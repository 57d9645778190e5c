"""Settings, data, memory and commands of a run, for page and card."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from prefopt.options import options_of
from prefopt.report.read import Run
from prefopt.report.score import is_number

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".jsonl", ".parquet", ".json", ".yaml")
# Shown with the options of the method, if set.
TRAINING = (
    "sampler max_length learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm bf16 fp16 activation_checkpointing disable_dropout backend seed data_seed"
).split()
LORA = {
    "LoRA rank": "r",
    "LoRA alpha": "lora_alpha",
    "LoRA dropout": "lora_dropout",
    "LoRA layers": "target_modules",
    "LoRA, also trained whole": "modules_to_save",
    "rank-stabilised LoRA": "use_rslora",
    "DoRA": "use_dora",
}
COUNT_NAMES = {
    "rows": "rows used",
    "format": "form of the rows",
    "bad": "bad rows skipped",
    "truncated": "answers cut at max_length",
    "groups": "different prompts",
}
MEMORY = {"before": "before training", "peak": "at the peak", "after": "after training"}


def hub_id(name: object) -> str | None:
    """``name`` if it is a hub id, "owner/model"; None for a file, a folder or anything else.

    Example:
        >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("/models/qwen"), hub_id("data/rows.jsonl")
        ('Qwen/Qwen3-0.6B', None, None)
    """
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or name.endswith(FILES):
        return None
    return None if Path(name).exists() else name


def main_settings(run: Run) -> dict[str, Any]:
    """The method with all its options, and the options of the optimisation; without those that are None or unused."""
    config = _dict(run.record.get("config"))
    names = [*options_of("loss"), *TRAINING]
    found = {name: config[name] for name in names if _is_set(name, config.get(name))}
    sizes = [config.get("per_device_train_batch_size"), config.get("gradient_accumulation_steps")]
    sizes.append(run.record.get("world_size", 1))
    if all(isinstance(size, int) for size in sizes):
        found["processes"] = sizes[-1]
        found["rows or pairs in an optimizer step"] = math.prod(sizes)
    return found


def other_settings(run: Run) -> dict[str, Any]:
    """The rest of the trainer's configuration."""
    main = main_settings(run)
    config = _dict(run.record.get("config"))
    return {key: value for key, value in config.items() if key not in main and value is not None}


def model_settings(run: Run) -> dict[str, Any]:
    """The model and its adapter; no local path."""
    model = _dict(run.record.get("model"))
    found = {f"model: {key.replace('_', ' ')}": value for key, value in model.items() if value is not None}
    for key in ("revision", "dtype", "quantization"):
        if run.option("model", key) is not None:
            found[f"model: {key}"] = run.option("model", key)
    kind = _dict(run.record.get("reference")).get("kind")
    if kind is not None:
        found["reference model"] = kind
    lora = {label: run.adapter.get(key) for label, key in LORA.items()}
    return found | {label: value for label, value in lora.items() if value is not None and value is not False}


def data_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Head and body of the counts of each set of rows that training used; a fingerprint by its first 12 characters."""
    sets = {name: counts for name, counts in _dict(run.record.get("data")).items() if isinstance(counts, dict)}
    names = dict.fromkeys(name for counts in sets.values() for name in counts)
    body = [
        [COUNT_NAMES.get(name, name.replace("_", " ")), *(counts.get(name, "") for counts in sets.values())]
        for name in names
    ]
    for row in body:
        if row[0] == "fingerprint":
            row[1:] = [str(value)[:12] for value in row[1:]]
    return ["data", *sets], body


def bad_rows(run: Run) -> list[list[Any]]:
    """File, line and reason of the first rows that were skipped."""
    return [[row.get(key, "") for key in ("file", "line", "reason")] for row in run.bad_rows]


def versions(run: Run) -> dict[str, Any]:
    """Of Python and of the packages that determine the numbers."""
    return _dict(run.record.get("versions"))


def source_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Head and body of the sources of the built folder that the data came from; no path of a local file."""
    body = [
        [source.get("name"), source.get("kind"), hub_id(source.get("path")) or "a local file"]
        + [source.get("revision"), source.get("rows")]
        for source in _dicts(run.manifest.get("sources"))
    ]
    return ["source", "schema", "from", "revision", "rows"], body


def resumes(run: Run) -> list[list[str]]:
    """When a run was resumed, from which step, and which options changed; one row for each time."""
    return [
        [
            str(row.get("at", "")),
            format_value(row.get("from_step", "")),
            ", ".join(
                f"{key}: {json.dumps(before)} to {json.dumps(now)}"
                for key, (before, now) in _dict(row.get("changed")).items()
            )
            or "nothing",
        ]
        for row in _dicts(run.record.get("resumes"))
    ]


def memory(run: Run) -> dict[str, str]:
    """Memory before, during and after training, in MiB, and of which device."""
    found = {}
    for when, label in MEMORY.items():
        used, reserved = (_mebibytes(run, f"{kind}{when}_bytes") for kind in ("", "reserved_"))
        if used:
            found[label] = f"{used} ({reserved} reserved)" if reserved else used
    if found:
        about = {"of": "what", "peak since": "peak_since", "device": "device"}
        texts = {label: run.memory.get(key) for label, key in about.items()}
        found |= {label: text for label, text in texts.items() if isinstance(text, str)}
        total = _mebibytes(run, "total_bytes")
        found |= {"device's memory": total} if total else {}
    return found


def commands(run: Run) -> list[str]:
    """How to train and evaluate again. The run is called RUN; its recipe has every option spelled out."""
    found = []
    if run.recipe:
        found.append("prefopt train RUN/recipe.yaml --training.output_dir NEW_RUN")
    for suite in run.suites:
        words = ["prefopt", "eval", "NEW_RUN", "--suite", suite.name]
        for name, value in suite.settings.items():
            if (name, value) not in (("batch_size", 8), ("seed", 0)):  # the defaults
                words += [f"--{name.replace('_', '-')}", _without_folder(name, value)]
        found.append(shlex.join(words))
    return found


def format_value(value: Any) -> str:
    """A setting as text: large numbers with commas, lists in one line, yes and no, nothing for None.

    Example:
        >>> format_value(968768), format_value(0.5), format_value(True), format_value(["v_proj", "q_proj"])
        ('968,768', '0.5', 'yes', 'q_proj, v_proj')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else "not a finite number"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        numbers = all(is_number(one) for one in value)  # in their order: low and high
        return ", ".join(format_value(one) for one in (value if numbers else sorted(value, key=str)))
    return str(value)


def _mebibytes(run: Run, key: str) -> str:
    value: Any = run.memory.get(key)
    return f"{value / 2**20:,.0f} MiB" if is_number(value) else ""


def _is_set(name: str, value: Any) -> bool:
    return value is not None and value != {} and not (name == "max_steps" and value == -1)


def _without_folder(name: str, value: Any) -> str:
    """A local path without its folder, which does not exist elsewhere."""
    local = name in ("data", "base", "tasks_dir") and hub_id(value) is None
    return Path(str(value)).name if local else str(value)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
