"""What a client sent that was not let in is noted under a digest of its name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fedbiscuit.pipeline.rounds import _quarantine
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import RoundRecord

REASON = "layers.0.k.lora_A: 1 non-finite values, first at 3"


def record(*clients: str) -> RoundRecord:
    return RoundRecord(
        12, "federated", (), {}, {}, False, {}, {"away": "no reply"}, 0.0, 0, 0, dict.fromkeys(clients, REASON)
    )


@pytest.mark.parametrize("client", ["ann", "../../x", "/etc/passwd", "x" * 300, "\ud800", "CON", "😀\0"])
def test_fault_63_the_reason_is_kept_by_round_and_no_name_becomes_a_path(tmp_path, client):
    with RunDir.open(tmp_path / "run", resume=False) as run:
        session = SimpleNamespace(run=run)
        _quarantine(session, record(client), "selectors")
        _quarantine(session, record(client), "selectors")  # the same round once more, after a crash
        _quarantine(session, record(), "selectors")
        _quarantine(session, record(client), "global")
        (found,) = (run.path / "quarantine" / "000012").iterdir()
        (other,) = (run.path / "quarantine" / "global" / "000012").iterdir()
    assert found.name == other.name
    assert len(found.stem) == 16
    assert set(found.stem) <= set("0123456789abcdef")
    assert json.loads(found.read_text("utf-8")) == {"round": 12, "client": client, "reason": REASON}
    assert not list(tmp_path.glob("x*"))
