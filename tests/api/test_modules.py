"""fusedrnn.RNN and fusedrnn.RNNCell against torch.nn.RNN and torch.nn.RNNCell, side by side."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import pair
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]  # unsorted

OURS_AND_THEIRS = [
    pytest.param(fusedrnn.RNN, nn.RNN, id="RNN"),
    pytest.param(fusedrnn.RNNCell, nn.RNNCell, id="RNNCell"),
]


# ---- helpers


def floats(result: Any) -> list[Tensor]:
    """Return the floating-point tensors in a module's result."""
    results = result if isinstance(result, tuple) else (result,)
    return [r.data if isinstance(r, PackedSequence) else r for r in results]


def fresh(argument: Any) -> Any:
    """Return a new leaf for an argument that requires a gradient, and other arguments unchanged."""
    if isinstance(argument, PackedSequence):
        return argument._replace(data=fresh(argument.data))
    if argument is None or not argument.requires_grad:
        return argument
    return argument.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def run(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    """Return the result of a call, and the gradients for random cotangents."""
    arguments = tuple(fresh(a) for a in arguments)
    torch.manual_seed(1)  # for dropout
    result = module(*arguments)
    generator = torch.Generator().manual_seed(0)
    leaves = {n: p for n, p in module.named_parameters() if p.requires_grad}
    for i, a in enumerate(arguments):
        data = a.data if isinstance(a, PackedSequence) else a
        if data is not None and data.requires_grad:
            leaves[f"argument {i}"] = data
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype)
        for r in floats(result)
    ]
    grads = torch.autograd.grad(floats(result), list(leaves.values()), cotangents)
    return result, dict(zip(leaves, grads, strict=True))


def assert_same(ours: nn.Module, theirs: nn.Module, *arguments: Any) -> None:
    """Compare results, strides and the gradients of all arguments and parameters."""
    our_result, our_grads = run(ours, arguments)
    their_result, their_grads = run(theirs, arguments)
    assert_close(floats(our_result), floats(their_result), check_stride=True)
    assert_close(our_grads, their_grads)


def sequence(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(*(shape or (T, B, I)), requires_grad=True, **kwargs)


def packed(enforce_sorted: bool = False, **kwargs: Any) -> PackedSequence:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = torch.randn(T, B, I, **kwargs)
    result = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    result.data.requires_grad_()
    return result


def error_of(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as info:
        f(*args, **kwargs)
    return info.type, str(info.value)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- construction

CONSTRUCTOR_ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "proj_size": ((I, H), {"proj_size": 2}),
    "proj_size of zero": ((I, H), {"proj_size": 0}),
    "proj_size goes first": ((0, H), {"proj_size": 2, "nonlinearity": "foo"}),
    "nonlinearity": ((I, H), {"nonlinearity": "foo"}),
    "nonlinearity, positional": ((I, H, 1, "sigmoid"), {}),
    "nonlinearity goes before sizes": ((0, 0), {"nonlinearity": "foo"}),
    "dropout above one": ((I, H, 2), {"dropout": 1.5}),
    "dropout below zero": ((I, H, 2), {"dropout": -0.1}),
    "dropout a bool": ((I, H, 2), {"dropout": True}),
    "dropout a word": ((I, H, 2), {"dropout": "a"}),
    "dropout a number in a string": ((I, H, 2), {"dropout": "0.5"}),
    "dropout None": ((I, H, 2), {"dropout": None}),
    "bias an int": ((I, H), {"bias": 1}),
    "bias a string": ((I, H), {"bias": "True"}),
    "batch_first an int": ((I, H), {"batch_first": 0}),
    "bias goes before batch_first": ((I, H), {"batch_first": 0, "bias": 0}),
    "input_size a float": ((4.0, H), {}),
    "input_size a string": (("4", H), {}),
    "hidden_size a float": ((I, 6.0), {}),
    "input_size zero": ((0, H), {}),
    "input_size negative": ((-1, H), {}),
    "hidden_size zero": ((I, 0), {}),
    "num_layers zero": ((I, H, 0), {}),
    "num_layers a float": ((I, H, 1.0), {}),
    "unknown argument": ((I, H), {"foo": 1}),
    "dtype an integer type": ((I, H), {"dtype": torch.int64}),
}


@pytest.mark.parametrize("case", CONSTRUCTOR_ERRORS)
def test_constructor_errors(case: str) -> None:
    args, kwargs = CONSTRUCTOR_ERRORS[case]
    assert error_of(fusedrnn.RNN, *args, **kwargs) == error_of(nn.RNN, *args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"proj_size": 2}, "proj_size argument is only supported for LSTM, not RNN or GRU"),
        ({"nonlinearity": "foo"}, "Unknown nonlinearity 'foo'. Select from 'tanh' or 'relu'."),
        ({"foo": 1}, "RNNBase.__init__() got an unexpected keyword argument 'foo'"),
    ],
)
def test_constructor_errors_that_are_our_own_code(kwargs: dict[str, Any], text: str) -> None:
    assert error_of(fusedrnn.RNN, I, H, **kwargs)[1] == text


