"""tools/check/kernels.py: attention's kernels compile for an H100 on a machine without a GPU, and fit on it."""

import json
import sys

import pytest
from programs import load, run

kernels = load("tools/check/kernels.py")

PROGRAM = """
import json
from molmo2_nemo.rehearsal import hopper
hopper.install()
from molmo2_nemo.rehearsal.kernels import Shape, compiled
# Two heads for one of keys, as wide as all shipped decoders'; the last of two context parallel ranks.
print(json.dumps([vars(kernel) for kernel in compiled(Shape(B=1, N=2, G=1, Q=512, S=1024, D=128))]))
"""


@pytest.mark.slow
def test_attention_compiles_for_hopper_and_fits():
    # Cold: torch.compile must not have been imported.
    result = run([sys.executable, "-c", PROGRAM], TORCHDYNAMO_DISABLE="0")
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"mask", "forward", "backward"} <= {kernel["of"] for kernel in found}
    for kernel in map(kernel_of, found):
        assert kernels.faults_of(kernel) == []
        assert 0 < kernel.registers <= 255
    forward = next(kernel for kernel in found if kernel["of"] == "forward")
    assert forward["shared"] > 64 * 1024  # tiles of queries, keys and values: it is the real kernel


def kernel_of(record: dict):
    from molmo2_nemo.rehearsal.kernels import Kernel

    return Kernel(**record)


def test_a_kernel_that_takes_too_much_is_a_fault():
    fitting = {"of": "backward", "name": "k", "registers": 255, "spill_stores": 252, "spill_loads": 300, "shared": 1000}
    assert kernels.faults_of(kernel_of(fitting)) == []
    (spilling,) = kernels.faults_of(kernel_of(fitting | {"of": "forward"}))
    assert "k spills 252 bytes a thread, more than 0" in spilling
    (large,) = kernels.faults_of(kernel_of(fitting | {"shared": 227 * 1024 + 1}))
    assert "232,449 bytes of shared memory, more than 232,448" in large


@pytest.mark.slow
def test_every_shipped_layout_has_a_shape():
    from molmo2_nemo.rehearsal.kernels import shape_of

    shapes = set(map(shape_of, kernels.shipped()))
    assert {shape.D for shape in shapes} == {128} and {shape.B for shape in shapes} >= {1}
    assert all(shape.N % shape.G == 0 and shape.Q <= shape.S for shape in shapes)
