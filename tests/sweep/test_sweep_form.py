"""The deployment's parameters as a server checks them: by their JSON schema, before there is a run whose page shows them."""

from __future__ import annotations

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.sweep import sweep

SCHEMA = parameter_schema(sweep).model_dump_for_openapi()
SECRET = "s3://me:hunter2@bucket/x"

REFUSED = [
    # where a password was written, and the field that is blamed
    ({"publish_to": SECRET}, "publish_to"),
    ({"study": [{"model": "a/b"}, {"model": "c/d", "publish_to": SECRET}]}, "study[1].publish_to"),
    ({"defaults": {"publish_to": SECRET}}, "defaults.publish_to"),
    ({"defaults": {"publish_to": "https://bucket/x"}}, "defaults.publish_to"),
    ({"matrix": {"publish_to": [SECRET]}}, "matrix.publish_to[0]"),
    ({"study": [{"model": "https://me:hunter2@hf.co/a/b"}]}, "study[0].model"),
    ({"study": [{"model": {"id": "https://hunter2@hf.co/a/b"}}]}, "study[0].model.id"),
    ({"defaults": {"compute": {"executor": "dask=tcp://me:hunter2@10.0.0.5:8786"}}}, "defaults.compute.executor"),
    ({"defaults": {"capture": {"site_modules": ["x=http://me:hunter2@b/"]}}}, "defaults.capture.site_modules[0]"),
    ({"matrix": {"model": ["a/b", "https://me:hunter2@hf.co/a/b"]}}, "matrix.model[1]"),
    # and what was refused before
    ({"parallel": 0}, "parallel"),
    ({"study": [3]}, "study[0]"),
    ({"matrix": {"dtype": "float32"}}, "matrix.dtype"),
]


@pytest.mark.parametrize(("parameters", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_a_password_is_refused_wherever_it_stands(parameters, field):
    with pytest.raises(ValidationError) as caught:
        validate(parameters, SCHEMA, raise_on_error=True)
    assert f"'{field}'" in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"file": "sweeps/moe.toml", "parallel": 2},
        {
            "study": [
                {"name": "one", "model": "Qwen/Qwen3-0.6B", "publish_to": "s3://bucket/atlas", "label": None},
                {"model": {"id": "/data/model@3", "dtype": "float32"}, "publish_to": None},
                {"model": "a/b", "compute": {"provider": "ssh", "host": "user@lab1", "gpu_count": 1}},
            ],
            "defaults": {
                "corpus": {"source": "builtin:python-docs", "num_sequences": 8},
                "capture": {"sites": ["attn_in"], "layers": [0, 1], "site_modules": ["attn_in=layers.*.x:input"]},
                "compute": {"executor": "dask=tcp://10.0.0.5:8786"},
                "publish_to": "file:///data/atlas",
            },
            "matrix": {"dtype": ["float32"], "magnitude": [6, 8.5], "sites": [["resid"], ["attn_in", "mlp_in"]]},
        },
        {"study": None, "defaults": None, "matrix": None},
    ],
)
def test_what_a_sweep_may_be_is_taken(parameters):
    validate(parameters, SCHEMA, raise_on_error=True)


def test_the_form_asks_for_json_where_a_study_is_written():
    """Prefect's form shows an object's `properties` and nothing else: with one of them, the others could not be given."""
    study, defaults, matrix = (SCHEMA["properties"][name]["anyOf"][0] for name in ("study", "defaults", "matrix"))
    for shown in (study["items"], defaults, matrix):
        assert shown["type"] == "object"
        assert "properties" not in shown
