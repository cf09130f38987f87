"""Weights from and to Hugging Face folders, tensor by tensor: no process group, one tensor in memory at a time."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.hf.architecture import hf_config, model_config_from_hf
from molmo2_nemo.hf.names import EMBEDDING_PARTS, NATIVE_EMBEDDING, read_released, tensor_table

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceWeights:
    """Tensors of a Hugging Face folder by name, read when asked for. Safetensors only: nothing is unpickled."""

    def __init__(self, folder: Path):
        index = folder / INDEX_FILE
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
        elif (folder / MODEL_FILE).is_file():
            with safe_open(folder / MODEL_FILE, "pt") as file:
                files = dict.fromkeys(file.keys(), MODEL_FILE)
        else:
            raise ConfigError(
                f"{folder} has neither {MODEL_FILE} nor {INDEX_FILE}: only safetensors are read, never pickles."
            )
        if any(Path(name).name != name for name in files.values()):
            raise ConfigError(f"{index} names a file outside its folder: it is not read.")
        self.folder, self.files = folder, files

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def _open(self, name: str):
        if name not in self.files:
            raise KeyError(name)
        return safe_open(self.folder / self.files[name], "pt")

    def __call__(self, name: str) -> Tensor:
        with self._open(name) as file:
            return file.get_tensor(name)

    def shape_of(self, name: str) -> Tensor:
        """A meta tensor of the right shape and type: it takes no memory."""
        with self._open(name) as file:
            part = file.get_slice(name)
            return torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.float32), device="meta")

    def first_rows(self, name: str, rows: int) -> Tensor:
        with self._open(name) as file:
            return file.get_slice(name)[:rows]


class _LazyPlanner(DefaultSavePlanner):
    """Writes tensors that are made when their turn comes; the state dict holds meta tensors of their shapes."""

    def __init__(self, make: dict[str, Callable[[], Tensor]]):
        super().__init__(flatten_state_dict=False)
        self.make = make

    def resolve_data(self, write_item):
        make = self.make.get(write_item.index.fqn)
        return make() if make is not None else super().resolve_data(write_item)


def head_is_tied(folder: Path) -> bool:
    """Whether a Molmo2's head is its embedding, by the first rows of both. False also for a folder without weights."""
    try:
        weights = HuggingFaceWeights(folder)
    except ConfigError:
        return False
    table = next((name for name in (EMBEDDING_PARTS[0], NATIVE_EMBEDDING) if name in weights), None)
    if table is None or "lm_head.weight" not in weights:
        return False
    return torch.equal(weights.first_rows(table, 64), weights.first_rows("lm_head.weight", 64))


def import_hf(
    folder: Path, checkpoint: Path, progress: Callable[[str], None] = print, info: dict | None = None
) -> ModelConfig:
    """Write a checkpoint of the weights in a Hugging Face folder (released or native names). Returns its architecture.

    A head equal to the base embedding, bit for bit, is stored once and marked tied. info: more for the marker. Raises
    ConfigError when the folder lacks a tensor or has one of another shape.
    """
    model = model_config_from_hf(folder)
    weights = HuggingFaceWeights(folder)

    # Every tensor is checked before anything is written.
    for entry in tensor_table(model):
        try:
            shape = entry.join([read_released(name, model, weights, weights.shape_of) for name in entry.released]).shape
        except KeyError as error:
            raise ConfigError(f"{folder} lacks {error.args[0]}: it cannot be imported.") from None
        except RuntimeError as error:
            raise ConfigError(f"{folder}: {' + '.join(entry.released)} do not fit config.json: {error}.") from None
        if tuple(shape) != entry.shape:
            raise ConfigError(
                f"{folder}: {' + '.join(entry.released)} make {tuple(shape)}, config.json says {entry.shape}."
            )

    def read(name):
        return read_released(name, model, weights, weights)

    embedding = read(EMBEDDING_PARTS[0])
    model.tie_embeddings = torch.equal(read("lm_head.weight"), embedding)
    dtype = embedding.dtype
    del embedding
    state, make = {}, {}
    for entry in tensor_table(model):

        def build(entry=entry):
            progress(entry.key)
            return entry.join([read(name) for name in entry.released]).contiguous()

        state[entry.key] = torch.empty(entry.shape, dtype=dtype, device="meta")
        make[entry.key] = build
    source = {"step": 0, "stage": "imported", "source": str(folder)}
    write_checkpoint(checkpoint, model, state, make, source | (info or {}))
    return model


