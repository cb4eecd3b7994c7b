"""Two uploads of one file at once, each at any point of the other: both end well, or say that the file is to be sent again."""

from __future__ import annotations

import hashlib

import pytest

from outliers.errors import MachineLost
from outliers.machines import agent

BYTES = b"token names"
SHA256 = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def request_of(tmp_path):
    (tmp_path / "corpora").mkdir()
    return {"path": "corpora/token_names.json", "sha256": SHA256}


def part(tmp_path):
    return tmp_path / "corpora" / f".token_names.json.{SHA256[:16]}.part"


def test_the_second_of_two_that_settle_finds_the_file_settled(tmp_path, request_of):
    part(tmp_path).write_bytes(BYTES)
    assert agent.settle(tmp_path, request_of) == {}
    assert agent.settle(tmp_path, request_of) == {}
    assert (tmp_path / request_of["path"]).read_bytes() == BYTES


@pytest.mark.parametrize("there", [None, b"others"])
def test_a_part_that_is_gone_without_the_file_is_sent_again(tmp_path, request_of, there):
    if there is not None:
        (tmp_path / request_of["path"]).write_bytes(there)
    with pytest.raises(MachineLost, match="send it again"):
        agent.settle(tmp_path, request_of)


def test_the_size_of_a_part_that_goes_meanwhile_is_none(tmp_path, request_of):
    part(tmp_path).write_bytes(BYTES[:4])
    assert agent.size(tmp_path, request_of) == {"whole": False, "part": 4}
    part(tmp_path).unlink()
    assert agent.size(tmp_path, request_of) == {"whole": False, "part": 0}
