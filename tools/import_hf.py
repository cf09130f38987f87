"""Turn a Hugging Face Molmo2 folder into a checkpoint that a stage can start from (train.init_from=CKPT).

It reads safetensors only, with released or native tensor names, one tensor at a time. It needs no GPU. With --llm and
--vision, the language model is a Qwen3 or an OLMo 3, the vision tower a SigLIP 2; the connector and the rows of the
extra vocabulary are drawn at random. A run does the same by itself if train.init_from names such folders.

All folders may be addresses of object storage; copies are then made in a folder below --scratch.

    python tools/import_hf.py HF_DIR CKPT
    python tools/import_hf.py --adapter PEFT_DIR --base CKPT ADAPTER_CKPT          # LoRA beside the weights of CKPT
    python tools/import_hf.py --llm Qwen3-4B-Instruct-2507 --vision siglip2-so400m-patch14-384 CKPT
"""

import argparse
import sys
import tempfile
from pathlib import Path

from molmo2_nemo import checkpoint_dir, remote_checkpoints, storage
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.hf.base_models import import_base_models
from molmo2_nemo.hf.convert import import_hf
from molmo2_nemo.hf.folder import is_there
from molmo2_nemo.hf.peft import import_adapter
from molmo2_nemo.option_types import local_path


def say(line: str) -> None:
    """At once, also into a file."""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "hf_dir", metavar="HF_DIR", nargs="?", help="a Molmo2: folder with config.json and *.safetensors"
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="new folder for the checkpoint, or its address")
    parser.add_argument("--llm", metavar="DIR", help="a Qwen3 or OLMo 3 instead of HF_DIR")
    parser.add_argument("--vision", metavar="DIR", help="its vision tower, a SigLIP 2")
    parser.add_argument("--adapter", metavar="DIR", help="adapters of LoRA that PEFT has saved")
    parser.add_argument("--base", metavar="CKPT", help="the checkpoint of the weights that they belong to")
    parser.add_argument("--seed", type=int, default=6198, help="seed of what is drawn at random (train.seed)")
    parser.add_argument(
        "--scratch", type=local_path, help="folder for copies of what is at addresses; default: the temporary one"
    )
    args = parser.parse_args()
    pairs = [(args.llm, args.vision), (args.adapter, args.base)]
    given = [args.hf_dir is not None, *(all(part is not None for part in pair) for pair in pairs)]
    if sum(given) != 1 or any((first is None) != (second is None) for first, second in pairs):
        parser.error("give HF_DIR, or both --llm and --vision, or both --adapter and --base")
    try:
        if args.scratch is not None and not Path(args.scratch).is_dir():
            raise ConfigError(f"--scratch {args.scratch} is no folder: make it, or name another one.")
        with tempfile.TemporaryDirectory(prefix="import_hf_", dir=args.scratch) as scratch:
            make(args, Path(scratch))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def make(args: argparse.Namespace, scratch: Path) -> None:
    """Make the checkpoint, and say how to start from it; scratch: an empty folder. Raises ConfigError and OSError."""
    if not storage.is_remote(args.checkpoint) and is_there(Path(args.checkpoint)):
        raise ConfigError(f"{args.checkpoint} exists: remove it or name another folder.")

    def local(given: str) -> Path:
        return remote_checkpoints.local_copy(given, scratch, say)

    with remote_checkpoints.written(args.checkpoint, scratch / "made", checkpoint_dir.MARKER, say) as made:
        if args.adapter is not None:
            base = checkpoint_dir.resolve(str(local(args.base)))
            lora = import_adapter(local(args.adapter), base, made, say, args.seed)
        elif args.llm is not None:
            llm, vision = local(args.llm), local(args.vision)
            model = import_base_models(llm, vision, made, seed=args.seed, progress=say, tokenizer=args.llm)
        else:
            model = import_hf(local(args.hf_dir), made, say, tokenizer=args.hf_dir)
    if args.adapter is not None:
        settings = f"lora.rank={lora.rank} lora.alpha={lora.alpha:g} lora.rslora={str(lora.rslora).lower()}"
        print(f"{args.checkpoint}: adapters of {', '.join(lora.targets)}, rank {lora.rank}")
        print(f"start from it: {settings} 'lora.targets=[{','.join(lora.targets)}]' train.init_from={args.checkpoint}")
        return
    tied = "tied to the embedding" if model.tie_embeddings else "its own"
    print(f"{args.checkpoint}: {model.num_layers} decoder layers, {model.vit.num_layers} ViT layers, head {tied}")
    is_folder = args.llm is None and not storage.is_remote(args.hf_dir)
    architecture = f"model=hf model.hf_path={args.hf_dir}" if is_folder else "model=NAME (of the same sizes)"
    print(f"start from it: {architecture} train.init_from={args.checkpoint}")


if __name__ == "__main__":
    main()
