"""A run of now has the losses of the run that was written down: a refactoring changes no number."""

import json

import pytest
from golden.losses import FILE, RUNS, STEPS, losses


@pytest.mark.parametrize("name", RUNS)
def test_the_first_losses_are_those_that_were_written_down(name):
    recorded = json.loads(FILE.read_text())[name]
    assert len(recorded) == STEPS
    assert losses(name) == pytest.approx(recorded, rel=1e-5)
