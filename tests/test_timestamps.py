"""The 80-ms grid, the stamp tokens, and their ids in a tokenizer after a reload."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text import REAL, STAMPED, part, stamped, tiny, write_tiny_tokenizer

from hebasr_jax.errors import UserError
from hebasr_jax.text import load_tokenizer, parse_output
from hebasr_jax.timestamps import (
    FILLER,
    MARKER,
    MAX_STAMP_S,
    SECONDS,
    SLOTS,
    STAMP_TOKENS,
    Segment,
    StampIds,
    Words,
    add_stamp_tokens,
    from_grid,
    join_stamps,
    to_grid,
)

REAL_ROWS = 151936
NAMES = (FILLER, *STAMP_TOKENS)


def _names(time_s: float) -> tuple[str, str]:
    second, slot = to_grid(time_s)
    return SECONDS[second], SLOTS[slot]


def real_folder(folder: Path, layout: str) -> Path:
    """The real tokenizer files: as published, as transformers 5 saves them, or both together."""
    from transformers import Qwen2Tokenizer

    folder.mkdir()
    if layout != "original":
        Qwen2Tokenizer.from_pretrained(str(REAL), local_files_only=True).save_pretrained(folder)
    if layout != "transformers":
        for file in REAL.iterdir():
            shutil.copyfile(file, folder / file.name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the grid ------------------------------------------------------------------------------


def test_every_millisecond_has_a_stamp_within_40_ms_and_stamps_are_monotone():
    times = [ms / 1000 for ms in range(round(MAX_STAMP_S * 1000) + 1)]
    points = [to_grid(time_s) for time_s in times]
    back = [from_grid(*point) for point in points]
    assert max(abs(a - b) for a, b in zip(times, back, strict=True)) <= 0.04 + 1e-9
    assert points == sorted(points)
    assert back == sorted(back)
    assert set(points) == {(second, slot) for second in range(121) for slot in range(13)}


@given(st.floats(0, MAX_STAMP_S), st.floats(0, MAX_STAMP_S))
def test_any_two_times_keep_their_order(first_s, second_s):
    early, late = sorted((first_s, second_s))
    assert to_grid(early) <= to_grid(late)
    assert abs(from_grid(*to_grid(early)) - early) <= 0.04 + 1e-9


def test_a_grid_point_is_its_own_stamp():
    for second in range(121):
        for slot in range(13):
            time_s = from_grid(second, slot)
            assert time_s == (100 * second + 8 * slot) / 100
            assert to_grid(time_s) == (second, slot)


@pytest.mark.parametrize(
    ("time_s", "stamp_s"),
    [
        *[(0, 0), (0.03, 0), (0.05, 0.08), (0.96, 0.96), (0.97, 0.96), (0.99, 1), (1, 1)],
        *[(119.99, 120), (120, 120), (120.95, 120.96), (MAX_STAMP_S, MAX_STAMP_S)],
    ],
)
def test_the_nearest_grid_point_is_taken(time_s, stamp_s):
    assert from_grid(*to_grid(float(time_s))) == stamp_s


@pytest.mark.parametrize("time_s", [-1e-9, -1.0, 120.961, 121.0, math.inf, -math.inf, math.nan])
def test_a_time_off_the_grid_is_an_error(time_s):
    with pytest.raises(UserError, match="cannot be written"):
        to_grid(time_s)


def test_the_token_names_read_well():
    assert _names(12.34) == ("<|12s|>", "<|+4|>")
    assert _names(0.0) == ("<|0s|>", "<|+0|>")
    assert _names(MAX_STAMP_S) == ("<|120s|>", "<|+12|>")
    assert len(STAMP_TOKENS) == len(set(STAMP_TOKENS)) == 135


def test_ids_and_times_go_both_ways():
    stamps = StampIds(marker=1000)
    for ms in range(0, 120_961, 37):
        second, slot = stamps.encode(ms / 1000)
        assert (stamps.second_of(second), stamps.slot_of(slot)) == to_grid(ms / 1000)
        assert stamps.second_of(slot) is None
        assert stamps.slot_of(second) is None
    inside = [token for token in range(900, 1300) if token in stamps]
    assert inside == list(range(999, 1135))
    assert stamps.second_of(1000) is None


# --- segments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "segments"),
    [
        (["א ב"], []),
        ([0, "א", 1, 2, "ב", 3], [(0, 1, "א"), (2, 3, "ב")]),
        (["א", 1, 2, "ב", 3], [(0, 1, "א"), (2, 3, "ב")]),  # no first start
        ([0, "א", 2, "ב", 3], [(0, 2, "א"), (2, 3, "ב")]),  # one stamp for end and start
        ([0, "א", 1, 2, "ב"], [(0, 1, "א"), (2, 9, "ב")]),  # cut before the last end
        ([0, "א", 1, "ב"], [(0, 1, "א"), (1, 9, "ב")]),
        ([0, 1, 2, "א ב", 3], [(2, 3, "א ב")]),  # stamps without words
        ([5, "א ב", 3], [(5, 5, "א ב")]),  # an end before its start
        ([0, "א ב", 1, 2], [(0, 1, "א ב")]),
    ],
)
def test_stamps_become_segments_and_no_word_is_lost(parts, segments):
    read = parse_output(tiny(), STAMPED, stamped(*parts), duration_s=9.0)
    assert read.text == "א ב"
    assert read.segments == tuple(part(*row) for row in segments)


def test_half_a_stamp_is_dropped():
    second, slot = tiny().stamps.encode(7.08)
    marker, whole = tiny().stamps.marker, stamped(1, "ב", 2)
    for stray in ([second], [slot], [slot, second], [second, marker, slot], [marker - 1]):
        read = parse_output(tiny(), STAMPED, [*stray, *whole, *stray])
        assert (read.text, read.segments) == ("ב", (part(1, 2, "ב"),))
    read = parse_output(tiny(), STAMPED, [*whole, second, *tiny().encode("א"), slot])
    assert (read.text, read.segments[1:]) == ("ב א", (part(2, 2, "א"),))


def test_a_last_segment_without_end_or_duration_ends_where_it_starts():
    read = parse_output(tiny(), STAMPED, stamped(3, "א"))
    assert read.segments == (part(3, 3, "א"),)


def test_a_segment_carries_its_tokens():
    style = dataclasses.replace(STAMPED, language_in_prompt=False)
    ids = [*tiny().full.encode("language Hebrew<asr_text>").ids, *stamped(1, "שלום", 2, "א")]
    first, last = parse_output(tiny(), style, ids).segments
    assert first.tokens == tiny().encode("שלום")
    assert last.tokens == tiny().encode("א")


# --- in a tokenizer ------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_real_ids_after_a_reload(tmp_path, layout):
    from transformers import AutoTokenizer

    folder = real_folder(tmp_path / layout, layout)
    before = AutoTokenizer.from_pretrained(str(folder))
    assert add_stamp_tokens(folder, REAL_ROWS) == StampIds(marker=151706)
    after = AutoTokenizer.from_pretrained(str(folder))
    assert after.convert_tokens_to_ids(list(NAMES)) == list(range(151705, 151841))
    assert len(after) == 151841
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert after.all_special_tokens == before.all_special_tokens
    ids = after("<|timestamps|><|3s|><|+4|>שלום<|5s|><|+0|>")["input_ids"]
    assert ids == [151706, 151710, 151832, 126654, 151712, 151828]
    assert after.decode([*ids, 151645], skip_special_tokens=True).endswith("שלום<|5s|><|+0|>")
    ours = load_tokenizer(folder)
    assert ours.stamps == StampIds(marker=151706)
    assert SECONDS[3] + SLOTS[4] == ours.decode(ours.stamps.encode(3.33))


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_stamps_follow_the_last_token_of_any_tokenizer(tmp_path, layout):
    folder = write_tiny_tokenizer(tmp_path, layout)
    stamps = add_stamp_tokens(folder, vocab_size=267 + 136)
    assert stamps == StampIds(marker=268) == load_tokenizer(folder).stamps
    assert load_tokenizer(folder).full.get_vocab_size() == 267 + 136


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_second_call_changes_nothing(tmp_path, layout):
    folder = write_tiny_tokenizer(tmp_path, layout)
    stamps = add_stamp_tokens(folder, 512)
    once = contents(folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert add_stamp_tokens(folder, 512) == stamps
    assert contents(folder) == once
    assert times == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.mark.shared
def test_nothing_else_in_the_files_changes(tmp_path):
    folder = real_folder(tmp_path / "both", "both")
    before = contents(folder)
    add_stamp_tokens(folder, REAL_ROWS)
    after = contents(folder)
    lists = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == lists
    old, new = ({name: json.loads(files[name]) for name in lists} for files in (before, after))
    for files in (old, new):
        files["listed"] = files["tokenizer.json"].pop("added_tokens")
        files["decoder"] = files["tokenizer_config.json"].pop("added_tokens_decoder")
    assert new["tokenizer.json"] == old["tokenizer.json"]
    assert new["tokenizer_config.json"] == old["tokenizer_config.json"]
    assert new["listed"][: len(old["listed"])] == old["listed"]
    assert new["decoder"] | old["decoder"] == new["decoder"]
    added = {name: token_id for token_id, name in enumerate(NAMES, start=151705)}
    assert new["added_tokens.json"] == old["added_tokens.json"] | added
    assert not any(token["special"] for token in new["listed"] if token["content"] in added)
    assert not any(t["special"] for t in new["decoder"].values() if t["content"] in added)


@pytest.mark.shared
def test_the_aligners_token_is_kept_where_it_is(tmp_path):
    folder = real_folder(tmp_path / "original", "original")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["151705"] = {"content": FILLER, "special": True}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert add_stamp_tokens(folder, REAL_ROWS) == StampIds(marker=151706)
    config = json.loads(file.read_text(encoding="utf-8"))
    assert config["added_tokens_decoder"]["151705"] == {"content": FILLER, "special": True}


def test_a_call_cut_short_leaves_whole_files_and_the_next_completes_it(tmp_path, monkeypatch):
    done = write_tiny_tokenizer(tmp_path / "done", "original")
    cut = write_tiny_tokenizer(tmp_path / "cut", "original")
    for folder in (done, cut):
        write_tiny_tokenizer(folder, "transformers")  # a tokenizer.json beside the other files
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    add_stamp_tokens(done, 512)
    before, replace = contents(cut), os.replace

    def fail_on_config(source, target):
        if Path(target).name == "tokenizer_config.json":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_config)
    with pytest.raises(OSError, match="disk full"):
        add_stamp_tokens(cut, 512)
    half = contents(cut)
    assert half.keys() == before.keys()
    assert half["tokenizer.json"] == contents(done)["tokenizer.json"]
    assert half["tokenizer_config.json"] == before["tokenizer_config.json"]
    monkeypatch.undo()
    add_stamp_tokens(cut, 512)
    assert contents(cut) == contents(done)


# --- what is refused -----------------------------------------------------------------------


def refused(folder: Path, message: str, vocab_size: int = 512) -> None:
    """Adding the stamps is refused with this message and leaves the folder as it was."""
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        add_stamp_tokens(folder, vocab_size)
    assert contents(folder) == before


def relist(folder: Path, *tokens: tuple[str, int]) -> Path:
    """Add tokens to the list in tokenizer.json."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] += [
        {**content["added_tokens"][0], "content": name, "id": token_id} for name, token_id in tokens
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_ids_beyond_the_embedding_rows_are_refused(tmp_path):
    folder = write_tiny_tokenizer(tmp_path)
    refused(folder, "Id 402 needs 403 embedding rows; there are 402", vocab_size=402)
    add_stamp_tokens(folder, 403)
    refused(folder, "Id 402 needs 403", vocab_size=402)


