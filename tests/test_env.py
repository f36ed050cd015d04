"""``env``: the variables that choose directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from tq_tvm import env


@pytest.mark.parametrize("before", [None, "elsewhere"])
def test_only_artifact_dir(monkeypatch, before):
    monkeypatch.delenv("TQ_TVM_ARTIFACT_DIR", raising=False)
    if before:
        monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", before)
    dirs = env.artifact_dirs()
    with pytest.raises(KeyError), env.only_artifact_dir(Path("here")):
        assert env.artifact_dirs() == (Path("here"),)
        raise KeyError
    assert env.artifact_dirs() == dirs
