"""Hugging Face ``kernels`` loads the exported folder, with and without the package, with the same results."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels._rust import Build, Metadata

import prefopt_kernels
from prefopt_kernels.integrations import hub_kernels

VARIANTS = list(hub_kernels.VARIANTS)

NUMBERS = """
import torch

def numbers(module, backend):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 24, generator=generator).requires_grad_()
    weight = torch.randn(70, 24, generator=generator).requires_grad_()
    targets = torch.randint(70, (40,), generator=generator)
    targets[::5] = -100
    out = module.linear_logprob(
        hidden, weight, targets, softcap=3.0, outputs=("entropy",), backend=backend
    )
    logps = module.sequence_logps(out.logp, torch.tensor([0, 15, 15, 40]))
    labels, z0 = torch.tensor([True, False, False]), torch.tensor(0.5)
    loss = module.kto_loss(logps, logps.detach() + 1, labels, beta=0.1, reference_point=z0)
    loss.sum().backward()
    return [x.detach().tolist() for x in (out.logp, out.entropy, loss, hidden.grad, weight.grad)]
"""

# Loads the kernel without the package.
HIDDEN = (
    NUMBERS
    + """
import json, sys
from pathlib import Path
from kernels import get_local_kernel

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("prefopt_kernels", "prefopt"):
            raise ImportError(name)

sys.meta_path.insert(0, Hidden())
kernel = get_local_kernel(Path(sys.argv[1]))
ones = torch.ones(2, 2)
print(json.dumps({
    "file": kernel.__file__,
    "numbers": {backend: numbers(kernel, backend) for backend in ("reference", "triton")},
    "refused": kernel.explain(ones, ones),
    "loaded": [name for name in sys.modules if name.split(".")[0] == "prefopt_kernels"],
}))
"""
)

# Loads two versions, then the package, then replaces layers of a model.
BESIDE = (
    NUMBERS
    + """
import json, sys
from pathlib import Path
from kernels import get_local_kernel

folders = [Path(folder) for folder in sys.argv[1:]]
versions = [numbers(get_local_kernel(folder), "reference") for folder in folders]
import prefopt_kernels
package = numbers(prefopt_kernels, "reference")
import warnings
warnings.simplefilter("default")
from support import kernelized
layers = {mode: kernelized.run(mode, folders[0]) for mode in kernelized.MODES}
print(json.dumps({"versions": versions, "package": package, "layers": layers}))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hub") / "kernel"
    assert hub_kernels.export(made, version=3) == VARIANTS
    return made


def run(program: str, *folders: Path, **variables: str) -> dict:
    words = [sys.executable, "-W", "error::UserWarning", "-c", program, *map(str, folders)]
    path = os.pathsep.join(map(str, (Path(prefopt_kernels.__file__).parents[1], Path(__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, cwd=folders[0])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def beside(folder, tmp_path_factory) -> dict:
    second = tmp_path_factory.mktemp("second") / "kernel"
    hub_kernels.export(second, version=4)
    return run(BESIDE, folder, second, TRITON_INTERPRET="0")


def test_kernels_has_the_supported_version():
    assert importlib.metadata.version("kernels") == "0.17.2"


def test_two_versions_and_the_package_have_their_own_ops(beside):
    first, second = beside["versions"]
    assert first == second == beside["package"]  # bit for bit
    assert any(map(any, first[4]))


def test_without_the_package_it_has_the_reference_and_triton(folder):
    found = run(HIDDEN, folder, TRITON_INTERPRET="1")
    assert Path(found["file"]).parent.name == "torch-cpu"
    assert found["loaded"] == []
    assert found["refused"]["cpu"] is not None and found["refused"]["reference"] is None
    namespace: dict = {}
    exec(NUMBERS, namespace)
    exact = namespace["numbers"](prefopt_kernels, "reference")
    assert found["numbers"]["reference"] == exact
    for mine, expected in zip(found["numbers"]["triton"], exact, strict=True):
        # values up to some ten, sums of 24 products and of 70 exponentials in fp32
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE", "TRAINING | TORCH_COMPILE"])
def test_a_layer_is_kernelized(mode, beside):
    results = beside["layers"][mode]
    assert results.pop("calls") == 0  # of the layer that is replaced
    found, expected, installed, gradient, other = map(torch.tensor, results.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, installed)
    assert (gradient - other).norm() <= 1e-5 * other.norm()


def test_kernels_reads_the_exported_metadata(folder):
    metadata = [Metadata.read_from_file(folder / "build" / each / "metadata.json") for each in VARIANTS]
    assert {each.name.python_name for each in metadata} == {"prefopt_kernels"}
    assert {each.version for each in metadata} == {3}
    assert len({each.id for each in metadata}) == len(VARIANTS)
    assert all(each.id.isidentifier() for each in metadata)
    assert [str(each) for each in Build.open(folder).general.backends] == ["cpu", "cuda"]
    for variant in VARIANTS:
        inside = folder / "build" / variant
        assert not (inside / "integrations").exists() and not (inside / "info.py").exists()
        for file in inside.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "prefopt_kernels::" not in text
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom):
                    assert node.level or not node.module.startswith("prefopt"), file
        assert not [path for path in inside.rglob("*") if path.is_file() and path.suffix not in (".py", ".json")]


def test_a_plain_import_of_the_package_is_refused(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("import prefopt_kernels.losses\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="planted.py line 1 imports the package by its name"):
        hub_kernels._Relocation(planted, 0, "copy").visit(ast.parse(planted.read_text(encoding="utf-8")))


def test_the_command_prints_what_it_wrote(tmp_path, capsys):
    out = tmp_path / "new" / "kernel"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (out.parent / f".kernel.export-{ended.pid}-left" / "kernel").mkdir(parents=True)
    assert hub_kernels.main([str(out), "--name", "my-kernel", "--version", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{out}/build/torch-cpu", f"{out}/build/torch-cuda"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["kernel"]
    assert hub_kernels.main([str(out)]) == 2
    assert "is not empty; expected a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "My_Kernel"}, "name is 'My_Kernel'; expected lower-case letters"),
        ({"version": 0}, "version is 0; expected 1 or above"),
    ],
)
def test_refusals(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hub_kernels.export(tmp_path / "kernel", **options)
    assert list(tmp_path.iterdir()) == []
