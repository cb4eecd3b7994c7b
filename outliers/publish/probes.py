"""The results of a probe: brought home, checked, kept next to the study's, and published with them.

    <results>/probes/<probe_id>/probes.json            what each change did to the model's predictions
    <results>/probes/<probe_id>/sensitivity.parquet    what each place and format costs
    <results>/probes/<probe_id>/advice.json            the verdict, drawn here from the two
    <results>/probes/<probe_id>/probe.html             the same as a page, rendered here
    <results>/probes/<probe_id>/manifest.json          names the others, written last

A study keeps its id and digest whatever is probed of it. A published probe is never replaced: its manifest is created once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from outliers.advice.advise import DEFAULT_BUDGET, advise, verdict_words
from outliers.errors import BadInput, DamagedResults, DigestConflict, JobFailed, PublishRefused
from outliers.files.atomic import write_atomic
from outliers.files.beneath import read_beneath
from outliers.locks import locked
from outliers.machines.base import Machine
from outliers.publish.allowlist import ADVICE, MANIFEST, MAX_FILE_BYTES, read_regular
from outliers.publish.contents import NotAllowedError, check_probes, check_sensitivity
from outliers.publish.own import is_private, shown_names
from outliers.publish.stores.open import opened
from outliers.report.shown import Shown, shown_probes
from outliers.results.schema import Advice, Probes, first_error
from outliers.results.schema.fields import Digest, Strict
from outliers.results.write import json_bytes
from outliers.spec import public_name
from outliers.study.parts import LOCKS
from outliers.study.prepare import Prepared
from outliers.study.probes import PROBE_NUMBERS, PROBES, SENSITIVITY, placed_probe, probe_id
from outliers.untrusted.strict_json import strict_json
from outliers.workspace import Workspace

PAGE = "probe.html"
FILES = (*PROBE_NUMBERS, ADVICE, PAGE)
MAX_MANIFEST_BYTES = 16_000
POLL_SECONDS = 0.1


class _File(Strict):
    path: Literal["probes.json", "sensitivity.parquet", "advice.json", "probe.html"]
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(Strict):
    schema_version: Literal[1]
    study_id: Digest
    probe_id: Digest
    files: Annotated[list[_File], Field(max_length=len(FILES))]


@dataclass(frozen=True)
class Probed:
    """The results of one probe, checked: their folder, parsed, and their bytes by name."""

    folder: Path
    manifest: dict[str, Any]
    probes: Probes
    sensitivity: list[dict[str, Any]]
    advice: Advice
    files: Mapping[str, bytes] = field(repr=False)


def is_probed(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether nothing is left to probe: no probe is asked for, or its results are here and whole."""
    if not prepared.spec.probe.asked:
        return True
    try:
        return read_probe(placed_probe(prepared, workspace)) is not None
    except DamagedResults:
        return False


def receive_probe(prepared: Prepared, machine: Machine, workspace: Workspace) -> dict[str, Any]:
    """Bring the numbers of the study's probe from `machine` to its results; their verdict. Raises JobFailed for anything else
    than the numbers of that probe."""
    place = f"captures/{prepared.capture_id}/probes/{probe_id(prepared)}/numbers"
    with tempfile.TemporaryDirectory() as made:
        aside = Path(made) / "numbers"
        try:
            machine.download(
                place, aside, max_bytes=len(PROBE_NUMBERS) * MAX_FILE_BYTES, max_files=2, names=PROBE_NUMBERS
            )
            files = {name: read_regular(aside, name) for name in PROBE_NUMBERS}
            probes = check_probes(files[PROBES])
            rows = check_sensitivity(files[SENSITIVITY], probes)
            _check_study(probes, prepared)
        except (BadInput, PublishRefused, NotAllowedError, ValueError) as error:
            raise JobFailed(f"the probe that {machine.name} gives of {prepared.title} is refused: {error}") from error
    advice = _place(probes, rows, prepared, placed_probe(prepared, workspace), workspace)
    return {"probe_id": probes.probe_id, "paragraph": advice.paragraph}


def _check_study(probes: Probes, prepared: Prepared) -> None:
    """ValueError where the numbers are of another probe than was asked for."""
    dtype = "float32" if prepared.spec.probe.probe_dtype == "float32" else prepared.model.dtype
    named = (prepared.study_id, prepared.capture_id, probe_id(prepared))
    wanted = (*named, prepared.model.source.id, prepared.corpus.source, dtype)
    found = (probes.study_id, probes.capture_id, probes.probe_id, probes.model, probes.corpus, probes.dtype)
    if found != wanted:
        raise ValueError(f"it is of {found}, and {wanted} was asked for")


