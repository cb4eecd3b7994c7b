"""StudySpec and the ids: what is allowed, what is refused in which words, what changes an id and what must not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest
from pydantic import ValidationError

from flows.study import study
from outliers.errors import BadInput, PlanRefused
from outliers.machines.options import TAKEN_BY, check_options, foreign
from outliers.spec import STORE_PATTERN, ComputeSpec, CriteriaSpec, ModelSpec, StudySpec, digest, has_login
from outliers.study.prepare import prepare
from outliers.sweep.sweep import answer, make_sweep
from outliers.workspace import open_workspace
from tests.support import tiny


def test_bare_strings_stand_for_model_and_corpus():
    spec = StudySpec(model="builtin:smollm2", corpus="notes.txt")
    assert (spec.model.id, spec.corpus.source) == ("builtin:smollm2", "notes.txt")
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute": {"gpu_count": 9}}, "less than or equal to 8"),
        ({"capture": {"sites": ["attn_out"]}}, "'attn_in', 'mlp_in', 'o_in', 'down_in' or 'resid'"),
        ({"capture": {"sites": []}}, "at least 1 item"),
        ({"capture": {"layers": [-1]}}, "0-based"),
        ({"capture": {"layers": "5-2"}}, "5-2 names no layer"),
        ({"capture": {"layers": "0-2,"}}, "numbers and ranges such as 0-5,20-, or all; got 0-2,"),
        ({"capture": {"layers": ["0", "x"]}}, "got 0,x"),
        ({"capture": {"layers": "0-99999"}}, "no model has a layer 99999"),
        ({"captures": {}}, "Extra inputs are not permitted"),
        ({"corpus": {"num_sequence": 4}}, "Extra inputs are not permitted"),
        ({"criteria": {"position_fraction": 6}}, "less than or equal to 1"),
        ({"criteria": {"ladder": [3.0, float("inf")]}}, "positive finite numbers"),
        ({"criteria": {"site": "resid"}}, "'resid' is not captured; captured: attn_in, mlp_in, block"),
        ({"capture": {"sites": ["o_in", "resid"]}}, "leave open which one decides"),
        ({"publish_to": "s3://user:key@bucket/x"}, "must not carry a user or password"),
        ({"publish_to": "http://host/x"}, "is not s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder"),
        ({"publish_to": "hf://lab/studies"}, "is not hf://datasets/ORG/NAME"),
        ({"publish_to": "hf://datasets/lab/studies@v1"}, "is not hf://datasets/ORG/NAME"),
        ({"publish_to": "s3:bucket"}, "no valid bucket name"),
        ({"publish_to": "file://folder/x"}, "three slashes"),
        ({"label": "a/b"}, "match pattern"),
        ({"compute": {"keep_seconds": 10**9}}, "less than or equal to 604800"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValidationError) as caught:
        StudySpec.model_validate({"model": "m", **given})
    assert message in str(caught.value)


def test_every_field_says_what_it_is():
    def fields(model, path=""):
        for name, field in model.model_fields.items():
            assert field.description, f"{path}{name} has no description"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                fields(field.annotation, f"{path}{name}.")

    fields(StudySpec)


def test_fractions_are_the_decimals_that_were_written():
    assert CriteriaSpec().position_rule == Fraction(6, 100)
    assert CriteriaSpec(layer_fraction=0.1).layer_rule == Fraction(1, 10)


def test_deciding_site():
    def site(*sites):
        return StudySpec(model="m", capture={"sites": sites}).deciding_site

    assert site("mlp_in", "attn_in", "resid") == "block"
    assert site("resid") == "resid"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny.make_model(folder / "model")
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten. " * 50)
    return folder, tiny.spec_for(model, folder / "text.txt")


def ids(base, **changes):
    folder, spec = base
    merged = dict(spec)
    for name, value in changes.items():
        merged[name] = {**spec.get(name, {}), **value} if isinstance(value, dict) else value
    prepared = prepare(StudySpec.model_validate(merged), open_workspace(folder / "ws"))
    return prepared.capture_id, prepared.study_id


@pytest.mark.parametrize(
    ("changes", "capture", "study"),
    [
        # machine, workspace, codec and target are in no id
        ({"compute": {"provider": "ssh", "gpu_count": 0, "keep_running": True, "machine": "x"}}, False, False),
        ({"capture": {"codec": "zstd"}}, False, False),
        ({"capture": {"store": "rolling", "store_sequences": 2, "disk_window": 0.5}}, False, False),
        ({"publish_to": "s3://bucket/x"}, False, False),
        ({"criteria": {"ladder": (3.0, 4.5, 8.0, 12.0, 20.0, 50.0, 100.0)}}, False, False),
        # what is looked for changes the study alone
        ({"criteria": {"magnitude": 5.0}}, False, True),
        ({"criteria": {"reading": "union"}}, False, True),
        ({"label": "b200"}, False, True),
        ({"publish_text": "context"}, False, True),
        # what determines the activations changes both
        ({"capture": {"sites": ("attn_in", "mlp_in", "resid")}}, True, True),
        ({"capture": {"layers": (0, 1)}}, True, True),
        ({"capture": {"batch_sequences": 2}}, True, True),
        ({"model": {"dtype": "bfloat16"}}, True, True),
        ({"corpus": {"sequence_length": 23}}, True, True),
        ({"corpus": {"bos": "always"}}, True, True),
    ],
)
def test_what_an_id_covers(base, changes, capture, study):
    before, after = ids(base), ids(base, **changes)
    assert (before[0] != after[0], before[1] != after[1]) == (capture, study)


def test_auto_and_all_are_resolved_before_the_digest(base):
    assert ids(base) == ids(base, model={"dtype": "float32"}, capture={"layers": (0, 1, 2)})


@pytest.mark.parametrize("layers", ["0-", "0-2", ["0-1", "2"], "0,1-", ["2", "0-1"]])
def test_ranges_of_layers_are_the_layers_that_they_name(base, layers):
    assert ids(base) == ids(base, capture={"layers": layers})


def test_a_range_that_begins_after_the_model_is_refused(base):
    with pytest.raises(BadInput, match=r"--layers 1,3-: 3- names no layer; .* has layers 0 to 2"):
        ids(base, capture={"layers": "1,3-"})


def test_short_names_of_dtypes_stand_for_the_long_ones(base):
    assert ids(base, model={"dtype": "bf16"}) == ids(base, model={"dtype": "bfloat16"}) != ids(base)
    assert ModelSpec(id="m", dtype="fp16").dtype == "float16"


def test_ids_are_the_same_in_another_process_with_another_hash_seed(base):
    folder, spec = base
    script = (
        "import json,sys; from outliers.study.prepare import *; from outliers.workspace import open_workspace;"
        "p = prepare(StudySpec.model_validate(json.loads(sys.argv[1])), open_workspace(sys.argv[2]));"
        "print(p.capture_id, p.study_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(spec), str(folder / "other")],
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "99", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(done.stdout.split()) == ids(base)


def test_a_moved_model_and_text_keep_their_ids(base, tmp_path):
    import shutil

    folder, _ = base
    shutil.copytree(folder / "model", tmp_path / "elsewhere")
    shutil.copy(folder / "text.txt", tmp_path / "renamed.txt")
    spec = tiny.spec_for(tmp_path / "elsewhere", tmp_path / "renamed.txt")
    moved = prepare(StudySpec.model_validate(spec), open_workspace(tmp_path / "ws"))
    assert moved.capture_id == ids(base)[0]
    assert moved.model.source.id.startswith("local:")
    assert str(tmp_path) not in json.dumps(moved.public_spec())


def test_what_is_stored_is_in_a_public_spec_where_it_is_not_everything(base):
    folder, spec = base

    def public(**capture):
        made = prepare(StudySpec.model_validate(spec | {"capture": capture}), open_workspace(folder / "ws"))
        found = made.public_spec()["capture"]
        return {name: found[name] for name in ("store", "store_sequences", "disk_window") if name in found}

    assert public() == {} == public(store_sequences=7)
    assert public(store="rolling", disk_window=3.0) == {"store": "rolling", "store_sequences": 4}


def test_a_window_belongs_to_rolling():
    with pytest.raises(
        ValidationError, match=r"--disk-window 2 is the window of --store rolling, and --store full has none"
    ):
        StudySpec.model_validate({"model": "m", "capture": {"disk_window": 2.0}})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"formats": ["int8"]},
            "--formats samples tokens of the whole corpus, and --store rolling keeps the first sequences",
        ),
        ({"compute": {"executor": "dask=tcp://a:1"}}, "--executor dask=tcp://a:1 counts a capture that is there whole"),
        ({"probe": {"probe": "check"}}, "give --store-sequences 16, or --probe-sequences 4"),
    ],
)
def test_what_needs_all_activations_is_refused_before_anything_runs(asked, told):
    with pytest.raises(ValidationError, match=re.escape(told)):
        StudySpec.model_validate({"model": "m", "capture": {"store": "rolling"}} | asked)
    StudySpec.model_validate({"model": "m"} | asked)


def test_a_probe_of_what_stays_is_none_of_that():
    probe = {"probe": "check", "probe_sequences": 4}
    StudySpec.model_validate({"model": "m", "capture": {"store": "rolling"}, "probe": probe})
    few = {
        "model": "m",
        "corpus": {"source": "t", "num_sequences": 3},
        "capture": {"store": "rolling"},
        "probe": {"probe": "check"},
    }
    StudySpec.model_validate(few)


def test_digest_is_sorted_and_plain():
    assert digest({"b": 1, "a": (2,)}) == digest({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))


def test_an_option_of_another_provider_is_refused_before_the_model_is_looked_for(workspace, monkeypatch):
    """Also where no command reads the options: in the flow, in a sweep. Defaults that are written out are not options."""
    written = ComputeSpec().model_dump()
    for name in ("", "local", "ssh", "sky"):
        check_options(ComputeSpec.model_validate(written | {"provider": name}))
    for field in TAKEN_BY:
        assert foreign(ComputeSpec.model_validate({field: written[field]})) == ()
    compute = ComputeSpec(max_price=3, host="lab1", workspace=str(workspace.root))
    entry = {"name": "one", "model": "no/model", "compute": compute.model_dump(exclude_defaults=True)}
    (planned,) = make_sweep({"study": [entry]}, "one").studies
    for begin in (lambda: study.fn("no/model", compute=compute), lambda: answer(planned)):
        with pytest.raises(
            PlanRefused, match=r"^provider local, the default, does not take --host .*say --provider ssh$"
        ):
            begin()
    monkeypatch.setenv("OUTLIERS_PROVIDER", "ssh")
    check_options(compute)
    with pytest.raises(BadInput, match="a port stands in the ssh configuration"):
        check_options(ComputeSpec(host="lab1:22"))


STORES = ("s3://atlas", "s3://atlas/", "s3://atlas/runs/2", "file:///tmp", "file:///srv/a b/c", "s3://a.b-c.d/x@y")
LOGINS = ("s3://user:pass@atlas/runs", "s3://key@atlas", "file://user@host/folder", "s3://u:p@atlas/x?y")


@pytest.mark.parametrize("url", [*STORES, *LOGINS, "s3://", "file://tmp", "ftp://x/y", "s3://atlas/a?b", "file:///a#b"])
def test_a_store_that_a_spec_takes_passes_the_form_and_a_login_passes_neither(url):
    try:
        taken = StudySpec(model="builtin:smollm2", publish_to=url) is not None
    except ValidationError:
        taken = False
    assert taken == (url in STORES)
    assert re.search(STORE_PATTERN, url) or not taken
    assert has_login(url) == (url in LOGINS)
    if url in LOGINS:
        assert not re.search(STORE_PATTERN, url)
