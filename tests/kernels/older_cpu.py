"""The C++ kernels as a CPU without AVX-512 and AMX has them, against their contracts: prints how many results."""

from __future__ import annotations

import torch

from siirl_kernels import contracts, native, providers
from siirl_kernels.accuracy import measure
from siirl_kernels.native import build, functions

OPS = ("inference_linear", "inference_layer", "paged_attention", "rms_norm", "rope", "swiglu", "categorical")
CPU = torch.device("cpu")

build.FLAGS = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in build.FLAGS)
assert native.unavailable() is None and not functions.has_tiles()
checked = 0
for op in OPS:
    ours, reference, contract = providers(op)["native"], providers(op)["torch"], contracts.CONTRACTS[op]
    for case, inference in contracts.taken(op, "native", "full", torch.float32, CPU):
        truth = reference(**case.to(CPU, torch.float64).arguments)
        with torch.inference_mode(inference):
            found = ours(**case.arguments)
        pairs = zip(found, truth, strict=True) if isinstance(found, tuple) else [(found, truth)]
        for result, expected in pairs:
            error = measure(result, expected, contract.tolerance(torch.float32, case, "forward"))
            assert error.tolerated, f"{op}, {case.name}: {error}"
            checked += 1
print(checked)
