# The training image; `docker build --target tracking .` builds the tracking server. See docs/docker.md.
#
# BASE_IMAGE: any Debian or Ubuntu image with Python 3.11 or newer, or without Python; NVIDIA's images too. The packages
# are the same on all of them, in a virtual environment that includes the CUDA libraries: the host needs only the driver.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# Base of both images: Python, and an init process that forwards signals and reaps orphans.
FROM ${BASE_IMAGE} AS runtime
# The base decides which versions exist, so none can be pinned.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        tini $(command -v python3 >/dev/null || echo python3) \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/apt /var/log/*.log \
    && mkdir --mode=755 /data \
    && mkdir --mode=1777 /runs
# Clear options of pip and Python that the base may set.
ENV PATH=/opt/venv/bin:$PATH PIP_CONSTRAINT= PYTHONPATH=

# pip, which the other stages mount and so do not contain, and the list of packages.
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
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*p["dependencies"], *p["optional-dependencies"]["s3"], sep="\n")' >requirements.txt

# A compiler and Python's headers: Triton compiles C at run time for train.compile, Inductor C++ on CPUs. numactl is for
# launch.numa_binding.
FROM runtime AS compiler
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ numactl $(python3 -c 'import os, sysconfig; os.path.exists(sysconfig.get_path("include") + "/Python.h") or print("libpython3-dev")') \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/apt /var/log/*.log

# All packages; rebuilt if a version or a dependency changes.
FROM compiler AS packages
COPY --chmod=644 constraints.txt /opt/dl2pa/
COPY --from=builder /build/requirements.txt /opt/dl2pa/
RUN --mount=type=bind,from=builder,source=/build,target=/mnt \
    /mnt/install-packages --constraint=/opt/dl2pa/constraints.txt --requirement=/opt/dl2pa/requirements.txt \
    && /opt/venv/bin/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/dl2pa.pth", "w").write("/opt/dl2pa\n")'

# The code of dl2pa, readable by every user and compiled, so that nothing is written at run time.
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

# The last stage, so that `docker build .` builds it.
FROM packages AS train
ENV PATH=/opt/dl2pa/bin:$PATH \
    # Import nothing from a mounted home or working directory, and no libraries of the base.
    PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    # For a user without name or home directory, on a read-only file system.
    HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 GIT_PYTHON_REFRESH=quiet \
    # Devices and driver features for NVIDIA's runtime and Enroot; JPEGs are decoded in hardware by the video library.
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    DL2PA_DATA=/data
COPY --from=code /opt/dl2pa /opt/dl2pa
ARG REVISION=unknown
# In the working directory /, runs/ is the volume /runs and configs/ the image's configurations. This RUN precedes ENV
# because buildah and podman reuse a cached ENV even if its argument has changed, but not a RUN.
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
