"""The demo from end to end: build, fine-tune, sample, train by ``run_recipe``, sample again, report."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefopt.data import load_rows, tokenize_rows
from prefopt.data.toy.rows import pair_rows, split_questions, unpaired_rows
from prefopt.data.toy.rule import RULE, judge, language
from prefopt.demo.model import build_model, build_tokenizer, supervised_fine_tune
from prefopt.demo.sampling import TEMPERATURE, sample_answers
from prefopt.errors import UserError
from prefopt.files import is_unused, only_writer
from prefopt.recipe import make_recipe, run_recipe
from prefopt.report import write_report
from prefopt.report.statistics import paired_difference, wilson
from prefopt.train.methods import ANSWERS, METHODS, PAIRS, UNPAIRED

MARKER = "demo.json"  # says that a folder is a demo's, and whether it is complete
OWN_ENTRIES = ("base", "data", "run")
MAX_LENGTH = 128
SFT_ROWS_PER_QUESTION, SFT_GOOD_SHARE, SFT_EPOCHS = 3, 0.4, 12
# Few in the wrong language: a model this small takes more from them than a habit, it begins to mix the two.
SFT_BAD_KINDS = ("rude",) * 3 + ("evasive",) * 3 + ("language",)
# What each method needs to move so small a model within a minute, beside its defaults. ipo aims at a quarter of a nat
# per token: a further target spoils the good answers too. So does a larger step of simpo, which nothing anchors.
LOSSES: dict[str, dict] = {
    "kto": {"beta": 0.5},
    "apo_zero": {"beta": 0.5},
    "enhanced_kto": {"beta": 0.5},
    "bco": {"beta": 0.5},
    "dpo": {"beta": 0.5},
    "ipo": {"beta": 2.0},
    "cpo": {"beta": 0.5},
    "simpo": {"gamma": 0.5},
    "orpo": {"odds_weight": 1.0},
    "sft": {},
}
LEARNING_RATE, LEARNING_RATES = 1e-3, {"simpo": 4e-4}
TRAINED_ON = {
    UNPAIRED: "thumbs up and thumbs down",
    PAIRS: "pairs of a better and a worse answer",
    ANSWERS: "answers, those with a thumbs-up alone",
}
TOY = (
    "This is a toy: a model of under a million parameters, built and trained in minutes on a few dozen topics, to show "
    "that the whole path works. It knows nothing else, and its scores say nothing about larger models."
)


def run_demo(out: str | Path, seed: int = 0, method: str = "kto") -> Path:
    """Build a tiny model and data, train, and leave a report: minutes on two CPU cores, no network.

    ``out`` then holds ``base`` (model and tokenizer before training), ``data`` (the rows) and ``run`` (adapter,
    metrics, samples, plots, model card, report). An earlier demo there is replaced.

    Args:
        out: folder, new, empty or of an earlier demo.
        seed: from 0; decides the split of the questions, the rows, the weights and the samples.
        method: one of ``prefopt.train.methods.METHODS``.

    Returns:
        Path of report.html.

    Raises:
        UserError: ``out`` holds something else, ``seed`` is out of range, or there is no such method.
        KeyboardInterrupt: after what had been written is removed.
    """
    out = Path(out)
    with only_writer(out, "--out"):
        _check(out, seed, method)
        _clear(out)
        _mark(out, "unfinished", seed)
        report = _run_alone(out, seed, method)
        _mark(out, "finished", seed)
    return report


def _run_alone(out: Path, seed: int, method: str) -> Path:
    threads = torch.get_num_threads()
    # One thread is as fast for matrices this small, is not slowed by a busy machine, and gives the same bits anywhere.
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its former name; nothing a reader of the demo could act on
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return _run(out, seed, method)
    except (KeyboardInterrupt, SystemExit):
        _clear(out)
        raise
    finally:
        torch.set_num_threads(threads)


def recipe_content(out: Path, seed: int, method: str = "kto") -> dict:
    """The recipe of the demo's training, as ``prefopt train`` would read it from a file."""
    out = out.resolve()  # so that recipe and adapter can be used from any folder
    return {
        "model": {"path": f"{out / 'base'}"},
        "data": {
            "path": f"{out / 'data' / 'train.jsonl'}",
            "eval_path": f"{out / 'data' / 'held_out.jsonl'}",
            "max_length": MAX_LENGTH,
        },
        "lora": {"r": 16, "alpha": 32},
        "loss": {"method": method, **LOSSES[method]},
        "training": {
            "output_dir": f"{out / 'run'}",
            "learning_rate": LEARNING_RATES.get(method, LEARNING_RATE),
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "per_device_eval_batch_size": 32,
            "warmup_steps": 0.1,
            "logging_steps": 2,
            "save_strategy": "no",
            "seed": seed,
            "use_cpu": True,
        },
    }


