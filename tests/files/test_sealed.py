"""A sealed file is read as it was written, or not at all."""

from __future__ import annotations

import zlib

import pytest

from outliers.files.sealed import (
    LARGE_BYTES,
    LISTING,
    changed_files,
    check_folder,
    checksums,
    drop_folder,
    read_sealed,
    seal_folder,
    write_sealed,
)

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


def test_a_sealed_folder_is_whole_or_not(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("config.json", "part/weights.bin", ".hidden"):
        (tmp_path / name).write_bytes(b"x" * 100)
    assert not check_folder(tmp_path)
    seal_folder(tmp_path)
    assert check_folder(tmp_path)
    (tmp_path / ".hidden").unlink()  # of no one who seals
    assert check_folder(tmp_path)
    for name in ("config.json", "part/weights.bin", LISTING):
        whole = (tmp_path / name).read_bytes()
        for content in (whole[:-1], whole[:50] + b"y" + whole[51:], b""):
            (tmp_path / name).write_bytes(content)
            assert not check_folder(tmp_path)
        (tmp_path / name).unlink()
        assert not check_folder(tmp_path)
        (tmp_path / name).write_bytes(whole)
        assert check_folder(tmp_path)


def test_a_large_file_is_listed_by_another_checksum(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES + 3)
    seal_folder(tmp_path, (path.name,), "weights.json")
    mark = read_sealed(tmp_path / "weights.json")["files"][path.name]
    assert mark == f"crc32:{zlib.crc32(bytes(LARGE_BYTES + 3)):08x}:{LARGE_BYTES + 3}"
    assert check_folder(tmp_path, "weights.json")
    with path.open("r+b") as file:
        file.seek(LARGE_BYTES)
        file.write(b"\x10")
    assert not check_folder(tmp_path, "weights.json")
    path.write_bytes(b"")
    assert not check_folder(tmp_path, "weights.json")


def test_a_folder_that_is_dropped_is_gone_and_one_that_is_not_there_is_no_error(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    drop_folder(tmp_path / "a")
    drop_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