def write_checkpoint(checkpoint: Path, model: ModelConfig, state: dict, make: dict, info: dict) -> None:
    """A weights-only checkpoint that Megatron's dist_checkpointing.load reads, written by one process."""
    temporary = checkpoint_dir.aside(checkpoint)
    # dist_checkpointing expects the unsharded part of a state dict as one serialised object.
    common = io.BytesIO()
    torch.save([{}], common)
    dcp.save(
        {**state, "common_state/shard_0_1": common},
        storage_writer=dcp.FileSystemWriter(temporary, thread_count=1),
        planner=_LazyPlanner(make),
        no_dist=True,
    )
    (temporary / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    checkpoint_dir.publish(temporary, checkpoint, model, info)


def read_tensor(checkpoint: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A whole tensor of a checkpoint, whatever layout wrote it."""
    state = {key: torch.empty(shape, dtype=dtype)}
    with checkpoint_dir.nothing_executed(checkpoint):
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return state[key]


def checkpoint_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    with checkpoint_dir.nothing_executed(checkpoint):
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        key: entry.properties.dtype
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "properties")
    }


def released_tensors(checkpoint: Path, model: ModelConfig):
    """Yield (released name, tensor) of a checkpoint, one entry of the table in memory at a time."""
    dtypes = checkpoint_dtypes(checkpoint)
    for entry in tensor_table(model):
        if entry.key not in dtypes:
            raise ConfigError(f"checkpoint {checkpoint} lacks {entry.key}: its model.json does not describe it.")
        tensor = read_tensor(checkpoint, entry.key, entry.shape, dtypes[entry.key])
        yield from zip(entry.released, entry.split(tensor))
        if model.tie_embeddings and entry.released == (EMBEDDING_PARTS[0],):
            # Released folders carry a tied head as a copy.
            yield "lm_head.weight", entry.split(tensor)[0]


def export_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 << 30,
    tokenizer: str | None = None,
    max_crops: int = 8,
    max_frames: int = 384,
    max_fps: float = 2.0,
    progress: Callable[[str], None] = print,
) -> None:
    """Write a Hugging Face folder under a temporary name and rename it when it is whole.

    dtype: None keeps the checkpoint's. tokenizer: folder whose tokenizer and chat template are written along with the
    processor; None writes weights and configuration only. Memory stays near `max_shard_bytes` plus one tensor.
    Raises ConfigError when `folder` exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: remove it or export to another folder.")
    model = checkpoint_dir.read_model(checkpoint)
    temporary = checkpoint_dir.aside(folder)
    shard, size, shards, total = {}, 0, [], 0

    def flush():
        nonlocal shard, size
        if shard:
            name = f"part-{len(shards):05d}.safetensors"
            save_file(shard, temporary / name, metadata={"format": "pt"})
            shards.append((name, list(shard)))
            progress(f"{name}: {len(shard)} tensors, {size / 2**20:.1f} MiB")
        shard, size = {}, 0

    stored = None
    for name, tensor in released_tensors(checkpoint, model):
        tensor = tensor.to(dtype or tensor.dtype).contiguous().clone()
        stored = stored or tensor.dtype
        if size and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for number, (part, names) in enumerate(shards, start=1):
        name = MODEL_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (temporary / part).rename(temporary / name)
        weight_map.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    config = hf_config(model, str(stored).removeprefix("torch."))
    config.save_pretrained(temporary)
    if tokenizer is not None:
        from molmo2_nemo.data.processor import build_processor

        processor = build_processor(tokenizer, model.vision, max_crops)
        processor.video_processor.num_frames = max_frames
        processor.video_processor.max_fps = max_fps
        processor.save_pretrained(temporary)
        _write_generation_config(temporary, processor.tokenizer)
    temporary.rename(folder)


def _write_generation_config(folder: Path, tokenizer) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
