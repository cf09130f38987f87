"""Private names of libraries: each one that is used is there, and none is used outside of molmo2_nemo/compat.py."""

import ast
import gzip
import importlib
import inspect
import io
import itertools
import queue
import re
from types import SimpleNamespace

import pytest
import torch
from programs import REPOSITORY, python

from molmo2_nemo import compat

LIBRARIES = "torch|numpy|megatron|huggingface_hub|transformers|nemo|av|pydantic|hydra|omegaconf"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_optimizer_health_check():
    assert parameters(getattr(torch.optim.Optimizer, compat.OPTIMIZER_HEALTH_CHECK)) == ["self"]


def test_cuda_memory(monkeypatch):
    """Without a GPU: which of torch's functions are called, and that they take what they are given."""
    calls = []
    for name in ("_record_memory_history", "_dump_snapshot"):
        real = inspect.signature(getattr(torch.cuda.memory, name))  # fails when there is no such name

        def stand_in(*args, real=real, **kwargs):
            real.bind(*args, **kwargs)
            calls.append((args, kwargs))

        monkeypatch.setattr(torch.cuda.memory, name, stand_in)
    compat.record_cuda_memory(7)
    compat.save_cuda_memory("file")
    compat.record_cuda_memory(None)
    assert calls == [((), {"max_entries": 7}), (("file",), {}), ((), {"enabled": None})]


def test_extra_state():
    class Layer(torch.nn.Module):
        def get_extra_state(self):
            return 1

    assert list(Layer().state_dict()) == [compat.EXTRA_STATE]


def test_dynamo_config():
    assert isinstance(compat.dynamo_config().disable, bool)


