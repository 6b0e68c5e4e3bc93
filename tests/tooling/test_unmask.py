"""``python -m fusedrnn unmask``: the model, its checkpoints, and the page in headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from charlm import CharFusedModel
from torch import Tensor
from torch.nn import functional as F

from fusedrnn import unmask
from fusedrnn.__main__ import main
from fusedrnn.unmask.model import (
    CharLoopModel,
    UserError,
    Vocabulary,
    language_reference,
    read_text,
    window_batches,
)

TEXT = language_reference()[:12_000]
EXAMPLE = "The import statement"


def random_model(v: int, n_in: int, h: int) -> CharLoopModel:
    """Return a model whose values are as large as those of a trained one."""
    model = CharLoopModel(v, n_in, h)
    with torch.no_grad():
        model.l_hidden.weight.mul_(3)
        model.l_out.weight.mul_(5)
    return model


# --- The model ------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_after_each_character() -> None:
    model = random_model(11, 4, 9).double()
    cs = torch.randint(11, (7, 3))
    found = unmask.log_probabilities(model, cs)
    for t in range(7):
        torch.testing.assert_close(found[t], model(*cs[: t + 1]), rtol=0, atol=1e-12)


def test_loss_is_the_mean_over_all_characters_of_a_window() -> None:
    model = random_model(11, 4, 9).double()
    text = torch.randint(11, (8, 3))
    found = unmask.every_step_loss(model, text[:-1], text[-1])
    each = [F.nll_loss(model(*text[: t + 1]), text[t + 1]) for t in range(7)]
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=0, atol=1e-12)


def test_training_prints_its_progress_and_lowers_the_loss(capsys: Any) -> None:
    model, vocabulary = unmask.train(TEXT)
    losses = re.findall(r"epoch \d of 6: mean loss (\S+)", capsys.readouterr().out)
    assert len(losses) == unmask.EPOCHS
    assert float(losses[-1]) < 0.8 * float(losses[0])
    assert vocabulary == Vocabulary.of(TEXT)
    assert model.e.weight.shape == (len(vocabulary.characters), 16)
    assert model.l_hidden.weight.shape == (64, 64)


def test_training_gives_the_same_model_again() -> None:
    first, second = (unmask.train(TEXT[:640])[0].state_dict() for _ in range(2))
    torch.testing.assert_close(dict(second), dict(first), rtol=0, atol=0)


def test_shortest_text() -> None:
    unmask.train("ab" * 32)
    with pytest.raises(UserError, match="the text is too short: 63 characters, and 64 are"):
        unmask.train("ab" * 31 + "a")


# --- The text and its batches -------------------------------------------------------------------


def test_language_reference_is_long_text() -> None:
    text = language_reference()
    assert isinstance(text, str)
    assert len(text) >= unmask.CHARS
    assert "while_stmt" in text
    assert read_text(None, 100) == text[:100]


def test_text_file_is_read_as_utf8(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("\ufeffcafé\r\n日本\n".encode())
    assert read_text(str(file), 100) == "café\n日本\n"
    assert read_text(str(file), 4) == "café"


def test_missing_reference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="--text FILE"):
        language_reference()


def test_vocabulary_numbers_characters_in_order() -> None:
    vocabulary = Vocabulary.of("banana é")
    assert vocabulary.characters == " abné"
    numbers = vocabulary.encode("nab")
    assert numbers.tolist() == [3, 1, 2]
    assert vocabulary.decode(numbers.tolist()) == "nab"


@pytest.mark.parametrize("seed", [0, 3])
def test_windows_read_the_text_once(seed: int) -> None:
    text = torch.arange(50)  # each character is its own position
    batches = window_batches(text, context=4, batch=5, seed=seed)
    windows = torch.cat([torch.cat([cs, following[None]]) for cs, following in batches], 1).T
    first = windows[:, 0].sort().values
    assert torch.equal(first, torch.arange(seed, 46, 4))
    assert torch.equal(windows - windows[:, :1], torch.arange(5).expand_as(windows))
    assert [following.numel() for _, following in batches[:-1]] == [5] * (len(batches) - 1)


def test_windows_come_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> Tensor:
        return torch.cat([f for _, f in window_batches(torch.arange(400), 4, 8, seed)])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(0) % 400, order(4) % 400)  # the same windows in another order
    assert torch.equal(order(0).sort().values, order(4).sort().values)


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CharLoopModel, CharFusedModel])
def test_checkpoint_of_any_size_is_loaded(kind: type[CharLoopModel], tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    saved = kind(3, 2, 5)
    file.write_bytes(unmask.checkpoint(saved, Vocabulary("abc")))
    model, vocabulary = unmask.load(str(file))
    assert vocabulary == Vocabulary("abc")
    torch.testing.assert_close(dict(model.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)


STATE = CharLoopModel(3, 2, 5).state_dict()
SHAPE = "must be a dict with .*, as --save writes it"
WRONG_CHECKPOINTS = {
    "no dict": ([1, 2], f"does not fit: a checkpoint {SHAPE}"),
    "no vocabulary": ({"model": STATE}, f"does not fit: a checkpoint {SHAPE}"),
    "vocabulary of another type": (
        {"vocabulary": 3, "model": STATE},
        f"does not fit: a checkpoint {SHAPE}",
    ),
    "pickled objects": (
        {"vocabulary": "abc", "model": STATE, "more": Vocabulary("abc")},
        f"does not fit: a checkpoint {SHAPE}",
    ),
    "weights only": (STATE, f"does not fit: a checkpoint {SHAPE}"),
    "another model": (
        {"vocabulary": "abc", "model": torch.nn.RNN(2, 5).state_dict()},
        f"does not fit: a checkpoint {SHAPE}",
    ),
    "another vocabulary": (
        {"vocabulary": "ab", "model": STATE},
        "its vocabulary has 2 characters, and its embedding 3",
    ),
    "a layer less": (
        {"vocabulary": "abc", "model": {k: v for k, v in STATE.items() if "l_in" not in k}},
        r"does not fit the model of the blog post: Missing key.*l_in\.weight",
    ),
    "another size": (
        {"vocabulary": "abc", "model": {**STATE, "l_out.bias": torch.zeros(4)}},
        r"does not fit the model of the blog post: size mismatch for l_out\.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_an_error(case: str, tmp_path: Path) -> None:
    content, message = WRONG_CHECKPOINTS[case]
    file = tmp_path / "model.pt"
    torch.save(content, file)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))} .*{message}") as raised:
        unmask.load(str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4"], ids=["empty", "text", "broken"])
def test_a_file_that_is_no_checkpoint_is_an_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"does not fit: a checkpoint {SHAPE}"):
        unmask.load(str(file))


def test_a_missing_checkpoint_is_an_error() -> None:
    with pytest.raises(UserError, match="^cannot read /none: No such file or directory$"):
        unmask.load("/none")


# --- The command ----------------------------------------------------------------------------------


def test_command_writes_a_page_and_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    text, saved, page = tmp_path / "text", tmp_path / "model.pt", tmp_path / "page.html"
    text.write_text(TEXT)
    assert main(["unmask", f"--text={text}", f"--save={saved}", f"--out={page}"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Training on 12,000 characters of {text}\n")
    assert out.endswith(f"{page}: {len(page.read_bytes()) / 1000:.0f} kB. Open it in a browser.\n")
    assert err == ""
    again = tmp_path / "again.html"
    assert main(["unmask", f"--text={text}", f"--checkpoint={saved}", f"--out={again}"]) == 0
    assert "epoch" not in capsys.readouterr().out
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--text=/none", "cannot read /none: No such file or directory"),
        ("--checkpoint=/none", "cannot read /none: No such file or directory"),
        ("--out=/none/page.html", "cannot write /none/page.html: No such file or directory"),
        ("--save=/none/model.pt", "cannot write /none/model.pt: No such file or directory"),
    ],
)
def test_wrong_path_gets_one_sentence(
    option: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    saved = tmp_path / "model.pt"
    saved.write_bytes(unmask.checkpoint(random_model(3, 2, 5), Vocabulary("abc")))
    options = [f"--checkpoint={saved}", f"--out={tmp_path / 'page.html'}", option]
    assert main(["unmask", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"python -m fusedrnn unmask: {message}\n")


def test_a_page_that_would_be_too_large_is_an_error(tmp_path: Path, capsys: Any) -> None:
    saved, page = tmp_path / "model.pt", tmp_path / "page.html"
    saved.write_bytes(unmask.checkpoint(CharLoopModel(3, 2, 640), Vocabulary("abc")))
    assert main(["unmask", f"--checkpoint={saved}", f"--out={page}"]) == 2
    assert "would have 2.3 MB, and 2 MB are the limit" in capsys.readouterr().err
    assert not page.exists()


EXAMPLE_TEXTS = {
    "Sentences first, then lines. They are cut between words, as here.": [
        "Sentences first, then lines",
        "They are cut between words",
    ],
    "lines in lower case do count if no other\nis there, and this one is too": [
        "lines in lower case do count",
        "is there, and this one is",
    ],
    "Short. Lines. Do not.\nCount.": [],
    "alongwordofoneortheotherlanguage": ["alongwordofoneortheotherlang"],
}


@pytest.mark.parametrize("text", EXAMPLE_TEXTS)
def test_examples_are_beginnings_of_sentences(text: str) -> None:
    assert unmask.examples(text, Vocabulary.of(text)) == EXAMPLE_TEXTS[text]
    for example in EXAMPLE_TEXTS[text]:
        assert example in unmask.examples(text, Vocabulary.of(example))


def test_examples_can_be_read_by_the_model() -> None:
    text = "A sentence without the letter. Quite another, with that letter."
    assert unmask.examples(text, Vocabulary.of(text.replace("Q", "A")))[1:] == []
    many = "".join(f"\n{letter}nother line of this text" for letter in "ABCDEFGHIJKL")
    found = unmask.examples(many, Vocabulary.of(many))
    assert [example[0] for example in found] == ["A", "C", "E", "G", "I"]


# --- The page in a browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    if not os.environ.get("CI"):
        pytest.importorskip("playwright", reason="no playwright (see .ci/requirements.txt)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def trained() -> tuple[CharLoopModel, Vocabulary]:
    return unmask.train(TEXT)


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(
    browser: Any, trained: tuple[CharLoopModel, Vocabulary], tmp_path: Path
) -> Iterator[OpenPage]:
    """Open the page of a model in a browser with these options; check for errors and requests."""
    complaints: list[str] = []
    contexts = []

    def open_it(
        model: CharLoopModel | None = None,
        vocabulary: Vocabulary | None = None,
        examples: tuple[str, ...] = (EXAMPLE, "Another text"),
        width: int = 1280,
        **options: Any,
    ) -> Any:
        file = tmp_path / "page.html"
        html = unmask.page(model or trained[0], vocabulary or trained[1], list(examples))
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # the machine may be shared
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("data:", file.as_uri()))
                or complaints.append(f"loads {request.url}")
            ),
        )
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def plain_loop(model: CharLoopModel, cs: Tensor) -> list[dict[str, Tensor]]:
    """Run the loop of the blog post and return all its values."""
    hp = torch.zeros(model.h, dtype=model.e.weight.dtype, requires_grad=True)
    steps = []
    for c in cs:
        e = model.e(c)
        a = model.l_in(e)
        v = F.relu(a)
        s = hp + v
        z = model.l_hidden(s)
        h = torch.tanh(z)
        logp = F.log_softmax(model.l_out(h), dim=-1)
        steps.append({"e": e, "a": a, "v": v, "hp": hp, "s": s, "z": z, "h": h, "logp": logp})
        hp = h
    return steps


def numbers(page: Any, expression: str, argument: Any) -> list[dict[str, Tensor]]:
    """Evaluate a list of objects in the page; their typed arrays become tensors."""
    plain = "entry => Object.fromEntries(Object.entries(entry).map(([k, v]) => [k, Array.from(v)]))"
    objects = page.evaluate(f"argument => ({expression}).map({plain})", argument)
    return [
        {name: torch.tensor(values, dtype=torch.float64) for name, values in entry.items()}
        for entry in objects
    ]


SIZES = {
    "page's own": None,
    "small": (3, 2, 5),
    "no squares": (40, 7, 50),
    "one of each": (1, 1, 1),
    "large": (90, 16, 500),
}


@pytest.fixture(params=SIZES)
def any_model(
    request: pytest.FixtureRequest, trained: tuple[CharLoopModel, Vocabulary]
) -> tuple[CharLoopModel, Vocabulary]:
    size = SIZES[request.param]
    if size is None:
        return trained
    return random_model(*size), Vocabulary("".join(map(chr, range(97, 97 + size[0]))))


def test_forward_agrees_with_pytorch(
    open_page: OpenPage, any_model: tuple[CharLoopModel, Vocabulary]
) -> None:
    model, vocabulary = any_model
    page = open_page(model, vocabulary)
    cs = torch.randint(len(vocabulary.characters), (25,))
    found = numbers(page, "forward(argument).map(({ c, ...rest }) => rest)", cs.tolist())
    for t, step in enumerate(found):
        expected = model(*cs[: t + 1, None])[0]
        torch.testing.assert_close(step["logp"].float(), expected, rtol=0, atol=1e-4)
    wide = random_model(len(vocabulary.characters), model.e.embedding_dim, model.h).double()
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, plain_loop(wide, cs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("step", [0, 24])
def test_gradient_agrees_with_autograd(
    step: int, open_page: OpenPage, any_model: tuple[CharLoopModel, Vocabulary]
) -> None:
    model, vocabulary = any_model
    page = open_page(model, vocabulary)
    cs = torch.randint(len(vocabulary.characters), (25,))
    target = int(cs[0])
    given = [cs.tolist(), step, target]
    found = numbers(page, "backward(forward(argument[0]), argument[1], argument[2])", given)
    assert len(found) == step + 1
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.float64, 1e-10)]:
        same = CharLoopModel(len(vocabulary.characters), model.e.embedding_dim, model.h).to(dtype)
        same.load_state_dict(model.state_dict())
        steps = plain_loop(same, cs)
        loss = -steps[step]["logp"][target]
        for k in range(step + 1):
            names = ["e", "a", "v", "hp", "s", "z", "h"]
            expected = torch.autograd.grad(
                loss, [steps[k][name] for name in names], retain_graph=True
            )
            for name, gradient in zip(names, expected, strict=True):
                torch.testing.assert_close(
                    found[k][name], gradient.double(), rtol=0, atol=tolerance
                )


def place(page: Any) -> str:
    return page.locator("#place").text_content()


def shown_cells(page: Any) -> int:
    """Return the number of computed cells in the row, without the first state."""
    return page.locator("#row li.known button").count()


def test_stepping_forward_and_back(open_page: OpenPage) -> None:
    page = open_page()
    names = ["character", "embedding", "l_in", "relu", "addition", "l_hidden", "tanh"]
    names.append("prediction")
    click = {
        name: partial(page.get_by_role("button", name=name, exact=True).click, force=True)
        for name in ("Next", "Back", "Next character")
    }
    for name in names:
        assert place(page) == f"1 of 20 · {name}"
        click["Next"]()
    assert place(page) == "2 of 20 · character"
    assert shown_cells(page) == 1
    for name in reversed(names):
        click["Back"]()
        assert place(page) == f"1 of 20 · {name}"
    click["Back"]()  # at the start, it does nothing
    assert place(page) == "1 of 20 · character"
    for k in range(1, 21):
        click["Next character"]()
        assert place(page) == f"{k} of 20 · prediction"
        assert shown_cells(page) == k
    click["Next"]()
    assert place(page) == "20 of 20 · prediction"
    slider = page.get_by_role("slider", name="Step")
    slider.fill("13")
    assert place(page) == "2 of 20 · l_hidden"
    assert slider.get_attribute("aria-valuetext") == "step 2 of 20, h: l_hidden"
    page.get_by_role("button", name="Step 1, T").click()
    assert place(page) == "1 of 20 · prediction"


def spelled(x: float) -> str:
    return f"{x:.2f}".replace("-", "−")


def test_page_shows_the_models_numbers(
    open_page: OpenPage, trained: tuple[CharLoopModel, Vocabulary]
) -> None:
    model, vocabulary = trained
    cs = vocabulary.encode(EXAMPLE)
    step = plain_loop(model, cs)[4]
    page = open_page()
    for _ in range(5):
        page.keyboard.press("Shift+ArrowRight")
    page.get_by_label("Follow unit").fill("12")
    cells = page.locator("#numbers td").all_text_contents()[1:]
    assert cells == [spelled(step[name][11].item()) for name in ("a", "v", "hp", "s", "z", "h")]
    best = step["logp"].argsort(descending=True)[:3].tolist()
    glyphs = [{" ": "␣", "\n": "↵"}.get(c, c) for c in vocabulary.decode(best)]
    assert page.locator(".bar .name").all_text_contents()[:3] == glyphs
    percents = [f"{100 * step['logp'][c].exp().item():.0f}%" for c in best]
    assert page.locator(".bar .value").all_text_contents()[:3] == percents
    over = page.locator("#row li").nth(5).locator(".over")
    assert over.text_content() == glyphs[0] + percents[0]
    # Negative numbers are drawn as circles, positive ones as squares.
    radius = "rects => rects.map(rect => rect.getAttribute('rx') / rect.getAttribute('width'))"
    radii = page.locator("[data-part=z] [data-unit]").evaluate_all(radius)
    assert [r == pytest.approx(0.5) for r in radii] == (step["z"] < 0).tolist()


def test_gradient_view_shows_the_gradients_of_autograd(
    open_page: OpenPage, trained: tuple[CharLoopModel, Vocabulary]
) -> None:
    model, vocabulary = trained
    steps = plain_loop(model, vocabulary.encode(EXAMPLE))
    page = open_page()
    page.get_by_role("button", name="Backward").click()
    assert place(page) == "19 of 20 · loss"  # the prediction of the last character
    page.get_by_label("Gradient of the prediction after").select_option("4")
    target = vocabulary.characters.index("x")
    page.get_by_label("if the next character is").select_option("x")
    assert place(page) == "5 of 20 · loss"
    loss = -steps[4]["logp"][target]
    assert f"= {spelled(loss.item())}" in page.locator("#equation").text_content()
    norms = [g.norm().item() for g in torch.autograd.grad(loss, [s["h"] for s in steps[:5]])]
    names = ["state", "tanh", "l_hidden", "addition", "relu", "l_in"]
    for k in reversed(range(5)):
        for name in names:
            page.keyboard.press("ArrowRight")
            assert place(page) == f"{k + 1} of 20 · {name}"
        assert page.locator("#chart .dot").count() == 5 - k
        assert shown_cells(page) == 5 - k
        if norms[k] >= 0.01:
            over = page.locator("#row li").nth(k + 1).locator(".over")
            assert over.text_content() == spelled(norms[k])
    page.keyboard.press("ArrowRight")  # at the end
    assert place(page) == "1 of 20 · l_in"
    page.keyboard.press("Shift+ArrowLeft")
    assert place(page) == "2 of 20 · l_in"
    assert page.get_by_role("button", name="Step 6, m").is_disabled()
    page.get_by_role("button", name="Forward").click()
    assert place(page) == "1 of 20 · character"
    assert page.locator("#chart").is_hidden()


def test_typing_grows_the_row(open_page: OpenPage) -> None:
    page = open_page()
    box = page.get_by_label("Text to read")
    box.fill("")
    assert page.get_by_text("Type a text or choose an example.").is_visible()
    assert page.locator("#cell").is_hidden()
    for k, character in enumerate("class", start=1):
        box.press(character)
        assert place(page) == f"{k} of {k} · prediction"
        assert shown_cells(page) == k
    page.get_by_role("button", name="Another text").click()
    assert box.input_value() == "Another text"
    assert place(page) == "1 of 12 · character"


def test_unknown_characters_get_a_hint(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_label("Text to read").fill("naïve ☃ 𝄞")
    hint = page.get_by_text("therefore left out: ï ☃ 𝄞")
    assert hint.is_visible()
    assert page.locator("#row .char").all_text_contents()[1:] == list("nave␣␣")
    page.get_by_label("Text to read").fill("☃")
    assert page.locator("#cell").is_hidden()
    page.get_by_label("Text to read").fill("naive")
    assert hint.is_hidden()


def test_text_of_one_character(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_label("Text to read").fill("a")
    page.get_by_role("button", name="Backward").click()
    page.get_by_role("slider").fill("6")
    assert place(page) == "1 of 1 · l_in"
    assert page.locator("#chart-text").text_content().startswith("Choose a prediction further on")


def test_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page()

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            outline = "getComputedStyle(document.activeElement).outlineWidth"
            assert page.evaluate(outline) == "3px"
            if page.evaluate("document.activeElement.textContent").strip().endswith(name):
                return
        raise AssertionError(f"{name} is not reached")

    page.keyboard.press("Tab")
    page.keyboard.press("End")
    page.keyboard.type("s")
    assert place(page) == "21 of 21 · prediction"
    page.keyboard.press("ArrowLeft")  # moves the cursor of the text
    assert place(page) == "21 of 21 · prediction"
    tab_to("Another text")
    page.keyboard.press("Enter")
    assert place(page) == "1 of 12 · character"
    page.keyboard.press("ArrowRight")
    assert place(page) == "1 of 12 · embedding"
    tab_to("the gradient through time")
    page.keyboard.press("Space")
    assert place(page) == "11 of 12 · loss"
    page.keyboard.press("Shift+ArrowRight")
    assert place(page) == "11 of 12 · l_in"
    tab_to("Step 11, x, gradient " + page.locator("#row li").nth(11).locator(".over").inner_text())
    page.keyboard.press("Shift+ArrowRight")  # the focus goes with the step
    assert page.evaluate("document.activeElement.textContent").strip().count("Step 10, e") == 1
    tab_to("Next")
    page.keyboard.press("Enter")
    assert place(page) == "9 of 12 · state"


def test_playing(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="Play").click()
    page.get_by_text("1 of 20 · l_in").wait_for()
    page.get_by_role("button", name="Pause").click()
    stopped = place(page)
    page.wait_for_timeout(900)
    assert place(page) == stopped
    page.get_by_role("slider").fill("158")
    page.get_by_role("button", name="Play").click()
    page.get_by_text("20 of 20 · prediction").wait_for()
    page.get_by_role("button", name="Play").click()  # from the end, it starts again
    assert place(page).startswith("1 of 20")


@pytest.mark.parametrize("width", [320, 768, 1440])
@pytest.mark.parametrize("view", ["Forward", "Backward"])
def test_nothing_is_cut_off(width: int, view: str, open_page: OpenPage) -> None:
    page = open_page(width=width)
    page.get_by_role("button", name=view).click()
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for control in page.locator("button:visible, input:visible, select:visible").all():
        if control.evaluate("element => element.closest('#row') === null"):  # the row scrolls
            box = control.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["height"] >= 16 if "slider" in str(control.get_attribute("id")) else 24
    beyond = """texts => texts.map(text => text.getBoundingClientRect())
      .filter(box => box.width && (box.left < 0 || box.right > innerWidth)).length"""
    assert page.locator("svg text").evaluate_all(beyond) == 0


# Texts whose contrast with their background, by the formula of WCAG 2, is too low.
FAINT_TEXTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [[r, 0.2126], [g, 0.7152], [b, 0.0722]].reduce((sum, [c, part]) =>
    sum + part * (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4), 0);
  const behind = (element) => {
    const [r, g, b, a = 1] = channels(getComputedStyle(element).backgroundColor);
    return a === 1 ? [r, g, b] : behind(element.parentElement);
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const off = element.closest("[aria-disabled=true], script, .unseen, option, noscript");
    if (!own || off || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const inside = element instanceof SVGElement;
    const [one, other] = [channels(inside ? style.fill : style.color), behind(element)].map(light);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) faint.push(`${element.textContent}: ${contrast.toFixed(2)}`);
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["Forward", "Backward"])
def test_contrast_in_both_colour_schemes(scheme: str, view: str, open_page: OpenPage) -> None:
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 26)") == (scheme == "dark")
    page.get_by_role("button", name=view).click()
    assert page.evaluate(FAINT_TEXTS) == []
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate(FAINT_TEXTS) == []


def test_change_of_the_colour_scheme_redraws_the_numbers(open_page: OpenPage) -> None:
    page = open_page(color_scheme="light")
    tile = page.locator("[data-part=hp] [data-unit]").first
    assert tile.evaluate("square => square.style.fill") == "rgb(239, 237, 231)"
    page.emulate_media(color_scheme="dark")
    page.locator("[data-part=hp] [data-unit='0'][style*='rgb(42, 46, 54)']").wait_for()


@pytest.mark.parametrize("view", ["Forward", "Backward"])
def test_everything_has_an_accessible_name(view: str, open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name=view).click()
    page.keyboard.press("Shift+ArrowRight")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    named = {"button", "textbox", "slider", "combobox", "spinbutton", "image", "region", "group"}
    nodes = [
        node for node in tree["nodes"] if not node["ignored"] and node["role"]["value"] in named
    ]
    assert {node["role"]["value"] for node in nodes} >= {"button", "slider", "image"}
    assert [node["role"]["value"] for node in nodes if not node["name"]["value"].strip()] == []


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_reduced_motion(motion: str, open_page: OpenPage) -> None:
    page = open_page(reduced_motion=motion)
    durations = page.locator(".number, .edge").evaluate_all(
        "all => all.map(element => getComputedStyle(element).transitionDuration)"
    )
    assert any("0.2s" in duration for duration in durations) == (motion == "no-preference")


def test_pointing_at_a_number_follows_its_unit(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("[data-part=z] [data-unit='20']").hover()
    assert page.get_by_label("Follow unit").input_value() == "21"
    assert page.locator("[data-part=h] .followed").get_attribute("data-unit") == "20"
    page.mouse.move(0, 0)
    page.get_by_label("Follow unit").fill("65")  # there are 64
    assert page.locator("[data-part=h] .followed").get_attribute("data-unit") == "20"


def test_text_that_looks_like_html(open_page: OpenPage) -> None:
    text = "</script><!--<script><b>"
    vocabulary = Vocabulary.of(text)
    model = random_model(len(vocabulary.characters), 4, 9)
    page = open_page(model, vocabulary, (text, r"a\u0062"))
    assert page.locator("#row .char").all_text_contents()[1:] == list(text)
    assert page.locator("#examples button").all_text_contents() == [text, r"a\u0062"]


def test_page_without_examples(open_page: OpenPage) -> None:
    page = open_page(examples=())
    assert page.get_by_text("Type a text or choose an example.").is_visible()
    page.get_by_label("Text to read").fill("text")
    assert place(page) == "4 of 4 · prediction"
