"""How loud a clip is, and by how much its speech stands out from its noise."""

import numpy as np
from jaxtyping import Float, Int16

_FRAME = 400  # samples: 25 ms
_MIN_FRAMES = 40  # 1 s; less holds no pause to hear the noise in
_FLOOR_SHARE = 0.05
_SILENT_DB, _LOWEST_DB, _HIGHEST_DB = -60.0, -10.0, 60.0

Wave = Float[np.ndarray, " S"] | Int16[np.ndarray, " S"]


def estimate_snr_db(wave_S: Wave) -> float | None:
    """Energy of the speech over that of the noise, over the whole clip, in dB from -10 to 60.

    The noise is taken for steady, and its power for that of the frames of 25 ms that only one in
    twenty is quieter than; the rest of the mean power is speech. So a clip without pauses reads
    too low, and noise that comes and goes too high. None for less than 1 s, and for silence.

    Args:
      wave_S: mono at 16 kHz; float within [-1, 1], or int16.
    """
    power_F = _frame_powers(wave_S)
    if len(power_F) < _MIN_FRAMES or is_silent(wave_S):
        return None
    noise = max(float(np.quantile(power_F, _FLOOR_SHARE)), 1e-12)
    speech = max(float(power_F.mean()) - noise, 1e-12)
    return float(np.clip(10 * np.log10(speech / noise), _LOWEST_DB, _HIGHEST_DB))


def is_silent(wave_S: Wave) -> bool:
    """Whether no frame of 25 ms is louder than -60 dB of full scale (RMS 0.001).

    Noise without speech is not silent: that would take a detector of speech.
    """
    return not (_frame_powers(wave_S) > 10 ** (_SILENT_DB / 10)).any()


def _frame_powers(wave_S: Wave) -> np.ndarray:
    """Mean square of each frame, the last one as short as it is; 1 is full scale."""
    if not len(wave_S):
        return np.zeros(0)
    scale = 32768.0 if wave_S.dtype == np.int16 else 1.0
    square_S = np.square(wave_S.astype(np.float64) / scale)
    starts_F = np.arange(0, len(square_S), _FRAME)
    lengths_F = np.diff(np.append(starts_F, len(square_S)))
    return np.add.reduceat(square_S, starts_F) / lengths_F
