"""How fast attention, the vision tower and a whole training step are on a GPU, and what FP8 does to the loss.

    python tools/bench/gpu.py                               # one GPU, under nine minutes
    python tools/bench/gpu.py --wheels DIR --out bench.jsonl    # no network: see docs/gpu.md for DIR
    python tools/bench/gpu.py --only step --only fp8_loss
    python tools/bench/gpu.py --only tiles      # FlexAttention with many tiles, 16,384 tokens; not among the others
    python tools/bench/gpu.py --device cpu --tiny           # toy sizes: does the script itself work?

attention   forward + backward of the decoder's attention with its packed mask, of SDPA with the same mask held dense,
            and of causal flash attention; TFLOP/s of the pairs that the mask lets through (12 x pairs x heads x head
            size: recomputation inside a kernel does not count)
vision      ViT and connector, 128 crops, with and without recomputation
step        whole optimisation steps of molmo2_4b at two depths; what all its layers would take is computed from the two
fp8_loss    200 steps of a small model in bf16 and in FP8 on the same data: how far apart the losses are
nccl        losses of two tensor or context parallel ranks against one (two GPUs)

Each section prints a table and one JSON line. Every case runs in a process of its own; one that fails is a sentence,
and the others go on. Times are medians after warm-up. Data is made up: packed rows of images, videos, text and message
trees in the released geometry, without padding, ready in memory: no time is spent on loading.

This file is the command: it chooses the cases and prints, and imports nothing but the standard library. The cases are
in gpu_kernels.py (attention, vision) and gpu_steps.py (the others).
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from tables import parser, print_json, print_table

REPOSITORY = Path(__file__).resolve().parents[2]
SECTIONS = ("attention", "vision", "step", "fp8_loss", "nccl")
ASKED_FOR = ("tiles",)  # with --only
RECIPES = ("delayed", "tensorwise", "blockwise")
CASE_SECONDS = 150  # of one process, compilation included
ANCHOR = 2300  # tokens/s per H100 of the 4B at 16,384 tokens, about 9 % MFU: derived from arXiv 2601.10611's GPU hours


def cases_of(section: str, device: str, has_te: bool, num_gpus: int) -> list[dict]:
    """What a section runs: keyword arguments of its function, and `not_measured` with a reason where it cannot run."""
    if section == "attention":
        return [{}]
    if section == "tiles":
        from molmo2_nemo.rehearsal.kernels import SWEEP

        return [dict(number=number) for number in range(-2, len(SWEEP))]
    if section == "fp8_loss":
        return [dict(layer_spec="transformer_engine" if has_te else "local")]
    if section == "nccl":
        few = f"not measured: needs two GPUs, here are {num_gpus}"
        return [dict(not_measured=few) if num_gpus < 2 else dict(ranks=2)]
    if section == "vision":
        cases = [dict(layer_spec=spec) for spec in ("local", "transformer_engine")]
    else:
        plain = dict(precision="fp32" if device == "cpu" else "bf16", recipe=None, recompute=False)
        cases = [dict(plain, layer_spec=spec) for spec in ("local", "transformer_engine")]
        cases += [dict(cases[1], precision="fp8", recipe=recipe) for recipe in RECIPES]
        cases += [dict(cases[has_te], recompute=True)]
    if device == "cuda":
        cases += [dict(cases[0], kernels="plain")]
    for case in cases:
        if case["layer_spec"] != "local" and not has_te:
            case["not_measured"] = "not measured: Transformer Engine is not installed"
    return cases


def run_case(section: str, case: dict, args, seconds: float) -> list[dict]:
    """Rows of a case from a fresh process, and one that says why if it broke off."""
    label = {key: value for key, value in case.items() if key not in ("not_measured", "ranks")}
    if "not_measured" in case:
        return [dict(label, not_measured=case["not_measured"])]
    if seconds < 20:
        return [dict(label, not_measured=f"not measured: the {args.minutes:g} minutes (--minutes) were over")]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.jsonl"
        command = [str(Path(__file__).resolve()), "--case", json.dumps([section, case]), "--result", str(result)]
        command += ["--device", args.device] + ["--tiny"] * args.tiny
        ranks = case.get("ranks", 1)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        process = subprocess.Popen(
            [sys.executable, *launcher, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
            reason = None if process.returncode == 0 else reason_in(output)
        except subprocess.TimeoutExpired:
            # torchrun passes this on to its ranks.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            reason = f"not done after {seconds:.0f} s"
        lines = result.read_text().splitlines() if result.is_file() else []
        rows = [dict(label, **json.loads(line)) for line in lines]
        return rows + [dict(label, not_measured=f"failed: {reason}")] * (reason is not None)


def reason_in(output: str) -> str:
    """The last error of a process' output, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [match[1] for match in map(re.compile(r"(?:\[rank\d+\]: )?([\w.]*Error\b.*)").match, lines) if match]
    return (errors or lines or ["it said nothing"])[-1][:300]


