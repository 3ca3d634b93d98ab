"""What tests of the encoder's backend leave as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """A session that takes denormal numbers for zero has the thread that runs it do so from then on, here pytest's own;
    hypothesis makes no floats then.
    """
    yield
    torch.set_flush_denormal(False)
