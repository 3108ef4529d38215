"""A turn of an agent at a long transcript and at a short one: SpectralGPT with 6 layers of width
256, one conversation of up to 16,384 bytes, float32.

The turn has 256 bytes, of which the first half is given, as the result of a tool is, and the others
are the model's. It begins after 512 or 8,192 bytes; or it passes 8,192 bytes, where the long
convolutions add what all bytes so far contribute to as many to come: of all turns that one costs
the most, and it comes once in so many bytes. Beside them, reading the transcript again, in one
pass, as an agent would without a state to go on from. Group: turn.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spectral_pod.agent import protocol
from spectral_pod.agent.writer import GREEDY, grammar
from spectral_pod.generate.turns import TurnDecoder
from spectral_pod.ops.online_conv import BLOCK

from .generate import Model
from .settings import Settings
from .timing import Case, Comparison, Group, Ratio, Row, Seconds, timed, times_faster

_SHORT, _LONG = 512, 8192


class _Model(Model):
    """A model of conversations."""

    sizes = {"num_classes": protocol.NUM_CLASSES, "vocab_size": protocol.VOCAB_SIZE}  # noqa: RUF012


def groups(settings: Settings) -> list[Group]:
    size = (2, 16, 128, 256, 64) if settings.quick else (6, 256, _SHORT, _LONG, 256)
    return [Group("turn", 1, functools.partial(_turns, *size))]


def _turns(layers: int, width: int, short: int, long: int, turn: int) -> Comparison:
    model = _Model(layers, width, 2 * long)

    def case(name: str, what: str, length: int, run: Callable[[], Seconds], bytes: int) -> Case:
        shape = f"layers={layers} D={width} N={length}"
        return Case(name, what, shape, run, "", work={"bytes": bytes})

    def of_turn(name: str, what: str, start: int) -> Case:
        run = functools.partial(_turn, model, start, 2 * long, turn)
        return case(name, f"{turn} bytes, {what}", start, run, turn)

    after, passing = f"turn_{_LONG}", f"turn_passing_{_LONG}"
    again = functools.partial(_read_again, model, long, 2 * long)
    cases = [
        of_turn(f"turn_{_SHORT}", "from the state that the transcript has left", short),
        of_turn(after, "the same", long),
        of_turn(passing, "the largest sums of the convolutions among them", long - turn // 2),
        case(f"read_{_LONG}", "the transcript again, in one pass", long, again, long),
    ]

    def cost_of_a_byte(name: str, target: str = "") -> Ratio:
        def of(rows: Mapping[str, Row]) -> float:
            return rows[f"turn_{_SHORT}"].rates["bytes"] / rows[name].rates["bytes"]

        return Ratio(f"byte_of_{name}_vs_{_SHORT}", of, target)

    return Comparison(
        cases,
        [
            cost_of_a_byte(after, "<= 1.5"),
            cost_of_a_byte(passing),
            times_faster(f"reading_again_vs_turn_{_LONG}", after, f"read_{_LONG}"),
        ],
    )


def _decoder(model: Model, length: int, capacity: int) -> TurnDecoder:
    """A decoder that has read a transcript, with room for `capacity` symbols together."""
    keys_B = jax.random.split(jax.random.key(0), 1)
    never = grammar()._replace(halt=np.int32(-1))  # an untrained model hands over anywhere
    return TurnDecoder(
        model.module, model.params, np.zeros((1, length), np.int32),
        num_positions=capacity - length, keys_B=keys_B, sampling=GREEDY, grammar=never,
    )  # fmt: skip


def _turn(model: Model, start: int, capacity: int, turn: int) -> Seconds:
    """A turn that begins after so many bytes, of which the last block is not timed either."""
    decoder = _decoder(model, start - BLOCK, capacity)

    def read(given: list[int], num_bytes: int) -> Any:
        last = decoder.room - num_bytes
        while decoder.room > last:
            ((read, _),) = decoder.go_on([given], [True])
            given = given[read:]
        assert decoder.room == last, "blocks are read whole where nothing halts"
        return vars(decoder)  # all arrays, also those of positions to come

    jax.block_until_ready(read([0] * BLOCK, BLOCK))
    return timed(read, [0] * (turn // 2), turn)


def _read_again(model: Model, length: int, capacity: int) -> Seconds:
    return timed(lambda: vars(_decoder(model, length, capacity)))
