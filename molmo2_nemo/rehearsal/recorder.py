"""Counts what a rank does with its device: memory, collectives, host synchronisations, FLOPs, bytes moved.

A dispatch mode over fake tensors. Tensors of the batch and what is computed from them alone have values, too: how many
tokens carry loss and which places are visual is as in a real step.
"""

import math
import weakref
from collections import Counter

import torch
from torch.utils.weak import WeakIdKeyDictionary

from molmo2_nemo import compat
from molmo2_nemo.rehearsal.collectives import Collective, collective_of, name_and_ranks, tensors_in
from molmo2_nemo.rehearsal.places import Places
from molmo2_nemo.rehearsal.plan import pairs_of

aten = torch.ops.aten
BLOCK = 512  # CUDA's caching allocator rounds every tensor up to a multiple of this many bytes
SMALL = 2**24  # elements: values of larger tensors are not followed
PRODUCTS = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.addmm_.default, aten.addmm.dtype_out),
    compat.gelu_product_operation(),
}
VIEWS = compat.views()
BOOLEAN_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
OVERWRITTEN = {"zero_", "fill_", "copy_"}  # operations that do not read their first argument


def has_to_count(args: tuple) -> bool:
    """Whether an indexing operation has to know how many places a mask has.

    One value at the places of one mask, as in Megatron's embedding, is a masked_fill (pytorch/pytorch:
    aten/src/ATen/native/TensorAdvancedIndexing.cpp, canDispatchToMaskedFill).
    """
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
    return bool(masks) and not (len(masks) == 1 and len(args) > 2 and args[2].numel() == 1)


