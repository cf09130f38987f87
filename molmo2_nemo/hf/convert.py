"""Weights from and to Hugging Face folders, a few tensors in memory at a time, without a process group."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from molmo2_nemo import checkpoint_dir, lora_base
from molmo2_nemo.byte_progress import ByteProgress
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.lora import scale
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.data import vocabulary
from molmo2_nemo.files import disk_errors_told, missing_room, readable_size
from molmo2_nemo.hf.adapters import Adapted, adapted, merge
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.folder import INDEX_FILE, MODEL_FILE, HuggingFaceWeights, has_weights, is_there
from molmo2_nemo.hf.layouts import LAYOUTS, write_config
from molmo2_nemo.hf.names import EMBEDDING_PARTS, NATIVE_EMBEDDING, Entry, WrongShape, read_released, tensor_table

_HEAD = "lm_head.weight"
# The base embedding of a Molmo2 (released, native) and of a language model.
_TABLES = (EMBEDDING_PARTS[0], NATIVE_EMBEDDING, "model.embed_tokens.weight", "embed_tokens.weight")
# Bytes: what torch.save puts around a tensor (about 1,700), and its place in the index.
_AROUND_A_TENSOR = 2048
# Bytes of tensors that an export reads at a time: each time the checkpoint's index is read.
READ_AT_ONCE = 2**30
# Bytes of tensors in a file of an imported checkpoint: torch's writer holds what it has written until a file is closed.
BYTES_OF_A_FILE = 2**29
# Bytes of two tables that are compared at a time.
_COMPARED_AT_ONCE = 2**26


class _WriterOfSeveralFiles(dcp.FileSystemWriter):
    """torch's writer, which holds the tensors of a file until it is closed, given several files to write."""

    def write_data(self, plan, planner):
        results, items = [], sorted(plan.items, key=lambda item: planner.order[item.index.fqn])
        for number, group in enumerate(_groups(items, lambda item: planner.sizes[item.index.fqn], BYTES_OF_A_FILE)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
            part = dataclasses.replace(plan, items=group, storage_data=prefix)
            results += super().write_data(part, planner).wait()
        written = torch.futures.Future()
        written.set_result(results)
        return written


class _LazyPlanner(DefaultSavePlanner):
    """Writes tensors that are made when their turn comes; the state dict holds meta tensors of their shapes."""

    def __init__(self, state: dict, make: dict[str, Callable[[], Tensor]], progress: ByteProgress):
        super().__init__(flatten_state_dict=False)
        self.make, self.progress = make, progress
        self.order = {key: number for number, key in enumerate(state)}
        self.sizes = {key: value.nbytes if isinstance(value, Tensor) else 0 for key, value in state.items()}

    def resolve_data(self, write_item):
        key = write_item.index.fqn
        if key not in self.make:
            return super().resolve_data(write_item)
        tensor = self.make[key]()
        self.progress.add(tensor.nbytes, key)
        return tensor


def head_is_tied(folder: Path, says: bool) -> bool:
    """Whether a model's head is its embedding, by the first rows of both.

    says: config.json's tie_word_embeddings, which decides where there is no head, or only a configuration. Raises
    ConfigError for damaged weights, and for weights that lack a head of their own.
    """
    if not has_weights(folder):
        return says
    weights = HuggingFaceWeights(folder)
    if _HEAD not in weights:
        _refuse_no_head(folder, says)
        return True
    table = next((name for name in _TABLES if name in weights), None)
    if table is None or any(weights.shape_of(name).dim() != 2 for name in (table, _HEAD)):
        return False  # damaged: the import says so
    return _same(weights(table, slice(0, 64)), weights(_HEAD, slice(0, 64)))


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _refuse_no_head(folder: Path, tied: bool) -> None:
    refuse(
        not tied,
        f"{folder} lacks {_HEAD}, and its config.json does not say tie_word_embeddings=true: download the weights "
        "again, or set it if the head is the embedding.",
    )


def import_hf(
    folder: Path,
    checkpoint: Path,
    progress: Callable[[str], None] = print,
    info: dict | None = None,
    tokenizer: str | None = None,
) -> ModelConfig:
    """Write a checkpoint of the weights in a Hugging Face folder (released or native names). Returns its architecture.

    A head equal to the base embedding, bit for bit, is stored once and marked tied. info: more for the marker.
    tokenizer: where it will be found, if not in `folder`. Raises ConfigError for a folder that is damaged or does not
    fit its config.json, and for a disk without room.
    """
    model = model_config_from_hf(folder)
    model.tokenizer = tokenizer or model.tokenizer
    weights = HuggingFaceWeights(folder)
    if _HEAD not in weights:
        _refuse_no_head(folder, model.tie_embeddings)
    model.tie_embeddings = _HEAD not in weights
    weights.refuse_more_layers(("model.transformer.blocks.", "model.language_model.layers."), model.num_layers)

    # Every tensor is checked before anything is written.
    state, rows = {}, weights.rows
    for entry in tensor_table(model):
        released = " + ".join(entry.released)
        try:
            meta = entry.join([read_released(name, model, rows, weights.shape_of) for name in entry.released])
        except KeyError as error:
            raise ConfigError(
                f"{folder} lacks {error.args[0]}, which its config.json asks for: it cannot be imported; download both "
                "again."
            ) from None
        except WrongShape as error:
            raise ConfigError(f"{folder}: {error}: its config.json is another model's; download both again.") from None
        except (RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{folder}: {released} do not fit config.json ({reason}): download both again.") from None
        if tuple(meta.shape) != entry.shape:
            raise ConfigError(
                f"{folder}: {released} make {tuple(meta.shape)}, config.json says {entry.shape}: download both again."
            )
        state[entry.key] = torch.empty(entry.shape, dtype=meta.dtype, device="meta")

    def read(name, piece=None):
        return read_released(name, model, rows, weights, piece)

    if _HEAD in weights and _head_is_embedding(model, read):
        model.tie_embeddings = True
    make = {}
    for entry in tensor_table(model):

        def build(entry=entry):
            return entry.join([read(name) for name in entry.released]).contiguous()

        make[entry.key] = build
    state = {key: state[key] for key in make}
    report_types(state, progress)
    source = {"step": 0, "stage": "imported", "source": str(folder)}
    write_checkpoint(checkpoint, model, state, make, source | (info or {}), ByteProgress(_bytes(state), progress))
    return model


def _head_is_embedding(model: ModelConfig, read: Callable[[str, slice], Tensor]) -> bool:
    """Whether both tables are the same, bit for bit; a piece of each is in memory."""
    step = max(1, _COMPARED_AT_ONCE // (4 * model.hidden_size))
    pieces = [slice(at, min(at + step, model.vocab_size)) for at in range(0, model.vocab_size, step)]
    return all(_same(read(_HEAD, piece), read(EMBEDDING_PARTS[0], piece)) for piece in pieces)


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def report_types(state: dict[str, Tensor], progress: Callable[[str], None]) -> None:
    """Say which data types the tensors have, if there are several: each keeps its own.

    Tensors that are joined, as q, k and v are, take the type that holds all of them.
    """
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    if len(counts) > 1:
        several = ", ".join(f"{number} {dtype}" for dtype, number in counts.most_common())
        progress(f"the tensors are of several types, and each keeps its own: {several}")


@contextlib.contextmanager
def new_folder(folder: Path, needed: int, what: str) -> Iterator[Path]:
    """The temporary folder of `folder`, to write `what` of `needed` bytes into; removed unless it has been renamed.

    Raises ConfigError for a disk that lacks room, or that cannot be written.
    """
    with disk_errors_told(folder, needed, what):
        temporary = checkpoint_dir.aside(folder)  # removes what an interrupted attempt has left, which makes room
        try:
            if (missing := missing_room(folder, needed, what)) is not None:
                raise ConfigError(missing)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_checkpoint(
    checkpoint: Path, model: ModelConfig, state: dict, make: dict, info: dict, progress: ByteProgress | None = None
) -> None:
    """A weights-only checkpoint that Megatron's dist_checkpointing.load reads, written by one process.

    state: key -> tensor, which may be a meta tensor where `make` has a function that makes it. Files have
    BYTES_OF_A_FILE of tensors or one larger tensor, and so much is in memory. progress: told of what was made.

    Raises ConfigError when the disk lacks room or fails; then nothing is left of it.
    """
    needed = sum(x.nbytes + _AROUND_A_TENSOR for x in state.values())
    with new_folder(checkpoint, needed, "a checkpoint of these weights") as temporary:
        # dist_checkpointing expects the unsharded part of a state dict as one serialised object.
        common = io.BytesIO()
        torch.save([{}], common)
        contents = {**state, "common_state/shard_0_1": common}
        failure = None
        try:
            dcp.save(
                contents,
                # Nothing is copied ahead: that is for tensors on a GPU.
                storage_writer=_WriterOfSeveralFiles(temporary, thread_count=1, per_thread_copy_ahead=0),
                planner=_LazyPlanner(contents, make, progress or ByteProgress(needed, lambda line: None)),
                no_dist=True,
            )
        except CheckpointException as error:
            failure = _first_failure(error)
        if failure is not None:
            raise failure  # not above: the error of the disk that it came from would be forgotten
        (temporary / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        checkpoint_dir.publish(temporary, checkpoint, model, info)


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong itself: CheckpointException is no Exception, and its text is a traceback."""
    return next(iter(error.failures.values()))[0]


def read_tensors(checkpoint: Path, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint by key, whatever layout wrote it. wanted: key -> (shape, dtype).

    Each call reads the checkpoint's index once. Raises ConfigError, which names the first that cannot be read.
    """
    state = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in wanted.items()}
    with checkpoint_dir.nothing_executed(checkpoint):
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        except CheckpointException as error:
            if len(wanted) > 1:
                return {key: read_tensor(checkpoint, key, *one) for key, one in wanted.items()}
            reason = (str(_first_failure(error)).splitlines() or [type(_first_failure(error)).__name__])[0]
            raise ConfigError(
                f"checkpoint {checkpoint}: {next(iter(wanted))} cannot be read ({reason}); use another step_* "
                "directory."
            ) from None
    return state


def read_tensor(checkpoint: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One of them."""
    return read_tensors(checkpoint, {key: (shape, dtype)})[key]


def read_adapters(checkpoint: Path, matrices: list[Adapted], rank: int) -> dict[str, Tensor]:
    """All adapters of a checkpoint by key; they are small. Raises ConfigError where one is missing."""
    dtypes, wanted = checkpoint_dtypes(checkpoint), {}
    for one in matrices:
        for key, shape in zip(one.keys(), one.shapes(rank)):
            refuse(key not in dtypes, f"checkpoint {checkpoint} lacks {key}: its marker does not describe it.")
            wanted[key] = (shape, dtypes[key])
    return read_tensors(checkpoint, wanted)


def checkpoint_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    with checkpoint_dir.nothing_executed(checkpoint):
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        key: entry.properties.dtype
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "properties")
    }


def merged_reader(checkpoint: Path, base: Path | None) -> tuple[Path, Callable[[Entry, Tensor], Tensor]]:
    """(the checkpoint that holds all weights, what makes the weights of an entry of its own ones).

    Of a checkpoint without adapters: itself, and what it holds. base: where the weights are, if they were moved.
    Adapters are read whole: they are small. Raises ConfigError.
    """
    lora = lora_base.lora_of(checkpoint_dir.read_marker(checkpoint))
    if lora is None:
        refuse(base is not None, f"checkpoint {checkpoint} holds all weights: leave out --base.")
        return checkpoint, lambda entry, tensor: tensor
    weights, model = lora_base.find_base(checkpoint, base), checkpoint_dir.read_model(checkpoint)
    matrices = {one.entry.key: one for one in adapted(model, lora)}
    adapters = read_adapters(checkpoint, list(matrices.values()), lora.rank)

    def merged(entry: Entry, tensor: Tensor) -> Tensor:
        if entry.key not in matrices:
            return tensor
        one = matrices[entry.key]
        return merge(one, tensor, *(adapters[key] for key in one.keys()), scale(lora))

    return weights, merged


def released_tensors(
    checkpoint: Path,
    model: ModelConfig,
    dtype: torch.dtype | None = None,
    merged: Callable[[Entry, Tensor], Tensor] = lambda entry, tensor: tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (released name, tensor) of all weights; READ_AT_ONCE bytes or one entry of the table are in memory.

    checkpoint, merged: as merged_reader gives them, for the adapters of LoRA, which are added in float32. dtype: None
    keeps the checkpoint's.
    """
    dtypes, table = checkpoint_dtypes(checkpoint), tensor_table(model)
    for entry in table:
        if entry.key not in dtypes:
            raise ConfigError(f"checkpoint {checkpoint} lacks {entry.key}: its model.json does not describe it.")
    for entries in _groups(table, lambda entry: math.prod(entry.shape) * dtypes[entry.key].itemsize, READ_AT_ONCE):
        tensors = read_tensors(checkpoint, {entry.key: (entry.shape, dtypes[entry.key]) for entry in entries})
        for entry in entries:
            tensor = tensors.pop(entry.key)
            parts = entry.split(merged(entry, tensor).to(dtype or tensor.dtype))
            yield from zip(entry.released, parts)
            if model.tie_embeddings and entry.released == (EMBEDDING_PARTS[0],):
                # Released folders carry a tied head as a copy.
                yield "lm_head.weight", parts[0]


def _groups[T](entries: list[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Neighbours that have `most` bytes together at most, or a larger one alone."""
    group, total = [], 0
    for entry in entries:
        if group and total + size(entry) > most:
            yield group
            group, total = [], 0
        group.append(entry)
        total += size(entry)
    yield group


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
    base: Path | None = None,
    layout: str = LAYOUTS[0],
    license: str | None = None,
) -> None:
    """Write a Hugging Face folder under a temporary name and rename it when it is whole.

    Adapters of LoRA are merged with their weights. base: see `merged_reader`. layout: of layouts.LAYOUTS, whose
    names config.json has. license: the Hub's name of one, for the model card. dtype: None keeps the checkpoint's.
    tokenizer: folder whose tokenizer and chat template are written along with the
    processor; None writes weights and configuration only. Memory stays near `max_shard_bytes` plus READ_AT_ONCE, or one
    tensor that is larger. Raises ConfigError when `folder` exists, for a folder without a tokenizer or with another
    one than the checkpoint was trained with, and when the disk lacks room or fails; then nothing is left of it.
    """
    if is_there(folder):
        raise ConfigError(f"{folder} exists: remove it or export to another folder.")
    model = checkpoint_dir.read_model(checkpoint)
    processor = None
    if tokenizer is not None:
        from molmo2_nemo.data.processor import build_processor

        processor = build_processor(tokenizer, model.vision, max_crops, setting="--tokenizer")
        trained_with = vocabulary.trained_with(checkpoint)
        if trained_with not in (None, vocabulary.digest(processor.tokenizer)):
            raise ConfigError(
                f"--tokenizer={tokenizer} is not what {checkpoint} was trained with, "
                "so that its answers would be read as other words: export it with tools/export_hf.py and "
                "--tokenizer=FOLDER, a folder with the old tokenizer."
            )
        processor.video_processor.num_frames = max_frames
        processor.video_processor.max_fps = max_fps
        # What vLLM asks it; transformers does not.
        processor.video_processor.frame_sample_mode, processor.video_processor.sampling_fps = "uniform_last_frame", 2
    from molmo2_nemo.hf.model_card import model_card  # needs matplotlib, which no start of a training run waits for

    card = model_card(checkpoint, folder.resolve().name, layout, license)
    weights, merged = merged_reader(checkpoint, base)
    size = _export_bytes(weights, model, dtype)
    with new_folder(folder, size, "an export") as temporary:
        written = ByteProgress(size, progress)
        tensors = released_tensors(weights, model, dtype, merged)
        stored = _write_weights(tensors, temporary, max_shard_bytes, written)
        tokens = None if processor is None else processor.tokenizer
        write_config(temporary, model, str(stored).removeprefix("torch."), layout, tokens)
        (temporary / "README.md").write_text(card)
        if processor is not None:
            processor.save_pretrained(temporary)
            _write_generation_config(temporary, processor.tokenizer)
        temporary.rename(folder)


def _export_bytes(checkpoint: Path, model: ModelConfig, dtype: torch.dtype | None) -> int:
    """Of the tensors that `released_tensors` yields, as `dtype`; the rows that pad the vocabulary are counted, too."""
    dtypes, total = checkpoint_dtypes(checkpoint), 0
    for entry in tensor_table(model):
        size = math.prod(entry.shape) * (dtype or dtypes.get(entry.key, torch.float32)).itemsize
        total += size * (2 if model.tie_embeddings and entry.released == (EMBEDDING_PARTS[0],) else 1)
    return total


def _write_weights(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int, progress: ByteProgress
) -> torch.dtype:
    """Write safetensors, and their index if there are several. Returns the type that most bytes have."""
    shard, size, shards, total, types = {}, 0, [], 0, Counter()

    def flush():
        nonlocal shard, size
        if shard:
            name = f"part-{len(shards):05d}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            # safetensors gives its files to their owner alone.
            (folder / name).chmod(_mode_of_new_files(folder))
            shards.append((name, list(shard)))
            progress.add(size, f"file {len(shards)}, {len(shard)} tensors")
        shard, size = {}, 0

    for name, tensor in tensors:
        tensor = tensor.contiguous().clone()
        types[tensor.dtype] += tensor.nbytes
        if size and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for number, (part, names) in enumerate(shards, start=1):
        name = MODEL_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / part).rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    if len(types) > 1:
        several = ", ".join(f"{readable_size(size)} of {str(dtype)[6:]}" for dtype, size in types.most_common())
        progress.say(
            f"the tensors are of several types, and each keeps its own: {several}; config.json names the first"
        )
    return types.most_common(1)[0][0]


def _mode_of_new_files(folder: Path) -> int:
    """The rights that the user's umask gives a new file: 0644 with the usual one."""
    probe = folder / ".rights"
    probe.touch()
    mode = os.stat(probe).st_mode & 0o777
    probe.unlink()
    return mode


def _write_generation_config(folder: Path, tokenizer) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
