import os
import stat

import pytest

from hiplora.errors import ConfigError
from hiplora.files import cache_dir, check_output_dir, staged_dir, write_atomic


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c"
    monkeypatch.delenv("HIPLORA_CACHE")
    assert cache_dir().name == "hiplora"