@pytest.mark.parametrize("args", [(), (I,)])
def test_missing_arguments_are_named(args: tuple[int, ...]) -> None:
    our_type, our_text = error_of(fusedrnn.RNN, *args)
    their_type, their_text = error_of(nn.RNN, *args)
    assert our_type is their_type is TypeError
    assert our_text == their_text.replace("RNNBase.", "RNN.")  # ours defines its own signature


def test_dropout_on_one_layer_warns() -> None:
    texts = []
    for cls in (fusedrnn.RNN, nn.RNN):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            cls(I, H, dropout=0.5)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]


def test_lenient_arguments_are_accepted() -> None:
    for kwargs in ({"bidirectional": 1}, {"num_layers": True}, {"input_size": True}):
        kwargs = {"input_size": I, "hidden_size": H, **kwargs}
        assert repr(fusedrnn.RNN(**kwargs)) == repr(nn.RNN(**kwargs))


def test_every_argument_can_be_positional() -> None:
    ours = fusedrnn.RNN(I, H, 2, "relu", False, True, 0.5, True, "meta", torch.float64)
    assert repr(ours) == repr(nn.RNN(I, H, 2, "relu", False, True, 0.5, True))
    assert ours.nonlinearity == "relu"
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.float64)}


def test_signature_names_its_parameters() -> None:
    names = "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional"
    assert list(inspect.signature(fusedrnn.RNN).parameters)[:10] == [
        *names.split(),
        "device",
        "dtype",
    ]


@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.RNNCell])
def test_skip_init(cls: type[nn.Module]) -> None:
    assert isinstance(nn.utils.skip_init(cls, I, H), cls)


def test_base_classes() -> None:
    """torch.compile refuses subclasses of nn.RNN; weight-drop code checks for nn.RNNBase."""
    assert issubclass(fusedrnn.RNN, nn.RNNBase)
    assert not issubclass(fusedrnn.RNN, nn.RNN)
    assert issubclass(fusedrnn.RNNCell, nn.RNNCell)


def test_cell_constructor_checks_nothing() -> None:
    for kwargs in ({"bias": 1}, {"hidden_size": 0}, {"nonlinearity": "foo"}):
        kwargs = {"input_size": I, "hidden_size": H} | kwargs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about initialising an empty weight
            assert repr(fusedrnn.RNNCell(**kwargs)) == repr(nn.RNNCell(**kwargs))


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"nonlinearity": "relu"},
    {"num_layers": 3},
    {"bidirectional": True},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "nonlinearity": "relu"},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]
CELL_LAYOUTS: list[dict[str, Any]] = [{}, {"bias": False}, {"nonlinearity": "relu"}]

ALL_LAYOUTS = [(fusedrnn.RNN, nn.RNN, layout) for layout in LAYOUTS] + [
    (fusedrnn.RNNCell, nn.RNNCell, layout) for layout in CELL_LAYOUTS
]


