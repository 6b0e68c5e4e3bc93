"""Private names of torch, and functions that report what torch is doing.

No other file of the package uses a private name of torch. All of them were tested with torch 2.13.0
and 2.14.1, and partially with 2.11.0. A later torch may remove one: ``import fusedrnn`` then still
works, and the comment at each name says what else changes ("If gone").

Attributes that ``nn.Module`` and ``nn.RNNBase`` share with their subclasses, such as
``_flat_weights``, are used in ``modules.py`` and ``leaky.py`` only, by the subclasses themselves.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .ops import _C
from .ops import step as _step_op

NAMES: list[str] = []  # all that were looked up


def _private(name: str, otherwise: Any) -> Any:
    """Return the private ``torch.<name>``; or ``otherwise``, if this torch does not have it."""
    NAMES.append(name)
    try:
        return pkgutil.resolve_name(f"torch.{name}")
    except (ImportError, AttributeError):
        return otherwise


def _needed(name: str, by: str) -> Any:
    """Return the private ``torch.<name>``; or a function that raises an error, if it is gone."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"fusedrnn: {by} needs torch.{name}, which torch {torch.__version__} does not have; "
            "use torch 2.14.1"
        )

    return _private(name, fail)


# ---- questions ----

# Whether torch.compile or torch.export is tracing. Public; Dynamo recognises this very object.
compiling = torch.compiler.is_compiling

# Whether torch.onnx.export is tracing, by torch.export or by torch.jit.trace. Public.
exporting_onnx = torch.onnx.is_in_onnx_export

# Whether tensors may have tangents. torch.autograd.forward_ad cannot be used for this, because
# compiled code enters forward mode without updating it; the engine reads torch's C++ state.
forward_mode: Callable[[], bool] = _C.forward_mode

# Whether torch.export is tracing. Public.
exporting = torch.compiler.is_exporting

# The state of torch.jit.trace, or None. If gone: a public function, 0.1 us slower.
_tracing_state = _private("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)

# The innermost transform of torch.func, or None. If gone: any call is treated as transformed.
_innermost_transform = _private("_C._functorch.peek_interpreter_stack", lambda: True)

# The number of active dispatch modes: fake tensors, make_fx. If gone: as if there were one.
_dispatch_modes = _private("_C._len_torch_dispatch_stack", lambda: 1)

# The number of active function modes, which override calls of torch. If gone: as if there were one.
_function_modes = _private("_C._len_torch_function_stack", lambda: 1)

# Whether autocast is on for any device. If gone: the caller checks its own device each time.
any_autocast: Callable[[], bool] = _private("_C._is_any_autocast_enabled", lambda: True)

# Whether one of the arguments is a tensor that requires a gradient. If gone: 1 us slower.
any_requires_grad: Callable[..., bool] = _private(
    "_C._any_requires_grad",
    lambda *args: any(isinstance(a, Tensor) and a.requires_grad for a in args),
)

# The innermost hooks for tensors that autograd saves, or None. If gone: as if there were some.
_saved_tensor_hooks = _private("_C._autograd._top_saved_tensors_default_hooks", lambda _: True)

# The class of fake tensors. If gone: a tensor counts as fake unless it is a plain Tensor.
_FakeTensor = _private("_subclasses.fake_tensor.FakeTensor", None)


# Whether a tensor differs between the samples of a vmap. If gone: such lengths raise torch's error.
mapped: Callable[[Tensor], bool] = _private("_C._functorch.is_batchedtensor", lambda _: False)

# Whether a gradient is one of is_grads_batched=True. If gone: torch's error for blocks.
batched_gradient: Callable[[Tensor], bool] = _private(
    "_C._functorch.is_legacy_batchedtensor", lambda _: False
)


def equal_sizes(a: int, b: int) -> bool:
    """Return whether two sizes are equal; False if, when compiling, that depends on data."""
    if not compiling():
        return a == b
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy: 1 s

    return guard_or_false(a == b)


def transformed() -> bool:
    """Return whether a transform of torch.func is active, at any level."""
    return _innermost_transform() is not None


def jit_tracing() -> bool:
    """Return whether torch.jit.trace is tracing."""
    return _tracing_state() is not None


def must_dispatch(weight: Tensor) -> bool:
    """Return whether an op must be called through torch's dispatcher, above its Autograd key.

    A compiler, a tracer, a transform or a TorchFunctionMode (such as that of ``trace.py``) must see
    the op itself. Forward mode and dispatch modes need not: they are handled below, by the op's
    Autograd kernel and by the kernels that it calls.
    """
    return (
        compiling()
        or transformed()
        or _tracing_state() is not None
        or _function_modes() > 0
        or type(weight) is ExpandedWeight
    )


def eager(*tensors: Tensor | None) -> bool:
    """Return whether nothing but plain eager autograd is active, so that data can be read.

    That excludes a compiler, a tracer, a transform of torch.func, forward mode, a dispatch mode
    such as fake tensors, and a subclass of Tensor.
    """
    return not (
        compiling()
        or _tracing_state() is not None
        or transformed()
        or forward_mode()
        or _dispatch_modes() > 0
        or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in tensors)
    )


