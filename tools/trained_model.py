"""Flags that name a trained model, and the devices that it runs on."""

import math

import jax
from jax.sharding import Mesh

from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative
from spectral_pod.parallel.mesh import AXES, make_mesh

from . import shell


def add_flags(parser: shell.Parser) -> None:
    """--workdir, --step, --mesh and --dtype."""
    parser.add_place(
        "--workdir", required=True, help="the workdir of a run: a folder or a gs:// URL"
    )
    parser.add_value("--step", NonNegative, None, "of the checkpoint (the newest sound one)")
    parser.add_argument("--mesh", default="", help="devices by mesh axis: data=4 (one device)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation"
    )


def mesh_of(text: str) -> Mesh | None:
    """The mesh of a text such as 'data=2,tensor=2', on the first devices; None if it is empty.

    Raises:
      ConfigError: an axis is unknown, or there are fewer devices.
    """
    if not text:
        return None
    axes = [axis for axis in AXES if axis != "sequence"]  # decoding has one position
    sizes = dict.fromkeys(AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in axes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh={text}: {item!r} is not AXIS=SIZE with an axis of {axes}")
        sizes[axis] = int(size)
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices):
        raise ConfigError(f"--mesh={text} needs {wanted} devices, and there are {len(devices)}")
    return make_mesh(sizes, devices[:wanted])