def layout_id(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return value.__name__ if value.__module__.startswith("fusedrnn") else ""


@pytest.mark.parametrize(("cls", "torch_cls", "layout"), ALL_LAYOUTS, ids=layout_id)
def test_one_seed_gives_one_set_of_weights(cls: Any, torch_cls: Any, layout: Any) -> None:
    torch.manual_seed(7)
    ours, after_ours = cls(I, H, **layout), torch.rand(1)
    torch.manual_seed(7)
    theirs, after_theirs = torch_cls(I, H, **layout), torch.rand(1)
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert list(our_state) == list(their_state)
    assert_close(our_state, their_state, rtol=0, atol=0)
    assert torch.equal(after_ours, after_theirs)  # the generator was left in the same state


@pytest.mark.parametrize(("cls", "torch_cls", "layout"), ALL_LAYOUTS, ids=layout_id)
def test_repr(cls: Any, torch_cls: Any, layout: Any) -> None:
    assert repr(cls(I, H, **layout)) == repr(torch_cls(I, H, **layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_attributes_equal_those_of_nn_rnn(layout: dict[str, Any]) -> None:
    ours, theirs = pair(I, H, **layout)
    for name in (
        *("mode", "nonlinearity", "proj_size", "input_size", "hidden_size", "num_layers", "bias"),
        *("batch_first", "dropout", "bidirectional", "_flat_weights_names", "_all_weights"),
        *("__constants__", "training"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert_close(ours.all_weights, theirs.all_weights)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert len(ours._flat_weight_refs) == len(theirs._flat_weight_refs)


@pytest.mark.parametrize(("cls", "torch_cls"), OURS_AND_THEIRS)
def test_factory_arguments(cls: Any, torch_cls: Any) -> None:
    for kwargs in ({"dtype": torch.float64}, {"device": "meta"}, {"dtype": torch.bfloat16}):
        ours, theirs = cls(I, H, **kwargs), torch_cls(I, H, **kwargs)
        assert [(p.dtype, p.device) for p in ours.parameters()] == [
            (p.dtype, p.device) for p in theirs.parameters()
        ]


def test_reset_parameters_can_read_the_nonlinearity() -> None:
    class Scaled(fusedrnn.RNN):
        def reset_parameters(self) -> None:
            self.gain = nn.init.calculate_gain(self.nonlinearity)
            super().reset_parameters()

    assert Scaled(I, H, nonlinearity="relu").gain == 2**0.5


# ---- forward and gradients

INPUTS: dict[str, Callable[[], Any]] = {
    "batched": sequence,
    "one step": lambda: sequence(1, B, I),
    "one row": lambda: sequence(T, 1, I),
    "unbatched": lambda: sequence(T, I),
    "packed": packed,
    "packed, sorted": lambda: packed(enforce_sorted=True),
}


def state_for(module: nn.RNNBase, x: Any) -> Tensor:
    states = module.num_layers * (2 if module.bidirectional else 1)
    if isinstance(x, PackedSequence):
        return sequence(states, int(x.batch_sizes[0]), H)
    if x.dim() == 2:
        return sequence(states, H)
    return sequence(states, x.size(0 if module.batch_first else 1), H)


@pytest.mark.parametrize("with_state", [False, True], ids=["hx=None", "hx"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_calls_match_nn_rnn(layout: dict[str, Any], kind: str, with_state: bool) -> None:
    ours, theirs = pair(I, H, **layout)
    x = INPUTS[kind]()
    assert_same(ours, theirs, x, state_for(ours, x) if with_state else None)


def test_odd_sizes_are_like_torch() -> None:
    for i, h in ((1, 1), (1, 33), (17, 1)):
        assert_same(*pair(i, h, 2, bidirectional=True), sequence(T, B, i))


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_output_keeps_the_index_tensors(enforce_sorted: bool) -> None:
    x = packed(enforce_sorted)
    output, _ = fusedrnn.RNN(I, H)(x)
    assert isinstance(output, PackedSequence)
    assert output.batch_sizes is x.batch_sizes
    assert output.sorted_indices is x.sorted_indices
    assert output.unsorted_indices is x.unsorted_indices


def test_empty_batch() -> None:
    ours, theirs = pair(I, H, 2, bidirectional=True)
    assert_same(ours, theirs, sequence(T, 0, I))
    assert_same(ours, theirs, sequence(T, 0, I), sequence(4, 0, H))
    assert all(not g.any() for g in run(ours, (sequence(T, 0, I),))[1].values())


def test_h_n_shares_no_memory_with_the_output() -> None:
    for layers in (1, 2):
        output, h_n = fusedrnn.RNN(I, H, layers)(torch.randn(T, B, I))
        before = output.clone()
        with torch.no_grad():
            h_n.zero_()
        assert torch.equal(output, before)


def test_result_may_be_changed_in_place() -> None:
    x = sequence()
    output, h_n = fusedrnn.RNN(I, H)(x)
    (output * 2).add_(1).sum().backward(retain_graph=True)
    h_n.mul_(2).sum().backward()


@pytest.mark.filterwarnings("ignore:fusedrnn. no kernel for torch.complex")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_dtypes_are_like_torch(dtype: torch.dtype) -> None:
    ours, theirs = pair(I, H, 2, bidirectional=True, dtype=dtype)
    with torch.no_grad():  # small, because complex tanh has poles, near which rounding errors grow
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.mul_(0.3), b.mul_(0.3)
    x = (0.1 * sequence(dtype=dtype)).detach().requires_grad_()
    hx = (0.1 * sequence(4, B, H, dtype=dtype)).detach().requires_grad_()
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x, hx)


def assert_as_accurate(ours: Any, theirs: Any, truth: Any) -> None:
    """Check that the dtypes match and our error is at most twice torch's in the same dtype."""
    for got, torch_got, exact in zip(floats(ours), floats(theirs), floats(truth), strict=True):
        assert got.dtype == torch_got.dtype
        torch_error = (torch_got.double() - exact).abs().max().item()
        our_error = (got.double() - exact).abs().max().item()
        assert our_error <= 2 * torch_error + torch.finfo(got.dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    ours, theirs = pair(I, H, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    assert_as_accurate(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def transposed_storage(t: Tensor) -> Tensor:
    """Return the same values with the strides of the transpose."""
    return t.detach().mT.contiguous().mT


def test_strides_of_arguments_and_weights_do_not_matter() -> None:
    ours, theirs = pair(I, H, 2)
    for module in (ours, theirs):
        for p in module.parameters():
            if p.dim() == 2:
                p.data = transposed_storage(p)
    x = transposed_storage(torch.randn(T, B, I)).requires_grad_()
    hx = transposed_storage(torch.randn(2, B, H)).requires_grad_()
    assert_same(ours, theirs, x, hx)
    expanded = torch.randn(1, 1, I).expand(T, B, I).requires_grad_()
    assert_same(ours, theirs, expanded, torch.randn(1, 1, H).expand(2, B, H))
    assert_same(*pair(I, H), torch.randn(2 * T, B, I)[::2].requires_grad_())


def test_frozen_weights_get_no_gradient() -> None:
    ours, theirs = pair(I, H, 2)
    for module in (ours, theirs):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
    assert_same(ours, theirs, torch.randn(T, B, I), sequence(2, B, H))


def test_no_grad_and_inference_mode() -> None:
    ours, theirs = pair(I, H)
    x = torch.randn(T, B, I)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(ours(x), theirs(x))
            assert not ours(x)[0].requires_grad


def test_meta_device() -> None:
    ours, theirs = (cls(I, H, 2, batch_first=True, device="meta") for cls in (fusedrnn.RNN, nn.RNN))
    x = torch.empty(B, T, I, device="meta")
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert (a.shape, a.stride(), a.device) == (b.shape, b.stride(), b.device)


# ---- dropout

DROPOUTS: list[dict[str, Any]] = [
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
]


@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("layout", DROPOUTS, ids=layout_id)
def test_dropout_draws_the_same_random_numbers(layout: dict[str, Any], kind: str) -> None:
    ours, theirs = pair(I, H, dropout=0.5, **layout)
    assert_same(ours, theirs, INPUTS[kind]())
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        module(torch.randn(T, B, I))
        results.append(torch.rand(1))
    assert torch.equal(*results)  # the generator was left in the same state


def test_dropout_of_one_zeroes_all() -> None:
    assert_same(*pair(I, H, 2, dropout=1.0), sequence())


def test_dropout_is_off_in_eval() -> None:
    ours, theirs = pair(I, H, 2, dropout=0.5)
    x = torch.randn(T, B, I)
    assert_close(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours(x)[0], ours(x)[0])


def test_dropout_and_batch_first_are_read_at_each_call() -> None:
    ours, theirs = pair(I, H, 2)
    for dropout, batch_first in ((0.5, False), (0.0, True), (0.9, True), (0.2, False)):
        for module in (ours, theirs):
            module.dropout, module.batch_first = dropout, batch_first
        assert_same(ours, theirs, sequence())


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_bfloat16(dtype: torch.dtype) -> None:
    ours, theirs = pair(I, H, 2)
    x, hx = torch.randn(T, B, I, dtype=dtype), torch.randn(2, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        for arguments in ((x,), (x, hx)):
            got, want = ours(*arguments), theirs(*arguments)
            assert [g.dtype for g in got] == [torch.bfloat16] * 2
            with torch.autocast("cpu", enabled=False):
                truth = copy.deepcopy(theirs).double()(*(a.double() for a in arguments))
            assert_as_accurate(got, want, truth)


def test_autocast_gives_gradients_in_the_dtype_of_the_weights() -> None:
    ours, _ = pair(I, H)
    with torch.autocast("cpu", torch.bfloat16):
        ours(torch.randn(T, B, I))[0].sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


# ---- errors of a call

X, HX = torch.zeros(T, B, I), torch.zeros(2, B, H)
PACKED = pack_padded_sequence(X, torch.tensor([5, 4, 1]))
CALL_ERRORS: dict[str, tuple[Any, ...]] = {
    "input 1-D": (X[0, 0],),
    "input 4-D": (X[None],),
    "input 0-D": (torch.zeros(()),),
    "input is a list": ([1, 2],),
    "input is None": (None,),
    "unbatched, hx 3-D": (X[:, 0], HX),
    "batched, hx 2-D": (X, HX[:, 0]),
    "batched, hx 1-D": (X, HX[0, 0, :-1]),
    "features": (X[..., :3],),
    "features, unbatched": (X[:, 0, :3],),
    "features, packed": (PACKED._replace(data=PACKED.data[:, :3]),),
    "packed data of three dimensions": (PACKED._replace(data=X),),
    "hx batch": (X, torch.zeros(2, B + 4, H)),
    "hx layers": (X, HX[:1]),
    "hx features": (X, HX[..., :3]),
    "hx unbatched": (X[:, 0], torch.zeros(2, H + 1)),
    "hx packed": (PACKED, torch.zeros(2, B + 1, H)),
    "hx is a tuple": (X, (HX, HX)),
    "hx is a tuple, packed": (PACKED, (HX, HX)),
    "input dtype": (X.double(),),
    "input dtype, packed": (PACKED.to(torch.float64),),
    "input dtype, integer": (X.long(),),
    "dtype goes before features": (X[..., :3].double(),),
    "features go before hx": (X[..., :3], HX[:1]),
    "no steps": (X[:0],),
    "no steps, unbatched": (X[:0, 0],),
    "hx goes before no steps": (X[:0], HX[:1]),
    "input on another device": (X.to("meta"),),
    "hx on another device": (X, HX.to("meta")),
    "input and hx on another device": (X.to("meta"), HX.to("meta")),
}


@pytest.mark.parametrize("case", CALL_ERRORS)
def test_call_errors(case: str) -> None:
    ours, theirs = pair(I, H, 2)
    assert error_of(ours, *CALL_ERRORS[case]) == error_of(theirs, *CALL_ERRORS[case])


def test_call_errors_that_are_our_own_code() -> None:
    ours, _ = pair(I, H, 2)
    assert error_of(ours, *CALL_ERRORS["input 1-D"])[1] == (
        "RNN: Expected input to be 2D or 3D, got 1D tensor instead"
    )
    assert error_of(ours, *CALL_ERRORS["unbatched, hx 3-D"])[1] == (
        "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor"
    )
    assert error_of(ours, *CALL_ERRORS["no steps"])[1] == (
        "Expected sequence length to be larger than 0 in RNN"
    )


def test_batch_first_errors_name_the_batch() -> None:
    ours, theirs = pair(I, H, 2, batch_first=True)
    for arguments in ((X, torch.zeros(2, T + 1, H)), (X[:, :0],)):
        assert error_of(ours, *arguments) == error_of(theirs, *arguments)


def test_state_of_another_dtype_is_a_runtime_error() -> None:
    ours, theirs = pair(I, H, 2)
    assert error_of(ours, X, HX.double())[0] is error_of(theirs, X, HX.double())[0]


def test_missing_weight_is_named() -> None:
    ours, _ = pair(I, H)
    del ours.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(X)


CELL_CALL_ERRORS: dict[str, tuple[Any, ...]] = {
    "input 3-D": (X,),
    "input 0-D": (torch.zeros(()),),
    "hx 3-D": (X[0], HX),
    "hx 4-D": (X[0], HX[None]),
    "input goes before hx": (X, HX),
    "input features": (torch.zeros(B, I + 1), HX[0]),
    "input features, no hx": (torch.zeros(B, I + 1),),
    "hx features": (X[0], torch.zeros(B, H + 1)),
    "hx batch": (X[0], torch.zeros(B + 2, H)),
    "hx batch of one is not broadcast": (X[0], HX[0, :1]),
    "features go before batch": (torch.zeros(B, I + 1), torch.zeros(B + 2, H + 1)),
    "batch goes before hx features": (X[0], torch.zeros(B + 2, H + 1)),
    "unbatched, input features": (torch.zeros(I + 1), HX[0, 0]),
    "unbatched, hx features": (X[0, 0], torch.zeros(H + 1)),
    "batched, hx 1-D": (X[0], HX[0, 0]),
    "unbatched, hx 2-D": (X[0, 0], HX[0]),
    "input is a list": ([1, 2],),
    "input is None": (None,),
    "hx is a tuple": (X[0], (HX[0], HX[0])),
}


@pytest.mark.parametrize("case", CELL_CALL_ERRORS)
def test_cell_call_errors(case: str) -> None:
    ours, theirs = pair(I, H, name="RNNCell")
    assert error_of(ours, *CELL_CALL_ERRORS[case]) == error_of(theirs, *CELL_CALL_ERRORS[case])


def test_cell_with_unknown_nonlinearity_raises_in_the_call() -> None:
    ours, theirs = pair(I, H, name="RNNCell", nonlinearity="foo")
    error = (RuntimeError, "Unknown nonlinearity: foo")
    for arguments in ((X[0],), (X[0, :, :3], HX)):
        assert error_of(ours, *arguments) == error_of(theirs, *arguments)
    assert error_of(ours, X[0]) == error


def test_cell_dtype_mismatch_is_a_runtime_error() -> None:
    ours, theirs = pair(I, H, name="RNNCell")
    for arguments in ((X[0].double(),), (X[0], HX[0].double())):
        assert error_of(ours, *arguments)[0] is error_of(theirs, *arguments)[0] is RuntimeError


# ---- RNNCell


@pytest.mark.parametrize("with_state", [False, True], ids=["hx=None", "hx"])
@pytest.mark.parametrize("batch", [B, 1, 0, None])
@pytest.mark.parametrize("layout", CELL_LAYOUTS, ids=layout_id)
def test_cell_matches_torchs(layout: dict[str, Any], batch: int | None, with_state: bool) -> None:
    rows = () if batch is None else (batch,)
    hx = sequence(*rows, H) if with_state else None
    assert_same(*pair(I, H, name="RNNCell", **layout), sequence(*rows, I), hx)


def test_cell_in_a_loop_is_like_torch() -> None:
    class Loop(nn.Module):
        def __init__(self, cell: nn.Module) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            h = None
            return torch.stack([h := self.cell(step, h) for step in x.unbind(0)])

    ours, theirs = pair(I, H, name="RNNCell")
    assert_same(Loop(ours), Loop(theirs), sequence())


@pytest.mark.filterwarnings("ignore:fusedrnn. no kernel for torch.complex")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_cell_dtypes_are_like_torch(dtype: torch.dtype) -> None:
    assert_same(
        *pair(I, H, name="RNNCell", dtype=dtype),
        sequence(B, I, dtype=dtype),
        sequence(B, H, dtype=dtype),
    )


def test_cell_autocast() -> None:
    ours, theirs = pair(I, H, name="RNNCell")
    x, hx = torch.randn(B, I), torch.randn(B, H)
    with torch.autocast("cpu", torch.bfloat16):
        for arguments in ((x,), (x, hx), (x.bfloat16(), hx)):
            got, want = ours(*arguments), theirs(*arguments)
            with torch.autocast("cpu", enabled=False):
                truth = copy.deepcopy(theirs).double()(*(a.double() for a in arguments))
            assert_as_accurate(got, want, truth)


# ---- state_dict, copies, pickles


@pytest.mark.parametrize(("cls", "torch_cls", "layout"), ALL_LAYOUTS, ids=layout_id)
def test_state_dicts_load_from_and_into_nn_rnn(cls: Any, torch_cls: Any, layout: Any) -> None:
    for source, target in ((cls, torch_cls), (torch_cls, cls)):
        one, other = source(I, H, **layout), target(I, H, **layout)
        other.load_state_dict(one.state_dict())
        assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize(("cls", "torch_cls"), OURS_AND_THEIRS)
def test_copies_compute_the_same_and_stand_alone(cls: Any, torch_cls: Any) -> None:
    def through_torch_save(module: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    module, x = cls(I, H), torch.randn(B, I)
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        replica = duplicate(module)
        assert type(replica) is cls
        assert_close(replica(x), module(x), rtol=0, atol=0)
        with torch.no_grad():
            next(replica.parameters()).zero_()
        assert next(module.parameters()).all()
        replica.double()
        assert {p.dtype for p in replica.parameters()} == {torch.float64}
        replica(x.double())


def test_pickle_after_functional_call() -> None:
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I)
    torch.func.functional_call(ours, {n: p * 2 for n, p in ours.named_parameters()}, (x,))
    assert_close(pickle.loads(pickle.dumps(ours))(x), ours(x))


@pytest.mark.parametrize("bias", [True, False])
def test_pickles_from_before_torch_1_8_load(bias: bool) -> None:
    """Such pickles have no proj_size, and store the weights themselves instead of their names."""
    states = []
    for module in pair(I, H, 2, bidirectional=True, bias=bias):
        state = module.__getstate__()
        del state["proj_size"], state["_all_weights"], state["_flat_weights_names"]
        state["all_weights"] = module.all_weights
        old = type(module).__new__(type(module))
        old.__setstate__(state)
        states.append(old)
    ours, theirs = states
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours.proj_size == 0
    assert_same(ours, theirs, sequence())


@pytest.mark.parametrize(("cls", "torch_cls"), OURS_AND_THEIRS)
def test_share_memory(cls: Any, torch_cls: Any) -> None:
    module = cls(I, H)
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    module(torch.randn(B, I))


def test_replicas_of_data_parallel() -> None:
    """nn.parallel.replicate sets the replica's weights as plain tensors, to keep their graph."""
    ours, _ = pair(I, H, 2)
    x = torch.randn(T, B, I)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p * 1)
    assert_close(replica(x), ours(x))
    replica(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert replica._flat_weights_names is not ours._flat_weights_names


# ---- moving, and weights that are not plain parameters


def test_weight_lists_follow_weights_that_move() -> None:
    ours, theirs = pair(I, H, 2)
    for move in (lambda m: m.double(), lambda m: m.to(torch.float32), lambda m: m.to("cpu")):
        move(ours), move(theirs)
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
        assert_same(ours, theirs, sequence(dtype=ours.weight_hh_l0.dtype))
    ours.to_empty(device="meta")
    assert ours(torch.empty(T, B, I, device="meta"))[0].shape == (T, B, H)


def test_optimizer_steps_take_effect() -> None:
    modules = pair(I, H, 2)
    x = torch.randn(T, B, I)
    for module in modules:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
    assert_close(*(m.state_dict() for m in modules))


def test_a_replaced_weight_is_used() -> None:
    ours, theirs = pair(I, H)
    weight = nn.Parameter(torch.randn(H, H))
    for module in (ours, theirs):
        module.weight_hh_l0 = weight
    assert ours._flat_weights[1] is ours.all_weights[0][1] is weight
    assert_same(ours, theirs, sequence())


def test_weights_may_be_deleted_and_set_again() -> None:
    """Delete weights and set them again, like PyTorch's test of the same name."""
    ours, theirs = pair(I, H)
    x = torch.randn(T, B, I)
    for module in (ours, theirs):
        module.weight_hh_l0_original = module.weight_hh_l0
        del module.weight_hh_l0
        assert not hasattr(module, "weight_hh_l0")
        module.float()  # must tolerate the missing weight
        assert module._flat_weights[1] is None
        module.weight_hh_l0 = module.weight_hh_l0_original
    assert_close(ours(x), theirs(x))


def test_flat_weights_cannot_be_edited() -> None:
    """nn.RNN, in contrast, computes with whatever tensors are in that list."""
    ours, _ = pair(I, H, 2)
    before = ours(torch.ones(T, B, I))
    doubled = [w * 2 for w in ours._flat_weights]
    for wrong in (doubled, [], ours._flat_weights[:-1], [None] * len(doubled)):
        with pytest.raises(AttributeError, match="_flat_weights must be the weights of the module"):
            ours._flat_weights = wrong
    with pytest.raises(TypeError, match="does not support item assignment"):
        ours._flat_weights[0] = doubled[0]
    assert_close(ours(torch.ones(T, B, I)), before)


def test_flat_weights_can_be_assigned_as_they_are() -> None:
    """Programs for nn.RNN assign the list after swapping weights.

    A parametrized weight is a new tensor on each access.
    """
    ours, _ = pair(I, H, 2)
    del ours.weight_hh_l0
    ours.weight_hh_l0 = torch.zeros(H, H)
    parametrize.register_parametrization(ours, "weight_hh_l1", nn.Tanh())
    ours._flat_weights = [getattr(ours, name) for name in ours._flat_weights_names]
    assert ours._flat_weights[1] is ours.weight_hh_l0
    ours.double()
    assert ours._flat_weights[5].dtype == torch.float64


def test_weight_drop() -> None:
    """As in AWD-LSTM, a weight is a plain tensor that is recomputed for each call."""
    ours, theirs = pair(I, H, 2)
    x = sequence()
    results = []
    for module in (ours, theirs):
        raw = module.weight_hh_l1
        del module._parameters["weight_hh_l1"]
        torch.manual_seed(5)
        for _ in range(2):
            module.weight_hh_l1 = nn.functional.dropout(raw, 0.5)
            output, h_n = module(x)
        results.append((output, h_n, *torch.autograd.grad(output.sum(), [raw, x])))
    assert_close(*results)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def legacy_spectral_norm(module: nn.Module) -> None:
    nn.utils.spectral_norm(module, "weight_hh_l0")


def legacy_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated in torch, still used
        nn.utils.weight_norm(module, "weight_hh_l0")


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "custom": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Symmetric()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "weight_norm on w_ih": lambda m: parametrizations.weight_norm(m, "weight_ih_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "legacy weight_norm": legacy_weight_norm,
    "legacy spectral_norm": legacy_spectral_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight_hh_l0", amount=0.3),
    "prune a bias": lambda m: prune.random_unstructured(m, "bias_hh_l0", amount=0.3),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights(name: str) -> None:
    modules = pair(I, H, dtype=torch.float64)
    for module in modules:
        torch.manual_seed(2)
        PARAMETRIZATIONS[name](module)
        # In training mode, each read of a spectral_norm weight runs a step of its power iteration.
        # We read the weight once per call, nn.RNN several times.
        module.eval()
    x = sequence(dtype=torch.float64)
    assert_same(*modules, x)
    for module in modules:  # an optimizer step must change the weight that is used
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        module(x)[0].sum().backward()
        optimizer.step()
    assert_same(*modules, x)


@pytest.mark.parametrize("name", ["custom", "weight_norm", "spectral_norm", "orthogonal"])
def test_deepcopy_of_parametrized_weights(name: str) -> None:
    ours, _ = pair(I, H)
    PARAMETRIZATIONS[name](ours)
    x = torch.randn(T, B, I)
    ours.eval()(x)  # nn.RNN cannot be copied after this: it keeps the computed weight
    assert_close(copy.deepcopy(ours)(x), ours(x))


def test_parametrization_removed_again() -> None:
    ours, theirs = pair(I, H)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(ours) is fusedrnn.RNN
    assert_same(ours, theirs, sequence())


def test_parametrized_cell() -> None:
    modules = pair(I, H, name="RNNCell")
    for module in modules:
        parametrizations.weight_norm(module, "weight_hh")
    assert_same(*modules, sequence(B, I), sequence(B, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functional_call(dtype: torch.dtype) -> None:
    ours, theirs = pair(I, H, 2)
    weights = {n: torch.randn_like(p, dtype=dtype) for n, p in ours.named_parameters()}
    x = torch.randn(T, B, I, dtype=dtype)
    results = []
    for module in (ours, theirs):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        output, h_n = torch.func.functional_call(module, leaves, (x,))
        results.append((output, h_n, *torch.autograd.grad(output.sum(), list(leaves.values()))))
    assert_close(*results)
    assert_close(ours(x.float()), theirs(x.float()))  # its own weights are restored


def test_helper_methods_agree_with_nn_rnns() -> None:
    ours, theirs = pair(I, H, 2)
    sizes = torch.tensor([3, 2])
    assert ours.flatten_parameters() is None
    assert ours.get_expected_hidden_size(X, None) == theirs.get_expected_hidden_size(X, None)
    assert ours.get_expected_hidden_size(X, sizes) == theirs.get_expected_hidden_size(X, sizes)
    assert ours.check_forward_args(X, HX, None) is None
    assert error_of(ours.check_input, X[0], None) == error_of(theirs.check_input, X[0], None)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(ours.permute_hidden(HX, order), theirs.permute_hidden(HX, order))
    assert ours.permute_hidden(HX, None) is HX
    assert ours._weights_have_changed() is False


def test_hooks_run() -> None:
    ours, _ = pair(I, H)
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda m, a: seen.append("before"))
    ours.register_forward_hook(lambda m, a, r: seen.append("after"))
    ours.register_full_backward_hook(lambda m, g, h: seen.append("backward"))
    ours(sequence())[0].sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    """torch.compile refuses nn.RNN. Dropout stays on: the same seed gives the same numbers."""
    torch._dynamo.reset()
    ours = fusedrnn.RNN(I, H, 2, bidirectional=True, dropout=0.5)
    x = INPUTS[kind]()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for hx in (None, state_for(ours, x)):
        torch.manual_seed(1)
        want = ours(x, hx)
        torch.manual_seed(1)
        assert_close(floats(compiled(x, hx)), floats(want), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["weight_norm", "functional_call"])
def test_compiles_with_weights_that_are_not_parameters(change: str) -> None:
    torch._dynamo.reset()
    ours, x = fusedrnn.RNN(I, H), torch.randn(T, B, I)
    weights = {n: p * 2 for n, p in ours.named_parameters()}
    if change == "weight_norm":
        parametrizations.weight_norm(ours, "weight_hh_l0")

        def function(x: Tensor) -> Any:
            return ours(x)
    else:

        def function(x: Tensor) -> Any:
            return torch.func.functional_call(ours, weights, (x,))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_close(compiled(x), function(x), rtol=0, atol=0)


def test_a_layout_changed_after_construction_is_refused():
    rnn = fusedrnn.RNN(4, 4, 2, bidirectional=True)
    rnn.bidirectional = False
    with pytest.raises(RuntimeError, match="weights of 2 layers in 1 direction"):
        rnn(torch.ones(3, 1, 4))
    rnn = fusedrnn.RNN(4, 4)
    rnn.num_layers = 2
    with pytest.raises(RuntimeError, match="weights of 2 layers"):
        rnn(torch.ones(3, 1, 4))


def test_a_packed_batch_on_meta_needs_no_state():
    rnn = fusedrnn.RNN(3, 4, device="meta")
    data = torch.empty(6, 3, device="meta")
    packed = torch.nn.utils.rnn.PackedSequence(data, torch.tensor([3, 2, 1]))
    output, h_n = rnn(packed)
    assert output.data.shape == (6, 4)
    assert h_n.shape == (1, 3, 4)
