"""The name of a disk, by which a machine knows that it is itself."""

from __future__ import annotations

import pytest

from outliers.machines.local import instance_id


@pytest.mark.parametrize("content", [b"", b"\xff" * 32, b"abc", bytes(32)])
def test_a_disk_without_a_readable_name_gets_another(tmp_path, content):
    first = instance_id(tmp_path)
    (tmp_path / "instance").write_bytes(content)
    again = instance_id(tmp_path)
    assert again != first
    assert instance_id(tmp_path) == again
