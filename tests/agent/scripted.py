"""Writers of turns that stand in for a model: they write what a script says."""

import random

from spectral_pod.agent import protocol
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.errors import DataError
from spectral_pod.generate.turns import Heard
from spectral_pod.shapes import END


class Scripted:
    """Writes by `script`, which maps the turns so far to the next one, a Turn or any symbols.

    It keeps to what `TurnDecoder.go_on` says: rows advance together, up to a few positions at a
    time, and halt where a live one has written END.
    """

    def __init__(self, *scripts, context=None, seed=0):
        self.scripts, self.context = scripts, context
        self.rng = random.Random(seed)

    def begin(self, symbols, num_symbols):
        self.num_symbols, self.halts = num_symbols, 0
        self.read = [list(row) for row in symbols]  # what each row has read, in order
        self.own = [[] for _ in symbols]  # what it will write, the first of which is written
        return self

    def go_on(self, given, live):
        heard = [Heard(0, []) for _ in given]
        for _ in range(self.rng.randint(1, 7)):
            halts = False
            for row, queue in enumerate(given):
                read, written = heard[row]
                if read < len(queue):
                    self.read[row].append(queue[read])
                    heard[row] = Heard(read := read + 1, written)
                    self.own[row] = []
                else:
                    self.read[row].append(self.own[row].pop(0) if self.own[row] else 0)
                if read == len(queue):
                    self.own[row] = self.own[row] or self._next(row, live[row])
                    written.append(self.own[row][0])
                    halts |= live[row] and written[-1] == END
            if halts:
                break
        return heard

    def _next(self, row, is_live):
        try:
            turns = protocol.decode(self.read[row])
        except DataError:  # nonsense, which the loop will see when this call returns
            is_live = False
        if not is_live:
            return [0] * 1000
        step = self.scripts[row % len(self.scripts)](turns)
        return protocol.symbols_of(step) if isinstance(step, Turn) else list(step)


def steps(*turns):
    """A script that writes these turns one after the other, whatever the results are."""

    def script(said):
        mine = [turn for turn in said if turn.role in protocol.WRITTEN]
        return turns[len(mine)]

    return script


def think(text):
    return Turn(Role.THOUGHT, text.encode())


def call(text):
    return Turn(Role.CALL, text.encode())


def answer(text):
    return Turn(Role.ANSWER, text.encode())
