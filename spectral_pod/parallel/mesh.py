"""The device mesh: axes data, fsdp, sequence, tensor."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import jaxlib
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from spectral_pod.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")

# Of jaxlib, since openxla/xla#46347: an FFT that runs on a thread of XLA's pool on CPUs hands its
# parts to that pool and blocks until they are done. When each thread does so, none is left.
_DEADLOCKS = ("0.11.1", "0.11.2")
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, arranged by JAX to match the hardware's interconnect.

    TPU slices lie along `data`, the axis that communicates least; the other axes stay within a
    slice. All axes are automatic: XLA places whatever `sharding.py` does not.

    Args:
      sizes: the size of every axis of `AXES`, from `validation.validate_mesh`.
      devices: all devices of the run by default.

    Raises:
      ConfigError: `data` is not a multiple of the number of slices, or this version of jaxlib does
        not serve these devices.
    """
    devices = jax.devices() if devices is None else devices
    _check_version(devices[0].platform)
    shape = tuple(sizes[axis] for axis in AXES)
    slices = num_slices(devices)
    check_slices(sizes, slices)
    # Splitting a physical axis costs bandwidth, but tensor=2 must be possible on 4x4x4.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_version(platform: str) -> None:
    version = jaxlib.__version__
    if (
        platform == "cpu"
        and version in _DEADLOCKS
        and _ONE_THREAD not in os.environ.get("XLA_FLAGS", "")
    ):
        raise ConfigError(
            f"jaxlib {version} is installed, whose FFTs can wait for each other for ever on CPUs: "
            "install another (pip install 'jax!=0.11.1,!=0.11.2'), or set "
            f"XLA_FLAGS={_ONE_THREAD}, with which it is slower"
        )


def check_slices(sizes: Mapping[str, int], slices: int) -> None:
    """Raises a ConfigError unless the axis `data` can hold the slices."""
    if sizes["data"] % slices:
        raise ConfigError(
            f"config.mesh.data is {sizes['data']}, and there are {slices} slices, which lie along "
            f"it: make it a multiple of {slices}"
        )


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """The context of all computation: sets the mesh, and floats are float32 by default.

    With JAX_ENABLE_X64, parameters and optimizer state would otherwise become float64.
    """
    with jax.enable_x64(False), jax.set_mesh(mesh):
        yield


def num_slices(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices that the devices belong to; devices of other kinds count as one."""
    return len({getattr(d, "slice_index", None) or 0 for d in devices if d.platform == "tpu"}) or 1
