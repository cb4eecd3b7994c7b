"""The manifest and the digest of results: equal for equal numbers, different for any other number."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outliers.errors import ForbiddenFile, PermanentError, PublishRefused
from outliers.files.atomic import sha256_file, unfinished_name, write_atomic
from outliers.publish.allowlist import read_numbers
from outliers.publish.manifest import build_manifest, read_manifest, results_digest, write_manifest
from outliers.publish.publishable import read_publishable
from tests.support.results_folder import features, finish, make_results, summary, tokens


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results")


def rewrite_features(results: Path, table: pa.Table, **options: object) -> None:
    pq.write_table(table, results / "features.parquet", **options)


def replaced(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    cells = table[column].to_pylist()
    cells[row] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.array(cells, table.schema.field(column).type))


class TestDigest:
    def test_same_numbers_in_other_bytes(self, results: Path) -> None:
        before, old_bytes = results_digest(results), (results / "features.parquet").read_bytes()
        (results / "summary.json").write_text(json.dumps(dict(reversed(summary().items())), indent=4))
        (results / "tokens.json").write_text(json.dumps(tokens(), indent=1, sort_keys=True))
        rewrite_features(results, features(), compression="none", row_group_size=7, use_dictionary=False)
        assert (results / "features.parquet").read_bytes() != old_bytes
        assert results_digest(results) == before

    @pytest.mark.parametrize("column", ["mean", "std", "kurtosis"])
    def test_moments_do_not_count(self, results: Path, column: str) -> None:
        before = results_digest(results)
        rewrite_features(results, replaced(features(), column, 0, 0.123))
        assert results_digest(results) == before

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("site", "resid"),
            ("layer", 3),
            ("feature", 9),
            ("tokens", 255),
            ("hits", 21),
            ("ladder_hits", [60, 20, 4]),
            ("ladder_hits", [60, 20]),
            ("first_token_hits", 2),
            ("min", -1.0000001),
            ("max", 7.0),
            ("max_magnitude", 7.0),
        ],
    )
    def test_each_count_and_selection_counts(self, results: Path, column: str, value: object) -> None:
        before = results_digest(results)
        rewrite_features(results, replaced(features(), column, 0, value))
        assert results_digest(results) != before

    def test_border_between_lists_counts(self, results: Path) -> None:
        # the same values in the same order, cut elsewhere
        table = features()
        rewrite_features(results, replaced(replaced(table, "ladder_hits", 0, [60]), "ladder_hits", 1, [20, 3]))
        one = results_digest(results)
        rewrite_features(results, replaced(replaced(table, "ladder_hits", 0, [60, 20]), "ladder_hits", 1, [3]))
        assert results_digest(results) != one

    def test_row_order_counts(self, results: Path) -> None:
        before = results_digest(results)
        table = features()
        rewrite_features(results, table.take(list(reversed(range(table.num_rows)))))
        assert results_digest(results) != before

    @pytest.mark.parametrize(("name", "key"), [("summary.json", "notes"), ("tokens.json", "massive")])
    def test_json_counts(self, results: Path, name: str, key: str) -> None:
        before = results_digest(results)
        content = json.loads((results / name).read_text())
        (results / name).write_text(json.dumps(content | {key: ["x"]}))
        assert results_digest(results) != before

    def test_hash_seed_does_not_count(self, results: Path) -> None:
        program = (
            "from pathlib import Path; from outliers.publish.manifest import *; "
            f"print(results_digest(Path({str(results)!r})))"
        )
        digests = {
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for seed in ("1", "2")
        }
        assert digests == {results_digest(results)}

    @pytest.mark.parametrize("name", ["summary.json", "tokens.json", "features.parquet"])
    def test_missing_or_broken_file(self, results: Path, name: str) -> None:
        (results / name).write_bytes(b"\xff\x00 not it")
        with pytest.raises(PublishRefused, match=name):
            results_digest(results)
        (results / name).unlink()
        with pytest.raises(PublishRefused, match=name):
            results_digest(results)


class TestManifest:
    def test_content(self, results: Path) -> None:
        made = read_manifest(results)
        assert made is not None
        plots = ("heatmap", "largest_by_layer", "layer_curves", "magnitudes", "massive_positions", "positions", "sweep")
        paths = ["features.parquet", *(f"plots/{name}.png" for name in plots)]
        paths += ["report.html", "summary.json", "tokens.json"]
        assert [file["path"] for file in made["files"]] == paths
        for file in made["files"]:
            data = (results / file["path"]).read_bytes()
            assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        listed = json.dumps(made["files"], sort_keys=True, separators=(",", ":"))
        assert made["folder"] == hashlib.sha256(listed.encode()).hexdigest()[:12]
        assert made["results_digest"] == results_digest(results)
        assert (made["study_id"], made["capture_id"]) == ("a" * 24, "b" * 24)
        assert made["headline"] == {
            "model": "Qwen/Qwen3-0.6B",
            "num_systematic": 2,
            "systematic": [7, 3],
            "reading": "pooled",
            "site": "block",
            "num_tokens": 256,
            "num_layers": 4,
            "hidden_size": 32,
        }
        assert made["spec"] == {"model": {"id": "Qwen/Qwen3-0.6B"}}
        assert made["provenance"] == {"seconds": 1.5}

    def test_headline_is_short(self, results: Path) -> None:
        many = summary()
        many["systematic"] = [many["systematic"][0] | {"feature": n} for n in range(32)]
        (results / "summary.json").write_text(json.dumps(many))
        headline = finish(results)["headline"]
        assert (headline["num_systematic"], headline["systematic"]) == (32, list(range(20)))

    def test_log_only_when_asked(self, results: Path) -> None:
        assert "run.log" not in [file["path"] for file in finish(results)["files"]]
        assert "run.log" in [file["path"] for file in finish(results, log=True)["files"]]

    def test_writing_it_again_changes_nothing(self, results: Path) -> None:
        before = (results / "manifest.json").read_bytes()
        finish(results)
        assert (results / "manifest.json").read_bytes() == before

    def test_leftover_of_a_killed_write_is_passed_over(self, results: Path) -> None:
        (results / ".summary.json.0123456789abcdef.part").write_bytes(b"half")
        assert all("part" not in file["path"] for file in finish(results)["files"])

    def test_forbidden_file_is_named(self, results: Path) -> None:
        (results / "weights.safetensors").write_bytes(b"x")
        with pytest.raises(ForbiddenFile, match=r"weights\.safetensors"):
            read_publishable(results)

    @pytest.mark.parametrize(
        "provenance",
        [
            {"x": float("nan")},
            {"x": object()},
            {"x": list(range(100_000))},
            {"x": "y" * 5_000},
            {"x": 10**400},
            {"y" * 5_000: 1},
            functools.reduce(lambda inner, _: {"x": inner}, range(40), {}),
        ],
    )
    def test_provenance_that_is_no_metadata(self, results: Path, provenance: dict[str, object]) -> None:
        with pytest.raises(PublishRefused):
            build_manifest(read_numbers(results).files, spec={}, provenance=provenance)

    def test_absent(self, tmp_path: Path) -> None:
        assert read_manifest(tmp_path) is None
        assert read_manifest(tmp_path / "nowhere") is None

    @pytest.mark.parametrize(
        "change",
        [
            {"schema_version": 2},
            {"schema_version": "1"},
            {"folder": "../../../etc"},
            {"results_digest": None},
            {"files": [{"path": "a"}]},
            {"study_id": "../x"},
            {"extra": 1},
        ],
    )
    def test_malformed(self, results: Path, change: dict[str, object]) -> None:
        content = json.loads((results / "manifest.json").read_text()) | change
        (results / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(PermanentError, match=r"manifest\.json"):
            read_manifest(results)

    @pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
    def test_no_json(self, results: Path, data: bytes) -> None:
        (results / "manifest.json").write_bytes(data)
        with pytest.raises(PermanentError, match=r"manifest\.json"):
            read_manifest(results)

    def test_malformed_is_not_written(self, results: Path) -> None:
        before = (results / "manifest.json").read_bytes()
        with pytest.raises(PublishRefused):
            write_manifest(results, {"schema_version": 1})
        assert (results / "manifest.json").read_bytes() == before


class TestFiles:
    def test_replaces_and_leaves_nothing(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "a.json", b"one")
        write_atomic(tmp_path / "a.json", b"two")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"two")]
        assert sha256_file(tmp_path / "a.json") == hashlib.sha256(b"two").hexdigest()

    def test_others_may_read_it(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_atomic(tmp_path / "a", b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644

    def test_failure_keeps_the_old_file(self, tmp_path: Path) -> None:
        # a folder under the final name: the last step, the rename, fails
        (tmp_path / "a").mkdir()
        with pytest.raises(OSError, match="directory"):
            write_atomic(tmp_path / "a", b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_unfinished_names(self) -> None:
        assert unfinished_name(".summary.json.0123456789abcdef.part") == "summary.json"
        for name in ("summary.json", ".zarray", "x.part", ".summary.json.012345678.part"):
            assert unfinished_name(name) is None