class Recorder(compat.dispatch_mode()):
    """lengths: tokens of rows and of ranks' parts of them. A tensor with two such dimensions, or one that is their
    product, holds a number for every pair of tokens, which is a fault."""

    def __init__(self, lengths: set[int]):
        super().__init__()
        self.lengths = lengths
        self.pairs = pairs_of(lengths)
        self.phase = "build"
        self.places = Places()
        self.alive: dict[int, tuple[int, str, str]] = {}  # storage -> bytes, part, line
        self.current, self.is_highest = 0, False
        self.now = {"part": Counter(), "line": Counter()}  # bytes of `current`
        self.peak = 0
        self.at_peak = {"part": Counter(), "line": Counter()}
        self.peaks: dict[str, int] = {}  # of each phase
        self.collectives: list[Collective] = []
        self.syncs = Counter()  # (phase, line) -> calls
        self.uploads, self.downloads = Counter(), Counter()  # phase -> bytes from the host, to the host
        self.on_host: dict[int, int] = {}  # storage of the host -> bytes
        self.pinned: set[int] = set()  # those to and from which the device copies by itself
        self.flops, self.moved, self.moved_by_line = Counter(), Counter(), Counter()  # by (phase, part), ... line
        self.faults: dict[str, None] = {}  # sentences, each once and in order
        self.values = WeakIdKeyDictionary()  # tensor of the batch -> the same with values
        self.counts: dict[tuple[int, ...], int] = {}  # shape of a mask -> how many of it were true last

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].device
        if function.namespace == "c10d":
            return self._collective(function, args, kwargs)
        if function.namespace == "_c10d_functional":
            line = self.places.here(self.phase)[1]
            self.faults[f"{line} calls {compat.schema_of(function).name}: functional collectives are not counted"] = (
                None
            )
        if compat.schema_of(function).name == compat.TO_NUMBER:
            return self._number(function, args[0])
        if function is aten.nonzero.default and self.is_here(args[0]):
            return self._nonzero(args[0])
        if compat.schema_of(function).name == compat.PIN_MEMORY:
            return self.pin(args[0].clone())
        if function in BOOLEAN_INDEX and has_to_count(args):
            args = (args[0], self._as_numbers(args[1]), *args[2:])
        before = {compat.storage_address(t.untyped_storage()) for t in tensors_in((args, kwargs))}
        is_view = function in VIEWS and compat.is_fake(args[0])
        result = compat.fake_view(function, args, kwargs) if is_view else function(*args, **kwargs)
        self._follow(function, args, kwargs, result)
        made = tensors_in(result)
        if any(self.is_here(tensor) for tensor in made) or any(map(self.is_here, tensors_in(args))):
            place = self.places.here(self.phase)
            for tensor in made:
                self.see(tensor, place)
            self._count(function, args, kwargs, made, before, place)
        else:
            for tensor in made:
                self._see_on_host(tensor)
        return result

    def is_here(self, tensor) -> bool:
        """Whether a tensor is on the device."""
        return isinstance(tensor, torch.Tensor) and tensor.device.type == compat.REHEARSAL_DEVICE

    # ---- memory ----

    def see(self, tensor: torch.Tensor, place: tuple[str, str]) -> None:
        """Count a tensor's memory from now until it goes. place: its part and line."""
        if not self.is_here(tensor):
            self._see_on_host(tensor)
            return
        storage = tensor.untyped_storage()
        address = compat.storage_address(storage)
        if address in self.alive:
            return
        if sum(size in self.lengths for size in tensor.shape) > 1 or not self.pairs.isdisjoint(tensor.shape):
            shape = " x ".join(map(str, tensor.shape))
            self.faults[f"{place[1]} makes a tensor of {shape}: a number for every pair of tokens"] = None
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive[address] = (size, *place)
        self._change(size, *place)
        weakref.finalize(storage, self._gone, address)

    def rename(self, tensors, part: str) -> None:
        """Say what the memory of tensors is for."""
        for tensor in tensors:
            address = compat.storage_address(tensor.untyped_storage())
            size, before, line = self.alive[address]
            self.alive[address] = (size, part, line)
            self.now["part"][before] -= size
            self.now["part"][part] += size

    def _see_on_host(self, tensor: torch.Tensor) -> None:
        if not compat.is_fake(tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        address = compat.storage_address(storage)
        if address not in self.on_host:
            self.on_host[address] = storage.nbytes()
            weakref.finalize(storage, self.on_host.pop, address)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that a tensor's memory on the host is pinned; returns it.

        torch rounds it up to a power of two (pytorch/pytorch: aten/src/ATen/core/CachingHostAllocator.h).
        """
        self._see_on_host(tensor)
        storage = tensor.untyped_storage()
        address = compat.storage_address(storage)
        self.on_host[address] = 2 ** math.ceil(math.log2(max(1, storage.nbytes())))
        self.pinned.add(address)
        weakref.finalize(storage, self.pinned.discard, address)
        return tensor

    def _gone(self, address: int) -> None:
        if self.is_highest:  # the first to go after a new peak
            self._keep_peak()
        size, *place = self.alive.pop(address)
        self._change(-size, *place)

    def _change(self, size: int, part: str, line: str) -> None:
        self.current += size
        self.now["part"][part] += size
        self.now["line"][line] += size
        if self.current > self.peak:
            self.peak, self.is_highest = self.current, True
        self.peaks[self.phase] = max(self.current, self.peaks.get(self.phase, 0))

    def _keep_peak(self) -> None:
        self.at_peak = {kind: +counter for kind, counter in self.now.items()}
        self.is_highest = False

    def begin(self, phase: str) -> None:
        """What is counted from now on belongs to another phase; `peak` and `at_peak` are those of the last one."""
        self.phase, self.peak, self.is_highest = phase, self.current, True

    def finish(self) -> None:
        """To be called after the last operation."""
        if self.is_highest:
            self._keep_peak()

    # ---- values, and waiting for them ----

    def give_values(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Say what a tensor on the device holds."""
        self.values[tensor] = values

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self.values.get(tensor) if compat.is_fake(tensor) else tensor

    def note_sync(self) -> None:
        """The host waits for the device here."""
        part, line = self.places.here(self.phase)
        self.syncs[self.phase, line] += 1
        if self.places.in_layer:
            self.faults[f"{line} waits for the device in every layer ({part})"] = None

    def to_list(self, tensor: torch.Tensor):
        """`tensor.tolist()`: one wait, whatever the tensor's size."""
        if self.is_here(tensor):
            self.note_sync()
        values = self.values_of(tensor)
        with compat.without_modes():
            return (torch.zeros(tensor.shape, dtype=tensor.dtype) if values is None else values).tolist()

    def _number(self, function, tensor):
        if self.is_here(tensor):
            self.note_sync()
        values = self.values_of(tensor)
        if values is not None:
            with compat.without_modes():
                return values.item()
        if not self.is_here(tensor):
            try:
                return function(tensor)
            except RuntimeError:  # a tensor of the host that was computed from the device's
                pass
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        self.note_sync()
        found = torch.empty((self._true_in(mask), mask.dim()), dtype=torch.int64, device=mask.device)
        self.see(found, self.places.here(self.phase))
        return found

    def _as_numbers(self, indices: list) -> list:
        """Indices of an operation with each mask replaced by the numbers of its true places, as torch does it."""
        numbers = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                numbers.append(index)
            else:
                numbers += self._nonzero(index).unbind(1)
        return numbers

    def _true_in(self, mask: torch.Tensor) -> int:
        values, shape = self.values_of(mask), tuple(mask.shape)
        if values is not None:
            with compat.without_modes():
                self.counts[shape] = int(values.count_nonzero())
        # In a backward pass a mask is another object than in the forward pass.
        return self.counts.get(shape, mask.numel())

    def _follow(self, function, args, kwargs, result) -> None:
        """Compute the operation on values as well, if all that it takes has values."""
        taken = tensors_in((args, kwargs))
        if not taken or not isinstance(result, torch.Tensor | list | tuple):
            return
        known = [self.values_of(tensor) for tensor in taken]
        if any(values is None for values in known) or not any(compat.is_fake(tensor) for tensor in taken):
            if compat.schema_of(function).is_mutable and taken[0] in self.values:
                del self.values[taken[0]]
            return
        made = tensors_in(result)
        if any(tensor.numel() > SMALL for tensor in made):
            return
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        with compat.without_modes():
            values = function(*compat.with_values(args, self.values_of), **compat.with_values(kwargs, self.values_of))
        for tensor, value in zip(made, tensors_in(values)):
            self.values[tensor] = value

    # ---- work ----

    def product(self, flops: float, part: str) -> None:
        """Count FLOPs of a kernel that is stood in for."""
        self.flops[self.phase, part] += flops

    def note_moved(self, size: int) -> None:
        """Count bytes that a kernel which is stood in for reads and writes."""
        part, line = self.places.here(self.phase)
        self.moved[self.phase, part] += size
        self.moved_by_line[self.phase, line] += size

    def _goes_by_itself(self, function, args, kwargs: dict, target: torch.Tensor) -> bool:
        """Whether the host does not wait for a copy from the device: it asked not to, and the target is pinned.

        What torch makes itself for such a copy is (pytorch/pytorch: aten/src/ATen/native/TensorConversions.cpp,
        _to_copy, pin_out).
        """
        if function is not aten.copy_.default:
            return bool(kwargs.get("non_blocking"))
        asked = kwargs.get("non_blocking") or args[2:] == (True,)
        return asked and compat.storage_address(target.untyped_storage()) in self.pinned

    def _count(self, function, args, kwargs, made: list, before: set[int], place: tuple[str, str]) -> None:
        part, line = place
        taken = tensors_in(args)
        if function in PRODUCTS:
            self.flops[self.phase, part] += 2 * made[0].numel() * taken[-2].shape[-1]
            return
        schema = compat.schema_of(function)
        name, changes = schema.name.removeprefix("aten::"), schema.is_mutable
        if schema.name == compat.TO_COPY or function is aten.copy_.default:
            source, target = (taken[1], taken[0]) if function is aten.copy_.default else (taken[0], made[0])
            if self.is_here(source) != self.is_here(target):
                size = source.numel() * target.element_size()  # converted before it goes
                if self.is_here(target):
                    self.uploads[self.phase] += size
                    return
                self.downloads[self.phase] += size
                if not self._goes_by_itself(function, args, kwargs, target):
                    self.note_sync()
                return
        written = compat.written_by(function, args) if changes and function.namespace != "aten" else []
        made = made + written  # by a kernel of ours, which returns nothing of what it changes
        if name.startswith(("empty", "new_empty")) or not made:
            return
        if not changes and all(compat.storage_address(t.untyped_storage()) in before for t in made):
            return  # a view
        read = taken[1:] if changes and name in OVERWRITTEN else taken
        moved = sum(map(_bytes, made)) + sum(map(_bytes, read))
        if name in ("index", "embedding"):
            moved = 2 * sum(map(_bytes, made))
        self.moved[self.phase, part] += moved
        self.moved_by_line[self.phase, line] += moved

    def note_call(self, operation: str, group) -> None:
        """A collective without tensors of the device: a barrier, or an exchange of objects."""
        line = self.places.here(self.phase)[1]
        self.collectives.append(Collective(self.phase, operation, *name_and_ranks(group), 0, 0.0, line))

    def _collective(self, function, args, kwargs):
        found, result = collective_of(function, args, kwargs, self.places.here(self.phase)[1], self.phase)
        self.collectives.append(found)
        for tensor in tensors_in((args, kwargs)):
            if tensor in self.values:  # a sum over ranks is not this rank's value
                del self.values[tensor]
        return result


def _bytes(tensor: torch.Tensor) -> int:
    """What an operation reads or writes of a tensor, of an expanded one its memory alone."""
    size = tensor.element_size()
    return min(tensor.numel(), math.ceil(tensor.untyped_storage().nbytes() / size)) * size
