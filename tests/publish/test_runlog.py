"""What is published of run.log: all of a short one, whole lines from the end of a long one, and never a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import ForbiddenFile
from outliers.publish import contents, runlog
from outliers.publish.allowlist import LOG, read_log
from outliers.publish.manifest import read_manifest
from outliers.publish.publish import fetch, publish
from tests.support.publishing import results
from tests.support.results_folder import finish

__all__ = ["results"]  # the fixture, found by name

MOST = contents.MAX_LOG_BYTES
LINE = "2026-11-27T23:00:00Z info    extract: sequence {:07d} — Zeichen für Zeichen 字字字\n"


def log_of(results) -> bytes:
    found = read_log(results)
    assert found is not None
    return found


def test_a_short_log_is_published_as_it_is(results):
    text = "".join(LINE.format(number) for number in range(100)).encode()
    (results / LOG).write_bytes(text)
    assert log_of(results) == text


@pytest.mark.parametrize("count", [12_000, 150_000])  # 1.1 MB, and more than a file of a study may have
def test_of_a_long_log_the_last_whole_lines_are_published(results, count):
    lines = [LINE.format(number) for number in range(count)]
    (results / LOG).write_text("".join(lines), encoding="utf-8")
    size = (results / LOG).stat().st_size
    assert size > MOST
    head, *kept = log_of(results).decode("utf-8").splitlines(keepends=True)
    assert head.startswith("... the end of this log: the last ") and f" of {size:,} bytes" in head
    assert kept == lines[-len(kept) :]
    assert MOST - 1000 < len(log_of(results)) <= MOST
    assert (results / LOG).stat().st_size == size, "here all of it stays"


@settings(max_examples=300, deadline=None)
@given(st.text(), st.integers(300, 2000), st.integers(0, 3000))
def test_what_is_published_is_the_end_of_what_was_there(text, most, before):
    data = text.encode("utf-8", "replace") * 20
    found = runlog.publishable(data, len(data) + before, most)
    assert len(found) <= most
    found.decode("utf-8")
    if not before and len(data) <= most:
        assert found == data
    else:
        head, _, kept = found.partition(b"\n")
        assert head.startswith(b"... the end of this log")
        assert data.endswith(kept)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text() | st.text("abc\0\x08\ud800+/", min_size=1000, max_size=9000), max_size=5))
def test_whatever_a_step_printed_may_be_published(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("log")
    runlog.append(folder, lines, folder)
    contents.check_log((folder / LOG).read_bytes())


@pytest.mark.parametrize("odd", [("字" * 700 + " ").encode() * 1000, b"x " * 1_500_000, b"", b"\n" * 3_000_000])
def test_odd_logs_are_published_too(results, odd):
    (results / LOG).write_bytes(odd)
    contents.check_log(log_of(results))
    assert len(log_of(results)) <= MOST


@pytest.mark.parametrize("binary", [bytes(range(256)) * 8000, b"\x80" * 3_000_000, b"x" * 3_000_000, b"\0\n" * 600_000])
def test_what_is_no_log_does_not_become_one_by_its_length(results, binary):
    (results / LOG).write_bytes(binary)
    with pytest.raises(ForbiddenFile):
        read_log(results)


def test_a_study_with_a_long_log_is_published_and_fetched(results, tmp_path):
    finish(results)
    (results / LOG).write_text("".join(LINE.format(number) for number in range(40_000)), encoding="utf-8")
    before = read_manifest(results)
    manifest = finish(results, log=True)
    target = f"file://{tmp_path}/atlas"
    publish(results, target, "a-model")
    fetch(target, "a-model", manifest["study_id"], tmp_path / "back")
    (published,) = (tmp_path / "atlas").glob(f"*/*/*/{LOG}")
    assert published.read_bytes() == log_of(results)
    assert not (tmp_path / "back" / LOG).exists()  # numbers alone are fetched
    assert manifest["results_digest"] == before["results_digest"]
