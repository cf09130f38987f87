"""Lets torch and Triton compile for an H100 on a machine without a GPU, in this process. Nothing can run.

To be installed before torch._dynamo is imported, which keeps torch.cuda's functions as it finds them.
"""

import types

import torch

from molmo2_nemo import compat

SHARED_MEMORY = 227 * 1024  # of a block at most, bytes: CUDA programming guide, table of compute capability 9.0
# Of an H100 SXM by the same guide and NVIDIA's data sheet.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_000_000_000,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
    gcnArchName="sm_90",
    is_integrated=False,
)


class Driver:
    """What Triton asks a driver for while it compiles."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": SHARED_MEMORY,
            "multiprocessor_count": PROPERTIES.multi_processor_count,
            "max_num_regs": PROPERTIES.regs_per_multiprocessor,
            "warpSize": PROPERTIES.warp_size,
        }
    )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def is_active(self) -> bool:
        return True


class Event:
    """A CUDA event, of which nothing is asked."""

    def __init__(self, *args, **kwargs):
        pass


class Stream(Event):
    """The stream that everything would be in."""

    stream_id = device_index = cuda_stream = 0
    device_type = 1


def get_rng_state(device="cuda") -> torch.Tensor:
    """Something of the form of a state of CUDA's random numbers."""
    return torch.zeros(16, dtype=torch.uint8, device="cpu")


def set_rng_state(state: torch.Tensor, device="cuda") -> None:
    """There are no random numbers."""


def install() -> None:
    """For the rest of this process, torch.cuda describes one H100."""
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    cuda.get_device_name = lambda device=None: PROPERTIES.name
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.is_initialized = lambda: False
    cuda.empty_cache = lambda: None
    cuda.is_current_stream_capturing = lambda: False
    for module in (cuda, cuda.random):  # torch.compile puts the state back after it has looked at the code
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
    cuda.Event, cuda.Stream = Event, Stream
    cuda.current_stream = lambda device=None: Stream()
    cuda.default_stream = lambda device=None: Stream()
    compat.compile_without_driver()
    from triton.runtime import driver

    driver.set_active(Driver())
