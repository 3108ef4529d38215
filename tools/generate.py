"""Continues texts with a trained language model.

    python -m tools.generate --workdir=DIR --prompt=$'First Citizen:\\n' --stream
    python -m tools.generate --workdir=DIR --batch=prompts.jsonl > texts.jsonl
    ... --num_bytes=1000 --temperature=0.8 --top_k=40 --top_p=0.95 --seed=1 --stop=$'\\n\\n'

A prompt is used verbatim; $'...' is how shells write line breaks. What the model appends goes to
stdout: for each line {"prompt": ...} of --batch a line {"prompt": ..., "text": ...}, in the same
order; all of them are computed in one batch. Bytes that are not valid UTF-8 become U+FFFD. The
speed, including compilation, goes to stderr.

The newest sound checkpoint is used, also while training continues; its mesh does not matter. The
same seed gives the same text on every mesh: --mesh=tensor=2,fsdp=2 uses four devices.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, NonNegativeFloat, Positive, Probability
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.text import continuations, decoded
from spectral_pod.parallel import backend, runtime
from spectral_pod.parallel.mesh import on_mesh

from . import shell, trained_model


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("generate", __doc__)
    trained_model.add_flags(parser)
    # Texts to continue, and to stop at, may be any bytes: `type` exempts them from being Unicode.
    parser.add_argument("--prompt", type=str, metavar="TEXT", help="the text to continue")
    parser.add_place("--batch", local=True, metavar="FILE", help='a file of lines {"prompt": ...}')
    parser.add_value("--num_bytes", Positive, 256, "bytes, or tokens, to append (256)")
    parser.add_value("--temperature", NonNegativeFloat, 1.0, "0 takes the likeliest byte (1.0)")
    parser.add_value("--top_k", NonNegative, 0, "sample from the k likeliest bytes; 0: all (0)")
    parser.add_value(
        "--top_p", Probability, 1.0, "sample from the likeliest bytes of this total probability"
    )
    parser.add_value("--seed", int, 0, "sampling seed (0)")
    parser.add_argument("--stop", type=str, default="", metavar="TEXT", help="end before this")
    parser.add_argument("--stream", action="store_true", help="print the text as it is generated")
    return shell.run(parser, generate, argv)


def generate(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    workdir = arguments.workdir
    prompts = read_prompts(arguments.prompt, arguments.batch, stream=arguments.stream)
    trained = restore_for_inference(
        workdir,
        step=arguments.step,
        mesh=trained_model.mesh_of(arguments.mesh),
        dtype=arguments.dtype,
    )
    if trained.config.train.compilation_cache:
        backend.enable_compilation_cache(workdir)
    started = time.perf_counter()
    with on_mesh(trained.mesh):
        rows: Any = continuations(
            trained,
            prompts,
            num_bytes=arguments.num_bytes,
            seed=arguments.seed,
            sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
            stop=os.fsencode(arguments.stop),
        )
        if arguments.stream:
            num_bytes = _stream(rows)
        else:
            texts = [b"".join(pieces) for pieces in zip(*rows)]
            num_bytes = sum(map(len, texts))
            for prompt, text in zip(prompts, texts):
                line = text.decode(errors="replace")
                if arguments.batch:
                    fields = {"prompt": prompt.decode(), "text": line}
                    line = json.dumps(fields, ensure_ascii=False)
                _write(line + "\n")
    seconds = time.perf_counter() - started
    shell.say(f"{num_bytes} bytes in {seconds:.2f} s: {num_bytes / seconds:.1f} bytes/s")


def read_prompts(prompt: str | None, batch: str | None, *, stream: bool) -> list[bytes]:
    """The prompts that the flags give.

    Raises:
      ConfigError: not exactly one of the flags is given, or they contradict each other.
      DataError: the file of prompts is malformed.
    """
    if (prompt is None) == (batch is None):
        raise ConfigError("give either --prompt=TEXT or --batch=FILE")
    if prompt is not None:
        if not prompt:
            raise ConfigError("--prompt is empty; give at least one byte to continue")
        return [os.fsencode(prompt)]
    if stream:
        raise ConfigError("--stream prints one text as it comes; it cannot go with --batch")
    return shell.read_texts(batch or "", "prompt")


def _stream(rows: Iterator[Sequence[bytes]]) -> int:
    """Prints the only text as it is generated, and returns its length in bytes."""
    lengths = []

    def pieces() -> Iterator[bytes]:
        for (piece,) in rows:
            lengths.append(len(piece))
            yield piece

    for text in decoded(pieces()):
        _write(text)
    _write("\n")
    return sum(lengths)


def _write(text: str) -> None:
    """Writes UTF-8, as the training text is, whatever the terminal's encoding."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
