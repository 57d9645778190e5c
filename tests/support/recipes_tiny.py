"""A packaged recipe run by `prefopt train NAME --tiny`, and what every one of them must leave behind."""

import dataclasses
import json
import math
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer

from prefopt.cli import main
from prefopt.demo.tiny.shrink import shrunk
from prefopt.options import SECTIONS
from prefopt.recipe import Recipe, load_recipe

# What a run writes down in its recipe although nobody changed it: the rows of the plan, the defaults spelled out.
SPELLED_OUT = {"data.eval_path", "data.eval_split", "data.eval_fraction", "training.sampler"}


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A finished run: its folder, the real recipe, its own recipe, and what was printed."""

    folder: Path
    real: Recipe
    own: Recipe
    printed: str

    @property
    def inputs(self) -> Path:
        """Model, sources, plan and built rows."""
        return self.folder.with_name(self.folder.name + "-inputs")

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def logs(self, key: str) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [entry[key] for entry in map(json.loads, lines) if key in entry]


def train_tiny(name: str, capsys) -> TinyRun:
    """Run a recipe from data to card in the current folder, and check what holds for every recipe."""
    assert main(["train", name, "--tiny"]) == 0
    printed = capsys.readouterr().out
    folder = Path("runs") / f"{name}-tiny"
    assert printed.splitlines()[-1] == str(folder / "report.html")
    run = TinyRun(folder, load_recipe(name), load_recipe(folder / "recipe.yaml"), printed)
    _check_overrides(run)
    _check_folder(run)
    return run


def _check_overrides(run: TinyRun) -> None:
    """What --tiny changed is printed, written at the head of the recipe, and nothing else differs from the real one."""
    changed = {
        key
        for key, (real, own) in _options(run.real, run.own).items()
        if own != real and key not in SPELLED_OUT and not (key.startswith("loss.") and real is None)
    }
    allowed = set(shrunk(run.real, {})) - {"model.revision"}
    assert {"model.path", "data.path", "training.max_steps", "training.use_cpu"} <= changed
    assert changed <= allowed
    head = (run.folder / "recipe.yaml").read_text(encoding="utf-8").split("model:\n")[0]
    for key in changed:
        assert f"\n  {key} " in run.printed and f"\n#   {key} " in head
    assert head.count("\n#   ") == len(changed)


def _options(*recipes: Recipe) -> dict[str, tuple]:
    """{dotted key: its value in each recipe}"""
    return {
        f"{section}.{one.name}": tuple(getattr(getattr(recipe, section), one.name) for recipe in recipes)
        for section, kind in SECTIONS.items()
        for one in dataclasses.fields(kind)
    }


def _check_folder(run: TinyRun) -> None:
    record = run.json("run.json")
    assert record["status"] == "finished" and len(run.logs("loss")) == 20
    assert all(math.isfinite(loss) for loss in run.logs("loss"))
    assert run.folder.name in (run.folder / "report.html").read_text(encoding="utf-8")
    assert (run.folder / "README.md").read_text(encoding="utf-8").startswith("---\n")
    memory = run.json("memory.json")
    assert memory["peak_bytes"] >= max(memory["before_bytes"], memory["after_bytes"]) > 0
    assert memory["device"] == "cpu" and "memory before training: " in run.printed
    weights = load_file(run.folder / "adapter_model.safetensors")
    # lora_B begins at zero: every one of them has moved, in both layers and all seven linears
    ups = {name: tensor for name, tensor in weights.items() if "lora_B" in name}
    assert len(ups) == 2 * 7 and all(tensor.abs().max() > 0 for tensor in ups.values())
    assert AutoTokenizer.from_pretrained(run.folder).chat_template


def counts(run: TinyRun) -> dict:
    """counts.json of the built rows, whose table was printed."""
    table = (run.inputs / "data" / "counts.txt").read_text(encoding="utf-8")
    assert table.strip() in run.printed
    return json.loads((run.inputs / "data" / "counts.json").read_text(encoding="utf-8"))
