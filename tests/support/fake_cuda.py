"""A device on the CPU that behaves as CUDA is documented to: streams run later and in order, events, an allocator that reuses.

It has the names of `torch.cuda` that `CudaCopies` uses. Nothing is computed when it is asked for: each stream is a thread
with a queue, and copies wait while `copies` is cleared, computations while `computing` is. Memory that nothing refers to
any more is overwritten as soon as the streams that it is known to be used by allow: who forgot to name one reads
garbage. Events know their device and whether waiting for them would spin.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref

import torch

GARBAGE = 0xEE
PATIENCE = 20.0
"""Seconds after which a wait is a deadlock."""


class FakeEvent:
    """Recorded on a stream, done when the stream gets there. Never recorded, it is done, as with CUDA."""

    def __init__(self, cuda, blocking=False):
        self.cuda, self.blocking, self.device, self._done = cuda, blocking, None, None

    def record(self, stream):
        self.device = stream.device
        self._done = threading.Event()
        stream.put(self._done.set)

    def wait_here(self):
        if self._done is not None and not self._done.wait(PATIENCE):
            raise TimeoutError("an event never came")

    def synchronize(self):
        self.cuda.waits.append((self.blocking, self.device == self.cuda.current_device))
        if self.cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.wait_here()


class FakeStream:
    """A queue of operations, carried out in order by a thread. held_by: the device of a stream that it waits for now."""

    def __init__(self, cuda, device):
        self.cuda, self.device, self.held_by = cuda, device, None
        self._queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, operation):
        self._queue.put(operation)

    def wait_stream(self, other):
        event = FakeEvent(self.cuda)
        event.record(other)
        self.put(lambda: self._wait(event))

    def _wait(self, event):
        self.held_by = event.device
        event.wait_here()
        self.held_by = None

    def synchronize(self):
        event = FakeEvent(self.cuda)
        event.record(self)
        event.wait_here()

    def _run(self):
        with torch.inference_mode():  # per thread; the model's tensors are made in it
            while (operation := self._queue.get()) is not None:
                try:
                    operation()
                except Exception as error:  # noqa: BLE001 - raised by close, in the thread of the test
                    self.cuda.errors.append(error)


class Block:
    """A piece of device memory; given back, it is overwritten in the order of the stream that it belongs to."""

    def __init__(self, memory, stream):
        self.memory, self.stream = memory, stream
        self.users = set()
        self.tensors = 0

    def drop(self):
        self.tensors -= 1
        if self.tensors == 0:
            # as the caching allocator does: what the other streams were given until now must be through first
            for user in self.users - {self.stream}:
                event = FakeEvent(self.stream.cuda)
                event.record(user)
                self.stream.put(event.wait_here)
            self.stream.put(lambda: self.memory.fill_(GARBAGE))


class DeviceTensor(torch.Tensor):
    """A tensor whose values are there when its stream has made them; views share its block."""

    block: Block

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return self.block.stream.device

    def record_stream(self, stream):
        self.block.users.add(stream)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            return _copy(*args, **(kwargs or {}))
        if function is torch.Tensor.contiguous:
            return _contiguous(*args)
        result = super().__torch_function__(function, types, args, kwargs or {})
        source = next((arg for arg in args if isinstance(arg, DeviceTensor)), None)
        if type(result) is DeviceTensor and "block" not in vars(result) and source is not None:
            _belongs(result, source.block)
        return result


def _belongs(tensor, block):
    tensor.block = block
    block.tensors += 1
    weakref.finalize(tensor, block.drop)


def _plain(tensor):
    """The memory under a device's tensor: what an operation reads when its turn comes. It keeps no block in use."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor).detach()


def _contiguous(source):
    if source.is_contiguous():
        return source
    cuda = source.block.stream.cuda
    result, values, stream = cuda.empty(source), _plain(source), cuda.current_stream(source.device)
    target = _plain(result)
    stream.put(lambda: target.copy_(values))
    return result


def _copy(target, source, non_blocking=False):
    source = _contiguous(source)
    cuda, values, place = source.block.stream.cuda, _plain(source), target.detach()
    stream = cuda.current_stream(source.device)
    cuda.queued += 1
    stream.put(lambda: cuda.copy(place, values))
    if not non_blocking:
        stream.synchronize()
    return target


class FakeCuda:
    """What `CudaCopies` knows as `torch.cuda`, and the model's side of it: `tensor` computes one on a device."""

    def __init__(self):
        self.computing, self.copies = threading.Event(), threading.Event()
        self.computing.set()
        self.copies.set()
        self.streams, self.waits, self.errors = [], [], []
        self.broken = False
        self.queued = self.copied = 0
        self._defaults = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def Stream(self, device):
        self.streams.append(FakeStream(self, device))
        return self.streams[-1]

    def Event(self, blocking=False):
        return FakeEvent(self, blocking)

    @property
    def current_device(self):
        return getattr(self._here, "device", torch.device("cuda", 0))

    def current_stream(self, device):
        chosen = getattr(self._here, "stream", None)
        if chosen is not None and chosen.device == device:
            return chosen
        if device not in self._defaults:
            self._defaults[device] = FakeStream(self, device)
        return self._defaults[device]

    @contextlib.contextmanager
    def device(self, device):
        before, self._here.device = self.current_device, device
        try:
            yield
        finally:
            self._here.device = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._here.stream = getattr(self._here, "stream", None), stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self._here.stream = before

    def copy(self, target, values):
        self.copies.wait(PATIENCE)
        target.copy_(values)
        with self._lock:
            self.copied += 1

    def empty(self, like):
        """Uninitialized memory of the stream that is current on the device of `like`, or on the first one."""
        device = like.device if isinstance(like, DeviceTensor) else torch.device("cuda", 0)
        return self._made(like.shape, like.dtype, device)

    def _made(self, shape, dtype, device):
        memory = torch.full((shape.numel() * dtype.itemsize,), GARBAGE, dtype=torch.uint8)
        tensor = memory.view(dtype).view(shape).as_subclass(DeviceTensor)
        _belongs(tensor, Block(memory, self.current_stream(device)))
        return tensor

    def tensor(self, values, index=0):
        """A tensor on device `index` that will hold `values` when its stream has computed them."""
        result = self._made(values.shape, values.dtype, torch.device("cuda", index))
        place = _plain(result)

        def compute():
            self.computing.wait(PATIENCE)
            place.copy_(values)

        result.block.stream.put(compute)
        return result

    def close(self):
        """Let everything run to its end and stop the streams' threads."""
        self.computing.set()
        self.copies.set()
        streams = [*self.streams, *self._defaults.values()]
        for stream in streams:
            stream.put(None)
        for stream in streams:
            stream.thread.join(PATIENCE)
        if self.errors:
            raise self.errors[0]
