"""Compiles the Triton kernels of sequence_loss for GPUs that are not here: one JSON object for each; TRITON_INTERPRET unset."""

import json
import math
from dataclasses import asdict

import torch

from benchmarks.static_report import TARGETS, compile_launch
from prefopt_kernels.ops._launch import recording
from prefopt_kernels.ops.sequence_loss import backend_triton
from prefopt_kernels.ops.sequence_loss.parameters import OFF, TENSORS, Form, Parameters
from sequence_loss_testing import SETTINGS

# Between them every flag: (tensors for what may be one, int32 offsets and no lengths)
CALLS = {
    "kto": (False, False),
    "bco": (True, False),
    "everything": (True, False),
    "value, win weighting": (False, True),
    "decision weighting, prelec": (False, True),
}
T, B = 4096, 64


def launches(case: str, tensors: bool, plain: bool) -> list:
    """What a forward and a backward would launch."""

    def rows(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    settings = OFF | {"decision_low": 0.5, "decision_high": 2.0} | SETTINGS[case]
    settings |= {name: settings[name] or math.inf for name in ("main_bound", "odds_bound")}
    settings["decision_mean"] = settings["decision_mean"] or 0.0
    settings |= dict.fromkeys(TENSORS, rows()) if tensors else {}
    offsets = rows(B + 1, dtype=torch.int32 if plain else torch.int64)
    lengths = None if plain else rows(B, dtype=torch.int64)
    form = Form(settings["method"], settings["win_weighting"], settings["decision_weighting"])
    parameters = Parameters(*(settings[name] for name in Parameters._fields))
    labels = rows(B, dtype=torch.bool)
    with recording() as launched:
        out = backend_triton.forward(rows(T), offsets, rows(B), labels, lengths, form, parameters)
        backend_triton.backward(rows(B), rows(B), offsets, out[-1], T)
    return launched


def main() -> None:
    for arch in TARGETS:
        for case, flags in CALLS.items():
            for launch in launches(case, *flags):
                if case == "kto" or launch.kernel.__name__ == "all_rows":
                    row = compile_launch(launch, arch, "fp32", [case])
                    print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
