"""Hardware that programs are compiled for: chips, the names of slices, and their devices.

A slice is what is joined by a fast network: chips of a TPU slice by ICI, and the GPUs of a host by
NVLink, whose figures stand where those of ICI do. Between slices is the network of the data centre.

This module imports JAX only inside functions, as `prepare` must run first.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from spectral_pod.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one JAX device: a chip, or on tpu7x one of the two chiplets of a chip."""

    family: str
    device_kinds: tuple[str, ...]
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # available to a program; 0: see `memory`
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that it sends over all its links
    dcn_bandwidth: float  # bytes/s sent by one host
    chips_per_host: int
    dimensions: int  # of the torus of chips
    cores: int  # TensorCores of a chip; the 128 of v4-128 counts these
    clock: float  # cycles/s of a core
    latency: (
        float  # seconds of an instruction that reads and writes HBM, however little; 0: unknown
    )
    largest: int  # chips in the largest slice
    devices: int = 1  # JAX devices of a chip
    platform: str = "tpu"  # as JAX calls it: "cpu", "gpu" or "tpu"
    float32_flops: float = 0.0  # FLOP/s of a GPU outside of its matrix units
    target: str = ""  # what XLA must know of a GPU that is absent: lines of its `target_config`

    def __str__(self) -> str:
        return self.family


_GIB = 2**30
# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. ICI is half of the documented figure for
# both directions (v4: 6 links of 50 GB/s, v5e 400, v5p and tpu7x 1,200, v6e 800 GB/s). DCN is the
# bandwidth of the NICs: 50 Gbit/s per chip on v5p, 100 on tpu7x, 2 x 100 Gbit/s for 8 chips on v5e
# and 4 x 200 on v6e, which have 4 chips per host in slices of more than 8 chips; v4's is not
# documented and assumed equal to v5p's. HBM is what the compiler (libtpu 0.0.52; 0.0.42 at most
# 10 MiB more) reports as available to a program.
# Clocks follow from the peaks: 4 matrix units of 128 x 128 a core, from v6e on of 256 x 256.
# Latencies are libtpu's own estimates for a sum of 8 numbers: 612, 1,826, 2,123, 2,121 and 2,298
# cycles. A chip of tpu7x (Ironwood) is two chiplets, which are a device each: 2,307 TFLOP/s, 7,380
# GB/s of HBM and the network are halved. That the chiplets share a faster link is left out.
# CPU: nominal figures of one laptop core, so that the same formulas apply.
_TPUS = (
    Chip(
        family="v4", device_kinds=("TPU v4",), peak_flops=275e12, hbm_bytes=int(30.75 * _GIB),
        hbm_bandwidth=1.2e12, ici_bandwidth=300e9, dcn_bandwidth=25e9, chips_per_host=4,
        dimensions=3, cores=2, clock=1.05e9, latency=0.58e-6, largest=4096,
    ),
    Chip(
        family="v5e", device_kinds=("TPU v5 lite", "TPU v5e"), peak_flops=197e12,
        hbm_bytes=int(15.75 * _GIB), hbm_bandwidth=819e9, ici_bandwidth=200e9,
        dcn_bandwidth=12.5e9, chips_per_host=4, dimensions=2, cores=1, clock=1.5e9,
        latency=1.22e-6, largest=256,
    ),
    Chip(
        family="v5p", device_kinds=("TPU v5", "TPU v5p"), peak_flops=459e12,
        hbm_bytes=int(95.73 * _GIB), hbm_bandwidth=2.765e12, ici_bandwidth=600e9,
        dcn_bandwidth=25e9, chips_per_host=4, dimensions=3, cores=2, clock=1.75e9,
        latency=1.21e-6, largest=6144,
    ),
    Chip(
        family="v6e", device_kinds=("TPU v6 lite", "TPU v6e"), peak_flops=918e12,
        hbm_bytes=int(31.24 * _GIB), hbm_bandwidth=1.638e12, ici_bandwidth=400e9,
        dcn_bandwidth=50e9, chips_per_host=4, dimensions=2, cores=1, clock=1.75e9,
        latency=1.21e-6, largest=256,
    ),
    Chip(
        family="tpu7x", device_kinds=("TPU7x",), peak_flops=1153.5e12,
        hbm_bytes=int(94.74 * _GIB), hbm_bandwidth=3.69e12, ici_bandwidth=300e9,
        dcn_bandwidth=50e9, chips_per_host=4, dimensions=3, cores=2, clock=2.2e9,
        latency=1.04e-6, largest=9216, devices=2,
    ),
)  # fmt: skip
_CPU = Chip(
    family="cpu", device_kinds=("cpu",), peak_flops=1e11, hbm_bytes=0, hbm_bandwidth=10e9,
    ici_bandwidth=10e9, dcn_bandwidth=1e9, chips_per_host=256, dimensions=1, cores=1, clock=3e9,
    latency=0.0, largest=256, platform="cpu",
)  # fmt: skip
# GPUs: NVIDIA's data sheets of the SXM modules (H100, H200, A100 80GB), without sparsity; NVLink is
# half of the bidirectional figure. DCN is that of DGX machines: 8 x 400 Gbit/s, on A100 8 x 200.
# JAX takes 75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
# The latency is that of a launch, measured on one H100, docs/results.md.
_HOPPER = """
    cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128
    shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
"""
_AMPERE = """
    cuda_compute_capability { major: 8 minor: 0 } core_count: 108 fpus_per_core: 64
    shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040
"""
_JAX_SHARE = 0.75
_H100 = Chip(
    family="h100", device_kinds=("NVIDIA H100 80GB HBM3",), peak_flops=989e12,
    hbm_bytes=int(_JAX_SHARE * 84978434048), hbm_bandwidth=3.35e12, ici_bandwidth=450e9,
    dcn_bandwidth=400e9, chips_per_host=8, dimensions=1, cores=1, clock=1.98e9, latency=2e-6,
    largest=8, platform="gpu", float32_flops=67e12,
    target=_HOPPER,
)  # fmt: skip
_GPUS = (
    _H100,
    dataclasses.replace(
        _H100, family="h200", device_kinds=("NVIDIA H200",), hbm_bytes=int(_JAX_SHARE * 141e9),
        hbm_bandwidth=4.8e12,
    ),
    dataclasses.replace(
        _H100, family="a100",
        device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"), peak_flops=312e12,
        hbm_bytes=int(_JAX_SHARE * 79.2 * _GIB), hbm_bandwidth=2.039e12, ici_bandwidth=300e9,
        dcn_bandwidth=200e9, clock=1.41e9, float32_flops=19.5e12, target=_AMPERE,
    ),
)  # fmt: skip
CHIPS = {chip.family: chip for chip in (*_TPUS, *_GPUS, _CPU)}
_FAMILIES = {"v5litepod": "v5e", "v5lite": "v5e"}  # other names


