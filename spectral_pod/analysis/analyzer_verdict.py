"""Whether a layer is spectral, found out by probing it with tones and shifts, whatever its name.

A layer is called spectral here if, along the positions, it acts as a filter:

- it keeps frequencies: of two tones, nothing but these two frequencies comes out;
- it commutes with shifts: a later input gives the same output, later;
- it does not mix tones: what comes out at a frequency does not depend on the other tone;
- it selects: its response depends on the frequency. A gain per channel, and any product per
  position, passes the other tests too, but treats all frequencies alike.

A linear and time-invariant layer that is not a gain passes exactly. Layers with gates, or with
filters that depend on the input, pass as far as they act like one, so each test has a threshold.
The verdict is about a layer with these parameters: attention over a window whose scores are all
alike is a moving average, and passes.

The probes are sums of two tones under a Gaussian window in the middle of a sequence, on top of a
constant, as activations have one. Their frequencies are random, their phases and the constant
differ between channels, and their mean square is 1 at the peak, as after a norm. The window keeps
them away from the edges, where layers differ that pad. What a layer makes of the constant alone is
subtracted.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# What a spectral layer reaches; `Verdict` has the meaning.
MIN_KEPT, MAX_SHIFT_ERROR, MAX_INTERFERENCE, MIN_SELECTIVITY = 0.9, 0.2, 0.2, 1e-6
_STEADIER = 4  # times the energy of a response's other changes must be that of those by frequency
MIN_POSITIONS = 64  # below it, the bands of two tones cover most of the spectrum
PROBES = 16
_WIDTH = 10  # the sequence's length over the standard deviation of a window
_REACH = 3  # half the width of a tone's band, in standard deviations of its amplitude spectrum


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the probes found.

    Attributes:
      kept: the share of the output's energy in the bands of the two tones, which are as wide as the
        spectrum of their window. White noise has a share of `covered`.
      covered: the share of all frequencies in these bands.
      shift_error: the norm of (output for a shifted input - shifted output) over that of the
        output. Either the shift is circular, or positions that it moves across an end are left out:
        the smaller of the two errors.
      interference: the norm of the change of the output in a tone's band, if the other tone is
        replaced, over the norm of that output.
      selectivity: the share of the energy in the bands of the tones that is not explained by one
        amplitude and phase per output channel for all frequencies.
    """

    kept: float
    covered: float
    shift_error: float
    interference: float
    selectivity: float

    @property
    def reasons(self) -> list[str]:
        """Why the layer is not spectral; none if it is."""
        unsteady = self.shift_error**2 + self.interference**2
        failed = {
            f"{1 - self.kept:.0%} of its output is at other frequencies": self.kept < MIN_KEPT,
            f"a shift changes its output by {self.shift_error:.0%}": (
                self.shift_error > MAX_SHIFT_ERROR
            ),
            f"another tone changes the output of a tone by {self.interference:.0%}": (
                self.interference > MAX_INTERFERENCE
            ),
            "the frequency changes its response no more than shifts and other tones do": (
                self.selectivity < max(MIN_SELECTIVITY, _STEADIER * unsteady)
            ),
        }
        return [reason for reason, is_so in failed.items() if is_so]

    @property
    def spectral(self) -> bool:
        return not self.reasons


