"""Many utterances through few slots: sorted by length, decoded together, refilled as rows end.

Three programs for each class of lengths: `_new`, `_fill` (one for each bucket of audio) and
`_decode_slots`. Each device of the mesh has slots of its own; all take the same number of steps
between two fills, until the last one has room: one that stopped earlier would only wait.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.beam import Beams, generate_beam
from hebasr_jax.config import CHUNK_TOKENS, ModelConfig
from hebasr_jax.features import log_mel
from hebasr_jax.generate import Choice, Slots, decode, empty_slots, fill
from hebasr_jax.model.asr import Inputs, Params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.sharding import COPIES, CUT, ROWS, rows
from hebasr_jax.text import Prompt

_SHORTEST_S = 4  # shorter clips share the slots of this class
_REFILLS = 8  # a fill takes an eighth of the slots
_PIECE_S = 32  # most clips, and pieces of long ones, are shorter: little padding there
_FILL_S = 2048  # padded audio in a fill: the conv stem takes 6 MB for each second of it
# XLA's trials prefer kernels that find weights in a cache; in real steps cuBLAS is the quicker.
_DECODE_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_FREE = -1  # no utterance has the row
_COLUMNS, _FEW_COLUMNS = 32, 24  # multiples of 32; prompts without context, 18 tokens, have 24


@dataclass(frozen=True, eq=False)
class Utterance:
    """What is to be decoded.

    wave_S: mono float32 in [-1, 1] or int16 samples at 16 kHz, at least one mel frame (160).
    budget: most tokens that are drawn, an end token among them; at least 1.
    temperature, seed: 0 is greedy; above, tokens are drawn, and the draws follow from the seed.
    """

    wave_S: np.ndarray
    prompt: Prompt
    budget: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Decoded:
    """New tokens without the end token, the log-probability of each, and whether it ended."""

    tokens: tuple[int, ...]
    logprobs_G: Float[np.ndarray, " G"]
    finished: bool


@dataclass(frozen=True)
class _Shape:
    """A class's slots on each device: R rows, filled M at a time; X, P and G as in `generate`."""

    rows: int
    fill_rows: int
    columns: int
    prompt: int
    budget: int


@struct.dataclass
class _Entries:
    """Utterances on their way into slots; padded to a program's shape."""

    wave_MS: Any
    samples_M: Any
    text_MX: Any
    text_lengths_M: Any
    audio_at_M: Any
    budget_M: Any
    choice: Choice


@dataclass(frozen=True)
class _Program:
    """What the compiled programs are fixed to."""

    config: ModelConfig
    compute: Compute
    mesh: Mesh
    end_ids: tuple[int, ...]
    sample: bool


def decode_all(
    params: Params,
    utterances: Sequence[Utterance],
    *,
    config: ModelConfig,
    compute: Compute,
    mesh: Mesh,
    end_ids: tuple[int, ...],
    batch_audio_s: float,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Decoded] | None:
    """Decodes all, in the order given; each as if it were alone. None when `stopped` says so.

    Several devices wait for each other: one call at a time.

    Args:
      params: whole on every device of the mesh.
      mesh: devices of this process.
      end_ids: tokens that end an utterance.
      batch_audio_s: audio in the slots of one device, in seconds; memory depends on it, not
        results.
    """
    found: dict[int, Decoded] = {}
    sample = any(utterance.temperature > 0 for utterance in utterances)
    program = _Program(config, compute, mesh, end_ids, sample)
    for audio_s, members in classes([len(u.wave_S) for u in utterances]).items():
        some = [utterances[i] for i in members]
        decoded = _decode_class(params, some, audio_s, program, batch_audio_s, stopped)
        if decoded is None:
            return None
        found.update(zip(members, decoded, strict=True))
    return [found[i] for i in range(len(utterances))]


def search_all(
    params: Params,
    utterances: Sequence[Utterance],
    *,
    beams: int,
    config: ModelConfig,
    compute: Compute,
    mesh: Mesh,
    end_ids: tuple[int, ...],
    batch_audio_s: float,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Decoded] | None:
    """As `decode_all`, by beam search: the best of `beams` hypotheses by mean log-probability.

    In whole batches, without refilling. Temperatures do not count. The log-probability of each
    token is the mean of its hypothesis.
    """
    found: dict[int, Decoded] = {}
    program = _Program(config, compute, mesh, end_ids, sample=False)
    for audio_s, members in classes([len(u.wave_S) for u in utterances]).items():
        some = [utterances[i] for i in members]
        shape = _shape(some, audio_s, mesh.size, batch_audio_s / beams)
        shape = replace(shape, fill_rows=shape.rows)
        each = mesh.size * shape.rows
        for start in range(0, len(some), each):
            if stopped():
                return None
            which = range(start, start + each)
            entries = _entries(some, which, shape, program)
            best = _search(params, entries, program, shape.budget, beams)
            told = best.tokens_BWG, best.lengths_BW, best.scores_BW, best.finished_BW
            tokens, lengths, scores, finished = (x[:, 0] for x in jax.device_get(told))
            for m, i in zip(_dealt(which, shape, mesh.size), which, strict=True):
                if i < len(some):
                    new = tuple(tokens[m, : lengths[m]].tolist())
                    logprobs_G = np.full(len(new), scores[m])
                    found[members[i]] = Decoded(new, logprobs_G, bool(finished[m]))
    return [found[i] for i in range(len(utterances))]


