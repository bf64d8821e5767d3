# Training image. The default base is NVIDIA's PyTorch image, which holds torch, Apex and Transformer Engine; choose a
# tag whose torch is 2.11 or newer (pyproject.toml). Neither form has been built by CI yet.
#   docker build -t megatron_crnet .
# On a machine without a GPU, give any image with Python 3.11 and pip:
#   docker build --build-arg BASE_IMAGE=python:3.11-slim --build-arg TORCH=requirements-torch.txt -t megatron_crnet:cpu .
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE_IMAGE}

ARG TORCH=
WORKDIR /opt/megatron_crnet
COPY requirements-torch.txt requirements.txt ./
RUN if [ -n "${TORCH}" ]; then python3 -m pip install --no-cache-dir -r "${TORCH}"; fi \
    && python3 -m pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE pretrain_crnet.py ./
COPY megatron_crnet megatron_crnet
COPY tools tools
COPY examples examples
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation .

ENTRYPOINT ["python3", "/opt/megatron_crnet/pretrain_crnet.py"]
CMD ["--help"]
