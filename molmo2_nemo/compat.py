"""Private names of libraries, each used through one function or constant of this module.

A private name may disappear with any release of its library, so nothing else in this repository spells one.
tests/unit/test_compat.py has a case for each name, which fails when it is gone, and fails when another file uses one.
Each entry says what it is for, and the version it was last checked against.

Libraries are imported when a function is called: the downloader, for example, works without torch. A method that a
class of ours overrides must be spelled in that class; OVERRIDDEN lists those. molmo2_nemo/cpu.py, which replaces
functions of torch and Megatron at run time, takes their names from here.
"""

import contextlib
import types
from collections.abc import Callable, Iterator

# --- torch 2.14.1 ---------------------------------------------------------------------------------------------------

# Method of torch.optim.Optimizer that every step calls; cpu.py replaces it, since it needs NVIDIA's driver.
OPTIMIZER_HEALTH_CHECK = "_accelerator_graph_capture_health_check"
# The key suffix under which a module's extra state is in its state dict (Transformer Engine keeps FP8 scaling there).
EXTRA_STATE = "_extra_state"


def dynamo_config():
    """The settings of torch.compile's front end, `torch._dynamo.config`: `disable` turns compilation off."""
    import torch._dynamo

    return torch._dynamo.config


def compiled_graphs() -> int:
    """How many different graphs torch.compile has compiled in this process since `torch.compiler.reset()`."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def dispatch_mode() -> type:
    """TorchDispatchMode, the base class of a context manager that sees every operation on tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def tensors_in(tree) -> list:
    """The tensors in nested tuples, lists and dicts, in order."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_address(storage) -> int:
    """Identifies the memory of an untyped storage while it is alive, also where it has no data pointer."""
    return storage._cdata


def norms(tensors: list) -> list:
    """The 2-norm of each tensor, float32 scalars on its device, by one call (few kernels, no wait for the device)."""
    import torch

    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32)) if tensors else []


def loader_processes(loader) -> list:
    """The worker processes of a DataLoader with persistent workers; none before its first batch or without workers."""
    return getattr(loader._iterator, "_workers", [])


def stop_loader_processes(loader) -> None:
    """Stop and forget the worker processes of such a DataLoader. Safe to call again."""
    workers, loader._iterator = loader._iterator, None
    if workers is not None:
        workers._shutdown_workers()


@contextlib.contextmanager
def checkpoint_index_reader(read: Callable) -> Iterator[None]:
    """Have torch.distributed.checkpoint read the index of a checkpoint, a pickle, by `read(file)`.

    FileSystemReader calls pickle.load, which runs whatever a pickle names, and Megatron makes its own readers.
    """
    from torch.distributed.checkpoint import filesystem

    original = filesystem.pickle
    filesystem.pickle = types.SimpleNamespace(load=read, dump=original.dump)
    try:
        yield
    finally:
        filesystem.pickle = original


# --- numpy 2.5.5 ----------------------------------------------------------------------------------------------------

# Module -> functions through which pickled arrays are read: the state of the data loader holds arrays.
PICKLED_ARRAYS = {"numpy._core.multiarray": {"_reconstruct"}, "numpy._core.numeric": {"_frombuffer"}}

# --- megatron-core 0.19.2 -------------------------------------------------------------------------------------------

# Function of megatron.core.tensor_parallel.random; cpu.py replaces it, since it would wait for NVIDIA's driver.
SET_CUDA_RNG_STATE = "_set_cuda_rng_state"


def gradients_for_norm(optimizer, parameters: list) -> list:
    """The gradients of those parameters that count towards the norm on this rank: shared ones count once."""
    return optimizer._filter_grads_for_norm(parameters)


def use_results_queue(queue) -> None:
    """Let the threads that write a checkpoint report to this queue instead of one in a manager process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue


# --- megatron-energon 7.4.1 -----------------------------------------------------------------------------------------


def passes_made(stream) -> int:
    """How often this worker has read its part of a source to the end (stream: a WebdatasetSampleLoaderDataset)."""
    return stream._epoch_count


def wrapped_dataset(dataset, kind: type):
    """The outermost dataset of that class inside wrappers; None: there is none."""
    return dataset._find_wrapped_dataset(kind)


def function_config(function) -> str:
    """How a dataset's configuration names a function."""
    from megatron.energon.flavors.base_dataset import SavableDataset

    return SavableDataset._function_config(function)


def set_worker_sample_counters(loader, counters: list[int]) -> None:
    """Say for each worker process of a SavableDataLoader which batch of its own was handed out last."""
    loader._worker_sample_counters = counters


# --- huggingface_hub 2.4.0 ------------------------------------------------------------------------------------------


def hub_client():
    """The HTTP client that huggingface_hub would make for itself."""
    from huggingface_hub.utils._http import default_client_factory

    return default_client_factory()


# --- Python 3.12 ----------------------------------------------------------------------------------------------------


def is_after_gzip(error) -> bool:
    """Whether gzip.BadGzipFile says that something else follows the compressed data, which `gzip -d` ignores.

    The class is the same for a wrong checksum or length, and nothing but its text tells them apart.
    """
    return str(error).startswith("Not a gzipped file")


# --- what classes of ours override ----------------------------------------------------------------------------------

# (module, class, private name) of the library.
OVERRIDDEN = {
    # data/loader.py: reads each source through a reader that counts unreadable samples. megatron-energon 7.4.1.
    ("megatron.energon", "TaskEncoder", "_load_dataset"),
    # data/packing.py: names the attributes of a dataset that Energon saves and restores. megatron-energon 7.4.1.
    ("megatron.energon.wrappers.base", "BaseWrapperDataset", "_savable_fields"),
    # training/checkpoint.py: keeps the writer and the index that Megatron has planned. megatron-core 0.19.2.
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        "TorchDistSaveShardedStrategy",
        "_get_save_and_finalize_callbacks",
    ),
}
