"""tools/check/kernels.py: the GPU path's kernels compile for an H100 on a machine without a GPU, and fit on it."""

import json
import re
import sys

import pytest
from programs import REPOSITORY, load, run

kernels = load("tools/check/kernels.py")

PROGRAM = """
import json
from molmo2_nemo.rehearsal import hopper
hopper.install()
from molmo2_nemo.rehearsal.kernels import Shape, compiled, fused_kernels, widths_of
# Two heads for one of keys, as wide as all shipped decoders'; the last of two context parallel ranks.
found = [*compiled(Shape(B=1, N=2, G=1, Q=512, S=1024, D=128))]
from molmo2_nemo.command_line import compose
found += fused_kernels(widths_of(compose("stage2", ["model=molmo2_4b"])))
print(json.dumps([vars(kernel) for kernel in found]))
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_and_fit():
    # Cold: torch.compile must not have been imported.
    result = run([sys.executable, "-c", PROGRAM], TORCHDYNAMO_DISABLE="0")
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"mask", "forward", "backward", "fused"} <= {kernel["of"] for kernel in found}
    # Every kernel of ours, and liger-kernel's two.
    source = (REPOSITORY / "molmo2_nemo/model/kernels.py").read_text()
    ours = set(re.findall(r"@triton.jit\ndef ([a-z]\w+)", source))
    fused = {kernel["name"] for kernel in found if kernel["of"] == "fused"}
    assert len(ours) > 12 and ours <= fused
    assert all(any(part in name for name in fused) for part in ("rms_norm_backward", "swiglu"))
    for kernel in map(kernel_of, found):
        assert kernels.faults_of(kernel) == []
        assert 0 < kernel.registers <= 255
    forward = next(kernel for kernel in found if kernel["of"] == "forward")
    assert forward["shared"] > 64 * 1024  # tiles of queries, keys and values: it is the real kernel


def kernel_of(record: dict):
    from molmo2_nemo.rehearsal.kernels import Kernel

    return Kernel(**record)


def test_a_kernel_that_takes_too_much_is_a_fault():
    fitting = {"of": "backward", "name": "k", "registers": 255, "spill_stores": 0, "spill_loads": 0, "shared": 1000}
    assert kernels.faults_of(kernel_of(fitting)) == []
    (spilling,) = kernels.faults_of(kernel_of(fitting | {"spill_stores": 252}))
    assert "k spills 252 bytes a thread, more than 80" in spilling
    (large,) = kernels.faults_of(kernel_of(fitting | {"shared": 227 * 1024 + 1}))
    assert "232,449 bytes of shared memory, more than 232,448" in large


def test_warps_that_fit_by_hand():
    from molmo2_nemo.rehearsal.kernels import warps_at_a_time

    kernel = {"of": "fused", "name": "k", "registers": 33, "spill_stores": 0, "spill_loads": 0, "shared": 0}
    # 40 registers a thread, 1,280 a warp: 51 warps, 12 blocks of 4; then 8 blocks of 27 + 1 KB.
    assert warps_at_a_time(kernel_of(kernel | {"tiles": {"warps": 4}})) == 48
    assert warps_at_a_time(kernel_of(kernel | {"tiles": {"warps": 4}, "shared": 27 * 1024})) == 32
    assert warps_at_a_time(kernel_of(kernel | {"tiles": {"warps": 16}, "registers": 16})) == 64


@pytest.mark.slow
def test_every_shipped_layout_has_a_shape():
    from molmo2_nemo.rehearsal.kernels import shape_of

    shapes = set(map(shape_of, kernels.shipped()))
    assert {shape.D for shape in shapes} == {128} and {shape.B for shape in shapes} >= {1}
    assert all(shape.N % shape.G == 0 and shape.Q <= shape.S for shape in shapes)
