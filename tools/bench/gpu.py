"""How fast attention, the vision tower and a whole training step are on a GPU, and what FP8 does to the loss.

    python tools/bench/gpu.py                               # one GPU, under nine minutes
    python tools/bench/gpu.py --wheels DIR --out bench.jsonl    # no network: see docs/gpu.md for DIR
    python tools/bench/gpu.py --only step --only fp8_loss
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
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
SECTIONS = ("attention", "vision", "step", "fp8_loss", "nccl")
RECIPES = ("delayed", "tensorwise", "blockwise")
CASE_SECONDS = 150  # of one process, compilation included
ANCHOR = 2300  # tokens/s per H100 of the 4B at 16,384 tokens, about 9 % MFU: derived from arXiv 2601.10611's GPU hours
# Rows x columns of the tiles of an image, as the released processor cuts them.
TILINGS = ((1, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2))
SEGMENTS_OF_ROOT = 10_000  # above every branch of its tree
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


# ---- the command: chooses cases, runs each in a process, prints. Imports nothing but the standard library. ----


def cases_of(section: str, device: str, has_te: bool, num_gpus: int) -> list[dict]:
    """What a section runs: keyword arguments of its function, and `not_measured` with a reason where it cannot run."""
    if section == "attention":
        return [{}]
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


def print_table(rows: list[dict]) -> None:
    """Figures of rows in columns; a row without figures is its sentence."""
    columns = []
    for row in rows:
        columns += [key for key in row if key not in columns and key != "not_measured"]
    table = [columns] + [[cell(row.get(key)) for key in columns] if "not_measured" not in row else None for row in rows]
    widths = [max(len(line[i]) for line in table if line) for i in range(len(columns))]
    if any("not_measured" not in row for row in rows):
        print("  " + "  ".join(name.rjust(width) for name, width in zip(columns, widths)))
    for row, line in zip(rows, table[1:]):
        if line is None:
            labels = [
                key if value is True else str(value) for key, value in row.items() if value and key != "not_measured"
            ]
            label = " ".join(labels)
            print(f"  {label + ': ' if label else ''}{row['not_measured']}")
        else:
            print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths)))


def cell(value) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section alone; may be given again")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="packages to use where Transformer Engine is absent")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines here, too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    parser.add_argument("--minutes", type=float, default=8.5, help="start nothing after so long (default 8.5)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return child(*json.loads(args.case), args)
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
    lines = []
    for section in args.only or SECTIONS:
        rows = []
        for case in cases_of(section, args.device, has_te, facts["gpus"]):
            left = args.minutes * 60 - (time.monotonic() - started)
            rows += run_case(section, case, args, min(CASE_SECONDS, left))
        line = json.dumps({"section": section, "tiny": args.tiny, **facts, "rows": rows})
        print(f"\n{section}")
        print_table(rows)
        if section == "step":
            print(
                "  extrapolated: the line through the two depths at the model's own number of layers, no measurement. "
                f"The anchor is {ANCHOR:,} tokens/s per H100 (about 9 % MFU), the aim {4 * ANCHOR:,}."
            )
        print(line, flush=True)
        lines.append(line)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


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


# ---- the cases: one process each ----


def child(section: str, case: dict, args) -> None:
    """Run one case; its rows are written as they come, so that a crash leaves those before it."""
    functions = dict(attention=attention, vision=vision, step=step, fp8_loss=fp8_loss, nccl=nccl)
    case = {key: value for key, value in case.items() if key != "ranks"}
    first = os.environ.get("RANK", "0") == "0"
    for row in functions[section](args.device, args.tiny, **case):
        if first:
            with args.result.open("a") as file:
                file.write(json.dumps(row) + "\n")


def timed(function: Callable, device: str, repeats: int = 5, warmup: int = 2) -> tuple[float, float | None]:
    """Median milliseconds, and the peak of allocated GPU memory in GiB (None on a CPU)."""
    import torch

    for _ in range(warmup):
        function()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def model_config(name: str, **changes):
    """conf/model/NAME.yaml, without its tokenizer."""
    from omegaconf import OmegaConf

    from molmo2_nemo.config.schema import ModelConfig
    from molmo2_nemo.paths import CONF_DIR

    values = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    return dataclasses.replace(OmegaConf.to_object(values), **changes)


def documents(rng, vision, seq_length: int, max_crops: int) -> list[tuple[list[tuple[int, int]], list[int]]]:
    """What a row holds: (crops, visual tokens) of each document's images and frames, and the lengths of its answers.

    Half of the crops are frames, the rest tiles of images; several answers make a message tree. All crops are used, and
    text fills what is left of the row.
    """
    side = vision.image_size // vision.patch_size
    low = (-(-side // vision.image_pooling)) ** 2
    frame = (-(-side // vision.video_pooling)) ** 2
    inner = side - 2 * vision.overlap_margin  # patches that a tile adds
    found, crops, room = [], max_crops, seq_length
    frames_left = max_crops // 2

    def add(units, answers):
        nonlocal crops, room
        length = 1 + sum(tokens + 2 for _, tokens in units) + sum(answers)
        if sum(n for n, _ in units) > crops or length > room:
            return False
        crops, room = crops - sum(n for n, _ in units), room - length
        found.append((units, answers))
        return True

    while frames_left > 0:
        frames = min(int(rng.integers(8, max(9, max_crops // 2))), frames_left)
        if not add([(1, frame)] * frames, [int(rng.integers(10, 60))]):
            break
        frames_left -= frames
    misses = 0
    while crops and misses < 8:
        rows, columns = TILINGS[rng.integers(len(TILINGS))]
        high = [-(-(inner * n + 2 * vision.overlap_margin) // vision.image_pooling) for n in (rows, columns)]
        answers = [int(n) for n in rng.integers(10, 60, rng.choice([1, 1, 3, 6]))]
        misses += not add([(1, low), (rows * columns, high[0] * high[1])], answers)
    while crops and add([(1, frame)], [10]):
        pass
    while room >= 12:
        add([], [int(min(room - 1, rng.integers(60, 400)))])
    if room:
        units, answers = found[-1]
        found[-1] = (units, [*answers[:-1], answers[-1] + room])
    rng.shuffle(found)
    return found


def packed_row(model, seq_length: int, max_crops: int, seed: int, device: str = "cpu") -> dict:
    """A micro-batch of one packed row without padding, with the tensors that training hands to the model.

    Text follows a rule (the next id is 5 x the last + 7 modulo 509, broken at one place in ten), so it can be learned.
    """
    import numpy as np
    import torch

    from molmo2_nemo.config.schema import vision_token_ids
    from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE

    rng, ids, vision = np.random.default_rng(seed), vision_token_ids(model), model.vision
    row = {name: np.zeros(seq_length, np.int64) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    row["vision_mask"], row["loss_weights"] = np.zeros(seq_length, bool), np.zeros(seq_length, np.float32)
    patches, window = vision.patches_per_crop, vision.video_pooling**2
    pooling, all_units, at, first_patch = [], [], 0, 0
    for number, (units, answers) in enumerate(documents(rng, vision, seq_length, max_crops)):
        tree = len(answers) > 1
        root = [1]
        for crops, tokens in units:
            root += [ids["image_start_token_id"], *[ids["image_patch_id"]] * tokens, ids["image_end_token_id"]]
            # Consecutive patches, not squares of them: the same work.
            taken = vision.video_pooling**2 if crops == 1 and tokens * 4 < patches else vision.image_pooling**2
            index = np.arange(tokens * taken).reshape(tokens, taken) % (crops * patches) + first_patch
            pooling.append(np.pad(index, ((0, 0), (0, window - taken)), constant_values=-1))
            all_units.append((crops, tokens))
            first_patch += crops * patches
        span = slice(at, at + len(root))
        row["input_ids"][span], row["vision_mask"][span] = root, [False] + [True] * (len(root) - 1)
        row["position_ids"][span] = np.arange(len(root))
        row["segment_ids"][span] = SEGMENTS_PER_EXAMPLE * number + (SEGMENTS_OF_ROOT if tree else 0)
        at = span.stop
        for branch, length in enumerate(answers):
            text = [int(rng.integers(509))]
            for broken in rng.random(length):
                text.append(int(rng.integers(509)) if broken < 0.1 else (5 * text[-1] + 7) % 509)
            span = slice(at, at + length)
            row["input_ids"][span], row["labels"][span] = text[:-1], text[1:]
            row["loss_weights"][span] = 2 / length**0.5
            row["position_ids"][span] = np.arange(length) + len(root)
            row["segment_ids"][span] = SEGMENTS_PER_EXAMPLE * number + (branch if tree else 0)
            at = span.stop
    batch = {name: torch.from_numpy(values)[None] for name, values in row.items()}
    batch["crops"] = torch.from_numpy(
        rng.integers(0, 256, (first_patch // patches, patches, vision.patch_dim), dtype=np.uint8)
    )
    batch["pooling"] = torch.from_numpy(np.concatenate(pooling) if pooling else np.zeros((0, window), np.int64))
    batch["vision_units"] = torch.tensor(all_units, dtype=torch.int64).view(-1, 2)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def visible_pairs(batch: dict) -> int:
    """Pairs of query and key that the mask lets through, counted a slice of queries at a time."""
    from molmo2_nemo.model.mask import dense_mask

    segments, vision = batch["segment_ids"], batch["vision_mask"]
    S = segments.shape[1]
    return sum(int(dense_mask(segments, vision, q, min(512, S - q)).sum()) for q in range(0, S, 512))


def attention(device: str, tiny: bool) -> Iterator[dict]:
    """Forward and backward of three attentions over one packed row."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from molmo2_nemo.model.attention import attend
    from molmo2_nemo.model.mask import dense_mask, make_mask

    N, G, D = (4, 2, 16) if tiny else (32, 8, 128)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = model_config("tiny" if tiny else "molmo2_4b")
    for S in (256, 512) if tiny else (4096, 16384, 36864):
        batch = packed_row(model, S, S // 128, seed=S, device=device)
        segments, vision = batch["segment_ids"], batch["vision_mask"]
        pairs, scale = visible_pairs(batch), D**-0.5
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(1, heads, S, D, device=device, dtype=dtype).requires_grad_(i < 3)
            for i, heads in enumerate((N, G, G, N))
        )

        def dense():
            # No fused kernel of SDPA takes both a mask and grouped heads.
            keys, values = (x.repeat_interleave(N // G, dim=1) for x in (k, v))
            backend = [SDPBackend.EFFICIENT_ATTENTION] if device == "cuda" else [SDPBackend.MATH]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)

        def causal():
            with sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if device == "cpu" else SDPBackend.FLASH_ATTENTION
            ):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        expected = None
        for kernel, function, area in (
            ("sdpa dense", dense, pairs),
            ("flex", lambda: attend(q, k, v, mask, scale), pairs),
            ("flash causal", causal, S * (S + 1) // 2),
        ):
            row = {"tokens": S, "kernel": kernel}
            if kernel == "flex" and device == "cpu":
                yield dict(row, not_measured="not measured: FlexAttention has no backward pass on a CPU")
                continue

            def forward_backward():
                q.grad = k.grad = v.grad = None
                function().backward(grad)

            try:
                mask, mask_ms = None, None
                if kernel != "flash causal":
                    make = make_mask if kernel == "flex" else dense_mask
                    mask_ms, _ = timed(lambda: make(segments, vision), device)
                    mask = make(segments, vision)
                before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else None
                ms, peak = timed(forward_backward, device, repeats=2 if tiny else 10, warmup=1 if tiny else 3)
                difference = None
                if kernel == "sdpa dense":
                    expected = function().detach()
                elif kernel == "flex" and expected is not None:
                    difference = ((function() - expected).norm() / expected.norm()).item()
            except torch.OutOfMemoryError:
                yield dict(row, not_measured="failed: out of GPU memory")
                continue
            row.update(
                ms=ms,
                tflops=12 * area * N * D / ms / 1e9,
                working_gib=peak - before if peak else None,
                mask_ms=mask_ms,
                visible_share=area / S**2,
                differs_from_dense_by=difference,
            )
            yield row


def vision(device: str, tiny: bool, layer_spec: str) -> Iterator[dict]:
    """ViT and connector over video frames, one rank."""
    import torch

    from molmo2_nemo import parallel
    from molmo2_nemo.config.schema import ParallelConfig
    from molmo2_nemo.model.vision import VisionTower

    crops = 4 if tiny else 128
    model, layout = model_config("tiny" if tiny else "molmo2_4b"), ParallelConfig(layer_spec=layer_spec)
    parallel.initialize(layout, device, 5, 0)
    groups = parallel.solo_groups()
    side = model.vision.image_size // model.vision.patch_size
    windows, taken = (-(-side // model.vision.video_pooling)) ** 2, model.vision.video_pooling**2
    patches = model.vision.patches_per_crop
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (crops, patches, model.vision.patch_dim), dtype=torch.uint8).to(device)
    pooling = torch.randint(0, patches, (crops, windows, taken)) + torch.arange(crops).view(-1, 1, 1) * patches
    pooling = pooling.view(-1, taken).to(device)
    units = torch.tensor([(1, windows)] * crops)
    for recompute in (False, True):
        configs = parallel.transformer_configs(model, layout, device, "fp32" if device == "cpu" else "bf16", {})
        chunk = (2 if tiny else 32) if recompute else 0
        tower = VisionTower(model, configs["vit"], configs["connector"], groups, groups.tp, chunk, recompute)
        tower = tower.to(device).train()

        def forward_backward():
            tower.zero_grad()
            tower(pixels, pooling, units).sum().backward()

        with torch.no_grad():
            forward_ms, forward_gib = timed(lambda: tower(pixels, pooling, units), device)
        ms, gib = timed(forward_backward, device)
        yield dict(
            recompute=recompute,
            crops=crops,
            forward_ms=forward_ms,
            forward_crops_per_second=crops / forward_ms * 1e3,
            forward_peak_gib=forward_gib,
            ms=ms,
            crops_per_second=crops / ms * 1e3,
            peak_gib=gib,
        )
        del tower  # its memory is not counted with the next one's


class Trainer:
    """A model, its optimizer and their configuration, as training builds them, on the ranks that are there."""

    def __init__(self, device: str, model, layout, precision: str, transformer: dict, lr: float, seed: int = 0):
        import torch

        from molmo2_nemo import parallel
        from molmo2_nemo.config.schema import ComponentOptim, Config, OptimConfig, TrainConfig
        from molmo2_nemo.training.optimizer import build_optimizer, is_frozen
        from molmo2_nemo.training.step import build_model

        parallel.seed_everything(seed)
        torch.manual_seed(seed)
        rates = {name: ComponentOptim(lr=lr, warmup_steps=10) for name in ("vit", "connector", "llm")}
        self.config = Config(
            model=model,
            parallel=layout,
            optim=OptimConfig(**rates),
            train=TrainConfig(max_steps=10_000),
            transformer=transformer,
        )
        optim, tied = self.config.optim, model.tie_embeddings
        self.model = build_model(
            model,
            layout,
            device,
            precision,
            transformer,
            {"use_distributed_optimizer": device == "cuda"},
            freeze=lambda name: is_frozen(name, optim, tied),
        )
        for chunk in self.model:
            chunk.train()
        self.optimizer = build_optimizer(self.config, self.model, precision)
        self.steps = 0

    def step(self, batch: dict) -> float:
        """One optimisation step on one micro-batch; the loss before it, over all ranks."""
        import torch
        import torch.distributed as dist

        from molmo2_nemo.training.optimizer import clip_and_step, set_learning_rates
        from molmo2_nemo.training.step import forward_backward, global_weight

        optim = self.config.optim
        self.steps += 1
        set_learning_rates(self.optimizer, self.config, self.steps)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = global_weight([batch])
        weighted = forward_backward(self.model, [batch], total, z_loss=optim.z_loss)
        updated, norms = clip_and_step(self.optimizer, optim.clip_grad, all(bool(x.isfinite().all()) for x in weighted))
        if not updated:
            raise RuntimeError(f"step {self.steps}: loss or gradient is not finite (norms {norms})")
        loss = torch.stack([x[0].double().sum() for x in weighted]).sum() / total
        dist.all_reduce(loss)
        # Tensor parallel ranks hold copies.
        return loss.item() / self.config.parallel.tensor_model_parallel_size


def flops_of(model, batch: dict) -> float:
    """Model FLOPs of a training step on a row."""
    from molmo2_nemo.config.schema import OptimConfig
    from molmo2_nemo.planner.flops import frozen_parts, training_flops

    return training_flops(
        model,
        frozen_parts(OptimConfig(), model.tie_embeddings),
        crops=len(batch["crops"]),
        visual_tokens=len(batch["pooling"]),
        pooled_patches=int((batch["pooling"] >= 0).sum()),
        tokens=batch["input_ids"].numel(),
        attended=visible_pairs(batch),
        loss_tokens=int((batch["loss_weights"] > 0).sum()),
    )


def mfu(flops: float, ms: float, device: str, precision: str) -> float | None:
    """Share of the device's peak in that precision; None for a device whose peak is not known."""
    import torch

    if device == "cpu":
        return None
    from molmo2_nemo.planner.flops import peak_flops

    peak = peak_flops(torch.cuda.get_device_name(), precision)
    return None if peak is None else flops / (ms / 1e3) / peak


def step(
    device: str, tiny: bool, layer_spec: str, precision: str, recipe: str | None, recompute: bool
) -> Iterator[dict]:
    """Whole optimisation steps at two depths, and a line through them."""
    import gc

    import torch

    from molmo2_nemo import parallel
    from molmo2_nemo.config.schema import ParallelConfig

    name, S, crops, depths = ("tiny", 256, 4, (1, 2)) if tiny else ("molmo2_4b", 16384, 128, (4, 8))
    whole, layout = model_config(name), ParallelConfig(layer_spec=layer_spec)
    parallel.initialize(layout, device, 5, 0)
    transformer = {**({"fp8_recipe": recipe} if recipe else {}), **(FULL_RECOMPUTE if recompute else {})}
    batch, measured = packed_row(whole, S, crops, seed=1, device=device), []

    def row(model, ms, gib, extrapolated):
        share = mfu(flops_of(model, batch), ms, device, precision)
        return dict(
            layers=model.num_layers,
            extrapolated=extrapolated,
            tokens=S,
            ms=ms,
            tokens_per_second=S / ms * 1e3,
            mfu_percent=None if share is None else 100 * share,
            peak_gib=gib,
        )

    for depth in depths:
        model = dataclasses.replace(whole, num_layers=depth)
        trainer = Trainer(device, model, layout, precision, transformer, lr=1e-5)
        ms, gib = timed(lambda: trainer.step(batch), device, repeats=2 if tiny else 5, warmup=1 if tiny else 3)
        measured.append((ms, gib))
        yield row(model, ms, gib, False)
        del trainer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    yield row(whole, *(through(depths, values, whole.num_layers) for values in zip(*measured)), True)


def through(x: tuple[int, int], y: list[float | None], at: int) -> float | None:
    """The line through two points, read at a third place."""
    return None if None in y else y[0] + (y[1] - y[0]) / (x[1] - x[0]) * (at - x[0])


def small_model(tiny: bool):
    """Dimensions that every FP8 recipe takes: multiples of 128."""
    if tiny:
        return model_config("tiny")
    return model_config(
        "tiny",
        num_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=64,
        ffn_hidden_size=1536,
        vocab_size=1024,
    )


def fp8_loss(device: str, tiny: bool, layer_spec: str) -> Iterator[dict]:
    """Losses of the same steps in FP8 and with the other layer spec, against bf16."""
    from molmo2_nemo import parallel
    from molmo2_nemo.config.schema import ParallelConfig

    S, steps = (256, 6) if tiny else (2048, 200)
    last = max(1, steps // 4)
    parallel.initialize(ParallelConfig(layer_spec=layer_spec), device, 5, 0)
    model = small_model(tiny)
    plain = "fp32" if device == "cpu" else "bf16"
    batches = [packed_row(model, S, 8, seed, device) for seed in range(steps)]
    baseline = None
    runs = [(layer_spec, plain, None)]
    if layer_spec == "transformer_engine":
        # How much another bf16 kernel changes is what FP8's figure has to be seen against.
        runs += [("local", plain, None), *((layer_spec, "fp8", recipe) for recipe in RECIPES)]
    for spec, precision, recipe in runs:
        row = {"layer_spec": spec, "precision": precision, "recipe": recipe}
        if precision == "fp8":
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # the last model's scales
        try:
            trainer = Trainer(
                device,
                model,
                ParallelConfig(layer_spec=spec),
                precision,
                {"fp8_recipe": recipe} if recipe else {},
                lr=1e-3,
            )
            curve = [trainer.step(batch) for batch in batches]
        except Exception as error:
            yield dict(row, not_measured=f"failed: {type(error).__name__}: {error}"[:300])
            continue
        baseline = baseline or curve
        differences = [abs(a - b) for a, b in zip(curve[-last:], baseline[-last:])]
        yield dict(
            row,
            steps=steps,
            first_loss=curve[0],
            last_loss=sum(curve[-last:]) / last,
            mean_difference=sum(differences) / last,
            max_difference=max(differences),
        )
    if layer_spec == "local":
        reason = "FP8 needs a GPU" if device == "cpu" else "Transformer Engine is not installed"
        for recipe in RECIPES:
            yield dict(precision="fp8", recipe=recipe, not_measured=f"not measured: {reason}")


def nccl(device: str, tiny: bool) -> Iterator[dict]:
    """Five steps in float32 on two ranks: each alone with the row, then sharing it by tensor or context parallelism."""
    import shutil

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from molmo2_nemo import checkpoint_dir, parallel
    from molmo2_nemo.config.schema import ParallelConfig
    from molmo2_nemo.training.checkpoint import save_sharded
    from molmo2_nemo.training.step import load_weights, sharded_model_state

    model, alone, weights = small_model(tiny), None, None
    for name, sizes in (
        ("each alone", {}),
        ("TP2", dict(tensor_model_parallel_size=2)),
        ("TP2 + SP", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        ("CP2 a2a", dict(context_parallel_size=2)),
        ("CP2 all_gather", dict(context_parallel_size=2, cp_comm_type="all_gather")),
    ):
        layout = ParallelConfig(layer_spec="local", **sizes)
        parallel.initialize(layout, device, 5, 0)
        trainer = Trainer(device, model, layout, "fp32", {}, lr=1e-4)
        if weights is None:
            # Random weights depend on the layout: all layouts start from those of the first.
            parent = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(parent)
            weights = Path(parent[0]) / checkpoint_dir.step_name(0)
            aside = [str(checkpoint_dir.aside(weights)) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(aside)
            save_sharded(sharded_model_state(trainer.model), Path(aside[0]))
            if dist.get_rank() == 0:
                checkpoint_dir.publish(Path(aside[0]), weights, unwrap_model(trainer.model)[0].model, {"step": 0})
            dist.barrier()
        load_weights(trainer.model, weights)
        trainer.optimizer.reload_model_params()
        losses = [trainer.step(packed_row(model, 256 if tiny else 2048, 8, seed, device)) for seed in range(5)]
        alone = alone or losses
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, alone))
        yield dict(layout=name, first_loss=losses[0], last_loss=losses[-1], largest_relative_difference=difference)
        del trainer
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        shutil.rmtree(weights.parent)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
