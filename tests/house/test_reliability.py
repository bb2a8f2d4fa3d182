"""Kill it at any moment, run the same command, get the same bytes; and hostile input of every kind.

The campaigns of tests/soak with few tries each; `make soak` runs them long and writes docs/reliability.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak import disks
from tests.soak.campaigns import CAMPAIGNS

SEED = int(os.environ.get("LORA_BOOTH_SEED", "0"))


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_fails(name: str, tmp_path: Path) -> None:
    campaign = CAMPAIGNS[name]
    if campaign.needs_root and not disks.can_mount():
        pytest.skip("only root may mount a small disk")
    result = campaign.run(campaign.few, tmp_path, SEED)
    assert result.failures == ()
    assert result.tries >= campaign.few
