"""A sealed file is read as it was written, or not at all."""

from __future__ import annotations

import pytest

from outliers.sealed import changed_files, checksums, read_sealed, write_sealed

CONTENT = {"tokens": [1, 2, 3], "name": "ü", "share": 0.06, "nothing": None}


def test_what_was_sealed_is_read(tmp_path):
    write_sealed(tmp_path / "a.json", CONTENT)
    assert read_sealed(tmp_path / "a.json") == CONTENT


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, CONTENT)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert read_sealed(path) in (None, CONTENT)  # white space may change: the content may not
        path.write_bytes(whole[:place])
        assert read_sealed(path) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"tokens": 1}', b"\x00" * 99, b"[" * 100_000])
def test_what_was_never_sealed_counts_as_absent(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_sealed(tmp_path / "a.json") is None
    assert read_sealed(tmp_path / "absent.json") is None


def test_changed_files_are_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    expected = checksums(tmp_path, ("a", "b", "c"))
    assert changed_files(tmp_path, expected) == ()
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").unlink()
    assert changed_files(tmp_path, expected) == ("a", "b")
