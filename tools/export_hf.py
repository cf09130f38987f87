"""Turn a checkpoint of any layout into a Hugging Face folder, which plain transformers loads as a native Molmo2.

Writes sharded safetensors, configuration, generation configuration, tokenizer, processor, chat template and a model
card under a temporary name, and renames the folder when it is complete. Memory stays near the size of a shard. It needs
no GPU. Adapters of LoRA are merged with the weights that they were trained beside, or written alone, as PEFT's.
docs/serving.md says who reads the folder.

    python tools/export_hf.py runs/molmo2/stage2 OUT                  # newest complete checkpoint of a run
    python tools/export_hf.py runs/mine OUT --best                    # the best by train.save_best
    python tools/export_hf.py runs/molmo2/stage2/checkpoints/step_00000500 OUT --dtype bfloat16 --max-shard-gib 4
    python tools/export_hf.py runs/molmo2/stage2 OUT --adapter        # of a run with lora.rank above 0
"""

import argparse
import sys
from pathlib import Path

import torch

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.command_line import tokenizer_location
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.evaluate import card
from molmo2_nemo.evaluate.records import EVALUATIONS
from molmo2_nemo.hf.convert import export_hf
from molmo2_nemo.hf.layouts import LAYOUTS
from molmo2_nemo.hf.peft import export_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="a step_* directory, or a run directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
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
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders of tools/evaluate.py, for the card (default: all of runs/evaluate that are of these weights)",
    )
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="size of a safetensors file at most")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare the checkpoint with its checksums")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of LoRA alone, as PEFT loads them")
    parser.add_argument("--base", type=Path, help="with LoRA: the checkpoint of the frozen weights, if it was moved")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the checkpoint's model")
    parser.add_argument("--max-crops", type=int, help="tiles of an image; default: as in training, else 8")
    parser.add_argument("--max-frames", type=int, help="frames of a video; default: as in training, else 384")
    args = parser.parse_args()
    quiet_libraries()
    if not 0 < args.max_shard_gib < float("inf"):
        parser.error(f"--max-shard-gib {args.max_shard_gib} is no positive number")
    try:
        checkpoint = (checkpoint_dir.resolve_best if args.best else checkpoint_dir.resolve)(args.checkpoint)
        if not args.no_checksums:
            checkpoint_dir.verify(checkpoint)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        if args.adapter:
            layers = export_adapter(checkpoint, args.out, dtype, args.base)
            print(f"{args.out} holds the adapters of {layers} linear layers; load it with PeftModel.from_pretrained")
            return
        trained = training_data_settings(checkpoint)
        export_hf(
            checkpoint,
            args.out,
            dtype=dtype,
            max_shard_bytes=int(args.max_shard_gib * 2**30),
            tokenizer=args.tokenizer or tokenizer_location(checkpoint_dir.read_model(checkpoint).tokenizer),
            max_crops=args.max_crops or trained.get("max_crops_per_image", 8),
            max_frames=args.max_frames or trained.get("max_frames", 384),
            max_fps=trained.get("max_fps", 2.0),
            base=args.base,
            layout=args.layout,
            license=args.license,
        )
        scored = {out: card.evaluations_of(args.out, [out]) for out in args.scores or sorted(EVALUATIONS.glob("*"))}
        means = card.add_to_card(args.out, [one for found in scored.values() for one in found])
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    for out in args.scores or ():
        if not scored[out]:
            print(
                f"--scores {out}: no finished evaluation of exactly this model, left out of the card", file=sys.stderr
            )
    if means:
        print(f"{args.out / card.CARD} has {means:,} means of evaluations of exactly this model")
    print(f"{args.out} holds {checkpoint}; load it with transformers' AutoModelForImageTextToText and AutoProcessor")


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