def _place(
    probes: Probes, rows: list[dict[str, Any]], prepared: Prepared, folder: Path, workspace: Workspace
) -> Advice:
    """`place_probe` of a study that is known: in its page with the names of this machine, else with the public ones."""
    names = (prepared.public_model, prepared.public_corpus)
    return place_probe(probes, rows, folder, workspace, names, shown_names(prepared))


def name_probes(prepared: Prepared, workspace: Workspace) -> None:
    """Render the pages of a study's finished probes with the names of this machine; one that is damaged is left as it is."""
    finished = workspace.study(prepared.study_id) / "probes"
    places = [path for path in finished.glob(f"*/{MANIFEST}") if path.is_file() and not path.is_symlink()]
    for place in sorted(places, key=lambda path: path.stat().st_mtime):  # the newest stays the newest
        try:
            found = read_probe(place.parent)
        except DamagedResults:
            continue
        if found is not None and is_private(prepared):
            _place(found.probes, found.sensitivity, prepared, place.parent, workspace)


def place_probe(
    probes: Probes,
    rows: list[dict[str, Any]],
    folder: Path,
    workspace: Workspace,
    names: tuple[str, str] | None = None,
    shown: Shown | None = None,
) -> Advice:
    """Write the results of a probe from its checked values, the manifest last; returns the verdict. Raises OSError.

    names: what model and corpus are called in what is published (default: by their ids). shown: what they are called in the
    page, which stays in `folder`.
    """
    from outliers.results.schema.probes import sensitivity_bytes

    advice = advise(probes, rows, DEFAULT_BUDGET, names)
    files = {
        PROBES: json_bytes(probes.model_dump(mode="json")),
        SENSITIVITY: sensitivity_bytes(rows),
        ADVICE: json_bytes(advice.model_dump(mode="json")),
        PAGE: _page(probes, rows, advice, names, shown),
    }
    manifest = _manifest_of(probes, files)
    with locked(workspace.root / LOCKS / f"probe-{probes.probe_id}", lambda: time.sleep(POLL_SECONDS)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, data in files.items():
            write_atomic(folder / name, data)
        write_atomic(folder / MANIFEST, json_bytes(manifest))
    return advice


def _page(
    probes: Probes,
    rows: list[dict[str, Any]],
    advice: Advice,
    names: tuple[str, str] | None,
    shown: Shown | None = None,
) -> bytes:
    """probe.html: with the names of this machine, or the public ones."""
    from outliers.report.probe_page import make_probe_page

    named = shown_probes(probes, shown, names or (public_name(probes.model), probes.corpus))
    words = verdict_words(probes, advice, (named.model, named.corpus))
    return make_probe_page(
        named, rows, advice.model_copy(update={"paragraph": words}), "" if shown is None else shown.published
    )


def _manifest_of(probes: Probes, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest of the files of a probe, by name."""
    return {
        "schema_version": 1,
        "study_id": probes.study_id,
        "probe_id": probes.probe_id,
        "files": [
            {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ],
    }


def read_probe(folder: Path) -> Probed | None:
    """The results of a probe in a folder; None where there is no manifest. Raises DamagedResults where they are not what was
    written."""
    try:
        manifest = _parse(read_beneath(folder, MANIFEST, MAX_MANIFEST_BYTES), str(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedResults(f"the probe in {folder} can't be read: {error.strerror or error}") from error
    files: dict[str, bytes] = {}
    for item in manifest.files:
        try:
            data = read_beneath(folder, item.path, MAX_FILE_BYTES)
        except OSError as error:
            raise DamagedResults(f"{folder / item.path} can't be read: {error.strerror or error}") from error
        if (len(data), hashlib.sha256(data).hexdigest()) != (item.size, item.sha256):
            raise DamagedResults(f"{folder / item.path} is not what the manifest says: probe the study again")
        files[item.path] = data
    return _probed(folder, manifest, files)


def _parse(data: bytes, place: str) -> _Manifest:
    try:
        return _Manifest.model_validate(strict_json(data))
    except (ValidationError, ValueError) as error:
        why = first_error(error) if isinstance(error, ValidationError) else str(error)
        raise DamagedResults(f"the manifest of the probe in {place} is not one: {why}") from error


def _probed(folder: Path, manifest: _Manifest, files: Mapping[str, bytes]) -> Probed:
    if missing := [name for name in FILES if name not in files]:
        raise DamagedResults(f"the manifest of the probe in {folder} names no {missing[0]}")
    try:
        probes = check_probes(files[PROBES])
        rows = check_sensitivity(files[SENSITIVITY], probes)
        advice = Advice.model_validate_json(files[ADVICE])
    except (NotAllowedError, ValidationError) as error:
        raise DamagedResults(f"the probe in {folder} is not one: {error}") from error
    if (probes.study_id, probes.probe_id) != (manifest.study_id, manifest.probe_id):
        raise DamagedResults(f"the manifest of the probe in {folder} is of another probe")
    return Probed(folder, manifest.model_dump(), probes, rows, advice, files)


def newest_probe(study: Path) -> Probed | None:
    """The probe of a results folder that was finished last; None where there is none. Raises DamagedResults."""
    found = [path for path in (study / "probes").glob(f"*/{MANIFEST}") if path.is_file() and not path.is_symlink()]
    return read_probe(max(found, key=lambda path: (path.stat().st_mtime, path)).parent) if found else None


def count_probes(probe: Path) -> int:
    """How many finished probes there are in the folder that holds one, that one among them."""
    return sum(path.is_file() for path in probe.parent.glob(f"*/{MANIFEST}"))


def find_probe(prepared: Prepared, workspace: Workspace, target: str | None, slug: str) -> bool:
    """Whether the probe that is asked for is finished, and published where a target is given; or none is asked for.

    One that is published and not here is fetched. Raises the errors of stores.
    """
    if not prepared.spec.probe.asked:
        return True
    here = is_probed(prepared, workspace)
    if target is None:
        return here
    place = f"{slug}/{prepared.study_id}/probes/{probe_id(prepared)}"
    with opened(target) as store:
        there = store.read(f"{place}/{MANIFEST}", MAX_MANIFEST_BYTES)
        if there is None:
            return False
        if here:
            return True
        try:
            manifest = _parse(there, f"{store.url}/{place}")
            named: dict[str, _File] = {item.path: item for item in manifest.files}
            files = {}
            for name in PROBE_NUMBERS:
                data = store.read(f"{place}/{name}", named[name].size)
                if data is None or hashlib.sha256(data).hexdigest() != named[name].sha256:
                    raise PublishRefused(
                        f"{store.url}/{place}/{name} is not what its manifest says: remove it and publish again"
                    )
                files[name] = data
            probes = check_probes(files[PROBES])
            rows = check_sensitivity(files[SENSITIVITY], probes)
            _check_study(probes, prepared)
        except (DamagedResults, NotAllowedError, KeyError, ValueError) as error:
            raise PublishRefused(f"{store.url}/{place} is not a probe that this program reads: {error}") from error
    _place(probes, rows, prepared, placed_probe(prepared, workspace), workspace)
    return True


def publish_probe(folder: Path, target: str, slug: str, names: tuple[str, str] | None = None) -> str:
    """Publish a probe next to its study; the URL of its manifest. One that is there with the same numbers stays.

    Verdict and page are made anew from the numbers: those in `folder` name the files of this machine. names: as in
    `place_probe`. Raises DigestConflict where it is there with others, DamagedResults, and the errors of stores.
    """
    found = read_probe(folder)
    if found is None:
        raise PublishRefused(f"{folder} has no {MANIFEST}: that probe is not finished; run the same again")
    advice = advise(found.probes, found.sensitivity, DEFAULT_BUDGET, names)
    files = {name: found.files[name] for name in PROBE_NUMBERS}
    files |= {ADVICE: json_bytes(advice.model_dump(mode="json"))}
    files |= {PAGE: _page(found.probes, found.sensitivity, advice, names)}
    manifest = _manifest_of(found.probes, files)
    place = f"{slug}/{found.probes.study_id}/probes/{found.probes.probe_id}"
    with opened(target) as store:
        url = f"{store.url}/{place}/{MANIFEST}"
        there = store.read(f"{place}/{MANIFEST}", MAX_MANIFEST_BYTES)
        if there is None:
            placed = {f"{place}/{name}": data for name, data in files.items()}
            if store.create_with(placed, f"{place}/{MANIFEST}", json_bytes(manifest)):
                return url
            there = store.read(f"{place}/{MANIFEST}", MAX_MANIFEST_BYTES)
    if there is None or _numbers(json.loads(there)) != _numbers(manifest):
        raise DigestConflict(f"{url} is published with other numbers: nothing was changed")
    return url


def _numbers(manifest: dict[str, Any]) -> dict[str, str]:
    """What two publications of one probe have in common, whatever version drew the page and the verdict."""
    return {item["path"]: item["sha256"] for item in manifest["files"] if item["path"] in PROBE_NUMBERS}
