"""Compile the GPU path's kernels for an H100, on a machine without a GPU, and print what each of them takes.

    python tools/check/kernels.py --config-name stage2 model=molmo2_8b hardware=h100_128 gpus=128 [OVERRIDE...]
    python tools/check/kernels.py --all
    python tools/check/kernels.py --sweep --config-name stage2 model=molmo2_4b gpus=8

FlexAttention's forward and backward pass, the block mask's kernels, and the fused kernels between matrix products,
compiled by torch.compile and Triton for sm_90 at the shapes of a rank; --all: at each different shape of all models,
stages and presets in conf/. --sweep: FlexAttention alone, with each of the tiles in molmo2_nemo/rehearsal/kernels.py.
Exit status: 0 all compile, and are within LIMITS (not looked at in a sweep); 1 one does not, with a sentence; 2 a
setting cannot work.
"""

import argparse
import json
import sys
import traceback
from pathlib import Path

from molmo2_nemo.command_line import compose, take_gpus
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.paths import CONF_DIR

# Bytes of spill stores that a thread may have: as many as were seen with torch 2.14.1 and Triton 3.8.0, 80 with queries
# that are not the row's first (context parallelism by all_gather) and 0 otherwise.
LIMITS = {"mask": 0, "forward": 0, "backward": 80, "fused": 0, "other": 0}
SHARED_MEMORY = 227 * 1024  # of a block at most, bytes: CUDA programming guide, table of compute capability 9.0
STAGES = ("stage1", "stage2", "stage3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", metavar="STAGE", help="stage1, stage2 or stage3")
    parser.add_argument("--all", action="store_true", help="every model, stage and preset in conf/")
    parser.add_argument("--sweep", action="store_true", help="attention with many tiles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="gpus=N and overrides of the recipe")
    args = parser.parse_args()
    quiet_libraries()
    try:
        if args.all == bool(args.config_name):
            raise ConfigError("say --config-name STAGE or --all, one of them.")
        configs = shipped() if args.all else [one(args.config_name, args.overrides)]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from molmo2_nemo.rehearsal import hopper

    hopper.install()
    records, faults = [], []
    for title, values, kernels in to_compile(configs, args.sweep):
        print(f"\n{title}", flush=True)
        try:
            for kernel in kernels:
                print(line(kernel), flush=True)
                records.append({**values, **vars(kernel)})
                faults += [] if args.sweep else faults_of(kernel)
        except Exception as error:
            traceback.print_exc()
            faults.append(f"{title} does not compile: {type(error).__name__}")
    if args.json:
        args.json.write_text(json.dumps(records))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def to_compile(configs: list, sweep: bool):
    """(title, figures for the JSON file, kernels that are compiled as they are taken), each shape once."""
    from molmo2_nemo.rehearsal.kernels import SWEEP, compiled, fused_kernels, options_of, shape_of, widths_of

    for shape in dict.fromkeys(map(shape_of, configs)):
        for tiles in SWEEP if sweep else (None,):
            options = options_of(*tiles) if tiles else None
            title = f"{shape}  {options}" if sweep else f"{shape}"
            yield title, {**vars(shape), "options": options}, compiled(shape, options)
    for widths in () if sweep else dict.fromkeys(map(widths_of, configs)):
        yield f"{widths}", vars(widths), fused_kernels(widths)


def one(stage: str, words: list[str]):
    """The configuration on the command line. Raises ConfigError."""
    gpus, overrides = take_gpus(words)
    config = compose(stage, overrides)
    check_settings(config, gpus)
    return config


def shipped() -> list:
    """Those of every stage, model and preset of several GPUs."""
    models = sorted(file.stem for file in (CONF_DIR / "model").glob("molmo2_*.yaml"))
    presets = sorted(file.stem for file in (CONF_DIR / "hardware").glob("h100_*.yaml"))
    return [
        compose(stage, [f"model={model}", f"hardware={preset}"])
        for stage in STAGES
        for model in models
        for preset in presets
    ]


def line(kernel) -> str:
    """A row of the table."""
    from molmo2_nemo.rehearsal.kernels import warps_at_a_time

    tiles = " ".join(f"{name}={value}" for name, value in kernel.tiles.items())
    return (
        f"  {kernel.of:<9} {kernel.registers:>4} registers, spills {kernel.spill_stores:,} B stored "
        f"{kernel.spill_loads:,} B loaded, {kernel.shared:,} B shared, {warps_at_a_time(kernel)} of 64 warps  "
        f"{kernel.name}  {tiles}"
    )


def faults_of(kernel) -> list[str]:
    """Sentences on what a kernel takes too much of."""
    found = []
    if kernel.spill_stores > LIMITS[kernel.of]:
        limit = LIMITS[kernel.of]
        found.append(f"{kernel.name} spills {kernel.spill_stores:,} bytes a thread, more than {limit:,}")
    if kernel.shared > SHARED_MEMORY:
        found.append(f"{kernel.name} takes {kernel.shared:,} bytes of shared memory, more than {SHARED_MEMORY:,}")
    return found


if __name__ == "__main__":
    sys.exit(main())
