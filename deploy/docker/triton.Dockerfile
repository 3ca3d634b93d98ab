# Triton with TruthGPT's backends, for CPUs (target `cpu`) or NVIDIA GPUs (target `gpu`). Build from the repository's root:
#
#   docker build -f deploy/docker/triton.Dockerfile --target cpu -t truthgpt-triton:0.1.0-cpu .
#
# The base has Python 3.12 and CUDA 13. numpy stays below 2: with numpy 2 Triton's Python backend breaks text tensors.
# Checked with hadolint, not built by the tests.

FROM nvcr.io/nvidia/tritonserver:25.08-py3 AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONDONTWRITEBYTECODE=1
RUN pip install 'numpy==1.26.4' 'tokenizers>=0.21,<0.24' 'jinja2>=3.1,<4'
COPY backends/inflight /opt/tritonserver/backends/inflight
COPY backends/encoder /opt/tritonserver/backends/encoder
COPY deploy/docker/serve-models deploy/docker/model-alive /usr/local/bin/
WORKDIR /tmp
EXPOSE 8000 8001 8002
# The base's own entry point prints a banner and then runs this.
CMD ["serve-models"]

FROM base AS cpu
RUN pip install 'onnxruntime==1.32.0' 'numpy==1.26.4'
USER 10001:10001

FROM base AS gpu
RUN pip install 'onnxruntime-gpu==1.31.1' 'numpy==1.26.4'
USER 10001:10001
