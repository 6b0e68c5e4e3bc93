"""examples/variations.py trains every variation on the same characters, and all of them learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import variations
from variations import VARIATIONS, Model, Run, Variation

each = pytest.mark.parametrize("variation", VARIATIONS, ids=lambda variation: variation.name)


def test_every_variation_learns_and_reads_as_much_as_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "losses.png"
    runs = variations.main(["--chars", "30000", "--epochs", "1", "--figure", str(figure)])
    assert [run.variation for run in runs] == VARIATIONS
    assert len({len(run.losses) for run in runs}) == 1
    for run in runs:
        assert run.final < run.losses[0] - 0.5
        assert run.losses[0] == pytest.approx(math.log(run.model.l_out.out_features), abs=0.3)
    lines = capsys.readouterr().out.split("\n")
    assert [line[:22].strip() for line in lines[1:8]] == [v.name for v in VARIATIONS]
    assert figure.stat().st_size > 10_000


def run_of(variation: Variation) -> tuple[Run, torch.Tensor]:
    torch.manual_seed(0)
    return Run(variation, Model(20, variation.rnn)), torch.randint(20, (variation.steps + 1, 3))


@each
def test_the_loss_depends_on_the_characters_that_it_should(variation: Variation) -> None:
    """Change the character after the last one, and then the first one."""
    changed = []
    for place in (-1, 0):
        losses = []
        for shift in (0, 1):
            run, cs = run_of(variation)
            cs[place] = (cs[place] + shift) % 20
            losses.append(run.loss(cs[:-1], cs[1:]).item())
        changed.append(losses[0] != losses[1])
    assert changed == [variation.predict != "hidden", True]


@each
def test_only_a_carried_state_remembers_the_batch_before(variation: Variation) -> None:
    losses = []
    for shift in (0, 1):
        run, cs = run_of(variation)
        run.loss((cs[:-1] + shift) % 20, cs[1:])
        losses.append(run.loss(cs[:-1], cs[1:]).item())
    assert (losses[0] != losses[1]) == variation.carry
    assert run.state is None or not run.state.requires_grad  # truncated BPTT