def _check(out: Path, seed: int, method: str) -> None:
    if method not in METHODS:
        raise UserError(f"--method is {method!r}; expected one of {', '.join(METHODS)}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; expected a number from 0 to {2**32 - 1}")
    if out.is_dir() and not is_unused(out) and not _is_demo(out):
        raise UserError(f"--out {out} has files in it that are not a demo's; choose another folder")


def _clear(out: Path) -> None:
    """Remove what a demo writes."""
    if not _is_demo(out):
        return
    for name in OWN_ENTRIES:
        shutil.rmtree(out / name, ignore_errors=True)
    (out / MARKER).unlink()


def _is_demo(out: Path) -> bool:
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("prefopt") == "demo"


def _mark(out: Path, status: str, seed: int) -> None:
    _write_json(out / MARKER, {"prefopt": "demo", "status": status, "seed": seed})


def _run(out: Path, seed: int, method: str) -> Path:
    title, kind = METHODS[method].title, METHODS[method].data
    seen, held_out = split_questions(seed)
    questions = [question.text for question in held_out]
    rows = {
        "sft.jsonl": unpaired_rows(seen, SFT_ROWS_PER_QUESTION, SFT_GOOD_SHARE, "sft", seed, SFT_BAD_KINDS),
    }
    for name, questions_of, side in (("train", seen, "train"), ("held_out", held_out, "held out")):
        rows[f"{name}.jsonl"] = (
            pair_rows(questions_of, side, seed) if kind == PAIRS else unpaired_rows(questions_of, 1, 0.5, side, seed)
        )
    for name, content in rows.items():
        _write_jsonl(out / "data" / name, content)

    print(f"1/4 a tiny model learns to answer, well and badly, from {len(rows['sft.jsonl'])} rows")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    encoded = tokenize_rows(load_rows(out / "data" / "sft.jsonl"), tokenizer, max_length=MAX_LENGTH)
    supervised_fine_tune(model, tokenizer, encoded, seed=seed, epochs=SFT_EPOCHS)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    print(f"2/4 it answers {len(questions)} held-out questions before {title}")
    before = sample_answers(model, tokenizer, questions, seed=seed, desc=f"before {title}")

    print(f"3/4 {title} on {len(rows['train.jsonl'])} {TRAINED_ON[kind]}")
    run = run_recipe(make_recipe(recipe_content(out, seed, method), name="demo"))

    print(f"4/4 it answers the same {len(questions)} questions after {title}")
    # from the files, as a user would, so that what was saved is what is judged
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, run)
    after = sample_answers(trained, tokenizer, questions, seed=seed, desc=f"after {title}")
    samples = [_sample(*texts) for texts in zip(questions, before, after, strict=True)]
    _write_json(run / "samples.json", samples)
    _write_json(run / "summary.json", _summary(samples, title))
    report = write_report(run)
    print(_closing(samples))
    return report


def _sample(question: str, before: str, after: str) -> dict:
    judged_before, judged_after = judge(question, before), judge(question, after)
    return {
        "prompt": question,
        "before": before,
        "after": after,
        "before_ok": judged_before.ok,
        "after_ok": judged_after.ok,
        "before_reason": judged_before.reason,
        "after_reason": judged_after.reason,
    }


def _summary(samples: list[dict], title: str) -> dict:
    n = len(samples)
    return {
        "title": f"{title} demo",
        "metric": f"share of thumbs-up answers to held-out questions, sampled at temperature {TEMPERATURE}",
        "kind": "share",
        "before": sum(sample["before_ok"] for sample in samples) / n,
        "after": sum(sample["after_ok"] for sample in samples) / n,
        "n": n,
        "how": f"One answer sampled at temperature {TEMPERATURE} to each question; no question was trained on, though "
        f"its topic was. {RULE}",
        "note": TOY,
    }


def _closing(samples: list[dict]) -> str:
    """What the terminal shows at the end: the result and one sample of each language, one text a line."""
    n = len(samples)
    ups = {key: sum(sample[f"{key}_ok"] for sample in samples) for key in ("before", "after")}
    asked = f"{n} held-out questions, sampled at temperature {TEMPERATURE}"
    lines = ["", f"Thumbs-up answers to {asked} (95 % intervals):"]
    for key, count in ups.items():
        low, high = wilson(count, n)
        lines.append(f"  {key:<6} {count / n:6.1%}   ({low:.1%} to {high:.1%})")
    change, low, high = paired_difference(
        [sample["before_ok"] for sample in samples], [sample["after_ok"] for sample in samples]
    )
    lines.append(f"  change {100 * change:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    improved = [sample for sample in samples if sample["after_ok"] and not sample["before_ok"]]
    for lang in ("en", "ar"):
        for sample in [one for one in improved if language(one["prompt"]) == lang][:1]:
            lines += ["", f"  question  {sample['prompt']}"]
            lines += [f"  before    {sample['before']}", f"  after     {sample['after']}"]
    return "\n".join([*lines, ""])


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
