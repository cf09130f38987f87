"""Turn a checkpoint of any layout into a Hugging Face folder, which plain transformers loads as a native Molmo2.

Writes sharded safetensors, configuration, generation configuration, tokenizer, processor, chat template and a model
card under a temporary name, and renames the folder when it is complete. Memory stays near the size of a shard. It needs
no GPU. Adapters of LoRA are merged with the weights that they were trained beside, or written alone, as PEFT's.
docs/serving.md says who reads the folder.

    python tools/export_hf.py runs/molmo2/stage2 OUT                  # newest complete checkpoint of a run
    python tools/export_hf.py runs/mine OUT --best                    # the best by train.save_best
    python tools/export_hf.py runs/molmo2/stage2/checkpoints/step_00000500 OUT --dtype bfloat16 --max-shard-gib 4
    python tools/export_hf.py runs/molmo2/stage2 OUT --adapter        # of a run with lora.rank above 0
    python tools/export_hf.py runs/molmo2/stage2 OUT --push ORG/NAME  # also to the Hub, private without --public
    python tools/export_hf.py s3://bucket/runs/molmo2/stage2 s3://bucket/models/molmo2 --scratch /local

CKPT and OUT may be addresses of object storage: copies of the checkpoint and of the export are then made in a folder
below --scratch, and removed at the end.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from molmo2_nemo import checkpoint_dir, remote_checkpoints, storage
from molmo2_nemo.command_line import tokenizer_location
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.evaluate import card
from molmo2_nemo.evaluate.records import EVALUATIONS
from molmo2_nemo.hf.convert import export_hf
from molmo2_nemo.hf.layouts import LAYOUTS
from molmo2_nemo.hf.peft import export_adapter
from molmo2_nemo.hf.push import push, refuse_push
from molmo2_nemo.option_types import local_path

# Without it, nobody takes the folder for a model: it is uploaded when all else is there.
LAST = "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="a step_* directory, or a run directory; or its address")
    parser.add_argument("out", metavar="OUT", help="new folder to write, or its address")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of a run, not the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as in the checkpoint")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="names in config.json: released (default), as on the Hub, for vLLM and transformers; native, for "
        "transformers alone, without a file of code",
    )
    parser.add_argument("--license", help="of the exported model, for its card, by the Hub's names: apache-2.0, ...")
    parser.add_argument(
        "--scores",
        type=local_path,
        nargs="+",
        metavar="DIR",
        help="folders of tools/evaluate.py, for the card (default: all of runs/evaluate that are of these weights)",
    )
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="size of a safetensors file at most")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare the checkpoint with its checksums")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of LoRA alone, as PEFT loads them")
    parser.add_argument("--base", help="with LoRA: the checkpoint of the frozen weights, if it was moved")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the checkpoint's model")
    parser.add_argument("--max-crops", type=int, help="tiles of an image; default: as in training, else 8")
    parser.add_argument("--max-frames", type=int, help="frames of a video; default: as in training, else 384")
    parser.add_argument(
        "--scratch", type=local_path, help="folder for copies of what is at addresses; default: the temporary one"
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="put the export into this new repository of the Hub, too")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    args = parser.parse_args()
    quiet_libraries()
    if args.public and args.push is None:
        parser.error("--public is about --push, which is not there")
    if not 0 < args.max_shard_gib < float("inf"):
        parser.error(f"--max-shard-gib {args.max_shard_gib} is no positive number")
    try:
        if args.push is not None:
            refuse_push(args.push)
        if args.scratch is not None and not Path(args.scratch).is_dir():
            raise ConfigError(f"--scratch {args.scratch} is no folder: make it, or name another one.")
        with tempfile.TemporaryDirectory(prefix="export_hf_", dir=args.scratch) as scratch:
            export(args, Path(scratch))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def say(line: str) -> None:
    """At once, also into a file."""
    print(line, flush=True)


def export(args: argparse.Namespace, scratch: Path) -> None:
    """Write and push what was asked for; scratch: an empty folder. Raises ConfigError and OSError."""
    checkpoint = checkpoint_of(args, scratch)
    if args.base is not None:
        args.base = remote_checkpoints.local_copy(args.base, scratch / "base", say)
    if not args.no_checksums and not storage.is_remote(args.checkpoint):  # what was fetched has been compared
        checkpoint_dir.verify(checkpoint)
    with remote_checkpoints.written(args.out, scratch, LAST, say) as out:
        write(args, checkpoint, out, scratch)
        where = None if args.push is None else push(out, args.push, args.public)
    what = storage.shown(args.checkpoint) if storage.is_remote(args.checkpoint) else checkpoint
    how = "load it with transformers' AutoModelForImageTextToText and AutoProcessor"
    if args.adapter:
        how = "load it with PeftModel.from_pretrained"
    print(f"{storage.shown(args.out)} holds {'the adapters of ' if args.adapter else ''}{what}; {how}")
    if where is not None:
        print(f"pushed to {where}, {'public' if args.public else 'private'}")


def checkpoint_of(args: argparse.Namespace, scratch: Path) -> Path:
    """The checkpoint that was asked for, fetched to `scratch` if it is at an address. Raises ConfigError."""
    if not storage.is_remote(args.checkpoint):
        return (checkpoint_dir.resolve_best if args.best else checkpoint_dir.resolve)(args.checkpoint)
    storage.check(args.checkpoint, "CKPT")
    remote = (remote_checkpoints.resolve_best if args.best else remote_checkpoints.resolve)(args.checkpoint)
    if remote is None:
        raise ConfigError(f"there is no checkpoint at {storage.shown(args.checkpoint)}: name a step_* folder or a run.")
    target = scratch / checkpoint_dir.step_name(remote.step)
    remote_checkpoints.fetch(remote, target, say)
    return target


def write(args: argparse.Namespace, checkpoint: Path, out: Path, scratch: Path) -> None:
    """Write the folder `out`. Raises ConfigError."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.adapter:
        layers = export_adapter(checkpoint, out, dtype, args.base)
        print(f"adapters of {layers} linear layers")
        return
    trained = training_data_settings(checkpoint)
    tokenizer = args.tokenizer or tokenizer_location(checkpoint_dir.read_model(checkpoint).tokenizer)
    if storage.is_remote(tokenizer):  # it was imported from there
        remote_checkpoints.fetch_folder(tokenizer, scratch / "tokenizer", say, without=(".safetensors", ".bin", ".pt"))
        tokenizer = str(scratch / "tokenizer")
    export_hf(
        checkpoint,
        out,
        dtype=dtype,
        max_shard_bytes=int(args.max_shard_gib * 2**30),
        tokenizer=tokenizer,
        max_crops=args.max_crops or trained.get("max_crops_per_image", 8),
        max_frames=args.max_frames or trained.get("max_frames", 384),
        max_fps=trained.get("max_fps", 2.0),
        base=args.base,
        layout=args.layout,
        license=args.license,
    )
    add_scores(out, args.scores)


def add_scores(out: Path, evaluations: list[Path] | None) -> None:
    """Write the means of evaluations of exactly this model into its card; say those that are of another one. Those of a
    split `train` have to be named."""
    scored = {folder: card.evaluations_of(out, [folder]) for folder in evaluations or sorted(EVALUATIONS.glob("*"))}
    if not evaluations:
        scored = {folder: [one for one in found if not card.is_of_training(one)] for folder, found in scored.items()}
    means, _ = card.add_to_card(out, [one for found in scored.values() for one in found])
    for folder in evaluations or ():
        if not scored[folder]:
            print(
                f"--scores {folder}: no finished evaluation of exactly this model, left out of the card",
                file=sys.stderr,
            )
    if means:
        print(f"{card.CARD} has {means:,} means of evaluations of exactly this model")


def training_data_settings(checkpoint: Path) -> dict:
    """The `data` part of the configuration a training checkpoint carries; empty for an imported one."""
    import yaml

    path = checkpoint / "config.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text())["data"]
        return {key: found[key] for key in ("max_crops_per_image", "max_frames", "max_fps") if key in found}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is no configuration of a run ({type(error).__name__}); use another step_* directory."
        ) from error


if __name__ == "__main__":
    main()
