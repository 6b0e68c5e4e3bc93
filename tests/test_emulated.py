"""That the emulated CUDA engine is what ran."""

from __future__ import annotations

import pytest
from cases import Case
from engines import EMULATED, Engine, emulated

import fusedrnn


@pytest.mark.parametrize("engine", EMULATED, ids=str)
def test_the_regime_that_was_asked_for_runs(engine: Engine) -> None:
    library, arguments = emulated(engine.name), Case().arguments()
    before = library.runs()
    with engine.installed():
        found = fusedrnn.rnn(**arguments)
    after = library.runs()
    fusedrnn.rnn(**arguments)  # by the CPU engine again
    assert library.runs() == after
    (regime,) = {name for name in after if after[name] > before[name]}
    assert engine.regime in (None, regime)
    assert found[0].isfinite().all()
