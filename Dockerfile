# hf-longctx in an image, on a CPU or on CUDA: docs/installation.md. Built on a CPU from any Python of 3.11 or newer:
#   docker build --tag hf-longctx .
# on CUDA from an image that has torch for the driver, which is kept:
#   docker build --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime --tag hf-longctx:cuda .
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=trl,embedding
ENV PIP_NO_CACHE_DIR=1 TOKENIZERS_PARALLELISM=false
WORKDIR /opt/hf_longctx
COPY . .
RUN python -m pip install --constraint hf_longctx/tested_versions.txt ".[${EXTRAS}]"
RUN hf-longctx env
WORKDIR /workspace
ENTRYPOINT ["hf-longctx"]
CMD ["--help"]
