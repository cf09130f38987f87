"""Private names of libraries, each used through one function or constant of this module.

A private name may disappear with any release of its library, so nothing else in this repository spells one.
tests/unit/test_compat.py has a case for each name, which fails when it is gone, and fails when another file uses one.
Each entry says what it is for, and the version it was last checked against.

Libraries are imported when a function is called: the downloader, for example, works without torch. A method that a
class of ours overrides must be spelled in that class; OVERRIDDEN lists those. molmo2_nemo/cpu.py, which replaces
functions of torch and Megatron at run time, takes their names from here.
"""

import contextlib
import copy
import types
import weakref
from collections.abc import Callable, Iterable, Iterator

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


# Names of operations in `schema_of`: a number goes to the host; a tensor is converted, perhaps to another device; its
# memory is pinned.
TO_NUMBER, TO_COPY, PIN_MEMORY = "aten::_local_scalar_dense", "aten::_to_copy", "aten::_pin_memory"


def schema_of(operation):
    """The signature of an operation that a dispatch mode sees: name, arguments, returns, is_mutable."""
    return operation._schema


def written_by(operation, args: tuple) -> list:
    """The tensors among an operation's positional arguments that it changes."""
    return [x for x, a in zip(args, schema_of(operation).arguments) if a.alias_info and a.alias_info.is_write]


def views() -> set:
    """The operations that make one view of their first argument, and that are most of a step's."""
    import torch

    aten = torch.ops.aten
    return {
        *(aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.slice.Tensor, aten.t.default),
        *(aten.transpose.int, aten.permute.default, aten.expand.default, aten.select.int, aten.unsqueeze.default),
    }


def with_values(tree, values_of: Callable):
    """The same nested tuples, lists and dicts with `values_of(tensor)` in place of each tensor."""
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: values_of(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


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


def gelu_of_product(x, weight, bias):
    """The tanh form of GELU of x @ weight.T + bias, [..., H] and [F, H] -> [..., F]; no backward pass.

    On a GPU it is done at the end of the product by cuBLASLt, in float32, and what it is taken of is never stored
    (pytorch/pytorch: aten/src/ATen/native/cuda/Blas.cpp, addmm_out_cuda_impl; elsewhere torch would take GELU's other
    form).
    """
    import torch
    import torch.nn.functional as F

    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], -1)


def gelu_product_operation():
    """The operation that `gelu_of_product` is on a GPU, as a dispatch mode sees it."""
    import torch

    return torch.ops.aten._addmm_activation.default


# The device of a rehearsal: torch's backend for others to define, with a name of ours.
REHEARSAL_DEVICE = "rehearsal"


def register_rehearsal_device() -> None:
    """Make `REHEARSAL_DEVICE` an accelerator without kernels, for fake tensors: torch then asks it instead of CUDA.

    In torch built for CUDA the backward pass of fake CUDA tensors asks NVIDIA's driver for a context, even where there
    is no driver; of this device it asks Python. Once in a process.
    """
    import torch
    import torch.utils.backend_registration as registration

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self):
            return True

        def is_built(self):
            return True

        def has_primary_context(self, device):
            return False

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self):  # asked for by torch.utils.checkpoint
            return [torch.bfloat16, torch.float16]

    registration._setup_privateuseone_for_python_backend(REHEARSAL_DEVICE, Module(), Hooks())


def fake_tensor_mode():
    """A context manager in which tensors have a shape, a type and a device, but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.avoid_device_init = True  # torch.tensor makes its values on the host first; for the whole process
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor) -> bool:
    """Whether a tensor was made under `fake_tensor_mode`."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_view(function, args: tuple, kwargs: dict):
    """What an operation that makes a view of `args[0]`, a fake tensor, returns: its shape by torch's own C++ code.

    FakeTensorMode comes to the same by Python code, in ten times as long.
    """
    from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

    base = args[0]
    with in_kernel_invocation_manager(base.fake_mode):
        made = function(*args, **kwargs)
    return FakeTensor(base.fake_mode, made, base.fake_device)