@pytest.mark.slow
def test_compiled_graphs(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py disables it where there is no driver
    torch.compiler.reset()
    before = compat.compiled_graphs()
    with compat.dynamo_config().patch(disable=False):
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    assert compat.compiled_graphs() == before + 1


def test_norms():
    tensors = [torch.randn(7, 3), torch.full((4,), 300.0, dtype=torch.bfloat16)]
    found = compat.norms(tensors)
    assert [norm.dtype for norm in found] == [torch.float32] * 2 and compat.norms([]) == []
    assert found[0] == tensors[0].norm() and found[1] == 600


def test_gelu_of_product():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    expected = torch.nn.functional.gelu(x @ weight.t() + bias, approximate="tanh")
    torch.testing.assert_close(compat.gelu_of_product(x, weight, bias), expected)
    with compat.fake_tensor_mode():  # the call that a GPU gets
        x, weight, bias = (torch.empty(shape, device="meta") for shape in ((6, 8), (5, 8), (5,)))
        assert torch._addmm_activation(bias, x, weight.t(), use_gelu=True).shape == (6, 5)
    assert "use_gelu" in str(compat.schema_of(compat.gelu_product_operation()))


def test_written_by():
    a, b = torch.zeros(2), torch.ones(2)
    assert compat.written_by(torch.ops.aten.add_.Tensor, (a, b)) == [a] and not compat.written_by(
        torch.ops.aten.add.Tensor, (a, b)
    )


def test_liger_rms_norm_mode():
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    assert "casting_mode" in parameters(rms_norm.rms_norm_backward)
    assert len({compat.liger_rms_norm_mode(name) for name in ("llama", "gemma", "none")}) == 3


@pytest.mark.parametrize("name, first", [(compat.INTERPRETER_SCALAR, "arg"), (compat.INTERPRETER_CONVERT, "input")])
def test_interpreter_functions(name, first):
    from triton.runtime import interpreter

    assert parameters(getattr(interpreter, name))[0] == first


def test_dispatch_mode():
    seen = []

    class Seen(compat.dispatch_mode()):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Seen():
        torch.zeros(1)
    assert seen


def test_tensors_in():
    one, two = torch.zeros(1), torch.ones(1)
    assert [id(t) for t in compat.tensors_in([{"a": (one, 3)}, None, two])] == [id(one), id(two)]


def test_storage_address():
    tensor = torch.zeros(3)
    same, other = tensor[1:], torch.zeros(3)
    address = compat.storage_address(tensor.untyped_storage())
    assert address == compat.storage_address(same.untyped_storage())
    assert address != compat.storage_address(other.untyped_storage())


REHEARSED = """
import torch
from molmo2_nemo import compat
compat.register_rehearsal_device()
seen = []
class Seen(compat.dispatch_mode()):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = compat.schema_of(function)
        number = compat.sequence_number_of_backward()
        seen.append((schema.name, schema.is_mutable, compat.next_sequence_number() - 1, number))
        return function(*args, **(kwargs or {}))
compat.use_fake_process_groups(1, 2)
group = torch.distributed.group.WORLD
with compat.fake_tensor_mode():
    weight = torch.ones(3, 3, device=compat.REHEARSAL_DEVICE, requires_grad=True)
    assert compat.is_fake(weight) and not compat.is_fake(torch.nn.Parameter) and weight.device.type == "rehearsal"
    torch.autograd.set_multithreading_enabled(False)
    with Seen():
        (weight @ weight).sum().backward()
        torch.tensor([1.0], device=weight.device).to("cpu")
    assert weight.grad.shape == (3, 3)
    compat.fake_tensors_are_cuda()
    assert weight.is_cuda and not torch.zeros(1, device="cpu").is_cuda
    compat.read_fake_tensors_by(lambda tensor: tensor.shape)
    assert weight.tolist() == (3, 3)
    with compat.without_modes():
        assert torch.zeros(1).item() == 0 and not compat.is_fake(torch.zeros(1))
forward = next(number for name, _, number, backward in seen if name == "aten::mm" and backward is None)
assert any(name == "aten::mm" and backward == forward for name, _, _, backward in seen)
assert compat.TO_COPY in [name for name, *_ in seen] and any(mutable for _, mutable, *_ in seen) is False
assert compat.TO_NUMBER == torch.ops.aten._local_scalar_dense.default._schema.name
assert compat.PIN_MEMORY == torch.ops.aten._pin_memory.default._schema.name
work = compat.finished_work(group)
assert compat.process_group(group.boxed()) is group and compat.process_group(work) is None
assert compat.with_values({"a": [weight, 2]}, lambda tensor: 1) == {"a": [1, 2]}
"""


def test_rehearsal_device():
    """In a process of its own, since the device stays."""
    result = python("-c", REHEARSED)
    assert result.returncode == 0, result.stderr[-3000:]


def test_views_of_fake_tensors_are_those_of_torch():
    aten = torch.ops.aten

    def address(tensor):
        return compat.storage_address(tensor.untyped_storage())

    with compat.fake_tensor_mode():
        base = torch.empty(4, 6, 8)[1:, :, ::2]
        for function, *args in (
            (aten.view.default, [3, 3, 2, 4]),
            (aten.slice.Tensor, 1, 1, 5, 2),
            (aten.select.int, 2, 3),
            (aten.transpose.int, 0, 2),
            (aten.permute.default, [2, 0, 1]),
            (aten.unsqueeze.default, 1),
            (aten.expand.default, [5, 3, 6, 4]),
            (aten.detach.default,),
        ):
            found, expected = compat.fake_view(function, (base, *args), {}), function(base, *args)
            for each in (found, expected):
                assert compat.is_fake(each) and address(each) == address(base)
            assert (found.shape, found.stride(), found.storage_offset(), found.dtype, found.device) == (
                *(expected.shape, expected.stride(), expected.storage_offset(), expected.dtype, expected.device),
            )
            assert function in compat.views()


def test_what_compiles_without_a_driver():
    """tests/unit/test_kernels.py runs it."""
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.graphs as graphs
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx

    assert torch.__version__.split("+")[0] == compat.CUDA_HOOKS_VERSION
    assert hasattr(fake.FakeTensorMode, "avoid_device_init") and parameters(fake.init_gpu_context) == ["device"]
    assert callable(graphs._cuda_isCurrentStreamCapturing) and callable(torch._C._ensureCUDADeviceGuardSet)
    for name in ("_lazy_init", "_exchange_device", "_maybe_exchange_device"):
        assert callable(getattr(torch.cuda, name))
    assert functorch_config.force_non_lazy_backward_lowering in (True, False)
    for name in (
        "joint_graph_constant_folding",
        "force_disable_caches",
        "compile_threads",
        "use_static_triton_launcher",
    ):
        assert hasattr(inductor_config, name)
    assert parameters(AsyncCompile.triton)[:3] == ["self", "kernel_name", "source_code"]
    assert callable(PyCodeCache.load) and parameters(compile_fx)[:2] == ["model_", "example_inputs_"]


def test_processes_of_a_loader():
    loader = torch.utils.data.DataLoader(range(2), num_workers=1, persistent_workers=True)
    assert compat.loader_processes(loader) == []
    assert len(list(loader)) == 2
    (process,) = compat.loader_processes(loader)
    assert process.is_alive()
    compat.stop_loader_processes(loader)
    assert not process.is_alive() and compat.loader_processes(loader) == []
    compat.stop_loader_processes(loader)


@pytest.mark.parametrize("module, name", [(m, n) for m, names in compat.PICKLED_ARRAYS.items() for n in sorted(names)])
def test_pickled_arrays(module, name):
    assert callable(getattr(importlib.import_module(module), name))


def test_set_cuda_rng_state():
    from megatron.core.tensor_parallel import random

    function = getattr(random, compat.SET_CUDA_RNG_STATE)
    if function.__module__ != "molmo2_nemo.cpu":  # another test of this process has called cpu.install
        assert parameters(function) == ["new_state", "device", "graph_safe"]


def test_gradients_for_norm():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    for kind in (DistributedOptimizer, FP32Optimizer):
        optimizer = kind.__new__(kind)
        assert compat.gradients_for_norm(optimizer, []) == []


def test_optimizer_shards():
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

    parameter, shard, moment = torch.zeros(9), torch.zeros(3), torch.ones(3)
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    optimizer.gbuf_ranges = [{torch.float32: [{"param_map": {parameter: {"param": Range(2, 5)}}}]}]
    optimizer.model_param_group_index_map = {parameter: (0, 0)}
    optimizer.optimizer = SimpleNamespace(param_groups=[{"params": [shard]}], state={shard: {"exp_avg": moment}})
    [(of, first, end, states)] = compat.optimizer_shards(optimizer)
    assert of is parameter and (first, end) == (2, 5)
    assert states["param"] is shard and states["exp_avg"] is moment
    compat.load_optimizer_shards(optimizer, [{name: torch.full((3,), 7.0) for name in states}])
    assert shard.tolist() == moment.tolist() == [7.0] * 3
    assert hasattr(HybridDeviceOptimizer, "_sync_hdo_state_to_sub_optimizers")


def test_use_results_queue(monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)  # fails when there is no such name
    mine = queue.SimpleQueue()
    compat.use_results_queue(mine)
    assert filesystem_async.get_write_results_queue() is mine


def test_passes_made():
    from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

    stream = WebdatasetSampleLoaderDataset.__new__(WebdatasetSampleLoaderDataset)
    stream.worker_config, stream.parallel_slice_iters = None, 1
    stream.reset_state_own()
    assert compat.passes_made(stream) == 0


def test_upcoming_samples():
    """What a copy of a stream says comes next is what the stream reads then, over passes and from the middle of one."""
    from megatron.energon import WorkerConfig
    from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

    read, told = [], []

    class Reader:
        def __getitem__(self, index):
            if len(read) == 25:  # in the middle of a pass, while this sample is read
                told.append(list(itertools.islice(compat.upcoming_samples(stream, index), 60)))
                assert compat.upcoming_samples(stream, -1) is None
            read.append(index)
            return {"index": index}

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    offsets = [[0, 4, 8, 12, 16, 20, 22]]
    stream = WebdatasetSampleLoaderDataset(
        [Reader()], offsets, worker_config=config, shuffle_over_epochs=1, parallel_slice_iters=3
    )
    config.worker_activate(0)
    try:
        told.append(list(itertools.islice(compat.upcoming_samples(stream), 60)))
        for _ in range(5):
            list(stream)
    finally:
        config.worker_deactivate()
    assert told == [read[:60], read[25:85]]
    assert len(set(read[:22])) == 22


def test_wrapped_dataset():
    from megatron.energon.wrappers.limit_dataset import LimitDataset

    class Inner:
        pass

    inner = Inner()
    outer = LimitDataset.__new__(LimitDataset)
    outer.datasets = (inner,)
    assert compat.wrapped_dataset(outer, Inner) is inner


def test_function_config():
    assert "parameters" in compat.function_config(parameters)


def test_set_worker_sample_counters():
    """Energon keeps them under that name: what it writes there when it starts, and reads when it saves."""
    from megatron.energon.savable_loader import SavableDataLoader

    class Holder:
        pass

    holder = Holder()
    compat.set_worker_sample_counters(holder, [3])
    (name,) = vars(holder)
    assert name in inspect.getsource(SavableDataLoader.__init__)
    assert name in inspect.getsource(SavableDataLoader.save_state_rank)


def test_answer_before_the_start():
    """test_loader.py has it in real workers: here that a worker which has begun answers as Energon does."""
    from megatron.energon.savable_loader import SavableCheckpoint, SavableDatasetCheckpoint, SavableDatasetWrapper

    wrapper = SavableDatasetWrapper(
        None, SimpleNamespace(num_workers=1), 1, 1, cmd_queues=[], result_queues=[], cache_pool=None
    )
    wrapper.restore_checkpoint([SavableDatasetCheckpoint(state="restored", offset=3)], 0)
    wrapper._worker_id = 0
    compat.answer_before_the_start(SimpleNamespace(dataset=wrapper))
    answer = wrapper.get_checkpoint([7])
    assert (answer.state, answer.offset) == ("restored", 3)
    wrapper._last_checkpoints = [SavableCheckpoint(state="newer", checkpoint_time=0.0, sample_index=6)]
    answer = wrapper.get_checkpoint([7])
    assert (answer.state, answer.offset) == ("newer", 2)


def test_hub_client():
    with compat.hub_client() as client:
        assert set(client.event_hooks) == {"request", "response"}


def test_is_after_gzip():
    packed = gzip.compress(b"x" * 1000)
    with pytest.raises(gzip.BadGzipFile) as rest:
        gzip.GzipFile(fileobj=io.BytesIO(packed + b"rest")).read()
    assert compat.is_after_gzip(rest.value)
    with pytest.raises(gzip.BadGzipFile) as wrong:
        gzip.GzipFile(fileobj=io.BytesIO(packed[:-8] + bytes(8))).read()
    assert not compat.is_after_gzip(wrong.value)


# Of what is overridden: the parameters, or the value's type.
OVERRIDDEN = {
    "_load_dataset": ["self", "dataset", "worker_rotation_offset", "worker_config"],
    "_get_save_and_finalize_callbacks": ["self", "writer", "save_state_dict_ret", "async_strategy"],
    "_savable_fields": tuple,
}


@pytest.mark.parametrize("module, kind, name", sorted(compat.OVERRIDDEN))
def test_overridden(module, kind, name):
    found, expected = getattr(getattr(importlib.import_module(module), kind), name), OVERRIDDEN[name]
    assert isinstance(found, expected) if isinstance(expected, type) else parameters(found) == expected


def private(name) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names(trees) -> set[str]:
    """Private names that this repository defines: functions, classes, variables and attributes of self."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return names


def private_uses(tree, own: set[str]):
    """(line, what) for each private name of a library in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | {"_exit"}:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            parts = [part for module in modules for part in module.split(".")]
            if any(private(part) and part not in own for part in parts):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and private(argument.value) and argument.value not in own:
                    yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"({LIBRARIES})(\.\w+)*\._[a-z]\w*(\.\w+)*", node.value):
                yield node.lineno, node.value


@pytest.mark.slow
def test_no_private_name_of_a_library_is_used_elsewhere():
    files = [
        p
        for folder in ("molmo2_nemo", "recipes", "tools", "slurm", "tests")
        for p in (REPOSITORY / folder).rglob("*.py")
    ]
    trees = {path.relative_to(REPOSITORY): ast.parse(path.read_text()) for path in files}
    own = own_names(trees.values())
    exempt = {"molmo2_nemo/compat.py", "tests/unit/test_compat.py"}
    found = [
        f"{path}:{line}: {what}"
        for path, tree in trees.items()
        if str(path) not in exempt
        for line, what in private_uses(tree, own)
    ]
    assert not found, "\n".join(found)