def saved_tensor_hooks() -> bool:
    """Return whether hooks would pack the tensors that autograd saves, as for a checkpoint."""
    return _saved_tensor_hooks(False) is not None


def is_fake(tensor: Tensor) -> bool:
    """Return whether the tensor has sizes but no data, because a compiler is tracing."""
    return type(tensor) is not Tensor if _FakeTensor is None else isinstance(tensor, _FakeTensor)


# ---- autograd ----

# A context in which ops run below the Autograd key. If gone: an error at the first call.
below_autograd = _needed("_C._AutoDispatchBelowAutograd", "every call")

# The base class of torch.autograd.Function, which does not handle torch.func. If gone: the latter,
# whose ``apply`` takes 10 us longer.
_FUNCTION = "autograd.function._SingleLevelFunction"
_Function: Any = _private(_FUNCTION, torch.autograd.Function)


class SingleLevelFunction(_Function):
    """An autograd.Function for one level of torch.func."""

    # Compiled autograd requires this of every Function, but only torch.autograd.Function has it.
    _compiled_autograd_key = staticmethod(lambda ctx: (ctx._autograd_function_id,))


# A context in which torch.func allows a SingleLevelFunction. If one of the two is gone: an error
# under torch.func.
single_level_functions: Callable[[], AbstractContextManager[None]] = _needed(
    "_functorch.autograd_function.enable_single_level_autograd_function"
    if _Function is not torch.autograd.Function
    else _FUNCTION,
    "torch.func",
)

# Whether forward mode is on, and a context that sets it. If gone: an error under torch.func.
tangents_enabled: Callable[[], bool] = _needed(
    "autograd.forward_ad._is_fwd_grad_enabled", "torch.func"
)
with_tangents: Callable[[bool], AbstractContextManager[None]] = _needed(
    "autograd.forward_ad._set_fwd_grad_enabled", "torch.func"
)

# Split a dual tensor into primal and tangent. If gone: the public function, which calls it.
unpack_dual = _private("_VF._unpack_dual", forward_ad.unpack_dual)

# Run backward. If gone: the public function, which imports sympy to compare sizes: 1 s, once.
_run_backward = _private("autograd.graph._engine_run_backward", None)


def gradients_of(outputs: Any, inputs: Any, grad_outputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs, as ``torch.autograd.grad`` does.

    They can be differentiated again if gradients are enabled.
    """
    graph = torch.is_grad_enabled()
    if _run_backward is None:
        return torch.autograd.grad(
            outputs, inputs, grad_outputs, create_graph=graph, allow_unused=True
        )
    return _run_backward(outputs, grad_outputs, graph, graph, inputs, True, accumulate_grad=False)


# ---- ops ----

# The op ``step`` without the Python function around it. If gone: the op itself, 0.4 us slower.
step: Callable[..., tuple[Tensor, Tensor]] = getattr(_step_op, "_op", _step_op)

# ---- other contexts ----

# A context in which subclasses of Tensor do not override functions. If gone: a wrong argument under
# call_for_per_sample_grads raises torch's own error.
without_torch_function: Callable[[], AbstractContextManager[None]] = _private(
    "_C.DisableTorchFunctionSubclass", nullcontext
)

# If one is gone: autocast is disabled for the whole device instead, 5 us slower.
_ExcludeKeys = _private("_C._ExcludeDispatchKeyGuard", None)
_DispatchKey = _private("_C.DispatchKey", None)
_DispatchKeySet = _private("_C.DispatchKeySet", None)


def below_autocast(device_type: str, key: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that makes ops run below one Autocast key."""
    if _ExcludeKeys is None or _DispatchKey is None or _DispatchKeySet is None:
        return functools.partial(torch.autocast, device_type, enabled=False)
    return functools.partial(_ExcludeKeys, _DispatchKeySet(getattr(_DispatchKey, key)))


# A check that compiled code also makes. Documented, although its name is private. If gone: an empty
# batch_sizes raises torch's own error.
torch_check = _private("_check", lambda condition, message: None)

# ---- expanded weights: call_for_per_sample_grads, torch's older API ----

_EXPANDED_WEIGHTS = "nn.utils._expanded_weights"
_IMPL = f"{_EXPANDED_WEIGHTS}.expanded_weights_impl"
_UTILS = f"{_EXPANDED_WEIGHTS}.expanded_weights_utils"


class _NoWeight:
    pass


def _no_registration(op: Any) -> Callable[[type], type]:
    return lambda function: function


# The class of the weights under call_for_per_sample_grads, and a decorator that registers a
# Function for an op. If one is gone: torch reports that it cannot handle the op.
ExpandedWeight: Any = _private(f"{_EXPANDED_WEIGHTS}.ExpandedWeight", _NoWeight)
implements_per_sample_grads = _private(f"{_IMPL}.implements_per_sample_grads", _no_registration)
if ExpandedWeight is _NoWeight:
    implements_per_sample_grads = _no_registration

# If one of these is gone: an error under call_for_per_sample_grads.
set_grad_sample_if_exists = _needed(
    f"{_UTILS}.set_grad_sample_if_exists", "call_for_per_sample_grads"
)
unpack_expanded_weight_or_tensor = _needed(
    f"{_UTILS}.unpack_expanded_weight_or_tensor", "call_for_per_sample_grads"
)
