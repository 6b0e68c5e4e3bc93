"""Features of torch.autograd besides derivatives: checkpoints, hooks, modes, threads."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case
from pairs import pair
from torch import Tensor, nn
from torch.autograd import forward_ad, graph
from torch.func import grad, jvp
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fusedrnn

T, B, I, H = 6, 3, 4, 5


def gradients(module: nn.Module, x: Tensor, run: Callable | None = None) -> list[Tensor]:
    """Return the gradients of a scalar function of both results by the input and all weights."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # dropout
    output, h_n = (run or module)(x)
    return list(torch.autograd.grad(output.sin().sum() + h_n.sum(), [x, *module.parameters()]))


# Modes


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("lengths", [None, (6, 4, 1)], ids=["padded", "packed"])
def test_deterministic_algorithms_are_accepted(lengths):
    """Second derivatives as well. In this mode torch fills uninitialised memory with NaN."""
    case = Case(lengths=lengths, reset=True, alpha=True)

    def run() -> Any:
        tensors = case.arguments(requires_grad=True)
        h, h_n = fusedrnn.rnn(**tensors, **case.flags())
        loss = h.sin().sum() + h_n.sum()
        first = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
        return first, torch.autograd.grad(sum(g.sum() for g in first), list(tensors.values()))

    first, again = run(), run()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not any(g.isnan().any() for part in first for g in part)


def test_backward_in_eval_mode():
    """cuDNN raises an error for this."""
    ours, theirs = pair(I, H, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(gradients(ours.eval(), x), gradients(theirs.eval(), x))


def test_inference_tensors_are_refused_by_autograd_only():
    ours, _ = pair(I, H)
    with torch.inference_mode():
        x = torch.randn(T, B, I)
        output, _ = ours(x)
    assert output.is_inference()
    with torch.no_grad():
        assert torch.equal(ours(x)[0], output)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours(x)
    torch.testing.assert_close(ours(x.clone())[0].detach(), output.clone())


def test_the_current_grad_mode_decides_whether_there_is_a_graph():
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.no_grad():
        assert ours(x)[0].grad_fn is None
        with torch.enable_grad():
            assert ours(x)[0].grad_fn is not None
    with torch.set_grad_enabled(False), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))  # forward mode ignores grad mode
        assert forward_ad.unpack_dual(ours(dual)[0]).tangent.abs().sum() > 0
    assert ours.requires_grad_(False)(x.detach())[0].grad_fn is None


def test_anomaly_mode_names_the_forward_pass():
    ours, _ = pair(I, H)
    x = torch.full((T, B, I), torch.nan)
    with (
        pytest.warns(UserWarning, match="Error detected in FusedRNNBackward"),
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        ours(x)[0].sum().backward()


# Saved tensors


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing(reentrant, packed):
    """Dropout between the layers draws the same numbers in the recomputation."""
    ours, _ = pair(I, H, num_layers=3, dropout=0.5, bidirectional=True)
    batch_sizes = torch.tensor([3, 2, 2, 1])

    def run(x: Tensor) -> Any:
        if not packed:
            return ours(x)
        output, h_n = ours(PackedSequence(x, batch_sizes))
        return output.data, h_n

    x = torch.randn(8, I) if packed else torch.randn(T, B, I)

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(run, x, use_reentrant=reentrant)

    if reentrant:  # this kind of checkpoint does not support torch.autograd.grad
        x.requires_grad_()
        results = []
        for f in (run, checkpointed):
            torch.manual_seed(1)
            output, h_n = f(x)
            (output.sin().sum() + h_n.sum()).backward()
            results.append([x.grad, *(w.grad for w in ours.parameters())])
            x.grad = None
            ours.zero_grad()
        found, expected = results
    else:
        found, expected = gradients(ours, x, checkpointed), gradients(ours, x, run)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_checkpoint_saves_the_input_alone():
    ours, _ = pair(I, H, num_layers=3)
    saved = []
    x = torch.randn(T, B, I)
    with graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        checkpoint(ours, x, use_reentrant=False)
    assert {t.data_ptr() for t in saved if t.numel()} == {x.data_ptr()}  # torch 2.11: one is empty


def test_saved_tensors_hooks_may_replace_tensors():
    ours, _ = pair(I, H, num_layers=2)
    x = torch.randn(T, B, I)
    packed = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor.shape)
        return (tensor.clone(),)

    with graph.saved_tensors_hooks(pack, lambda one: one[0]):
        found = gradients(ours, x)
    assert packed.count((T, B, H)) >= 2  # h of each layer
    torch.testing.assert_close(found, gradients(ours, x), rtol=0, atol=0)
    with graph.save_on_cpu():
        torch.testing.assert_close(gradients(ours, x), found, rtol=0, atol=0)
    with graph.disable_saved_tensors_hooks("not here"):
        torch.testing.assert_close(gradients(ours, x), found, rtol=0, atol=0)


