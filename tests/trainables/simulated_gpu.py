"""A GPU that is not there: tensors labelled `cuda:0` that live on the CPU, and raise where real ones would.

Within `SimulatedGpu()` every call of torch is looked at. A device belongs to a storage, as in torch itself: what is moved
or made there is a copy whose storage is on the list; views and parameters share it. Calls that mix devices raise, but for
CPU tensors of no dimension, which torch takes as numbers. It is stricter than CUDA in two points, each a copy between the
devices that nobody has written down: a CPU index of a GPU tensor, and a CPU value that is put into one.

Numbers are those of the CPU, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

_MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_ACROSS = (torch.Tensor.copy_, _SET_DATA, torch._has_compatible_shallow_copy_type)
_TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)


class SimulatedGpu(TorchFunctionMode):
    """Labels storages; torch calls this instead of each of its functions."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[
            int, Any
        ] = {}  # address -> storage on the GPU, kept alive so that no other gets its address

    def __enter__(self) -> Any:
        self._cudnn = torch.backends.cudnn.is_acceptable  # asked by recurrent layers: it would warn that there is none
        torch.backends.cudnn.is_acceptable = lambda tensor: False
        self._module_to = nn.Module.to  # `module.to(tensor)` asks for the tensor's place behind our back
        nn.Module.to = lambda module, *args, **kwargs: self._module_to(module, *self._named(args), **kwargs)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        nn.Module.to = self._module_to  # type: ignore[method-assign]
        torch.backends.cudnn.is_acceptable = self._cudnn
        super().__exit__(*error)

    def _named(self, args: Any) -> Any:
        return (self.place(args[0]), args[0].dtype) if args and isinstance(args[0], Tensor) else args

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check where the arguments are, call the function on the CPU, and say where the result is."""
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.place(args[0])
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.place(args[0]) == GPU
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return self.place(args[0]) == CPU
        tensors = list(_tensors([args, kwargs]))
        if func in _MOVES:
            device, args, kwargs = self._destination(func, args, kwargs)
            return self._moved(func(*args, **kwargs), device or self.place(tensors[0]), tensors)
        if func in _TO_NUMPY and self.place(tensors[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if func == torch.Tensor.__reduce_ex__ and self.place(tensors[0]) == GPU:
            raise TypeError(
                "a cuda:0 tensor is written to a file, which no machine without a GPU reads; use Tensor.cpu()"
            )
        device = kwargs.pop("device", None)
        if func not in _ACROSS:
            self._check(func, tensors, device, kwargs.get("generator"))
        found = self.place(tensors[0]) if func in _ACROSS else self._common(tensors)
        result = func(*args, **kwargs)
        return self._moved(result, torch.device(device) if device is not None else found, tensors)

    def _destination(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.device | None, Any, dict[str, Any]]:
        """Device that a move names, and its arguments without it."""
        if func == torch.Tensor.cpu:
            return CPU, args[:1], {}
        if func == torch.Tensor.cuda:
            return GPU, args[:1], {}
        named, kept = kwargs.pop("device", None), [args[0]]
        for value in args[1:]:
            if isinstance(value, Tensor):
                named = self.place(value)
                kept.append(value.dtype)
            elif isinstance(value, str | torch.device):
                named = value
            elif isinstance(value, torch.dtype):
                kept.append(value)
        dtype = {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}
        return (torch.device(named) if named is not None else None), tuple(kept), dtype

    def place(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return GPU if _address(tensor) in self._storages else CPU

    def _common(self, tensors: Sequence[Tensor]) -> torch.device:
        return GPU if any(self.place(tensor) == GPU for tensor in tensors) else CPU

    def _check(self, func: Any, tensors: Sequence[Tensor], device: Any, generator: torch.Generator | None) -> None:
        places = {self.place(tensor) for tensor in tensors if tensor.dim() or self.place(tensor) == GPU}
        if len(places) > 1:
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, found cuda:0 and cpu")
        drawn = torch.device(device) if device is not None else self._common(tensors)
        if generator is not None and drawn.type != generator.device.type:
            raise RuntimeError(f"{func.__name__}: expected a generator on {drawn}, found one on {generator.device}")

    def _moved(self, result: Any, device: torch.device, inputs: Sequence[Tensor]) -> Any:
        """The result with its new storages on the device; one that another device's tensor holds is copied."""
        if isinstance(result, Tensor):
            if (self.place(result) == GPU) == (device.type == "cuda"):
                return result
            if any(_address(result) == _address(tensor) for tensor in inputs):
                result = result.clone()
            if device.type == "cuda":
                self._storages[_address(result)] = _storage(result)
            return result
        if isinstance(result, list | tuple):
            for part in result:
                self._moved(part, device, inputs)
        return result


def _storage(tensor: Tensor) -> Any:
    """Of a sparse tensor that of its values."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values().untyped_storage()
    return (tensor.values() if tensor.layout == torch.sparse_csr else tensor).untyped_storage()


def _address(tensor: Tensor) -> int:
    return int(_storage(tensor)._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
