"""Peak memory and speed of an import and an export of made-up weights of some GB.

    python tools/bench/convert.py [--gib 2.5] [--dtype bfloat16] [--keep DIR] [--out FILE]

Writes a Hugging Face folder of molmo2_4b with as many layers as fit and a head of its own, runs the import and the
export on it as processes of their own, and prints for each the largest resident memory beside that of a process which
has only imported the same modules, and the largest tensor. Needs three times --gib of disk. Exit status 1 if an import
took more than 2 GB above the largest tensor and what its modules take.
"""

import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tables import parser, print_json, print_table

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.hf.architecture import hf_config
from molmo2_nemo.hf.names import tensor_table

TOOLS = Path(__file__).resolve().parents[1]
BOUND = 2e9  # bytes
# Runs a program and prints the largest resident memory of it, in KiB.
MEASURED = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
MEASURED += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


def size_of(model: ModelConfig, dtype: torch.dtype) -> int:
    return sum(math.prod(entry.shape) * dtype.itemsize for entry in tensor_table(model))


def shrunk(size: int, dtype: torch.dtype) -> ModelConfig:
    """molmo2_4b, with a head of its own, and as many decoder layers as make `size` bytes, one at least."""
    model = dataclasses.replace(compose("stage2", ["model=molmo2_4b"]).model, num_layers=1, tie_embeddings=False)
    while size_of(next_model := dataclasses.replace(model, num_layers=model.num_layers + 1), dtype) <= size:
        model = next_model
    return model


def write_folder(folder: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    """config.json and one safetensors file of random weights, as they are released."""
    hf_config(model, str(dtype).removeprefix("torch.")).save_pretrained(folder)
    tensors = {}
    for entry in tensor_table(model):
        for name, part in zip(entry.released, entry.split(torch.empty(entry.shape, device="meta"))):
            tensors[name] = torch.empty(part.shape, dtype=dtype).normal_()
    save_file(tensors, folder / "model.safetensors")


def measured(*command) -> tuple[int, float]:
    """(largest resident bytes, seconds) of a Python program."""
    started = time.monotonic()
    program = [sys.executable, *map(str, command)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *program], stdout=subprocess.PIPE, check=True)
    return int(done.stdout) * 1024, time.monotonic() - started


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gib", type=float, default=2.5, help="size of the model")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of its tensors")
    arguments.add_argument("--keep", type=Path, metavar="DIR", help="write here and leave it; default: a temporary one")
    args = arguments.parse_args()
    dtype = getattr(torch, args.dtype)
    model = shrunk(int(args.gib * 2**30), dtype)
    size, largest = size_of(model, dtype), max(math.prod(e.shape) for e in tensor_table(model)) * dtype.itemsize
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        (folder / "hf").mkdir(parents=True)
        write_folder(folder / "hf", model, dtype)
        rows = []
        for name, tool, given in (
            ("import", "import_hf", [folder / "hf", folder / "step_00000000"]),
            ("export", "export_hf", [folder / "step_00000000", folder / "out", "--no-checksums"]),
        ):
            base, _ = measured("-c", f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import {tool}")
            if name == "export":
                given += ["--tokenizer", TOOLS.parent / "molmo2_nemo" / "data" / "tokenizer"]
            peak, seconds = measured(TOOLS / f"{tool}.py", *given)
            figures = dict(model_gb=size / 1e9, largest_tensor_gb=largest / 1e9, modules_gb=base / 1e9)
            above = (peak - base - largest) / 1e9
            rows.append(dict(what=name, **figures, peak_gb=peak / 1e9, above_gb=above, seconds=seconds))
    print_table(rows)
    print_json({"layers": model.num_layers, "dtype": args.dtype, "bound_gb": BOUND / 1e9, "rows": rows}, args.out)
    sys.exit(rows[0]["above_gb"] * 1e9 > BOUND)


if __name__ == "__main__":
    main()