def environment(site: str | None = None) -> dict[str, str]:
    """Where child processes find this package, the wheels, and the libraries that Transformer Engine loads."""
    torch_at = importlib.util.find_spec("torch").origin
    nvidia = Path(torch_at).resolve().parents[1] / "nvidia"
    libraries = [str(nvidia / name / "lib") for name in ("nccl", "cu13", "cudnn")]
    paths = {"PYTHONPATH": [site, str(REPOSITORY)], "LD_LIBRARY_PATH": [x for x in libraries if Path(x).is_dir()]}
    return {name: ":".join(filter(None, [*first, os.environ.get(name)])) for name, first in paths.items()}


def with_wheels(folder: Path) -> int:
    """Install a folder of wheels into a temporary one, and run this command again with it on the path."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        refuse(f"--wheels {folder} holds no wheel: see docs/gpu.md for what belongs there.")
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*pip, "--target", site, *wheels], text=True, capture_output=True)
        if done.returncode != 0:
            refuse(f"the wheels of {folder} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        again = [sys.executable, __file__, *without_wheels(sys.argv[1:])]
        return subprocess.run(again, env={**os.environ, **environment(site)}).returncode


def without_wheels(arguments: list[str]) -> list[str]:
    """The command line without --wheels DIR or --wheels=DIR."""
    kept = []
    for i, argument in enumerate(arguments):
        if argument != "--wheels" and not argument.startswith("--wheels=") and arguments[i - 1 : i] != ["--wheels"]:
            kept.append(argument)
    return kept


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--only", action="append", choices=SECTIONS + ASKED_FOR, help="this section alone; may be given again"
    )
    arguments.add_argument("--wheels", type=Path, metavar="DIR", help="packages, for where there are none")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    arguments.add_argument("--minutes", type=float, default=8.5, help="start nothing after so long (default 8.5)")
    arguments.add_argument("--case", help=argparse.SUPPRESS)
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.case:
        run_here(*json.loads(args.case), args)
        return
    started = time.monotonic()
    missing = [name for name in ("transformer_engine", "megatron", "omegaconf") if not importlib.util.find_spec(name)]
    if args.wheels and missing:
        sys.exit(with_wheels(args.wheels))
    os.environ.update(environment())
    facts = device_facts(args.device)
    if args.device == "cuda" and not facts["gpus"]:
        refuse("--device cuda, but torch sees no GPU: use --device cpu --tiny to try the script.")
    if args.device == "cpu" and not args.tiny:
        refuse("--device cpu needs --tiny: the real sizes take a CPU days.")
    has_te = args.device == "cuda" and facts["transformer_engine"] is not None
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    for number, section in enumerate(args.only or SECTIONS):
        rows = []
        for case in cases_of(section, args.device, has_te, facts["gpus"]):
            left = args.minutes * 60 - (time.monotonic() - started)
            rows += run_case(section, case, args, min(CASE_SECONDS, left))
        print(f"\n{section}")
        print_table(rows)
        if section == "step":
            print(
                "  extrapolated: the line through the two depths at the model's own number of layers, no measurement. "
                f"The anchor is {ANCHOR:,} tokens/s per H100 (about 9 % MFU), the aim {4 * ANCHOR:,}."
            )
        print_json({"section": section, "tiny": args.tiny, **facts, "rows": rows}, args.out, append=number > 0)


def device_facts(device: str) -> dict:
    """Device, versions and number of GPUs, asked of a process of its own: this one holds no GPU memory."""
    code = (
        "import json, torch; cuda = torch.cuda.is_available();"
        "name = torch.cuda.get_device_name() if cuda else None;"
        "print(json.dumps([torch.__version__, torch.cuda.device_count() if cuda else 0, name]))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    if done.returncode != 0:
        refuse(f"torch cannot be used here: {done.stderr.strip().splitlines()[-1]}")
    version, gpus, name = json.loads(done.stdout.splitlines()[-1])
    if device == "cpu":
        return {"device": "cpu", "gpus": 0, "torch": version, "transformer_engine": None}
    facts = {"device": name, "gpus": gpus, "torch": version, "transformer_engine": None}
    if gpus and importlib.util.find_spec("transformer_engine"):
        code = "import torch, transformer_engine as te, transformer_engine.pytorch; print(te.__version__)"
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
        if done.returncode == 0:
            facts["transformer_engine"] = done.stdout.split()[-1]
        else:
            print(f"Transformer Engine is installed but cannot be used: {done.stderr.strip().splitlines()[-1]}")
    return facts


def run_here(section: str, case: dict, args) -> None:
    """Run one case in this process; its rows are written as they come, so that a crash leaves those before it."""
    import gpu_kernels
    import gpu_steps

    functions = {
        "attention": gpu_kernels.attention,
        "tiles": gpu_kernels.tiles,
        "vision": gpu_kernels.vision,
        "step": gpu_steps.step,
        "fp8_loss": partial(gpu_steps.fp8_loss, recipes=RECIPES),
        "nccl": gpu_steps.nccl,
    }
    case = {key: value for key, value in case.items() if key != "ranks"}
    first = os.environ.get("RANK", "0") == "0"
    for row in functions[section](args.device, args.tiny, **case):
        if first:
            with args.result.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
