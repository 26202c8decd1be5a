"""A CUDA device that is not there, so that code for one runs where there is none.

A tensor on it says ``cuda:0`` when asked and has its values computed on the CPU. What CUDA refuses is refused: tensors
of both devices in one operation, a view as a numpy array, random numbers from a generator of the other device. Kernels,
streams and memory are not there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
_inside: list[None] = []
"""Not empty in a function that was given a tensor on the device: the tensors that torch makes there are on it too."""


class OnDevice(torch.Tensor):
    """A tensor on the device; `inner`, on the CPU, has its values."""

    inner: torch.Tensor
    device = CUDA
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # for torch's own code, which would look for a driver of any other
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the values."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    asked = kwargs.get("device")
    if not here:
        if asked is None or asked.type != "meta" or not _inside:
            return func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, OnDevice, func(*args, **kwargs | {"device": CPU}))
    _refuse_others(func, tensors if func not in _INDEXED else pytree.tree_leaves(args[0]))
    if func is torch.ops.aten._local_scalar_dense.default:
        return args[0].inner.item()
    on_cpu = pytree.tree_map_only(OnDevice, lambda one: one.inner, (args, kwargs))
    on_cpu = pytree.tree_map_only(torch.device, lambda _: CPU, on_cpu)
    result = func(*on_cpu[0], **on_cpu[1])
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if asked == CPU:
        return result
    same = {id(one.inner): one for one in here}  # of operations in place
    return pytree.tree_map_only(torch.Tensor, lambda one: same[id(one)] if id(one) in same else OnDevice(one), result)


def _refuse_others(func: Any, tensors: list[torch.Tensor]) -> None:
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    if any(other.is_meta for other in others):
        msg = f"{func}: a tensor on the device was made where it cannot have values"
        raise NotImplementedError(msg)
    if func not in _COPIES and any(other.dim() for other in others):  # numbers may come from the CPU, and indices
        msg = f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        raise RuntimeError(msg)


class _Functions(TorchFunctionMode):
    """Puts on the device what is asked to be there, and takes from it what is asked for."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if args and isinstance(args[0], OnDevice):
            if name in ("numpy", "__array__"):
                msg = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first."
                raise TypeError(msg)
            if name in ("item", "tolist"):
                return getattr(args[0].inner, name)()
            if name == "cpu":
                return args[0].inner.clone()
            if func == torch.Tensor.data.__set__:
                args[0].inner = args[1].inner
        if name in ("__getitem__", "__setitem__"):
            lists = pytree.tree_map_only(list, torch.tensor, args[1], is_leaf=lambda one: isinstance(one, list))
            args = (args[0], lists, *args[2:])
        if func is torch.tensor:
            args = pytree.tree_map_only(OnDevice, lambda one: one.inner.tolist(), args)
        if name == "to" and args:
            return _moved(func, *args, **kwargs)
        if kwargs.get("generator") is not None:
            drawn = args[0].device if args and isinstance(args[0], torch.Tensor) else kwargs.get("device") or CPU
            if _is_cuda(drawn) != _is_cuda(kwargs["generator"].device):
                msg = f"Expected a {drawn} device type for generator but found {kwargs['generator'].device}"
                raise RuntimeError(msg)
        if _is_cuda(kwargs.get("device")):
            made = func(*args, **kwargs | {"device": CPU})
            return pytree.tree_map_only(
                torch.Tensor, lambda one: one if isinstance(one, OnDevice) else OnDevice(one), made
            )
        if not any(isinstance(leaf, OnDevice) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        _inside.append(None)
        try:
            return func(*args, **kwargs)
        finally:
            _inside.pop()


def _entered(tensor: torch.Tensor) -> OnDevice:
    return tensor if isinstance(tensor, OnDevice) else OnDevice(tensor)


def _moved(func: Callable[..., Any], tensor: torch.Tensor, *others: Any, **kwargs: Any) -> torch.Tensor:
    """Carry out ``Tensor.to`` a device, a dtype, both, or another tensor's."""
    target = kwargs.pop("device", None)
    if others and isinstance(others[0], torch.Tensor):
        target, others = others[0].device, (others[0].dtype,)
    elif others and not isinstance(others[0], torch.dtype):
        target, others = others[0] if others[0] is not None else target, others[1:]
    dtypes = [other for other in others if isinstance(other, torch.dtype)]  # and not whether to wait
    if target is None:
        return func(tensor, *dtypes, **kwargs)
    inner = tensor.inner if isinstance(tensor, OnDevice) else tensor
    if not _is_cuda(target):
        moved = inner.to(target, *dtypes, **kwargs)
        return moved.clone() if isinstance(tensor, OnDevice) and moved is inner else moved
    moved = inner.to(*dtypes, **kwargs) if dtypes or kwargs else inner
    if moved is inner:
        return tensor if isinstance(tensor, OnDevice) else OnDevice(inner.clone())
    return OnDevice(moved)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


class _Generator(torch.Generator):
    """A generator that says on which device it draws."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        made.where = CUDA if _is_cuda(device) else CPU
        return made

    @property
    def device(self) -> torch.device:
        return self.where


@contextmanager
def pretended() -> Iterator[None]:
    """Let there be one CUDA device."""
    with pytest.MonkeyPatch.context() as patch, _Operations(), _Functions():
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.inference_mode, "__enter__", torch.no_grad.__enter__)  # it has no views of such tensors
        patch.setattr(torch.inference_mode, "__exit__", torch.no_grad.__exit__)
        yield
