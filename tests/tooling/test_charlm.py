"""The character models: all forms compute the same function; and the code around training."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fusedrnn
from fusedrnn import charlm, reference
from fusedrnn.charlm import (
    CharFusedModel,
    CharlmError,
    CharLoopModel,
    CharSequenceLoopModel,
    CharSequenceModel,
    Progress,
    Settings,
    Vocabulary,
)

TINY = Settings(
    chars=400,
    epochs=2,
    hidden=8,
    embedding=5,
    batch=7,
    chunk=9,
    streams=3,
    lr=1e-2,
    sample=20,
    dtype="float64",
)


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


# --- The models -----------------------------------------------------------------------------------


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
def test_sequence_models_are_one_function(carried):
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
    *_, model = sequence_models()
    text = torch.randint(11, (61,))
    (whole,) = charlm.sequence_batches(text, chunk=100, streams=1)
    expected, _ = charlm.sequence_loss(model, whole, None)
    total, hidden = 0.0, None
    for batch in charlm.sequence_batches(text, chunk=13, streams=1):
        loss, hidden = charlm.sequence_loss(model, batch, hidden)
        assert not hidden.requires_grad
        total += loss.item() * batch[1].numel()
    assert total / 60 == pytest.approx(expected.item(), abs=1e-12)


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
def test_windows_read_the_text_once(seed):
    text = torch.arange(50)  # each character is its own position
    batches = charlm.window_batches(text, context=4, batch=5, seed=seed)
    windows = torch.cat([torch.cat([cs, following[None]]) for cs, following in batches], 1).T
    first = windows[:, 0].sort().values
    assert torch.equal(first, torch.arange(seed, 46, 4))
    assert torch.equal(windows - windows[:, :1], torch.arange(5).expand_as(windows))
    assert [following.numel() for _, following in batches[:-1]] == [5] * (len(batches) - 1)


def test_windows_come_in_an_order_that_the_seed_decides():
    def order(seed):
        return torch.cat([f for _, f in charlm.window_batches(torch.arange(400), 4, 8, seed)])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(0) % 400, order(4) % 400)  # the same windows in another order
    assert torch.equal(order(0).sort().values, order(4).sort().values)


def test_streams_read_the_text_side_by_side():
    batches = charlm.sequence_batches(torch.arange(50), chunk=6, streams=3)
    cs = torch.cat([cs for cs, _ in batches])
    assert torch.equal(cs, torch.tensor([0, 16, 32]) + torch.arange(15)[:, None])
    assert torch.equal(torch.cat([following for _, following in batches]), cs + 1)
    assert [len(cs) for cs, _ in batches] == [6, 6, 3]


# --- Training -------------------------------------------------------------------------------------


def test_all_forms_train_alike(capsys):
    began = time.perf_counter()
    for runs in charlm.demonstrate(TINY):
        expected = runs[0].losses
        assert len(expected) == TINY.epochs
        assert expected[-1] < expected[0]
        for run in runs:
            assert run.losses == pytest.approx(expected, abs=1e-10)
            assert 0 < run.seconds < time.perf_counter() - began
    report = capsys.readouterr().out
    for word in ["Part 1", "Part 2", "nn.RNN", "times as fast", "continues"]:
        assert word in report


def test_the_same_seed_gives_the_same_report(capsys):
    def shown(seed):
        charlm.demonstrate(replace(TINY, seed=seed, epochs=1))
        report = capsys.readouterr().out
        return [line for line in report.splitlines() if "a second" not in line]

    assert shown(0) == shown(0)
    assert shown(0) != shown(1)


def test_no_sample_when_none_is_wanted(capsys):
    charlm.demonstrate(replace(TINY, sample=0, epochs=1))
    assert "continues" not in capsys.readouterr().out


def test_divergence_is_told():
    with pytest.raises(CharlmError, match="smaller --lr"):
        charlm.demonstrate(replace(TINY, lr=1e300))


# --- Text -----------------------------------------------------------------------------------------


def test_language_reference_is_long_text():
    text = charlm.language_reference()
    assert isinstance(text, str)
    assert len(text) >= Settings().chars
    assert "while_stmt" in text
    assert charlm.read_text(None, 100) == text[:100]


def test_text_file_is_read_as_utf8(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("\ufeffcafé\r\n日本\n".encode())
    assert charlm.read_text(str(file), 100) == "café\n日本\n"
    assert charlm.read_text(str(file), 4) == "café"


def test_vocabulary_numbers_characters_in_order():
    vocabulary = Vocabulary.of("banana é")
    assert vocabulary.characters == " abné"
    numbers = vocabulary.encode("nab")
    assert numbers.tolist() == [3, 1, 2]
    assert vocabulary.decode(numbers.tolist()) == "nab"


def test_missing_reference_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CharlmError, match="--text FILE"):
        charlm.language_reference()


# --- Samples --------------------------------------------------------------------------------------


def written(write, model, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        return list(islice(write(model, prompt, temperature, generator), 30))


@pytest.mark.parametrize(
    ("write", "models"),
    [
        pytest.param(charlm.write_windows, window_models, id="windows"),
        pytest.param(charlm.write_sequence, sequence_models, id="sequence"),
    ],
)
def test_samples(write, models):
    first, *others = models()
    sample = written(write, first)
    for model in others:  # equal weights write equal text
        assert written(write, model) == sample
    assert written(write, first) == sample
    assert written(write, first, seed=1) != sample
    assert written(write, first, seed=1, temperature=1e-6) == written(
        write, first, temperature=1e-6
    )  # deterministic at this temperature


def test_writing_on_keeps_the_state():
    *_, model = sequence_models()
    sample = written(charlm.write_sequence, model, temperature=1e-6)
    cs = torch.tensor([1, 2, 3, 4, *sample])
    log_p, _ = model(cs[:, None])  # all at once: each character is the likeliest after those before
    assert log_p[3:-1, 0].argmax(-1).tolist() == sample


# --- The progress bar -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(charlm.time, "monotonic", lambda: now[0])
    return now


def test_bar_on_a_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    progress = Progress("part 1", 4, Terminal())
    clock[0] = 10.0
    progress.advance(1)
    shown = progress.stream.getvalue()
    assert shown.startswith("\rpart 1 [####")
    assert "25%, 30 s left" in shown
    assert len(shown) <= 60
    progress.advance(3)
    assert ".]" not in progress.stream.getvalue().rsplit("\r", 1)[1]
    progress.clear()
    assert progress.stream.getvalue().endswith("\r\x1b[K")


def test_a_line_now_and_then_elsewhere(clock):
    progress = Progress("part 1", 40, io.StringIO())
    for clock[0] in range(1, 41):
        progress.advance(1)
    progress.clear()
    assert progress.stream.getvalue() == (
        "part 1: 38% done, 25 s left\npart 1: 75% done, 10 s left\n"
    )


def test_short_text_is_told(tmp_path: Path):
    file = tmp_path / "text"
    file.write_text("too short")
    with pytest.raises(CharlmError, match=r"the text is too short: 9 characters, .* need 30"):
        charlm.demonstrate(replace(TINY, text=str(file)))
    file.write_text("just enough to train upon it..")
    charlm.demonstrate(replace(TINY, text=str(file)))
    wide = replace(TINY, text=str(file), context=15)  # two windows
    charlm.demonstrate(wide)
    with pytest.raises(CharlmError, match="need 32"):
        charlm.demonstrate(replace(wide, context=16))
