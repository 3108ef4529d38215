"""Continues texts with a trained language model.

    python -m tools.generate --workdir=DIR --prompt=$'First Citizen:\\n' --stream
    python -m tools.generate --workdir=DIR --batch=prompts.jsonl > texts.jsonl
    ... --num_bytes=1000 --temperature=0.8 --top_k=40 --top_p=0.95 --seed=1 --stop=$'\\n\\n'

A prompt is taken as it is; $'...' is how shells write line breaks. What the model appends goes to
stdout, for each line {"prompt": ...} of --batch a line {"prompt": ..., "text": ...}, in the same
order; all of them are computed together. Bytes that are no UTF-8 become U+FFFD. The speed goes to
stderr, compiling included.

The newest sound checkpoint is taken, also while training goes on; its mesh does not matter. The
same seed gives the same text on every mesh: --mesh=tensor=2,fsdp=2 uses four devices.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from spectral_pod.errors import ConfigError, DataError
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.text import continuations, decoded
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import AXES, make_mesh
from tools import entry

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run: a folder or a gs:// URL.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest sound one by default.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_BATCH = flags.DEFINE_string("batch", None, 'A file of lines {"prompt": ...}.')
_NUM_BYTES = flags.DEFINE_integer("num_bytes", 256, "Most bytes to append.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0: the likeliest byte.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest bytes; 0: all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Only the likeliest that together have this probability.", 0.0, 1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
_STOP = flags.DEFINE_string("stop", "", "A text ends before this.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text as it comes.")
_MESH = flags.DEFINE_string("mesh", "", "Devices by mesh axis, such as data=4; one by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    prompts = read_prompts(_PROMPT.value, _BATCH.value, stream=_STREAM.value)
    trained = restore_for_inference(
        _WORKDIR.value or "", step=_STEP.value, mesh=mesh_of(_MESH.value), dtype=_DTYPE.value
    )
    if trained.config.train.compilation_cache:
        runtime.enable_compilation_cache(_WORKDIR.value or "")
    started, num_bytes = time.perf_counter(), 0
    with jax.set_mesh(trained.mesh):
        rows: Any = continuations(
            trained,
            prompts,
            num_bytes=_NUM_BYTES.value,
            seed=_SEED.value,
            sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
            stop=os.fsencode(_STOP.value),
        )
        if _STREAM.value:
            num_bytes = _stream(rows)
        else:
            texts = [b"".join(pieces) for pieces in zip(*rows)]
            num_bytes = sum(map(len, texts))
            for prompt, text in zip(prompts, texts):
                line = text.decode(errors="replace")
                if _BATCH.value:
                    fields = {"prompt": prompt.decode(), "text": line}
                    line = json.dumps(fields, ensure_ascii=False)
                _write(line + "\n")
    seconds = time.perf_counter() - started
    entry.say(f"{num_bytes} bytes in {seconds:.2f} s: {num_bytes / seconds:.1f} bytes/s")


def read_prompts(prompt: str | None, batch: str | None, *, stream: bool) -> list[bytes]:
    """The prompts of the flags.

    Raises:
      ConfigError: not exactly one of the flags is given, or they contradict one another.
      DataError: the file of prompts is not what it should be.
    """
    if (prompt is None) == (batch is None):
        raise ConfigError("give either --prompt=TEXT or --batch=FILE")
    if prompt is not None:
        if not prompt:
            raise ConfigError("--prompt is empty; give at least one byte to continue")
        return [os.fsencode(prompt)]
    if stream:
        raise ConfigError("--stream prints one text as it comes; it cannot go with --batch")
    prompts = []
    with open(batch or "", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["prompt"].encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                text = b""
            if not text:
                raise DataError(
                    f'{batch}:{number} is not {{"prompt": TEXT}} with at least one byte of text'
                )
            prompts.append(text)
    if not prompts:
        raise DataError(f"{batch} holds no prompts")
    return prompts


def mesh_of(text: str) -> Mesh | None:
    """The mesh of a text like 'data=2,tensor=2', of the first devices; none of an empty one.

    Raises:
      ConfigError: an axis is unknown, or there are fewer devices.
    """
    if not text:
        return None
    axes = [axis for axis in AXES if axis != "sequence"]  # one position at a time cannot be split
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


def _stream(rows: Iterator[Sequence[bytes]]) -> int:
    """Prints the one text as it comes; its length in bytes."""
    num_bytes = 0

    def pieces() -> Iterator[bytes]:
        nonlocal num_bytes
        for (piece,) in rows:
            num_bytes += len(piece)
            yield piece

    for text in decoded(pieces()):
        _write(text)
    _write("\n")
    return num_bytes


def _write(text: str) -> None:
    """In UTF-8 whatever the terminal says: so the text was."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    entry.run(main)