def classes(samples: Sequence[int]) -> dict[int, list[int]]:
    """Seconds -> indices of the clips that go into slots of that length, the longest first."""
    found: dict[int, list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: (-samples[i], i)):
        whole = math.ceil(samples[i] / SAMPLE_RATE)
        longest = max(_SHORTEST_S, 1 << (whole - 1).bit_length())
        found.setdefault(longest, []).append(i)
    return found


def bucket_s(seconds: float) -> int:
    """The length in whole seconds that a clip is padded to: 1 to 8, 10, 12 ... 32, 40, 48 ..."""
    whole = max(1, math.ceil(seconds))
    step = 2 ** max(0, (whole - 1).bit_length() - 3)
    step = min(step, 2) if whole <= _PIECE_S else step
    return step * math.ceil(whole / step)


def _decode_class(
    params: Params,
    utterances: Sequence[Utterance],
    audio_s: int,
    program: _Program,
    batch_audio_s: float,
    stopped: Callable[[], bool],
) -> list[Decoded] | None:
    """Utterances of one class, sorted by length, through one set of slots on each device."""
    devices = program.mesh.size
    shape = _shape(utterances, audio_s, devices, batch_audio_s)
    each = devices * shape.fill_rows
    waiting = deque(range(start, start + each) for start in range(0, len(utterances), each))
    owner_DR = np.full((devices, shape.rows), _FREE)
    found: dict[int, Decoded] = {}
    slots = _new(program, shape)
    decode_slots = _decoder(program.mesh.devices.flat[0].platform)
    ready = _entries(utterances, waiting[0], shape, program)
    while True:
        while waiting and (owner_DR == _FREE).sum(1).min() >= shape.fill_rows:
            row_M = _take_rows(owner_DR, waiting.popleft(), shape, len(utterances))
            slots = _fill(params, slots, ready, jax.device_put(row_M, rows(program.mesh)), program)
            if waiting:  # made ready while the devices work
                ready = _entries(utterances, waiting[0], shape, program)
        leave = np.int32(shape.rows - shape.fill_rows if waiting else 0)
        slots = decode_slots(params, slots, leave, program)
        _harvest(slots, owner_DR, found)
        if len(found) == len(utterances):
            return [found[i] for i in range(len(utterances))]
        if stopped():
            return None


