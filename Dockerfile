# Two targets. The last one, for GPUs, is what `docker build .` makes; `cpu` is for trying things out without one.
#
#   docker build -t megatron_crnet .
#   docker build --target cpu -t megatron_crnet:cpu .
#
# For `cpu` pip may choose the large CUDA build of torch: `--build-arg PIP_EXTRA_INDEX_URL=` with PyTorch's CPU index (see
# pytorch.org) gives the small one. Behind a package index of your own add
# `--secret id=pip.conf,src=$HOME/.config/pip/pip.conf`: it is mounted while pip runs and is not part of the image.
# `--build-arg REVISION=$(git rev-parse HEAD)` is written into the labels.
#
# Pinned by tag: where this was written no registry of images could be asked for the digest. 26.06 holds Python 3.12 and
# PyTorch 2.13.0a0+8145d630e8 (NVIDIA's release notes, rel-26-06); 26.02 and 26.03 hold 2.11.0a0, which comes before the
# 2.11 that pyproject.toml asks for: on them the last pip below ends with saying so.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE_IMAGE=python:3.11.14-slim-bookworm

# ---------------------------------------------------------------------------------------------------------------- cpu
FROM ${CPU_BASE_IMAGE} AS cpu
ARG PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_EXTRA_INDEX_URL=""
WORKDIR /opt/megatron_crnet

# alone, in a layer of its own: the largest part, and what changes least
COPY requirements-torch.txt ./
RUN --mount=type=secret,id=pip.conf python3 -m pip install --no-cache-dir --requirement requirements-torch.txt

# torch and numpy stay as they are from here on, for whoever installs something more as well: what the base image
# compiled (Apex, Transformer Engine, flash attention) fits no others
ENV PIP_CONSTRAINT=/opt/megatron_crnet/constraints.txt
COPY requirements.txt ./
RUN --mount=type=secret,id=pip.conf PIP_CONSTRAINT="" python3 -m pip list --format freeze >installed.txt \
    && grep -E '^(torch|numpy)==' installed.txt >constraints.txt \
    && grep -v '^numpy==' requirements.txt >others.txt \
    && python3 -m pip install --no-cache-dir --requirement others.txt \
    && rm installed.txt others.txt

# a user of its own, and a home in which any other user (`docker run --user`) can write caches
RUN useradd --uid 10001 --create-home crnet \
    && chmod 1777 /home/crnet \
    && install --directory --owner crnet data runs
ENV HOME=/home/crnet USER=crnet LOGNAME=crnet PYTHONUNBUFFERED=1

# in place: one copy of the code, and a checkout mounted over it is what runs. Its requirements are there already:
# pip only checks them
COPY . ./
RUN --mount=type=secret,id=pip.conf python3 -m pip install --no-cache-dir --no-build-isolation --editable .

USER 10001
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_crnet" \
      org.opencontainers.image.description="Distributed pre-training of CR-Net on Megatron-Core and DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["python3", "/opt/megatron_crnet/tools/check_imports.py"]
ENTRYPOINT ["python3", "/opt/megatron_crnet/pretrain_crnet.py"]
CMD ["--help"]

# ---------------------------------------------------------------------------------------------------------------- gpu
# The same again on NVIDIA's torch; tests/unit/test_dockerfile.py keeps the two alike.
FROM ${BASE_IMAGE} AS gpu
ARG PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_EXTRA_INDEX_URL=""
WORKDIR /opt/megatron_crnet

# torch and numpy stay as they are from here on, for whoever installs something more as well: what the base image
# compiled (Apex, Transformer Engine, flash attention) fits no others
ENV PIP_CONSTRAINT=/opt/megatron_crnet/constraints.txt
COPY requirements.txt ./
RUN --mount=type=secret,id=pip.conf PIP_CONSTRAINT="" python3 -m pip list --format freeze >installed.txt \
    && grep -E '^(torch|numpy)==' installed.txt >constraints.txt \
    && grep -v '^numpy==' requirements.txt >others.txt \
    && python3 -m pip install --no-cache-dir --requirement others.txt \
    && rm installed.txt others.txt

# a user of its own, and a home in which any other user (`docker run --user`) can write caches
RUN useradd --uid 10001 --create-home crnet \
    && chmod 1777 /home/crnet \
    && install --directory --owner crnet data runs
ENV HOME=/home/crnet USER=crnet LOGNAME=crnet PYTHONUNBUFFERED=1

# in place: one copy of the code, and a checkout mounted over it is what runs. Its requirements are there already:
# pip only checks them
COPY . ./
RUN --mount=type=secret,id=pip.conf python3 -m pip install --no-cache-dir --no-build-isolation --editable .

USER 10001
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_crnet" \
      org.opencontainers.image.description="Distributed pre-training of CR-Net on Megatron-Core and DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["python3", "/opt/megatron_crnet/tools/check_imports.py"]
ENTRYPOINT ["python3", "/opt/megatron_crnet/pretrain_crnet.py"]
CMD ["--help"]
