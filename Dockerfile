# CPU:   docker build -t expertsmith .
# CUDA:  docker build -t expertsmith --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Run:   docker run --rm -v "$PWD:/data" expertsmith inspect demo   (with a GPU: --gpus all)
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/data/.huggingface

WORKDIR /src
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt ".[data,heal]"

WORKDIR /data
ENTRYPOINT ["expertsmith"]
