# The gateway (target `gateway`) and the exporter (target `export`). Build from the repository's root:
#
#   docker build -f deploy/docker/truthgpt.Dockerfile --target gateway -t truthgpt-gateway:0.1.0 .
#
# Checked with hadolint, not built by the tests.

FROM python:3.11.10-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/truthgpt/bin:$PATH
RUN groupadd --gid 10001 truthgpt \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin truthgpt \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/truthgpt /backups \
 && install -d -o 10001 -g 10001 -m 0755 /models
WORKDIR /tmp

FROM base AS gateway-packages
RUN python -m venv /opt/truthgpt
COPY . /src
RUN pip install '/src[gateway,tracing]'

FROM base AS gateway
COPY --from=gateway-packages /opt/truthgpt /opt/truthgpt
USER 10001:10001
ENV TRUTHGPT_HOME=/var/lib/truthgpt TRUTHGPT_MODEL_REPOSITORY=/models TRUTHGPT_BACKUP_DIR=/backups \
    TRUTHGPT_HOST=0.0.0.0 TRUTHGPT_OPS_HOST=0.0.0.0
EXPOSE 8080 8081 9090
CMD ["python", "-m", "orchestrator.app"]

FROM base AS export-packages
# torch by itself first, its build for CPUs: the default one brings gigabytes of CUDA libraries that an export does not need.
RUN python -m venv /opt/truthgpt \
 && pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY . /src
RUN pip install '/src[export]'

FROM base AS export
COPY --from=export-packages /opt/truthgpt /opt/truthgpt
COPY demo/model /opt/truthgpt/demo-model
COPY deploy/docker/export-once /usr/local/bin/export-once
USER 10001:10001
ENV TRUTHGPT_MODEL_REPOSITORY=/models HF_HOME=/tmp/huggingface
CMD ["export-once"]
