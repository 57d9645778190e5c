"""The arithmetic of a comparison: equal sequences, medians, efficiency, no figures of time below 50 steps."""

import copy
import csv
import io

import numpy as np
import pytest
from PIL import Image

from prefopt.compare.notes import notes_of
from prefopt.compare.plan import (
    FEWEST_TIMED,
    WARMUP,
    Plan,
    loss_of,
    recipe_of,
    sequences_of,
    steps_of,
)
from prefopt.compare.plots import draw
from prefopt.compare.report import as_csv, markdown, page, terminal
from prefopt.compare.rows import as_unpaired, held_out_of, rows_of, sequences_of_steps
from prefopt.compare.summary import (
    MEASURES,
    TOO_FEW,
    efficiencies,
    lines_of,
    yardstick_of,
)
from prefopt.data import load_rows, tokenize_rows
from prefopt.data.pairs import tokenize_pairs
from prefopt.errors import UserError
from prefopt.recipe import make_recipe
from prefopt.report.score import BASE, CHANGE, RUN
from prefopt.train.methods import METHODS
from support.tiny_models import make_rows, make_tokenizer
from support.trainer import make_pairs

SEEDS = (42, 43, 44)
METHODS_HERE = ("kto", "dpo", "sft")
# (ms of a step, tokens in it, peak bytes, first loss, last loss, margin, accuracy, likelihood) by seed
RUNS = {
    "kto": (
        (100.0, 400, 3 * 2**20, 0.5, 0.4, 1.0, 0.7, -2.0),
        (200.0, 400, 4 * 2**20, 0.5, 0.3, 3.0, 0.9, -1.0),
        (400.0, 400, 8 * 2**20, 0.5, 0.2, 2.0, 0.8, -1.5),
    ),
    "dpo": ((50.0, 400, 2**20, 0.7, 0.6, 0.001, 0.5, -2.0),) * 3,
    "sft": ((50.0, 100, 2**20, 4.0, 3.0, 0.0, 0.5, -0.5),) * 3,
}


def content_of(timed: int) -> dict:
    """What compare.json would have."""
    runs = []
    for place, seed in enumerate(SEEDS):
        for method in METHODS_HERE:
            ms, tokens, peak, first, last, margin, accuracy, likelihood = RUNS[method][place]
            # a step in ten takes three times as long, which moves the mean and not the median
            times = [3 * ms if step % 10 == 0 else ms for step in range(timed)]
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "steps": WARMUP + timed,
                    "device": "CPU",
                    "threads": 1,
                    "versions": {"torch": "2"},
                    "step_ms": times,
                    "train_s": sum(times) / 1000,
                    "tokens": tokens * timed,
                    "tokens_in_all": tokens * (WARMUP + timed),
                    "sequences": 8 * timed,
                    "sequences_in_all": 8 * (WARMUP + timed),
                    "peak_bytes": peak,
                    "peak": "resident, since training began",
                    "losses": [first, last],
                    "scores": [
                        score("rewards", "margin", RUN, margin, low=margin - 0.5),
                        score("rewards", "accuracy, pairs", RUN, accuracy),
                        score("likelihood", "desirable, per token", RUN, likelihood),
                        score("likelihood", "desirable, per token", BASE, -2.5),
                        score("likelihood", "desirable, per token", CHANGE, likelihood + 2.5, low=0.1),
                    ],
                }
            )
    return {
        "recipe": "recipes/مقارنة الطرق.yaml",
        "model": "base",
        "changes": [],
        "settings": {"steps": WARMUP + timed, "loss.beta": None, "loss.precompute_ref_logps": False},
        "methods": {
            method: {"sequences_per_step": 4 if method == "sft" else 8, "left_out": []} for method in METHODS_HERE
        },
        "timed_steps": timed,
        "rows": {
            "kind": "pairs",
            "train": 15,
            "held_out": 5,
            "paired_by_prompt": 0,
            "without_pair": 0,
            "shared_prompts": 0,
        },
        "runs": runs,
    }


def score(task: str, metric: str, model: str, value: float, low: float = -9.0) -> dict:
    return {"task": task, "metric": metric, "model": model, "value": value, "low": low}