@dataclasses.dataclass(frozen=True)
class GpuPrices:
    """What programs on GPUs achieve, as shares of the peak figures, and what takes a fixed time."""

    bandwidth: float  # share of the bandwidth of memory
    flops: float  # share of the peak of matrix products, at any precision
    sum_s: float  # a sum over the threads of a kernel's cell, which then wait for each other


# Measured on one H100, docs/results.md: 2.5e12 bytes/s and 440e12 FLOP/s of bfloat16 in whole
# training steps, and kernels whose tokens depend on each other. Other GPUs are taken to be alike.
GPU_PRICES = GpuPrices(bandwidth=0.75, flops=0.45, sum_s=0.3e-6)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of equal shape, connected by the data centre's network if there are several."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of a slice
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    def __str__(self) -> str:
        separator = ":" if self.chip.platform == "tpu" else "-"
        what = "hosts" if self.chip.platform == "gpu" else "slices"
        slices = f" x {self.num_slices} {what}" if self.num_slices > 1 else ""
        return f"{self.chip}{separator}{_joined(self.shape)}{slices}"

    @property
    def num_devices(self) -> int:
        """JAX devices, among which the mesh divides the work."""
        return self.num_chips * self.chip.devices

    def half(self) -> "Topology | None":
        """The same topology with half the chips per slice; None if TPUs would split a host."""
        per_slice = self.num_chips // self.num_slices
        fits = self.chip.platform != "tpu" or per_slice > self.chip.chips_per_host
        return self._resized(lambda n: n // 2 if n % 2 == 0 else 0) if fits else None

    def double(self) -> "Topology | None":
        """The same topology with twice the chips per slice; None if no such slice exists."""
        return self._resized(lambda n: 2 * n)

    def _resized(self, resize: Callable[[int], int]) -> "Topology | None":
        candidates = [
            (*self.shape[:d], resize(n), *self.shape[d + 1 :]) for d, n in enumerate(self.shape)
        ]
        candidates = [tuple(sorted(c, key=lambda n: (n == 1, n))) for c in candidates]  # 2x2x1
        existing = [shape for shape in candidates if _exists(self.chip, shape)]
        compact = min(existing, key=lambda shape: max(shape) - min(shape), default=None)
        return dataclasses.replace(self, shape=compact) if compact else None


def parse(name: str, num_slices: int = 1, flag: str = "--topology") -> Topology:
    """Parses the name of a topology: `v4:4x4x4`, `v4-128`, `v5litepod-256`, `h100-8` or `cpu-8`.

    `v4-N`, `v5p-N` and `tpu7x-N` count TensorCores, two per chip; `v5e-N`, `v5litepod-N`, `v6e-N`
    and `cpu-N` count chips; `h100-N`, `h200-N` and `a100-N` the GPUs of a host, where slices are
    hosts. `flag` is what messages call the name.

    Raises:
      ConfigError: there is no such topology, or Google Cloud does not offer it; the message names
        the nearest.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices is {num_slices}; it must be at least 1")
    match = re.fullmatch(r"(\w+?)(?:[:-](\d+(?:x\d+)*))", name.strip().lower())
    family = _FAMILIES.get(match[1], match[1]) if match else ""
    if family in ("v2", "v3"):
        raise ConfigError(
            f"{flag}={name}: TPU {family} is not supported: libtpu compiles no kernel with "
            "bfloat16 matrix products for it, and those here have some. There are "
            + ", ".join(str(chip) for chip in _TPUS)
        )
    if not match or family not in CHIPS:
        raise ConfigError(f"{flag}={name} is no known topology{_hint(name)}")
    chip, sizes = CHIPS[family], tuple(int(n) for n in match[2].split("x"))
    if family == "cpu":
        if len(sizes) != 1 or num_slices > 1 or not _exists(chip, sizes):
            raise ConfigError(f"{flag}={name}: CPUs are cpu-1 to cpu-256, in one slice")
        return Topology(chip, sizes)
    if chip.platform == "gpu":
        if len(sizes) != 1 or ":" in name or not _exists(chip, sizes):
            raise ConfigError(
                f"{flag}={name}: hosts have {family}-1 to {family}-{chip.largest}; "
                f"--num_slices counts hosts, so 16 GPUs are {flag}={family}-8 --num_slices=2"
            )
        return Topology(chip, sizes, num_slices)
    if len(sizes) > 1 or ":" in name:
        if not _exists(chip, sizes):
            near = " or ".join(f"{family}:{_joined(s)}" for s in _nearest(chip, math.prod(sizes)))
            raise ConfigError(f"{flag}={name}: Google Cloud has no such slice; the nearest: {near}")
        return Topology(chip, sizes, num_slices)
    shape = _default_shape(chip, sizes[0] // chip.cores) if sizes[0] % chip.cores == 0 else None
    if shape is None:
        counts = f"TensorCores, {chip.cores} a chip" if chip.cores > 1 else "chips"
        shapes = _nearest(chip, sizes[0] // chip.cores)
        near = " or ".join(f"{family}-{math.prod(s) * chip.cores}" for s in shapes)
        raise ConfigError(
            f"{flag}={name}: {family}-N counts {counts}, and Google Cloud has no slice of "
            f"{sizes[0]}; the nearest: {near}"
        )
    return Topology(chip, shape, num_slices)


def _joined(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def prepare(topology: Topology) -> None:
    """Sets the environment so that JAX can compile for the topology; call before importing JAX."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.family == "cpu":
        flags = re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        )
        count = f"--xla_force_host_platform_device_count={topology.num_chips}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
        # XLA sizes its thread pool by this; with fewer threads, collectives of fake devices starve.
        os.environ["PJRT_NPROC"] = str(2 * topology.num_chips)
        return
    if topology.chip.platform == "gpu":
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver here
    else:
        os.environ.pop("XLA_FLAGS", None)  # libtpu aborts on flags of other backends
    os.environ |= {  # for GPUs as well, as JAX loads libtpu wherever it is installed
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server here
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def memory(topology: Topology) -> int:
    """Bytes of memory per chip; fake CPU devices share the machine's memory."""
    if topology.chip.family != "cpu":
        return topology.chip.hbm_bytes
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // topology.num_chips


def devices(topology: Topology) -> Sequence[Any]:
    """The topology's `jax.Device`s: fake CPU devices, or absent chips to compile for.

    Raises:
      ConfigError: libtpu is missing, or does not support the slice; or there is no CUDA plugin.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip.family == "cpu":
        return jax.devices("cpu")[: topology.num_chips]
    if topology.chip.platform == "gpu":
        return _gpus(topology)
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            f"--topology={topology}: libtpu compiles for TPUs, without having one, on Linux: "
            f'`pip install "jax[tpu]=={jax.__version__}"`'
        )
    options: dict[str, Any] = {}
    if topology.chip.cores > topology.chip.devices:
        options["chip_config_name"] = "megacore"  # one device per chip, as JAX has on these TPUs
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.shape == (2, 4):
        options["chips_per_host_bounds"] = [2, 4, 1]  # eight chips on one host
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.chip}:{_joined(topology.shape)}", **options
        )
    except Exception as error:
        raise ConfigError(
            f"--topology={topology}: libtpu {importlib.metadata.version('libtpu')} cannot describe "
            f"it: {str(error).splitlines()[0]}"
        ) from error
    return description.devices


def _gpus(topology: Topology) -> Sequence[Any]:
    import jax
    from jax.experimental import topologies

    if not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        raise ConfigError(
            f"--topology={topology}: JAX's CUDA plugin compiles for GPUs, without having one: "
            f'`pip install "jax[cuda13]=={jax.__version__}"`'
        )
    chip = topology.chip
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.family,
        topology=f"1x{topology.num_slices}x{topology.shape[0]}",  # partitions, hosts, GPUs of each
        target_config=f"""
            gpu_device_info {{
                {_NVIDIA} {chip.target}
                clock_rate_ghz: {chip.clock / 1e9}
                memory_bandwidth: {chip.hbm_bandwidth:.0f}
                device_memory_size: {chip.hbm_bytes / _JAX_SHARE:.0f}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{chip.device_kinds[0]}"
        """,
    )
    return description.devices


_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_NVIDIA = """
    threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
"""  # of every GPU here


# What Google Cloud sells: cloud.google.com/tpu/docs/{v5e,v6e} list all slices of two dimensions.
# Those of three are A <= B <= C of up to 4, or multiples of 4 (docs/types-topologies), up to 4096
# chips on v4, 6144 on v5p (docs/v5p: a job's largest) and 9216 on tpu7x.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@functools.cache
def _slices(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The shapes of all slices of a generation of TPUs, the smallest first."""
    if chip.dimensions == 2:
        return _FLAT
    most = chip.largest // 64  # cubes of 4 x 4 x 4 chips
    cubes = (
        (a, b, c)
        for a in range(1, most + 1)
        for b in range(a, most // a + 1)
        for c in range(b, most // (a * b) + 1)
    )
    shapes = [*_BELOW_A_CUBE, *(tuple(4 * n for n in cube) for cube in cubes)]
    return tuple(sorted(shapes, key=lambda shape: (math.prod(shape), max(shape))))


def _exists(chip: Chip, shape: Sequence[int]) -> bool:
    if chip.platform != "tpu":
        return 1 <= shape[0] <= chip.largest
    return tuple(shape) in _slices(chip)


def _default_shape(chip: Chip, num_chips: int) -> tuple[int, ...] | None:
    """The shape of a slice of this size if none is specified: the most compact one."""
    shapes = [shape for shape in _slices(chip) if math.prod(shape) == num_chips]
    return min(shapes, key=lambda shape: max(shape) - min(shape), default=None)


def _nearest(chip: Chip, num_chips: int) -> list[tuple[int, ...]]:
    """The most compact slice of this size, or else of the next smaller and larger ones."""
    sizes = sorted({math.prod(shape) for shape in _slices(chip)})
    below = max((n for n in sizes if n <= num_chips), default=sizes[0])
    above = min((n for n in sizes if n >= num_chips), default=sizes[-1])
    shapes = [_default_shape(chip, n) for n in sorted({below, above})]
    return [shape for shape in shapes if shape]


def _hint(name: str) -> str:
    family = re.split("[:-]", name.lower())[0]
    known = difflib.get_close_matches(family, [*CHIPS, "v5litepod"], n=1, cutoff=0.5)
    if not known:
        return "; names look like v4-128, v4:4x4x4, v5e-256, v5p-4096, v6e-64, h100-8, cpu-8"
    chip = CHIPS[_FAMILIES.get(known[0], known[0])]
    counts = [2**n for n in range(9)]
    if chip.platform == "tpu":
        counts = sorted({math.prod(shape) * chip.cores for shape in _slices(chip)})
    names = [f"{known[0]}-{n}" for n in counts if chip.platform == "tpu" or n <= chip.largest]
    return f"; did you mean {difflib.get_close_matches(name.lower(), names, n=1, cutoff=0)[0]}?"
