"""Turn a Hugging Face Molmo2 folder into a checkpoint that a stage can start from (train.init_from=CKPT).

Reads released and native tensor names, safetensors only, one tensor in memory at a time. Needs no GPU.

    python tools/import_hf.py HF_DIR CKPT
"""

import argparse
import sys
from pathlib import Path

from molmo2_nemo.config import ConfigError
from molmo2_nemo.hf.convert import import_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="new folder for the checkpoint")
    parser.add_argument("--verbose", action="store_true", help="name every tensor as it is written")
    args = parser.parse_args()
    try:
        if args.checkpoint.exists():
            raise ConfigError(f"{args.checkpoint} exists: remove it or name another folder.")
        model = import_hf(args.hf_dir, args.checkpoint, progress=print if args.verbose else lambda line: None)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    tied = "tied to the embedding" if model.tie_embeddings else "its own"
    print(f"{args.checkpoint}: {model.num_layers} decoder layers, {model.vit.num_layers} ViT layers, head {tied}")
    print(f"start from it: model=hf model.hf_path={args.hf_dir} train.init_from={args.checkpoint}")


if __name__ == "__main__":
    main()
