"""The command, as a person and a script use it: what it refuses, what it prints, where it leaves things."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from flows.server.served import SEED
from outliers.publish.publish import model_slug
from tests.support import tiny
from tests.support.commands import run_command, run_step

OUTLIERS = str(Path(sys.executable).with_name("outliers"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a tiny model with a planted feature, and a text."""
    folder = tmp_path_factory.mktemp("a person's") / "my studies"
    folder.mkdir()
    tiny.make_model(folder / "model", "Llama", dtype="bfloat16")
    (folder / "notes.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)
    return folder


def run(folder, *arguments, **environment):
    """`outliers ...` in `folder`, with a home of its own."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k == SEED or not k.startswith(("AWS_", "PREFECT_", "OUTLIERS_", "HF_TOKEN"))
    }
    home = {"HOME": str(folder / "home"), "OUTLIERS_WORKSPACE": str(folder / "ws")}
    return run_command(folder, *arguments, environment=clean | home | environment)


TINY = ("--model", "./model", "--corpus", "notes.txt", "--num-sequences", 3, "--sequence-length", 32)

REFUSED = [
    # what was typed, what the one message must say
    (("study",), "--model is missing"),
    (("study", *TINY, "--gpu-count", 9), "--gpu-count: Input should be less than or equal to 8 (given: 9)"),
    (("study", *TINY, "--gpu-count", "two"), "--gpu-count: Input should be a valid integer"),
    (
        ("study", *TINY, "--sites", "attn_in,attention"),
        "--sites: Input should be 'attn_in', 'mlp_in', 'o_in', 'down_in' or 'resid'",
    ),
    (
        ("study", *TINY, "--publish-to", "http://host/bucket"),
        "is not s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder",
    ),
    (("study", *TINY, "--publish-to", "s3://me:secret@bucket/x"), "must not carry a user or password"),
    (("study", *TINY, "--publish-to", "file:///proc/no/atlas"), "/proc/no"),
    (("study", *TINY, "--workspace", "/proc/no"), "the workspace /proc/no can't be written"),
    (("study", *TINY, "--layers", "0,7"), "layer 7 was asked"),
    (("study", *TINY, "--sequence-length", "600"), "--sequence-length 600 is more than the 512 positions"),
    (
        ("study", *TINY, "--shards", 4),
        "--shards 4 is more than the 3 batches of 1 sequence there are to share: at most 3",
    ),
    (
        ("plan", *TINY, "--shards", 4),
        "--shards 4 is more than the 3 batches of 1 sequence there are to share: at most 3",
    ),
    (("study", *TINY, "--num-sequences", "5000"), "5000 sequences of 32 need 160,000"),
    (("study", *TINY, "--model", "./nothing"), "there is no model at ./nothing"),
    (("study", *TINY, "--model", "Some/Model"), "'Some/Model' is not a folder, a file or a built-in"),
    (("study", *TINY, "--corpus", "missing.txt"), "there is no text at missing.txt"),
    (("study", *TINY, "--provider", "azure"), "provider 'azure' is not known: use local"),
    (
        ("study", *TINY, "--host", "lab1"),
        "provider local, the default, does not take --host (for ssh): leave it out, or say --provider ssh",
    ),
    (
        ("plan", *TINY, "--host", "lab1", "--region", "us", "--max-price", "0.01", "--keep-running"),
        "provider local, the default, does not take --host (for ssh), --region (for sky), --max-price (for ssh or sky), "
        "--keep-running (for ssh or sky): leave them out",
    ),
    (
        ("study", *TINY, "--provider", "sky", "--host", "lab1"),
        "provider sky does not take --host (for ssh): leave it out, or say --provider ssh",
    ),
    (("study", *TINY, "--provider", "ssh", "--region", "us"), "provider ssh does not take --region (for sky)"),
    (("study", *TINY, "--spec", "rented.json"), "provider local does not take --max-total-price (for ssh or sky)"),
    (("study", *TINY, "--keep-seconds", "600"), "leave it out, or say --provider ssh or sky"),
    (("study", *TINY, "--provider", "ssh", "--host", "me@lab:2222"), "a port stands in the ssh configuration"),
    (("study", "--spec", "bad.json"), "corpuss: Extra inputs are not permitted"),
    (("study", "--spec", "missing.json"), "--spec missing.json can't be read"),
    (("plan", *TINY, "--num-sequences", 1_000_000, "--sequence-length", 512), "of disk"),
    (("plan", *TINY, "--min-cpu-ram", 99_000), "99000.0 GB of memory asked (--min-cpu-ram), the machine has"),
    (("captures", "rm", "0123"), "there is no capture 0123"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused_before_anything_runs(place, arguments, message):
    (place / "bad.json").write_text(json.dumps({"model": "m", "corpuss": "x"}))
    compute = {"provider": "local", "max_total_price": 3, "host": None, "keep_running": False}
    (place / "rented.json").write_text(json.dumps({"model": "m", "compute": compute}))
    done = run(place, *arguments)
    said = " ".join(done.stderr.split())
    assert message in said, done.stderr
    assert done.returncode == 2
    # a plan that no machine fits says what it needs
    assert done.stdout == "" or (arguments[0] == "plan" and message not in " ".join(done.stdout.split()))
    assert "Traceback" not in done.stderr
    assert not list((place / "ws").glob("jobs/*")), "something ran"


def test_a_url_with_a_password_is_not_repeated(place):
    done = run(place, "study", *TINY, "--publish-to", "s3://me:hunter2@bucket/x")
    assert "hunter2" not in done.stderr + done.stdout


def test_workspace_of_a_newer_format_is_refused(place):
    (place / "newer").mkdir(exist_ok=True)
    (place / "newer" / "workspace.json").write_text('{"format": 99}')
    done = run(place, "study", *TINY, "--workspace", "newer")
    assert (done.returncode, "has format 99, this version reads up to 1" in " ".join(done.stderr.split())) == (2, True)


def test_gpu_options_that_this_machine_can_not_meet_print_the_command_to_rent(place):
    asked = (
        "--gpu-count",
        2,
        "--gpu-filter",
        "H100-NOT-HERE",
        "--min-vram",
        80,
        "--min-cpu-ram",
        80,
        "--max-price",
        5,
        "--keep-running",
    )
    done = run(place, "study", *TINY, *asked)
    assert done.returncode == 2
    assert (
        "--gpu-filter H100-NOT-HERE --min-vram 80 --min-cpu-ram 80 --max-price 5 --keep-running --provider sky"
        in done.stderr
    )
    assert "2 GPUs named like 'H100-NOT-HERE' (--gpu-filter) asked, the machine has 0" in done.stderr


def test_help_describes_every_option(place):
    from outliers.spec import StudySpec

    text = " ".join(run(place, "study", "--help").stdout.split())
    for part in ("model", "corpus", "capture", "criteria", "compute"):
        kind = StudySpec.model_fields[part].annotation
        for name, field in kind.model_fields.items():
            renamed = {"id": "model", "source": "corpus", "site_modules": "site_module", "name": f"{part}_name"}
            option = renamed.get(name, name).replace("_", "-")
            assert f"--{option}" in text
            assert " ".join(field.description.split())[:40] in text, name


def test_a_model_is_inspected_from_its_config_alone(place):
    """Published configs of an MoE model with dense layers and a quantization; no weights are there."""
    folder = place / "deepseek"
    folder.mkdir()
    config = Path(__file__).parents[1] / "support" / "configs" / "deepseek-v3.json"
    (folder / "config.json").write_text(config.read_text())
    shown = run(place, "models", "inspect", "./deepseek")
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for part in (
        "deepseek (DeepseekV3ForCausalLM)",
        "671.0B, 37.6B active a token",
        "1.34 TB in memory (bfloat16; 688.57 GB on disk in fp8, made plain on loading)",
        "61 of 7,168 features: model.layers",
        "58 (3-60), 256 experts, 8 a token",
        "3 (0-2)",
        "layers.*.mlp.gate",
        "layers.*.mlp.experts",
        "attn_in 7168 layers.*.input_layernorm",
        "o_in 16384 layers.*.self_attn.o_proj:input",
    ):
        assert part in text, part
    assert shown.stderr == ""
    found = json.loads(run(place, "models", "inspect", "./deepseek", "--json").stdout)
    assert found["anatomy"]["moe_layers"] == list(range(3, 61))
    assert "path" not in found["source"]


def test_a_family_that_is_not_known_is_refused_with_what_it_has(place):
    folder = place / "stranger"
    folder.mkdir()
    config = transformers.Starcoder2Config(**tiny.COMMON)
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["Starcoder2ForCausalLM"], "dtype": "bfloat16"})
    )
    refused = run(place, "models", "inspect", "./stranger")
    assert refused.returncode == 2
    assert "the sites of Starcoder2ForCausalLM are not known" in refused.stderr
    assert "--site-module attn_in=layers.*.NAME" in refused.stderr
    named = ("--site-module", "attn_in=layers.*.input_layernorm", "--site-module", "mlp_in=layers.*.mlp:input")
    shown = run(place, "models", "inspect", "./stranger", *named)
    assert shown.returncode == 0, shown.stderr
    assert "o_in not known: --site-module o_in=PATTERN" in " ".join(shown.stdout.split())
    missing = run(place, "models", "inspect", "./stranger", "--site-module", "attn_in=layers.*.nothing")
    assert (missing.returncode, "3 of 3 modules are not there" in missing.stderr) == (2, True)


def test_plan_counts_and_spends_nothing(place):
    done = run(place, "plan", *TINY, "--json")
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert plan["capture_bytes"] == 3 * 2 * 3 * 32 * 32 * 2 + 3 * (32 * 5 + 4)
    assert plan["offers"][0]["provider"] == "local"
    assert plan["total_parameters"] == plan["active_parameters"] > 0
    assert not (place / "ws" / "captures").exists()


@pytest.fixture(scope="module")
def finished(place):
    """One study with every option working together, published to a folder; (process, its JSON)."""
    done = run(
        place, "study", *TINY, "--gpu-count", 0, "--min-cpu-ram", 0.5,
        "--sites", "attn_in,mlp_in,resid", "--dtype", "bfloat16", "--magnitude", 6, "--reading", "pooled", "--json",
        "--publish-to", f"file://{place}/atlas",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout)


@pytest.mark.servers
def test_study_prints_one_json_object_and_leaves_a_whole_study(place, finished):
    done, outcome = finished
    assert [feature["feature"] for feature in outcome["systematic"]] == [tiny.PLANTED]
    assert outcome["cached"] is False
    results = Path(outcome["results"])
    assert {"summary.json", "features.parquet", "tokens.json", "report.html", "manifest.json", "run.log"} <= {
        path.name for path in results.iterdir()
    }
    manifest = json.loads((results / "manifest.json").read_text())
    assert outcome["published"].endswith(f"{outcome['study_id']}/manifest.json")
    slug = model_slug(manifest["headline"]["model"])
    published = place / "atlas" / slug / outcome["study_id"]
    # the folder in the workspace has the page of the owner, so the store has a manifest of its own
    there = json.loads((published / "manifest.json").read_text())
    objects = published / there["folder"]
    assert (
        {str(p.relative_to(objects)) for p in objects.rglob("*") if p.is_file()}
        == {f["path"] for f in there["files"]}
        == {f["path"] for f in manifest["files"]}
    )
    assert there["results_digest"] == manifest["results_digest"]
    assert not list(published.rglob("run.log")), "the log is published only when asked"
    assert "extract" in done.stderr
    summary = json.loads((results / "summary.json").read_text())
    assert summary["massive"] is not None
    assert summary["corpus"]["publish_text"] == "none", "a user's own text is not published unasked"
    assert "bright cold day" not in (results / "tokens.json").read_text() + (objects / "report.html").read_text()
    assert "bright" in (results / "report.html").read_text(), "his own report shows it"


@pytest.mark.servers
def test_no_path_host_or_user_is_in_what_is_published(place, finished):
    _, outcome = finished
    for path in Path(outcome["results"]).rglob("*"):
        if path.is_file():
            assert str(place).encode() not in path.read_bytes(), path


@pytest.mark.servers
def test_a_second_run_is_answered_without_prefect(place, finished):
    _, outcome = finished
    script = (
        "import sys; from flows.cli import main; code = main(sys.argv[1:]);"
        "print('prefect' in sys.modules, 'torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    # asked just as the first was: another --dtype that comes to the same would be resolved anew, with torch
    sites = ("--sites", "attn_in,mlp_in,resid", "--dtype", "bfloat16")
    arguments = [*map(str, TINY), *sites, "--publish-to", f"file://{place}/atlas", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, "study", *arguments],
        cwd=place,
        env=os.environ | {"HOME": str(place / "home"), "OUTLIERS_WORKSPACE": str(place / "ws")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip().splitlines()[-1] == "False False"
    again = json.loads(done.stdout)
    assert again == outcome | {"cached": True}


@pytest.mark.studies
@pytest.mark.servers
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_a_finished_study_is_tracked_or_says_that_it_is_not(place, finished):
    asked = (
        "study",
        *TINY,
        "--sites",
        "attn_in,mlp_in,resid",
        "--dtype",
        "bfloat16",
        "--publish-to",
        f"file://{place}/atlas",
    )
    uri = f"file://{place}/runs".replace(" ", "%20")
    done = run(place, *asked, "--track", f"mlflow:{uri}", "--json", MLFLOW_ALLOW_FILE_STORE="true")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tracked"].startswith(uri)
    assert told["not_tracked"] is None
    gone = run(place, *asked, "--track", "mlflow:http://127.0.0.1:9", "--json")
    assert gone.returncode == 3
    assert "finished and not tracked" in gone.stderr
    told = json.loads(gone.stdout)
    assert told["tracked"] is None
    assert told["study_id"] == finished[1]["study_id"]
    assert run(place, *asked, "--track", "mlflow:http://me:secret@host").returncode == 2


@pytest.mark.servers
def test_results_lost_here_are_fetched_from_where_they_were_published(place, finished):
    import shutil

    _, outcome = finished
    shutil.rmtree(outcome["results"])
    arguments = (*TINY, "--sites", "attn_in,mlp_in,resid", "--publish-to", f"file://{place}/atlas", "--json")
    again = json.loads(run(place, "study", *arguments).stdout)
    assert (again["cached"], again["systematic"]) == (True, outcome["systematic"])
    assert (Path(again["results"]) / "report.html").exists()


@pytest.mark.servers
def test_captures_are_listed_and_removed(place, finished):
    _, outcome = finished
    listed = json.loads(run(place, "captures", "list", "--json").stdout)["captures"]
    (one,) = [held for held in listed if held["capture_id"] == outcome["capture_id"]]
    assert (one["done"], one["of_sequences"]) == (3, 3)
    assert one["bytes"] > 3 * 3 * 3 * 32 * 32 * 2
    assert run(place, "captures", "rm", outcome["capture_id"]).returncode == 0
    assert not (place / "ws" / "captures" / outcome["capture_id"]).exists()


@pytest.mark.servers
def test_nothing_is_written_outside_the_workspace(place, finished):
    """The study's own home folder stayed empty, but for what libraries keep in ~/.cache."""
    left = [path for path in (place / "home").rglob("*") if path.is_file()] if (place / "home").exists() else []
    assert [path for path in left if ".cache" not in path.parts] == []


FILLING = """
mount -t tmpfs -o size=4m tmpfs "$1" || exit 77
mkdir "$1/ws" && head -c 2500000 /dev/zero > "$1/ballast"
shift
"$@"; echo "full: $?"
rm "$BALLAST"
"$@"; echo "room: $?"
"""


@pytest.mark.studies
@pytest.mark.servers
def test_a_full_disk_in_the_middle_is_one_clear_error_and_then_a_resume(place, tmp_path):
    """A small tmpfs in a namespace of its own: the writers fail, the step says so, and with room the journal's work stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    spec = tmp_path / "spec.json"
    made = tiny.spec_for(place / "model", place / "notes.txt", 12, 340)
    made["capture"]["sites"] = ["attn_in", "mlp_in", "o_in", "resid"]
    spec.write_text(json.dumps(made))
    extract = [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(disk / "ws")]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", FILLING, "sh", str(disk), *extract],
        env=os.environ | {"BALLAST": str(disk / "ballast")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("a mount of one's own needs root")
    assert "full: 1" in done.stdout, done.stderr
    assert "takes no more (No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "room: 0" in done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-2])["sequences"] < 12


@pytest.mark.parametrize(
    ("verb", "content", "code", "message"),
    [
        ("extract", None, 2, "can't be read: No such file"),
        ("extract", "{", 2, "is not JSON"),
        ("extract", '{"model": "x", "corpos": 1}', 2, "corpos: Extra inputs are not permitted"),
        (
            "extract",
            '{"corpus": {"num_sequences": 0}}',
            2,
            "model: Field required; corpus.num_sequences: Input should be",
        ),
        ("analyze", "tiny", 1, "extract first"),
        pytest.param("report", "tiny", 1, "analyze first", marks=pytest.mark.studies),
        pytest.param("verify", "tiny", 1, "there is no capture", marks=pytest.mark.studies),
    ],
)
def test_steps_say_what_is_missing(place, tmp_path, verb, content, code, message):
    spec = tmp_path / "spec.json"
    if content == "tiny":
        content = json.dumps(tiny.spec_for(place / "model", place / "notes.txt"))
    if content is not None:
        spec.write_text(content)
    done = run_step(verb, spec, "--workspace", tmp_path / "ws")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