@pytest.fixture
def content():
    return content_of(FEWEST_TIMED)


def test_medians_and_ranges_are_those_of_the_runs(content):
    base, kto, dpo, sft = lines_of(content)
    assert kto.values["step_ms"] == (200.0, 100.0, 400.0)
    assert kto.values["margin"] == (2.0, 1.0, 3.0)
    assert kto.values["peak_mib"] == (4.0, 3.0, 8.0)
    assert kto.values["last_loss"] == (0.3, 0.2, 0.4)
    assert kto.values["tokens_per_step"] == (400, 400, 400)
    # 400 tokens in 100 ms, but one step in ten takes 300: 120 ms on average
    assert kto.values["tokens_per_second"] == pytest.approx((400 / 0.24, 400 / 0.48, 400 / 0.12))
    assert sft.values["tokens_per_second"].median == pytest.approx(100 / 0.06)
    assert sft.values["sequences_per_second"].median == pytest.approx(8 / 0.06)
    assert base.values["margin"].median == 0 and base.values["accuracy"].median == 0.5
    assert base.values["likelihood"].median == -2.5 and "step_ms" not in base.values
    assert (kto.learned, dpo.learned, sft.learned) == (3, 0, 3)


def test_efficiency_is_relative_to_kto_in_the_same_round(content):
    found = efficiencies(content["runs"], "kto")
    # the same tokens in half, a quarter and an eighth of the time; not the ratio of two medians, by luck the same
    assert [found["dpo", seed] for seed in SEEDS] == pytest.approx([2, 4, 8])
    assert {found["kto", seed] for seed in SEEDS} == {1.0}
    assert lines_of(content)[3].values["efficiency"] == pytest.approx((1.0, 0.5, 2.0))
    assert yardstick_of(["dpo", "kto"]) == "kto" and yardstick_of(["dpo", "ipo"]) == "dpo"


def test_fewer_than_50_timed_steps_have_no_figure_of_time():
    content = content_of(FEWEST_TIMED - 1)
    lines = lines_of(content)
    notes = notes_of(content, lines)
    timed = [one for one in MEASURES if one.timed]
    assert {one.key for one in timed} == {
        "step_ms",
        "tokens_per_second",
        "sequences_per_second",
        "efficiency",
        "train_s",
    }
    for line in lines[1:]:
        assert {line.cell(one) for one in timed} == {TOO_FEW}
        assert line.cell(next(one for one in MEASURES if one.key == "margin")) != TOO_FEW
    rows = list(csv.DictReader(io.StringIO(as_csv(lines))))
    assert {row[one.key] for row in rows[1:] for one in timed} == {TOO_FEW}
    written = terminal(lines, notes) + markdown(content, lines, notes) + page(content, lines, notes, [])
    assert "59 steps, less 10 of warm-up" in written and "steps after 10 of warm-up" not in written
    for figure in (
        "200",
        "1,667",
        "833",
        "2.00",
    ):  # of 50 steps: time, tokens per second, efficiency
        assert f"{figure} (" not in written


def test_csv_round_trip(content):
    lines = lines_of(content)
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(as_csv(lines)))}
    assert list(rows) == ["base", *METHODS_HERE]
    for line in lines:
        for one in MEASURES:
            cells = [rows[line.method][f"{one.key}{end}"] for end in ("", "_low", "_high")]
            if one.key in line.values:
                assert tuple(map(float, cells)) == line.values[one.key]
            else:
                assert cells == ["", "", ""]
    assert rows["sft"]["sequences_per_step"] == "4" and rows["kto"]["learned"] == "3"


