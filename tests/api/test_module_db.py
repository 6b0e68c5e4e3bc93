"""PyTorch's own test inputs for nn.RNN and nn.RNNCell, run on fusedrnn's modules.

The tests follow PyTorch's test_modules.py. The inputs ship with torch, in
``torch.testing._internal.common_modules``; PyTorch's tests do not.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules",
    reason="PyTorch's module inputs want the package expecttest",
)

OURS = {nn.RNN: fusedrnn.RNN, nn.RNNCell: fusedrnn.RNNCell}
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in OURS}


@dataclasses.dataclass
class Case:
    """One input of module_db: the arguments of the module's constructor and of its call."""

    cls: Callable[..., nn.Module]
    torch_cls: Callable[..., nn.Module]
    construct: Any  # FunctionInput: args, kwargs
    call: Any

    def modules(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """Return our module and torch's, with the same weights."""
        args, kwargs = self.construct.args, {**self.construct.kwargs, "dtype": dtype}
        theirs = self.torch_cls(*args, **kwargs)
        ours = self.cls(*args, **kwargs)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


def inputs(torch_cls: Any, dtype: torch.dtype) -> list[Any]:
    info = INFOS[torch_cls]
    more = {"with_packed_sequence": True} if torch_cls is nn.RNN else {}
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True, **more
    )


def cases() -> Iterator[Any]:
    for torch_cls, cls in OURS.items():
        for i, sample in enumerate(inputs(torch_cls, torch.float64)):
            case = Case(cls, torch_cls, sample.constructor_input, sample.forward_input)
            kind = "packed" if isinstance(case.call.args[0], PackedSequence) else "plain"
            yield pytest.param(case, id=f"{torch_cls.__name__}-{i}-{kind}")


def flat(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    if isinstance(result, PackedSequence):
        results = (result,)
    return [r.data if isinstance(r, PackedSequence) else r for r in results]


def leaves(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    return [*flat(args), *module.parameters()]


all_cases = pytest.mark.parametrize("case", list(cases()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_number_of_inputs_is_as_expected() -> None:
    assert [len(inputs(c, torch.float64)) for c in (nn.RNN, nn.RNNCell)] == [64, 3]


@all_cases
def test_forward_and_gradients(case: Case) -> None:
    ours, theirs = case.modules()
    results = []
    for module in (ours, theirs):
        result = flat(module(*case.call.args, **case.call.kwargs))
        wanted = leaves(module, case.call.args)
        results.append((result, torch.autograd.grad(sum(r.sin().sum() for r in result), wanted)))
    assert_close(*results)


@pytest.mark.parametrize("torch_cls", OURS, ids=lambda c: c.__name__)
def test_unbatched_input_matches_torchs_reference_function(torch_cls: Any) -> None:
    """Unbatched input gives the same result as torch's reference, which runs a batch of one."""
    for sample in inputs(torch_cls, torch.float64):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        if isinstance(args[0], PackedSequence):
            continue  # PyTorch has no reference for these
        construct = sample.constructor_input
        module = OURS[torch_cls](*construct.args, **construct.kwargs, dtype=torch.float64)
        assert_close(
            module(*args, **kwargs),
            sample.reference_fn(module, *args, **kwargs),
        )


def as_function(module: nn.Module, case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return the call as a function of floating-point arguments and parameters, for gradcheck."""
    names = [n for n, _ in module.named_parameters()]
    template = case.call.args
    arguments = [t.detach().clone().requires_grad_() for t in leaves(module, template)]

    def function(*tensors: Tensor) -> list[Tensor]:
        args = [
            a._replace(data=t) if isinstance(a, PackedSequence) else t
            for a, t in zip(template, tensors[: len(template)], strict=True)
        ]
        weights = dict(zip(names, tensors[len(template) :], strict=True))
        return flat(torch.func.functional_call(module, weights, tuple(args)))

    return function, arguments


@all_cases
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    module, _ = case.modules()
    function, arguments = as_function(module, case)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@all_cases
def test_pickle_deepcopy_and_save(case: Case) -> None:
    module, _ = case.modules()
    want = flat(module(*case.call.args))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for replica in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(buffer, weights_only=False),
    ):
        assert_close(flat(replica(*case.call.args)), want, rtol=0, atol=0)


@all_cases
def test_repr(case: Case) -> None:
    ours, theirs = case.modules()
    assert repr(ours) == repr(theirs)


@all_cases
def test_factory_arguments(case: Case) -> None:
    module, _ = case.modules(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    meta = case.cls(*case.construct.args, **case.construct.kwargs, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    meta.to_empty(device="cpu")
    meta.load_state_dict(module.state_dict())
    arguments = [a.to(torch.float32) for a in case.call.args]
    assert_close(flat(meta(*arguments)), flat(module(*arguments)), rtol=0, atol=0)


@all_cases
def test_non_contiguous_tensors(case: Case) -> None:
    def scattered(t: Tensor) -> Tensor:
        wide = torch.stack([t.detach(), torch.full_like(t, torch.nan)], -1)
        return wide[..., 0].requires_grad_()

    module, _ = case.modules()
    strided = copy.deepcopy(module)
    for p in strided.parameters():
        p.data = scattered(p)
    args = [
        a._replace(data=scattered(a.data)) if isinstance(a, PackedSequence) else scattered(a)
        for a in case.call.args
    ]
    results = []
    for m, arguments in ((module, case.call.args), (strided, tuple(args))):
        result = flat(m(*arguments))
        grads = torch.autograd.grad(sum(r.sum() for r in result), leaves(m, arguments))
        results.append((result, grads))
    assert_close(*results)


@all_cases
def test_train_and_eval_modes_agree_without_dropout(case: Case) -> None:
    module, _ = case.modules()
    want = flat(module.train()(*case.call.args))
    assert_close(flat(module.eval()(*case.call.args)), want, rtol=0, atol=0)


def error_cases() -> Iterator[Any]:
    for torch_cls, cls in OURS.items():
        info = INFOS[torch_cls]
        samples = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for i, sample in enumerate(samples):
            yield pytest.param(cls, sample, id=f"{torch_cls.__name__}-{i}")


@pytest.mark.parametrize(("cls", "sample"), list(error_cases()))
def test_errors(cls: Any, sample: Any) -> None:
    construct = sample.module_error_input.constructor_input
    in_constructor = common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR
    if sample.error_on == in_constructor:
        with pytest.raises(sample.error_type, match=sample.error_regex):
            cls(*construct.args, **construct.kwargs)
    else:
        module = cls(*construct.args, **construct.kwargs)
        call = sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*call.args, **call.kwargs)