def test_ids_that_other_tokens_have_are_refused(tmp_path):
    folder = relist(write_tiny_tokenizer(tmp_path), (FILLER, 267), ("<mine>", 268))
    refused(folder, "Id 268 belongs to <mine>")


def test_stamps_at_other_ids_are_refused(tmp_path):
    folder = relist(write_tiny_tokenizer(tmp_path), ("<|3s|>", 267))
    refused(folder, r"<\|3s\|> is there already, with id 267")


def test_a_gap_in_the_ids_is_refused(tmp_path):
    refused(relist(write_tiny_tokenizer(tmp_path), ("<mine>", 300)), "loaders would shift ids")


def test_files_that_contradict_each_other_are_refused(tmp_path):
    folder = write_tiny_tokenizer(tmp_path)
    (folder / "added_tokens.json").write_text('{"<asr_text>": 12}')
    refused(folder, "contradict each other")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"', '{"added_tokens_decoder": "x"}'])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    folder = write_tiny_tokenizer(tmp_path)
    (folder / name).write_text(content)
    refused(folder, "Cannot read the tokenizer")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    refused(tmp_path, "No special tokens")


def test_a_tokenizer_with_a_part_of_the_stamps_is_refused(tmp_path):
    folder = relist(write_tiny_tokenizer(tmp_path), (FILLER, 267), (MARKER, 268))
    with pytest.raises(UserError, match=r"<\|0s\|> is not at its place"):
        load_tokenizer(folder)


def test_stamps_that_run_backwards_make_no_segment_that_does() -> None:
    pieces = [0.0, Words("a", (1,)), 118.0, 110.0, Words("b", (2,)), 3.0]
    assert join_stamps(pieces, 120.0) == [Segment(0.0, 118.0, "a"), Segment(118.0, 118.0, "b")]