def test_notes_begin_with_the_problems(content):
    broken = copy.deepcopy(content)
    for run in broken["runs"]:
        if run["method"] == "kto":
            for key in ("step_ms", "losses", "scores", "tokens"):
                del run[key]
            run["stopped"] = "loss is nan at step 3"
    broken["runs"][1]["threads"] = 2
    broken["rows"] |= {"paired_by_prompt": 7, "without_pair": 3, "shared_prompts": 2}
    lines = lines_of(broken)
    notes = notes_of(broken, lines)
    assert notes[0] == "KTO, seed 42: loss is nan at step 3"
    assert notes[3] == "DPO learned next to nothing: the reward margin ended at 0.0010."
    assert any("different numbers of threads" in note for note in notes)
    assert any(note.startswith("7 of the 15 pairs are answers to one prompt") for note in notes)
    assert any(note.startswith("3 rows have no partner") for note in notes)
    assert any(note.startswith("2 prompts of the held-out rows were trained on") for note in notes)
    assert not any("SFT learned next to nothing" in note for note in notes)
    assert "no run ended" in terminal(lines, notes)
    assert "loss is nan at step 3" in page(broken, lines, notes, [])  # a run without losses
    assert "efficiency" not in lines[2].values  # kto has no figure to be relative to


def test_the_page_is_one_file_with_an_arabic_title(content, tmp_path):
    lines = lines_of(content)
    pictures = draw(lines, tmp_path)
    html = page(content, lines, notes_of(content, lines), pictures)
    assert '<h1 dir="auto">مقارنة الطرق: methods compared</h1>' in html
    assert "src=" not in html and 'href="http' not in html
    assert html.count("<svg") == 7
    shown = "step_ms tokens_per_second efficiency peak_mib margin accuracy likelihood".split()
    assert [picture.name for picture in pictures] == [f"compare_{key}" for key in shown]
    for name, columns in (("compare_cost", 4), ("compare_learning", 3), ("compare_margin", 1)):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert pixels.shape[0] > 250 and pixels.shape[1] > 350 * columns
        ours = np.all(pixels == [0x3F, 0x7F, 0xD0], axis=-1)  # the bars' own blue
        assert ours.sum() > 1000 * columns
    again = markdown(content, lines, notes_of(content, lines))
    assert "| KTO | 8 | 400 | 200 (100 to 400) |" in again


def test_texts_on_the_page_are_escaped(content):
    attack = '"><script>alert(1)</script>'
    content |= {
        "recipe": f"{attack.replace('/', '')}.yaml",
        "model": attack,
        "settings": content["settings"] | {"x": attack},
    }
    content["runs"][0] |= {"device": attack, "versions": {attack: attack}}
    html = page(content, lines_of(content), [attack], [])
    assert "<script" not in html and html.count("&lt;script&gt;") >= 7


# ---- the same sequences for all methods ----


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("pairs", [True, False])
def test_every_step_has_the_same_sequences_for_every_method(tokenizer, pairs):
    if pairs:
        train = tokenize_pairs(load_rows(make_pairs(11)), tokenizer, max_length=96)
        methods = ("kto", "dpo", "ipo", "sft")
    else:
        train = tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=96)
        methods = ("kto", "apo_zero", "sft")
    plan = Plan(recipe_with(), methods, sequences=4, steps=9)
    seen = {method: steps_with(plan, train, method, seed=5) for method in methods}
    assert all(seen[method] == seen["kto"] for method in methods[:-1])
    if pairs:  # half of them, of the same prompts
        desirable = [{one for one in step if one[2]} for step in seen["kto"]]
        assert seen["sft"] == desirable
        assert [len(step) for step in seen["kto"][:3]] == [8, 8, 6]  # 22 rows in micro-batches of 4
    assert all(one[2] for step in seen["sft"] for one in step)
    assert steps_with(plan, train, "kto", seed=6) != seen["kto"]


def steps_with(plan: Plan, train, method: str, seed: int) -> list[set]:
    """(prompt, completion, label) of the sequences in each optimizer step, as a trainer would cut the rows."""
    accumulation = plan.recipe.training.gradient_accumulation_steps
    rows = rows_of(method, train, seed, plan.sequences * accumulation).dataset.to_list()
    counts = sequences_of_steps(len(rows), plan.batch(method), accumulation, plan.steps)
    place, steps = 0, []
    for count in counts:
        taken = rows[place : place + count]
        assert len(taken) == count
        place = (place + count) % len(rows)
        steps.append({one for row in taken for one in sequences_in(row)})
    return steps


