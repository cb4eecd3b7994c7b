"""`containers/` beside the programs that read it, as far as a machine without a container engine allows.

    python tests/support/containers.py

It runs in an environment with hadolint, prefect-docker and prefect-kubernetes, and without this project (`make test-containers`).
hadolint reads the Dockerfiles; Prefect's workers make of each deployment what they would hand to Docker or Kubernetes; the
Kubernetes client's models read the manifests. No image is built and nothing is started.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import kubernetes_asyncio.client as kubernetes
import yaml
from docker.models.containers import _create_container_args
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

FOLDER = Path(__file__).resolve().parents[2] / "containers"
KINDS = {
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "ServiceAccount": "V1ServiceAccount",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "Deployment": "V1Deployment",
    "Job": "V1Job",
}

PREFECTS = {".spec.template.spec.completions", ".spec.template.spec.parallelism"}
"""Fields of a Job that Prefect 3.9.1 insists on having in its pod; Kubernetes leaves them out."""


class Answer:
    """What the client takes a server's answer for."""

    def __init__(self, content: object) -> None:
        self.data = json.dumps(content)


def lint() -> None:
    """hadolint has nothing to say, style included."""
    for path in sorted(FOLDER.glob("*.Dockerfile")):
        program = Path(sys.executable).with_name("hadolint")
        subprocess.run([program, "--failure-threshold", "style", path], check=True)
        print(f"{path.name}: hadolint finds nothing")


async def known(content: dict[str, Any], kind: str, place: str) -> None:
    """Every field of a manifest is one that the client's model has, with a value of its type."""
    async with kubernetes.ApiClient() as api:
        back = api.sanitize_for_serialization(api.deserialize(Answer(content), kind))
    lost = sorted(set(paths(content)) - set(paths(back)) - PREFECTS)
    if lost:
        raise SystemExit(f"{place}: {kind} has no {', '.join(lost)}")
    print(f"{place}: {kind} has known fields alone")


def paths(value: object, name: str = "") -> list[str]:
    """The name of every leaf that says something."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in paths(item, f"{name}.{key}")]
    if isinstance(value, list):
        return [found for item in value for found in paths(item, f"{name}[]")]
    return [] if value is None else [name]


async def configured(deployment: dict[str, Any]) -> Any:
    """What the pool's worker makes of a deployment's variables."""
    variables, pool = deployment["work_pool"]["job_variables"], deployment["work_pool"]["name"]
    if pool == "outliers-docker":
        template, kind = DockerWorker.get_default_base_job_template(), DockerWorkerJobConfiguration
    else:
        template, kind = json.loads((FOLDER / "kubernetes-pool.json").read_text()), KubernetesWorkerJobConfiguration
    unknown = variables.keys() - template["variables"]["properties"].keys()
    if unknown:
        raise SystemExit(f"{deployment['name']}: the pool {pool} has no variable {', '.join(sorted(unknown))}")
    # it is asked for blocks, of which there are none
    nobody = PrefectClient("http://127.0.0.1:1/api")
    made = await kind.from_template_and_values(template, variables, client=nobody)
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="study model 3x32"))
    return made


async def check_docker(name: str, made: DockerWorkerJobConfiguration) -> None:
    """docker's client takes the arguments, and the container's settings are those of an image that has the code."""
    extra = made.container_create_kwargs or {}
    asked = dict(image=made.image, command=made.command, environment=made.env, volumes=made.volumes, **extra)
    settings = _create_container_args(asked | {"version": docker.constants.DEFAULT_DOCKER_API_VERSION})
    host = settings["host_config"]
    assert host["Binds"] == ["outliers:/data"], host
    assert [one["Capabilities"] for one in host.get("DeviceRequests", [])] == [[["gpu"]]] * (name == "study-docker"), (
        host
    )
    print(f"{name}: docker runs {made.image} with {made.command}")


async def check_kubernetes(name: str, made: KubernetesWorkerJobConfiguration) -> None:
    """The job is one that Kubernetes knows, not root's, with the GPUs that were asked for."""
    job = made.job_manifest
    await known(job, "V1Job", name)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "{{" not in json.dumps(job), job
    assert container["resources"]["limits"]["nvidia.com/gpu"] == ("1" if name.startswith("study") else "0"), container
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "outliers"}, pod
    assert pod["securityContext"]["runAsUser"] == 10001, pod
    assert container["args"] == ["prefect", "flow-run", "execute"], container


async def main() -> None:
    """All of it; the first thing that is wrong ends it. Kubernetes' client wants a running loop."""
    lint()
    for content in yaml.safe_load_all((FOLDER / "kubernetes-worker.yaml").read_text()):
        await known(content, KINDS[content["kind"]], "kubernetes-worker.yaml")
    default = KubernetesWorker.get_default_base_job_template()["job_configuration"]
    ours = json.loads((FOLDER / "kubernetes-pool.json").read_text())["job_configuration"]
    print(f"kubernetes-pool.json leaves out of the default: {', '.join(sorted(default.keys() - ours.keys()))}")
    for deployment in yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]:
        made = await configured(deployment)
        check = check_docker if isinstance(made, DockerWorkerJobConfiguration) else check_kubernetes
        await check(deployment["name"], made)


if __name__ == "__main__":
    asyncio.run(main())
