# The training image; `docker build --target tracking .` makes the tracking server's. See docs/docker.md.
#
# BASE_IMAGE: any Debian or Ubuntu with a Python of 3.11 or newer, or without one; NVIDIA's own images too. The packages
# are the same on all of them: they live in an environment of their own, CUDA's libraries included, so that the host has
# to bring nothing but the driver.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What both images stand on: Python, and an init that hands signals on and buries orphans.
FROM ${BASE_IMAGE} AS runtime
# The distribution of the base decides which versions there are, so none can be named here.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        tini $(command -v python3 >/dev/null || echo python3) \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/apt /var/log/*.log \
    && mkdir --mode=755 /data \
    && mkdir --mode=1777 /runs
# The base may set pip's options and Python's for packages of its own.
ENV PATH=/opt/venv/bin:$PATH PIP_CONSTRAINT= PYTHONPATH=

# pip, which the images mount where they need it and so do not contain; and the list of what they install.
FROM runtime AS builder
# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' \
    || { apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
WORKDIR /build
RUN python3 -m venv venv \
    && mv venv/lib/python3*/site-packages/pip .
COPY --chmod=755 docker/install-packages .
COPY pyproject.toml .
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    >requirements.txt

# Everything but our own code: built again when a version or a dependency changes.
FROM runtime AS packages
COPY --chmod=644 constraints.txt /opt/dl2pa/
COPY --from=builder /build/requirements.txt /opt/dl2pa/
RUN --mount=type=bind,from=builder,source=/build,target=/mnt \
    /mnt/install-packages --constraint=/opt/dl2pa/constraints.txt --requirement=/opt/dl2pa/requirements.txt \
    && /opt/venv/bin/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/dl2pa.pth", "w").write("/opt/dl2pa\n")'

# Our own code, readable by every user whatever the rights in the checkout, and compiled: nothing is written at run time.
FROM runtime AS code
WORKDIR /opt/dl2pa
COPY docker/dl2pa docker/dl2pa-health bin/
COPY dl2pa dl2pa
COPY launcher launcher
COPY pipelines pipelines
COPY configs configs
RUN chmod -R u=rwX,go=rX . \
    && chmod 755 bin/* \
    && python3 -m compileall -q --invalidation-mode unchecked-hash dl2pa launcher pipelines

# MLflow on PostgreSQL: the server of docker/compose.yaml.
FROM runtime AS tracking
COPY --chmod=644 constraints.txt /opt/tracking/
RUN --mount=type=bind,from=builder,source=/build,target=/mnt \
    /mnt/install-packages --constraint=/opt/tracking/constraints.txt 'mlflow[auth]' 'psycopg[binary]' \
    && mkdir --mode=1777 /artifacts
COPY --chmod=755 docker/tracking-server /opt/tracking/
COPY --chmod=644 docker/basic-auth.ini /opt/tracking/
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 GIT_PYTHON_REFRESH=quiet MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="DL2PA tracking server" \
      org.opencontainers.image.description="MLflow on PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /tmp
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/tracking/tracking-server"]

# Last, so that a plain `docker build .` makes it.
FROM packages AS train
ENV PATH=/opt/dl2pa/bin:$PATH \
    # Only what is in the image is run: nothing of a mounted home or working directory, nor libraries of the base.
    PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    # For a user without a name or a home, on a file system that cannot be written.
    HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 GIT_PYTHON_REFRESH=quiet \
    # What NVIDIA's runtime and Enroot let in.
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DL2PA_DATA=/data
COPY --from=code /opt/dl2pa /opt/dl2pa
ARG REVISION=unknown
# From / a relative runs/ is the volume /runs, and configs/ the image's own. Here, because buildah and podman would take
# an ENV from their cache whatever the argument now is, but never a RUN.
RUN ln -s /opt/dl2pa/configs /configs
ENV DL2PA_IMAGE=$REVISION
LABEL org.opencontainers.image.title="DL2PA" \
      org.opencontainers.image.description="Training of classifiers on fixed hyperspherical prototypes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=$REVISION
USER 1000:1000
WORKDIR /
HEALTHCHECK --interval=1m --timeout=20s CMD ["dl2pa-health"]
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "dl2pa"]
CMD ["--help"]
