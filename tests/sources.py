"""Small data sources for the loader's tests, written sample by sample."""

import io
import json
import tarfile
from pathlib import Path

import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

from molmo2_nemo.config.schema import DataConfig, VisionConfig

ROOT = Path(__file__).resolve().parents[1]
VISION = VisionConfig(image_size=70, overlap_margin=1)


def config(root, **changes) -> DataConfig:
    settings = dict(
        blend="sample_stage2",
        root=str(root),
        tokenizer=str(ROOT / "molmo2_nemo" / "data" / "tokenizer"),
        seq_length=768,
        max_crops=32,
        max_crops_per_image=4,
        max_frames=12,
        packing_buffer_size=12,
        shuffle_buffer_size=8,
        num_workers=0,
        seed=5,
    )
    return DataConfig(**(settings | changes))


def chat(question="Q", answer="A", **example) -> dict:
    """An example with one conversation."""
    return {"branches": [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]]} | example


def write_source(folder: Path, samples: list[dict], shard_size: int = 10**9) -> None:
    """Shards train-0.tar, ... and their index. A sample: part name -> bytes, or what becomes JSON. Keys are numbers."""
    folder.mkdir(parents=True)
    shards = [f"train-{start // shard_size}.tar" for start in range(0, len(samples), shard_size)]
    for number, name in enumerate(shards):
        start = number * shard_size
        with tarfile.open(folder / name, "w") as tar:
            for index, sample in enumerate(samples[start : start + shard_size], start=start):
                for part, content in sample.items():
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                    member = tarfile.TarInfo(f"{index:05d}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    BaseWebdatasetFactory.prepare_dataset(
        EPath(folder), shards, split_parts_patterns=[("train", ".*")], shuffle_seed=None, workers=1
    )
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))


def write_blend(path: Path, *names: str) -> str:
    """A blend of equal weights of sources in folders of their names."""
    sources = {name: {"path": name, "weight": 1} for name in names}
    path.write_text(yaml.safe_dump({"weighting": "fixed", "sources": sources}))
    return str(path)
