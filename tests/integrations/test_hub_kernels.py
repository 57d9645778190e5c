"""The exported folder is loaded by Hugging Face ``kernels``, without and beside the package, and gives its numbers."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Build, Metadata
from torch import nn

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

# The package is out of reach where PACKAGE is "hidden", and loaded after the kernel where it is "beside".
PROGRAM = (
    NUMBERS
    + """
import json, sys
from pathlib import Path
from kernels import get_local_kernel

folder, package, *backends = sys.argv[1:]

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("prefopt_kernels", "prefopt"):
            raise ImportError(name)

if package == "hidden":
    sys.meta_path.insert(0, Hidden())
kernel = get_local_kernel(Path(folder))
ones = torch.ones(2, 2)
answer = {
    "file": kernel.__file__,
    "numbers": {backend: numbers(kernel, backend) for backend in backends},
    "refused": kernel.explain(ones, ones),
}
if package == "beside":
    import prefopt_kernels
    answer["again"] = {backend: numbers(prefopt_kernels, backend) for backend in backends}
answer["loaded"] = [name for name in sys.modules if name.split(".")[0] == "prefopt_kernels"]
print(json.dumps(answer))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hub") / "kernel"
    assert hub_kernels.export(made, version=3) == VARIANTS
    return made


def loaded(folder: Path, package: str, *backends: str, **variables: str) -> dict:
    words = [sys.executable, "-c", PROGRAM, str(folder), package, *backends]
    path = str(Path(prefopt_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    run = {"capture_output": True, "text": True, "timeout": 240, "cwd": folder}
    done = subprocess.run(words, env=environment, **run)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_written_for_this_version():
    assert importlib.metadata.version("kernels") == "0.17.2"


def test_beside_the_package_both_have_their_own_ops(folder):
    beside = loaded(folder, "beside", "reference")  # the kernel first, then the package
    assert "prefopt_kernels" in beside["loaded"]
    assert beside["numbers"] == beside["again"]  # bit for bit
    assert any(map(any, beside["numbers"]["reference"][4]))


TWO_VERSIONS = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

ones, targets = torch.ones(2, 3), torch.tensor([0, 1])
loaded = [get_local_kernel(Path(folder)) for folder in sys.argv[1:]]
print([kernel.linear_logprob(ones, torch.ones(4, 3), targets).logp.exp().tolist() for kernel in loaded])
"""


def test_two_versions_in_one_process(folder, tmp_path):
    hub_kernels.export(tmp_path / "second", version=4)
    words = [sys.executable, "-W", "error::UserWarning", "-c", TWO_VERSIONS, str(folder), str(tmp_path / "second")]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[[0.25, 0.25], [0.25, 0.25]]"


def test_without_the_package_it_has_the_definition_and_triton(folder):
    found = loaded(folder, "hidden", "reference", "triton", TRITON_INTERPRET="1")
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


@kernels.use_kernel_forward_from_hub("LinearLogprob")
class LinearLogprob(nn.Module):
    """A layer of a model that a kernel of this name can replace."""

    calls = 0

    def forward(self, hidden, weight, targets):
        LinearLogprob.calls += 1
        logp = (hidden @ weight.T).log_softmax(-1)
        return logp.gather(-1, targets[:, None])[:, 0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, 50, bias=False)
        self.score = LinearLogprob()

    def forward(self, hidden, targets):
        return self.score(hidden, self.head.weight, targets)


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE", "TRAINING | TORCH_COMPILE"])
def test_a_layer_is_kernelized_for_training_too(mode, folder):
    # in a process of its own, into which no other test has loaded another version
    words = [sys.executable, __file__, mode, str(folder)]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def kernelized(mode: str, folder: Path) -> None:
    """Compare a model whose layer the kernel replaces with the installed package."""
    mode = {
        "TRAINING": kernels.Mode.TRAINING,
        "INFERENCE": kernels.Mode.INFERENCE,
        "TRAINING | TORCH_COMPILE": kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
    }[mode]
    hidden, targets = torch.randn(9, 16), torch.arange(9)
    plain = Model()
    expected = plain(hidden, targets)
    expected.sum().backward()
    model = Model()
    repository = kernels.LocalLayerRepository(folder, layer_name="LinearLogprob")
    with kernels.use_kernel_mapping({"LinearLogprob": {"cpu": repository}}):
        model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    LinearLogprob.calls = 0
    if kernels.Mode.TORCH_COMPILE in mode:
        model = torch.compile(model, backend="eager", fullgraph=True)
    found = model(hidden, targets)
    found.sum().backward()
    assert LinearLogprob.calls == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = prefopt_kernels.linear_logprob(hidden, plain.head.weight, targets, backend="reference").logp
    assert torch.equal(found, ours)  # of the installed package, in the same process
    gradient, other = next(model.parameters()).grad, plain.head.weight.grad
    assert (gradient - other).norm() <= 1e-5 * other.norm()


def test_what_is_written_is_what_kernels_reads(folder):
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


if __name__ == "__main__":
    kernelized(sys.argv[1], Path(sys.argv[2]))