def verdict(
    layer: Callable[[np.ndarray], np.ndarray], length: int, width: int, seed: int = 0
) -> Verdict:
    """Probes a layer; one without an output has no verdict, and all its figures are 0.

    Args:
      layer: maps float32 [B, N, D] to [B, N, D'].
      length: N, at least `MIN_POSITIONS`.
      width: D.
      seed: of frequencies, phases and shifts.

    Raises:
      ValueError: N is too small for tones to be told apart.
    """
    if length < MIN_POSITIONS:
        raise ValueError(f"{length} positions are too few for tones; they need {MIN_POSITIONS}")
    rng = np.random.default_rng(seed)
    sigma = length / _WIDTH
    reach = _REACH / (2 * np.pi * sigma)  # cycles per position
    shift = int(rng.integers(length // 16, length // 8))
    frequency_P2 = _frequencies(rng, reach)
    start_P2 = rng.uniform(0, 2 * np.pi, frequency_P2.shape)
    t_N = np.arange(length) - (length // 2 - shift // 2)
    # What is beyond, 3e-4 of the peak, is cut off: a shift then moves nothing across the ends.
    window_N = np.where(abs(t_N) < 4 * sigma, np.exp(-0.5 * (t_N / sigma) ** 2), 0)
    tone_P2N = window_N * np.exp(1j * (2 * np.pi * frequency_P2[..., None] * t_N))
    tone_P2N *= np.exp(1j * start_P2[..., None])
    phase_2D = np.exp(1j * rng.uniform(0, 2 * np.pi, (2, width)))
    x_BND = np.zeros((1 + PROBES + 2, length, width))
    x_BND[1:-2] = np.sqrt(2 / 3) * np.einsum("pin,id->pnd", tone_P2N, phase_2D).real
    x_BND[-2:] = np.roll(x_BND[1:3], shift, axis=1)
    x_BND += rng.choice((-1, 1), width) / np.sqrt(3)
    y_BND = np.asarray(layer(x_BND.astype(np.float32)), np.float64)
    y_BND = y_BND[1:] - y_BND[:1]
    y_PND, shifted_BND = y_BND[:-2], y_BND[-2:]
    if not y_PND.any():
        return Verdict(0.0, 0.0, 0.0, 0.0, 0.0)

    bins_F = np.fft.rfftfreq(length)
    in_band_P2F = abs(bins_F - frequency_P2[..., None]) <= reach
    in_either_PF = in_band_P2F.any(axis=1)
    spectrum_PFD = np.fft.rfft(y_PND, axis=1)
    energy_PF = (abs(spectrum_PFD) ** 2).sum(axis=2)
    # Probes 2i and 2i + 1 have the first tone in common, but for where it starts.
    first_PFD = np.where(in_band_P2F[:, 0, :, None], spectrum_PFD, 0)
    first_PFD = first_PFD * np.exp(-1j * start_P2[:, :1, None])
    change_PFD = first_PFD[0::2] - first_PFD[1::2]
    # The parts of the tones in phase and in quadrature, within their bands as the output is.
    basis_PFK = np.concatenate([np.fft.rfft(tone_P2N.real), np.fft.rfft(tone_P2N.imag)], axis=1)
    basis_PFK = np.moveaxis(basis_PFK, 1, 2)
    return Verdict(
        kept=float(energy_PF[in_either_PF].sum() / energy_PF.sum()),
        covered=float(in_either_PF.mean()),
        shift_error=_shift_error(y_PND[:2], shifted_BND, shift),
        interference=_norm(change_PFD) / (2**0.5 * _norm(first_PFD) + 1e-300),
        selectivity=_unexplained(spectrum_PFD[in_either_PF], basis_PFK[in_either_PF]),
    )


def _frequencies(rng: np.random.Generator, reach: float) -> np.ndarray:
    """[P, 2] in cycles per position; the bands of a pair overlap neither each other nor 0 or 1/2.

    Pairs 2i and 2i + 1 have the first frequency in common.
    """
    found: list[np.ndarray] = []
    while len(found) < PROBES:
        first, second, other = rng.uniform(1.5 * reach, 0.5 - 1.5 * reach, 3)
        if min(abs(first - second), abs(first - other)) > 3 * reach:
            found += [np.array([first, second]), np.array([first, other])]
    return np.stack(found)


def _shift_error(y_BND: np.ndarray, shifted_BND: np.ndarray, shift: int) -> float:
    want_BND = np.roll(y_BND, shift, axis=1)
    return min(
        _norm(got - want) / (_norm(want) + 1e-300)
        for got, want in ((shifted_BND, want_BND), (shifted_BND[:, shift:], want_BND[:, shift:]))
    )


def _unexplained(y_MD: np.ndarray, basis_MK: np.ndarray) -> float:
    """The share of y's energy left by its least-squares fit, with real factors, by a basis."""
    y_MD, basis_MK = (np.concatenate([x.real, x.imag]) for x in (y_MD, basis_MK))
    factors_KD = np.linalg.lstsq(basis_MK, y_MD, rcond=None)[0]
    return (_norm(y_MD - basis_MK @ factors_KD) / (_norm(y_MD) + 1e-300)) ** 2


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