def sequences_in(row: dict) -> list[tuple]:
    if "label" in row:
        return [(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["label"])]
    return [
        (tuple(row[f"{side}_prompt_ids"]), tuple(row[f"{side}_completion_ids"]), side == "chosen")
        for side in ("chosen", "rejected")
    ]


def test_held_out_pairs_stay_pairs_for_the_evaluation(tokenizer):
    pairs = tokenize_pairs(load_rows(make_pairs(4)), tokenizer, max_length=96)
    held_out = held_out_of(pairs)
    assert held_out.loaded.rows["line"][:] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert held_out.rows["label"][:] == [True, False] * 4
    assert held_out.rows["completion_ids"][3] == pairs.dataset["rejected_completion_ids"][1]
    assert as_unpaired(pairs).counts["rows"] == 8


# ---- one recipe for every method ----


def recipe_with(**overrides):
    content = {
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "training": {"output_dir": "run", "gradient_accumulation_steps": 2},
    }
    return make_recipe(content, {key.replace("__", "."): value for key, value in overrides.items()})


def test_options_go_to_methods_with_the_same_default():
    recipe = recipe_with(
        loss__method="enhanced_kto",
        loss__beta=0.3,
        loss__odds_weight=0.2,
        loss__alpha=0.5,
        loss__kl_estimator="ema",
        loss__kl_decay=0.5,
        loss__shift="ema",
        loss__shift_decay=0.7,
        loss__gamma=0.4,
        loss__precompute_ref_logps=True,
        model__ref_path="other",
    )
    kto, left = loss_of(recipe, "kto")
    assert (kto.beta, kto.kl_estimator, kto.kl_decay, kto.alpha) == (0.3, "ema", 0.5, None)
    assert kto.precompute_ref_logps and "loss.alpha 0.5" in left and "loss.shift ema" in left
    orpo, left = loss_of(recipe, "orpo")
    assert orpo.odds_weight == 0.2 and orpo.beta is None
    assert {"loss.precompute_ref_logps true", "model.ref_path other"} <= set(left)
    # simpo's beta has another default, so another meaning; gamma is for simpo alone
    simpo, left = loss_of(recipe, "simpo")
    assert simpo.beta is None and simpo.gamma == 0.4 and "loss.beta 0.3" in left
    # bco's shift is on by default
    assert loss_of(recipe, "bco")[0].shift is None
    own, left = loss_of(recipe, "enhanced_kto")
    assert (own.alpha, own.shift_decay, own.gamma, left) == (0.5, 0.7, None, ["loss.gamma 0.4"])


def test_options_at_their_default_are_not_listed():
    recipe = recipe_with(loss__method="dpo", loss__label_smoothing=0.0, loss__robust=False)
    assert loss_of(recipe, "kto")[1] == []


@pytest.mark.parametrize(("method", "sequences"), [("kto", 6), ("dpo", 12), ("sft", 6)])
def test_batches_have_the_recipes_sequences(method, sequences):
    recipe = recipe_with(loss__method=method, training__per_device_train_batch_size=6)
    assert sequences_of(recipe, ("kto", "dpo", "sft")) == sequences
    plan = Plan(recipe, ("kto", "dpo", "sft"), sequences, 5)
    assert [plan.seen(one) for one in plan.methods] == [2 * sequences, 2 * sequences, sequences]
    made = recipe_of(plan, "dpo", 7, recipe.training.output_dir)
    assert made.training.per_device_train_batch_size == sequences // 2
    assert (made.training.seed, made.training.max_steps, made.loss.method) == (7, 5, "dpo")
    assert METHODS[made.loss.method].data == "pairs" and made.training.save_strategy == "no"


def test_an_odd_batch_cannot_be_pairs():
    recipe = recipe_with(training__per_device_train_batch_size=3)
    with pytest.raises(UserError, match="per_device_train_batch_size is 3; expected an even"):
        sequences_of(recipe, ("kto", "dpo"))
    assert sequences_of(recipe, ("kto", "apo_zero")) == 3


def test_steps_are_the_recipes():
    assert steps_of(recipe_with(training__max_steps=7), 100, 4) == 7
    assert steps_of(recipe_with(training__num_train_epochs=1.5), 33, 4) == 8  # 1.5 times 5, up