def fake_tensors_are_cuda() -> None:
    """Let fake tensors of `REHEARSAL_DEVICE` say that they are on a GPU: `is_cuda`.

    A property of their class, since no mode is in force while a backward pass runs layers again.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    FakeTensor.is_cuda = property(lambda tensor: tensor.device.type == REHEARSAL_DEVICE)


def read_fake_tensors_by(to_list: Callable) -> None:
    """Let `to_list(tensor)` be what `tensor.tolist()` does with fake tensors: torch reads every element by itself."""
    from torch._subclasses.fake_tensor import FakeTensor

    FakeTensor.tolist = lambda tensor: to_list(tensor)


def without_modes():
    """A context manager in which no dispatch mode sees what is called."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def use_fake_process_groups(rank: int, world_size: int) -> None:
    """torch.distributed as one rank of many, alone: its collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.Backend.backend_capability["fake"].append(REHEARSAL_DEVICE)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def finished_work(group):
    """What a collective of a fake group returns: a handle that never waits."""
    import torch

    with without_modes():
        return group._get_backend(torch.device("cpu")).allreduce([torch.zeros(1)]).boxed()


def process_group(value):
    """The process group in an argument of a c10d operation; None for other arguments."""
    import torch
    import torch.distributed as dist

    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):  # another kind of script object, such as a reduction's operator
        return None


def next_sequence_number() -> int:
    """The number that autograd gives to the next operation; the one that runs now has the number before."""
    import torch

    return torch._C._autograd._get_sequence_nr()


def sequence_number_of_backward() -> int | None:
    """The number of the operation whose backward pass runs now; None outside of a backward pass."""
    import torch

    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


# The torch whose CUDAHooks `answer_without_driver` knows.
CUDA_HOOKS_VERSION = "2.14.1"


def answer_without_driver() -> None:
    """Let autograd run over fake CUDA tensors without a driver: no device of this process has a context.

    Autograd asks C++ alone, at::detail::getCUDAHooks().hasPrimaryContext(device), the fifth of its virtual functions.
    This puts a copy of the table of these functions in its place, with that one exchanged. The device of a rehearsal
    needs no such thing, but torch.compile makes no CUDA kernels for it. Raises RuntimeError with another torch.
    """
    import ctypes

    import torch

    if torch.__version__.split("+")[0] != CUDA_HOOKS_VERSION:
        raise RuntimeError(
            f"torch {torch.__version__}: kernels can be compiled without a GPU with torch {CUDA_HOOKS_VERSION} alone; "
            "see whether hasPrimaryContext is still CUDAHooks' fifth virtual function, and change CUDA_HOOKS_VERSION."
        )
    words, fifth = 64, 4
    before = 2  # words in front of the functions: offset to top, type information
    find = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")["_ZN2at6detail12getCUDAHooksEv"]
    find.restype = ctypes.c_void_p
    table_of_object = ctypes.c_void_p.from_address(find())
    found = (ctypes.c_void_p * words).from_address(table_of_object.value - before * ctypes.sizeof(ctypes.c_void_p))
    table = (ctypes.c_void_p * words)(*found)
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda hooks, device: False)
    table[before + fifth] = ctypes.cast(answer, ctypes.c_void_p).value
    answer_without_driver.kept = (table, answer)  # for the life of the process
    table_of_object.value = ctypes.addressof(table) + before * ctypes.sizeof(ctypes.c_void_p)


def compile_without_driver() -> None:
    """Let torch.compile work on fake CUDA tensors in this process, though no GPU answers."""
    import torch
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.graphs

    answer_without_driver()

    torch._C._ensureCUDADeviceGuardSet()  # torch's guard that does nothing, for fake CUDA tensors
    fake.init_gpu_context = lambda device: None
    torch.cuda._lazy_init = lambda: None
    torch.cuda._exchange_device = lambda index: 0
    torch.cuda._maybe_exchange_device = lambda index: 0  # another function: torch.compile tells them apart
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.force_non_lazy_backward_lowering = True  # the backward pass together with the forward pass
    torch._inductor.config.joint_graph_constant_folding = False  # it computes on the device
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.use_static_triton_launcher = False  # it keeps no assembly


def forget_compiled() -> None:
    """Start torch.compile afresh."""
    import torch._dynamo

    torch._dynamo.reset()


def collecting_backend(sources: list[tuple[str, str]]) -> Callable:
    """A backend for torch.compile that appends (name, source) of each Triton kernel, and runs the code as it is."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx

    def collect(self, kernel_name, source_code, device_str="cuda"):
        sources.append((kernel_name, source_code))

    def backend(graph, inputs):
        real, AsyncCompile.triton = AsyncCompile.triton, collect
        try:
            compile_fx(graph, inputs)
        finally:
            AsyncCompile.triton = real
        return graph

    return backend


def compile_triton_source(name: str, source: str):
    """(Triton's compiled kernel, its tile sizes, warps and stages) of what `collecting_backend` found, the first
    choice of torch's heuristics."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    with triton_helpers.skip_gpu_driver_setup():
        tuner = getattr(PyCodeCache.load(source), name)
        choice = tuner.configs[0]
        binary = tuner._precompile_config(choice).kernel
    return binary, {**choice.kwargs, "warps": choice.num_warps, "stages": choice.num_stages}


@contextlib.contextmanager
def collecting_launches(found: list) -> Iterator[None]:
    """Append each Triton kernel that is launched inside to the list, compiled, in place of running it."""
    from triton.runtime.jit import KernelInterface

    def compile_only(self, grid):
        return lambda *args, **kwargs: found.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    launch, KernelInterface.__getitem__ = KernelInterface.__getitem__, compile_only
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


def ptxas() -> str:
    """The path of the assembler that comes with Triton."""
    from triton import knobs

    return knobs.nvidia.ptxas.path


def record_cuda_memory(entries: int | None) -> None:
    """Remember the last so many allocations and frees on the GPU, with their Python stacks; None: no more of them."""
    import torch

    if entries is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=entries)


def save_cuda_memory(path) -> None:
    """Write the GPU's memory, and what `record_cuda_memory` remembers, for https://pytorch.org/memory_viz."""
    import torch

    torch.cuda.memory._dump_snapshot(str(path))


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