def test_a_graph_is_freed_with_its_output():
    """No saved tensor refers to the node that saved it."""
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I)
    gc.disable()
    try:
        output = ours(x)[0]
        node = weakref.ref(output.grad_fn)
        del output
        assert node() is None
    finally:
        gc.enable()


def test_a_second_backward_without_retain_graph_raises():
    ours, _ = pair(I, H)
    loss = ours(torch.randn(T, B, I))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_backward_raises_after_the_output_is_changed_in_place():
    """Backward needs the output. torch's allow_mutation_on_saved_tensors avoids the error."""
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I)
    output, _ = ours(x)
    with pytest.raises(RuntimeError, match=r"(?s)output 0 of FusedRNN,.*modify output\.clone\(\)"):
        output.mul_(2).sum().backward()

    def changed(x: Tensor) -> Any:
        output, h_n = ours(x)
        return output.mul_(2), h_n

    expected = gradients(ours, x, lambda x: (ours(x)[0] * 2, ours(x)[1]))
    with graph.allow_mutation_on_saved_tensors():
        torch.testing.assert_close(gradients(ours, x, changed), expected)


# Hooks


def test_tensor_hooks_act_as_on_nn_rnn():
    ours, theirs = pair(I, H, num_layers=2)
    x = torch.randn(T, B, I)

    def run(module: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        inputs = x.clone().requires_grad_()
        inputs.register_hook(lambda g: seen.update(x=g))
        output, h_n = module(inputs)
        output.register_hook(lambda g: 2 * g)  # doubles all gradients that flow through it
        output.retain_grad()
        h_n.register_hook(lambda g: seen.update(h_n=g))
        handle = module.weight_hh_l0.register_hook(lambda g: g.clamp(-0.1, 0.1))
        module.bias_ih_l1.register_post_accumulate_grad_hook(
            lambda p: seen.update(bias=p.grad.clone())
        )
        (output.sin().sum() + h_n.sum()).backward()
        handle.remove()
        return {**seen, "output": output.grad, "w_hh": module.weight_hh_l0.grad}

    found, expected = run(ours), run(theirs)
    assert found["w_hh"].abs().max() <= 0.1
    torch.testing.assert_close(found, expected)


def test_module_hooks_act_as_on_nn_rnn():
    ours, theirs = pair(I, H)
    x = torch.randn(T, B, I)

    def run(module: nn.Module) -> Any:
        seen = []
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        module.register_forward_hook(lambda m, args, result: (result[0] + 1, result[1]))
        module.register_full_backward_pre_hook(lambda m, g: (g[0] * 3, g[1]))
        module.register_full_backward_hook(lambda m, g_in, g_out: seen.extend([*g_in, *g_out]))
        found = gradients(module, x)
        return found, [g for g in seen if g is not None]

    torch.testing.assert_close(run(ours), run(theirs))


def test_the_node_has_a_name_and_hooks():
    ours, _ = pair(I, H)
    output, _ = ours(torch.randn(T, B, I))
    assert output.grad_fn.name() == "FusedRNNBackward"
    assert "grad_fn=<FusedRNNBackward>" in repr(output)
    seen = []
    output.grad_fn.register_prehook(lambda g: seen.append("before"))
    output.grad_fn.register_hook(lambda g_in, g_out: seen.append("after"))
    output.sum().backward()
    assert seen == ["before", "after"]


# Threads


def test_threads_may_differentiate_concurrently():
    """Reverse and forward mode, eager and transformed, each in its own threads.

    Forward mode runs in one thread only, because torch has one dual level for all threads.
    """
    ours, _ = pair(I, H, num_layers=2)
    ours = ours.double()
    weight = torch.randn(H, H, dtype=torch.float64) / 2
    u = torch.randn(30, 8, H, dtype=torch.float64)
    x = torch.randn(30, 8, I, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return fusedrnn.recurrence(u, None, weight)[0].sin().sum()

    works: list[Callable[[], Any]] = [
        *[lambda: gradients(ours, x), lambda: grad(loss)(weight), lambda: loss(weight)] * 2,
        lambda: jvp(grad(loss), (weight,), (weight.cos(),))[1],
    ]
    expected = [work() for work in works]
    wrong: list[Any] = []

    def run(work: Callable[[], Any], result: Any) -> None:
        for _ in range(10):
            try:
                torch.testing.assert_close(work(), result, rtol=1e-12, atol=1e-12)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(works, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_backward_in_another_thread_than_forward():
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I)
    loss = ours(x)[0].sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    found = ours.weight_hh_l0.grad
    expected = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd_takes_the_backward_of_an_eager_forward(backend):
    x = torch.randn(5, 2, 3)
    rnn = fusedrnn.RNN(3, 4, bidirectional=True)
    rnn(x)[0].sum().backward()
    expected = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        rnn(x)[0].sum().backward()
    torch.testing.assert_close([p.grad for p in rnn.parameters()], expected)