def _shape(
    utterances: Sequence[Utterance], audio_s: int, devices: int, batch_audio_s: float
) -> _Shape:
    """As many slots as the utterances need or memory takes: a new token needs a token's room."""
    text = max(len(u.prompt.before) + len(u.prompt.after) for u in utterances)
    columns = _FEW_COLUMNS if text <= _FEW_COLUMNS else _up(text)
    budget = _up(max(u.budget for u in utterances))
    longest = bucket_s(max(len(u.wave_S) for u in utterances) / SAMPLE_RATE)
    room_s = max(audio_s, budget / CHUNK_TOKENS)
    most = 1 << max(0, math.floor(math.log2(max(1.0, batch_audio_s / room_s))))
    needed = 1 << (math.ceil(len(utterances) / devices) - 1).bit_length()
    fill_rows = needed if needed <= most else max(1, most // _REFILLS)
    fill_rows = min(fill_rows, max(1, _FILL_S // audio_s))
    prompt = columns + CHUNK_TOKENS * longest
    return _Shape(min(needed, most), fill_rows, columns, prompt, budget)


def _up(count: int) -> int:
    return _COLUMNS * math.ceil(count / _COLUMNS)


def _entries(
    utterances: Sequence[Utterance], which: range, shape: _Shape, program: _Program
) -> _Entries:
    """The utterances that come next, on their devices; `_take_rows` deals the same way."""
    some = dict(zip(_dealt(which, shape, program.mesh.size), which, strict=True))
    some = {m: i for m, i in some.items() if i < len(utterances)}
    total = len(which)
    seconds = bucket_s(max(len(utterances[i].wave_S) for i in some.values()) / SAMPLE_RATE)
    whole = all(utterances[i].wave_S.dtype == np.int16 for i in some.values())
    entries = _Entries(
        wave_MS=np.zeros((total, seconds * SAMPLE_RATE), np.int16 if whole else np.float32),
        samples_M=np.zeros(total, np.int32),
        text_MX=np.zeros((total, shape.columns), np.int32),
        text_lengths_M=np.ones(total, np.int32),
        audio_at_M=np.zeros(total, np.int32),
        budget_M=np.zeros(total, np.int32),
        choice=Choice(np.zeros(total, np.float32), np.zeros((total, 2), np.uint32)),
    )
    for m, i in some.items():
        utterance = utterances[i]
        wave_S, text = utterance.wave_S, utterance.prompt.before + utterance.prompt.after
        scale = np.float32(32768 if wave_S.dtype.kind == "i" else 1)
        entries.wave_MS[m, : len(wave_S)] = wave_S if whole else wave_S / scale
        entries.samples_M[m] = len(wave_S)
        entries.text_MX[m, : len(text)] = text
        entries.text_lengths_M[m] = len(text)
        entries.audio_at_M[m] = len(utterance.prompt.before)
        entries.budget_M[m] = utterance.budget
        entries.choice.temperature_R[m] = utterance.temperature
        entries.choice.seed_R2[m] = divmod(utterance.seed % (1 << 64), 1 << 32)
    return jax.device_put(entries, rows(program.mesh))


def _dealt(which: range, shape: _Shape, devices: int) -> list[int]:
    """The entry of each utterance: neighbours in length go to the devices in turn."""
    return [n % devices * shape.fill_rows + n // devices for n in range(len(which))]


def _take_rows(owner_DR: np.ndarray, which: range, shape: _Shape, count: int) -> np.ndarray:
    """The first free row of its device for each entry, for none a row that is not there."""
    devices = len(owner_DR)
    row_M = shape.rows + np.arange(len(which), dtype=np.int32) % shape.fill_rows
    for m, i in zip(_dealt(which, shape, devices), which, strict=True):
        if i < count:
            mine_R = owner_DR[m // shape.fill_rows]
            row_M[m] = np.flatnonzero(mine_R == _FREE)[0]
            mine_R[row_M[m]] = i
    return row_M


def _harvest(slots: Slots, owner_DR: np.ndarray, found: dict[int, Decoded]) -> None:
    """Takes what stands still out of its slots, which are free then."""
    told = slots.running_R, slots.finished_R, slots.length_R, slots.tokens_RG, slots.logprobs_RG
    running, finished, lengths, tokens, logprobs = jax.device_get(told)
    owners = owner_DR.reshape(-1)  # a view
    for row in np.flatnonzero((owners != _FREE) & ~running):
        count = lengths[row]
        new = tuple(tokens[row, :count].tolist())
        found[int(owners[row])] = Decoded(new, logprobs[row, :count].copy(), bool(finished[row]))
        owners[row] = _FREE


@partial(jax.jit, static_argnums=(0, 1))
def _new(program: _Program, shape: _Shape) -> Slots:
    config, dtype = program.config.decoder, program.compute.dtype
    return _on_each_device(
        lambda: empty_slots(config, shape.rows, shape.prompt, shape.budget, dtype), program
    )()


@partial(jax.jit, static_argnums=4, donate_argnums=1)
def _fill(params: Params, slots: Slots, entries: _Entries, row_M: Any, program: _Program) -> Slots:
    """Features, prefill and first tokens of the entries, put into their rows."""

    def on_one(params: Params, slots: Slots, entries: _Entries, row_M: Any) -> Slots:
        return fill(
            bind(params, program.config, program.compute),
            slots,
            _inputs(entries, program),
            row_M,
            entries.budget_M,
            entries.choice,
            end_ids=program.end_ids,
            sample=program.sample,
        )

    return _on_each_device(on_one, program, whole=1, cut=3)(params, slots, entries, row_M)


@cache
def _decoder(platform: str) -> Any:
    """`_decode_slots` compiled for a kind of device."""
    return jax.jit(
        _decode_slots,
        static_argnums=3,
        donate_argnums=1,
        compiler_options=_DECODE_OPTIONS.get(platform),
    )


def _decode_slots(params: Params, slots: Slots, leave: Any, program: _Program) -> Slots:
    def on_one(params: Params, leave: Any, slots: Slots) -> Slots:
        return decode(
            bind(params, program.config, program.compute),
            slots,
            leave,
            end_ids=program.end_ids,
            sample=program.sample,
            together=(COPIES, CUT) if program.mesh.size > 1 else (),
        )

    return _on_each_device(on_one, program, whole=2, cut=1)(params, leave, slots)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _search(
    params: Params, entries: _Entries, program: _Program, most_tokens: int, beams: int
) -> Beams:
    def on_one(params: Params, entries: _Entries) -> Beams:
        return generate_beam(
            bind(params, program.config, program.compute),
            _inputs(entries, program),
            entries.budget_M,
            beams=beams,
            length_penalty=1.0,
            end_ids=program.end_ids,
            max_new_tokens=most_tokens,
        )

    return _on_each_device(on_one, program, whole=1, cut=1)(params, entries)


def _inputs(entries: _Entries, program: _Program) -> Inputs:
    with jax.named_scope("features"):
        mel_BTM, frames_B = log_mel(
            entries.wave_MS, entries.samples_M, mel_bins=program.config.encoder.mel_bins
        )
    return Inputs(
        mel_BTM, frames_B, entries.text_MX, entries.text_lengths_M, audio_at_B=entries.audio_at_M
    )


def _on_each_device(
    function: Callable[..., Any], program: _Program, whole: int = 0, cut: int = 0
) -> Callable[..., Any]:
    """The function on each device's own rows; its first arguments are whole on all devices."""
    return jax.shard_map(
        function,
        mesh=program.mesh,
        in_specs=(PartitionSpec(),) * whole + (ROWS,) * cut,
        out_specs=ROWS,
        check_vma=False,
    )