# --- liger-kernel 0.8.5, Triton 3.8.0 -------------------------------------------------------------------------------

# Functions of triton.runtime.interpreter by which tests have it round as a compiled kernel does.
INTERPRETER_SCALAR, INTERPRETER_CONVERT = "_implicit_cvt", "_convert_float"


def liger_rms_norm_mode(name: str) -> int:
    """The number by which liger-kernel's backward kernels of RMSNorm know a way of rounding, such as llama."""
    from liger_kernel.ops import fused_add_rms_norm, rms_norm

    modes = rms_norm._str_to_casting_mode
    assert modes == fused_add_rms_norm._str_to_casting_mode
    return modes[name]


# --- numpy 2.5.5 ----------------------------------------------------------------------------------------------------

# Module -> functions through which pickled arrays are read: the state of the data loader holds arrays.
PICKLED_ARRAYS = {"numpy._core.multiarray": {"_reconstruct"}, "numpy._core.numeric": {"_frombuffer"}}

# --- megatron-core 0.19.2 -------------------------------------------------------------------------------------------

# Function of megatron.core.tensor_parallel.random; cpu.py replaces it, since it would wait for NVIDIA's driver.
SET_CUDA_RNG_STATE = "_set_cuda_rng_state"


def gradients_for_norm(optimizer, parameters: list) -> list:
    """The gradients of those parameters that count towards the norm on this rank: shared ones count once."""
    return optimizer._filter_grads_for_norm(parameters)


def optimizer_shards(optimizer) -> Iterator[tuple]:
    """A distributed optimizer's shards: parameter, first and end element in it, flat tensors by the state's name."""
    for buckets in (buckets for buffer in optimizer.gbuf_ranges for buckets in buffer.values()):
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            yield parameter, ranges["param"].start, ranges["param"].end, states


def load_optimizer_shards(optimizer, all_states: Iterable[dict]) -> None:
    """Copy into a distributed optimizer's shards what `optimizer_shards` has given, in its order, with other values."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    for (parameter, *_), states in zip(optimizer_shards(optimizer), all_states, strict=True):
        optimizer._set_main_param_and_optimizer_states(parameter, states)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):  # a part of it works in host memory
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def use_results_queue(queue) -> None:
    """Let the threads that write a checkpoint report to this queue instead of one in a manager process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue


# --- megatron-energon 7.4.1 -----------------------------------------------------------------------------------------


def passes_made(stream) -> int:
    """How often this worker has read its part of a source to the end (stream: a WebdatasetSampleLoaderDataset)."""
    return stream._epoch_count


def upcoming_samples(stream, now: int | None = None) -> Iterator[int] | None:
    """Endless: the indices that a stream (a WebdatasetSampleLoaderDataset) reads next, `now` first, by a copy of it.

    now: the index that the stream reads at this moment; None: it is about to begin, or to go on from a restored state.
    None: `now` is no index that it may read; a buffer is restored sample by sample, for example.
    """
    from megatron.energon.rng import WorkerRng

    class Indices:
        def __getitem__(self, index):
            return (index,)  # not None, which would be a sample that is skipped

    twin = copy.copy(stream)
    twin.ensure_slice_offsets()
    twin.join_readers = [Indices()]
    twin._worker_rng = WorkerRng(stream.worker_config)
    twin._worker_rng.restore_state(stream._worker_rng.save_state())
    twin._active_slice_state = [copy.copy(state) for state in stream._active_slice_state]
    twin._pending_slice_indexes = copy.copy(stream._pending_slice_indexes)
    if now is not None:
        slots = [slot for slot, state in enumerate(twin._active_slice_state) if state and state.current == now]
        if not slots:
            return None
        # The stream has drawn already from which of its slices `now` is.
        draw, drawn = twin._worker_rng.choice_idx, slots[:1]
        twin._worker_rng.choice_idx = lambda probabilities: drawn.pop() if drawn else draw(probabilities)

    def read():
        while len(twin.slice_offsets) > 1:
            for sample in twin._slices_iter():
                yield sample.data[0][0]

    return read()


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


def answer_before_the_start(loader) -> None:
    """Have each worker of a SavableDataLoader that has not begun say what it will begin with, when a state is saved.

    A worker's thread for such questions runs before the worker has restored its state. Energon answers then that it
    begins the data anew, behind as many batches as it had handed out, so that a run saved right after its start goes on
    with other data. To be called before the workers are forked.
    """
    from megatron.energon.savable_loader import SavableDatasetCheckpoint, SavableDatasetWrapper

    wrapper = loader.dataset
    here, [nothing_yet] = weakref.proxy(wrapper), wrapper._last_checkpoints

    def get_checkpoint(last_sample_indexes: list[int]) -> SavableDatasetCheckpoint:
        if here._last_checkpoints[-1] is nothing_yet:
            worker = here._worker_id
            state, offset = here._workers_restore_from[worker], here._workers_skip_samples[worker]
            return SavableDatasetCheckpoint(state=state, offset=offset)
        return SavableDatasetWrapper.get_checkpoint(here, last_sample_indexes)

    wrapper.get_checkpoint = get_checkpoint


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
