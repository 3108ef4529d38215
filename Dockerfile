# Images that train: `docker build --target=cuda .` for GPU nodes, `--target=cpu .` for CPUs and TPUs.
#
#   docker run IMAGE --config=configs/quickstart.py --workdir=/workdir
#
# CUDA 13 needs NVIDIA's driver 580 or newer on the host; with `--build-arg CUDA=12` it is 525.
# Weights & Biases is in both images, a wheel of 20 MB, as only the trainer can use it. XProf, which
# shows traces, is not: it runs where TensorBoard does.
#
# launch/docker_gpu.sh adds the GPUs, folders that outlive the container and more;
# `python -m tools.gke` writes the JobSet for GKE. Both leave time to save after SIGTERM: `docker
# stop` alone kills after 10 seconds, `docker stop --time=120` does not.

FROM python:3.11.14-slim-bookworm AS base
LABEL org.opencontainers.image.title="spectral_pod" \
    org.opencontainers.image.description="Trains byte-level spectral sequence models"
# HOME and USER suit any --user; launch/docker_gpu.sh adds its name. Malloc: as launch/local.sh.
ENV HOME=/home/trainer USER=trainer \
    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
RUN useradd --create-home --uid 1000 trainer \
    && install --directory --mode=1777 /home/trainer /workdir
WORKDIR /spectral_pod
COPY requirements.txt ./
# All sections of requirements.txt but the last, which is for tests.
RUN sed '/^# --- tests$/,$d' requirements.txt > requirements.image.txt \
    && echo 'wandb==0.31.0' >> requirements.image.txt \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements.image.txt
# The supervisor is process 1: it forwards SIGTERM, and restarts where that helps. Docker's own
# --restart would also do so after a misspelt flag, as it ignores exit codes. Kubernetes does not,
# and has to restart all hosts at once: there the trainer is process 1 (tools/gke_jobset.yaml).
ENTRYPOINT ["launch/supervise.sh", "--", "python", "-m", "spectral_pod.main"]

FROM scratch AS code
COPY configs /configs
COPY launch /launch
COPY spectral_pod /spectral_pod
COPY tools /tools

FROM base AS cpu
COPY --from=code / ./
USER 1000

FROM base AS cuda
# If JAX cannot use the GPU, that is an error rather than a run on CPUs.
ENV JAX_PLATFORMS=cuda,cpu
# NCCL finds InfiniBand by these libraries. No versions: Debian drops all but the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/*
# CUDA's libraries are wheels; the driver is that of the host.
ARG CUDA=13
RUN case "$CUDA" in 12 | 13) ;; *) echo "--build-arg CUDA=$CUDA: 12 or 13" >&2; exit 1 ;; esac \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements.image.txt \
    "jax[cuda${CUDA}]==0.10.2"
COPY --from=code / ./
USER 1000
