"""Run Megatron-Core on a CPU: the one place where libraries are patched at run time.

megatron-core 0.19 asks for the current CUDA device in about ninety places and has no CPU switch. `install()`
redirects those calls. It is called by the entry points when the accelerator is `cpu` and never on a GPU; a rehearsal
(molmo2_nemo/rehearsal) redirects them to a device of its own.
`torch.cuda.is_available()` still returns False: torch.compile, data loaders and transformers rely on it.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

from molmo2_nemo import compat

_CPU = torch.device("cpu")


class Inert:
    """Stands for a CUDA stream or event: every method does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeans(TorchFunctionMode):
    """Map literals such as torch.zeros(..., device="cuda") to a device, and `param.type()` to CUDA's spelling."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not kwargs and function not in (torch.Tensor.to, torch.Tensor.type):
            return function(*args)  # nearly all of a step's calls
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        # Pinned memory needs a driver.
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = tuple(self.device if _is_cuda(a) else a for a in args)
        result = function(*args, **kwargs)
        # Megatron's optimizers recognise a parameter by `type() == "torch.cuda.FloatTensor"`.
        if function is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            return result if "cuda" in result else f"torch.cuda.{result.rsplit('.')[-1]}"
        return result


_mode = None


def install(device: torch.device = _CPU) -> None:
    """Patch torch.cuda for this process, so that it is `device`. Safe to call again."""
    global _mode
    if _mode is not None:
        return
    cuda = torch.cuda
    cuda.current_device = lambda: device
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = Inert
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: Inert()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    # Megatron's tensor-parallel RNG tracker saves and restores the device's generator.
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.random.set_rng_state(state)
        module.manual_seed = module.manual_seed_all = lambda seed: torch.random.default_generator.manual_seed(seed)
        module.initial_seed = torch.random.initial_seed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(device)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(device)
    # A CUDA build of torch without a driver raises inside every optimizer step.
    setattr(torch.optim.Optimizer, compat.OPTIMIZER_HEALTH_CHECK, lambda self: None)
    # Megatron compiles small functions with torch.compile: seconds of C++ on a CPU, nothing gained.
    compat.dynamo_config().disable = True
    from megatron.core.tensor_parallel import random as megatron_random

    # With a CUDA build of torch the original queues the state for a driver that never comes.
    setattr(megatron_random, compat.SET_CUDA_RNG_STATE, lambda state, *_, **__: torch.random.set_rng_state(state))
    _mode = _CudaMeans(device)
    _mode.__enter__()
