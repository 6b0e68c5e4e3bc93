"""examples/charlm.py: all forms of the character model give the same results and train alike."""

from __future__ import annotations

import math

import charlm
import pytest
import torch
from charlm import CharFusedModel, CharSequenceLoopModel, CharSequenceModel, Run
from torch.nn import functional as F

import fusedrnn
from fusedrnn import reference
from fusedrnn.unmask.model import CharLoopModel, UserError

TINY = ["--chars", "400", "--epochs", "2", "--hidden", "8", "--dtype", "float64"]


def window_models(v=11, n_in=5, h=8):
    torch.manual_seed(0)
    loop, fused = CharLoopModel(v, n_in, h).double(), CharFusedModel(v, n_in, h).double()
    fused.load_state_dict(loop.state_dict())
    return loop, fused


def sequence_models(v=11, n_in=5, h=8):
    torch.manual_seed(0)
    models = [
        CharSequenceLoopModel(v, n_in, h).double(),
        CharSequenceModel(v, n_in, h).double(),
        CharSequenceModel(v, n_in, h, fusedrnn.RNN).double(),
    ]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    return models


def gradients(model, output):
    seed = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=seed, dtype=output.dtype)
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(output, list(parameters.values()), cotangent)))


@pytest.mark.parametrize(("t", "b"), [(1, 1), (8, 1), (8, 6), (3, 40)])
def test_fused_window_model_is_the_loop_model(t, b):
    loop, fused = window_models()
    cs = torch.randint(11, (t, b))
    torch.testing.assert_close(fused(*cs), loop(*cs), rtol=0, atol=1e-12)
    ours, theirs = gradients(fused, fused(*cs)), gradients(loop, loop(*cs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_loop_model_is_the_seeds_cell():
    loop, _ = window_models()
    cs = torch.randint(11, (8, 4))
    hidden = torch.zeros(4, 8, dtype=torch.float64)
    for c in cs:
        inputs = loop.l_in(loop.e(c))
        hidden = reference.seed_cell(inputs, hidden, loop.l_hidden.weight, loop.l_hidden.bias)
    expected = F.log_softmax(loop.l_out(hidden), dim=-1)
    torch.testing.assert_close(loop(*cs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("carried", [False, True], ids=["from zeros", "carried"])
def test_sequence_models_compute_the_same(carried):
    models = sequence_models()
    cs = torch.randint(11, (12, 3))
    hidden = torch.randn(1, 3, 8, dtype=torch.float64) if carried else None
    expected, last = models[0](cs, hidden)
    for model in models[1:]:
        log_p, state = model(cs, hidden)
        torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)
        theirs = gradients(models[0], models[0](cs, hidden)[0])
        torch.testing.assert_close(gradients(model, log_p), theirs, rtol=0, atol=1e-11)


def test_carried_state_makes_chunks_one_sequence():
    text = torch.randint(11, (61,))
    whole, chunks = (Run(sequence_models()[-1]) for _ in range(2))
    ((cs, following),) = charlm.sequence_batches(text, chunk=100, streams=1)
    expected = whole.gradient(cs, following)
    total = 0.0
    for cs, following in charlm.sequence_batches(text, chunk=13, streams=1):
        total += chunks.gradient(cs, following) * following.numel()
        assert not chunks.hidden.requires_grad
    assert total / 60 == pytest.approx(expected, abs=1e-12)


def test_streams_read_the_text_side_by_side():
    batches = charlm.sequence_batches(torch.arange(50), chunk=6, streams=3)
    cs = torch.cat([cs for cs, _ in batches])
    assert torch.equal(cs, torch.tensor([0, 16, 32]) + torch.arange(15)[:, None])
    assert torch.equal(torch.cat([following for _, following in batches]), cs + 1)
    assert [len(cs) for cs, _ in batches] == [6, 6, 3]


def test_all_forms_train_alike(capsys):
    for runs in charlm.main(TINY):
        *_, last = runs.values()
        assert len(last.losses) == 2
        assert last.losses[1] < last.losses[0]
        for run in runs.values():
            assert run.losses == pytest.approx(last.losses, abs=1e-10)
            assert run.seconds > 0
    report = capsys.readouterr().out
    for word in ["Part 1", "Part 2", "nn.RNN", "times as fast", "continues"]:
        assert word in report


def test_two_runs_print_the_same_report(capsys):
    def shown():
        charlm.main(TINY)
        report = capsys.readouterr().out
        return [line for line in report.splitlines() if "a second" not in line]

    assert shown() == shown()


def test_writing_keeps_the_state(monkeypatch):
    monkeypatch.setattr(charlm, "TEMPERATURE", 1e-6)  # the likeliest character, each time
    *_, model = sequence_models()
    written = charlm.write(model, torch.tensor([1, 2, 3, 4]), 30)
    log_p, _ = model(torch.tensor([1, 2, 3, 4, *written])[:, None])  # all at once
    assert log_p[3:-1, 0].argmax(-1).tolist() == written


def test_divergence_is_an_error():
    model = CharFusedModel(3, 2, 4)
    batches = [(torch.zeros(4, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long))] * 3
    with pytest.raises(UserError, match="diverged"):
        charlm.compete({"model": Run(model, lr=math.inf)}, [batches])


def test_shortest_text(tmp_path):
    file = tmp_path / "text"
    file.write_text("ab" * 130)
    charlm.main(["--text", str(file), "--epochs", "1", "--hidden", "3"])
    with pytest.raises(UserError, match="the text must have 260 characters, got 259"):
        charlm.main(["--text", str(file), "--chars", "259"])
