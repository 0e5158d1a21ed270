"""The page of an evaluation holds its numbers and texts, and nothing a transcript brings runs."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import ALLOWED, NASTY, Page

from hebasr_jax.errors import UserError
from hebasr_jax.hypotheses import Hypothesis, write_hypotheses
from hebasr_jax.metrics import score
from hebasr_jax.report_eval import write_evaluation_report

HEBREW = Hypothesis(
    "h1", "שלום, עולם גדול", "שלום לעולם גדול ויפה", 2.0, source="רדיו", snr_db=12.4
)
ENGLISH = Hypothesis("e1", "one two three", "one three", 3.5, speaker="Ann")
MIXED = Hypothesis("m1", "ה-API של Google", "האפי של גוגל", 4.0, loops=1, finished=False)
EMPTY = Hypothesis("n1", "", "", 1.0)
DEAF = Hypothesis("n2", "מי שם", "", 1.5)
SILENT = Hypothesis("n3", "", "תודה רבה", 5.0, silent=True)
STYLED = Hypothesis("q1", 'צה"ל הודיע', "\u200fצה״ל הודיע", 2.5)
ROWS = (HEBREW, ENGLISH, MIXED, EMPTY, DEAF, SILENT, STYLED)


def numbers(rows, **more) -> dict:
    """What results.json holds of a set."""
    texts = [row.reference for row in rows], [row.hypothesis for row in rows]
    told = score(*texts, None, resamples=20, seed=0)
    audio_s = sum(row.duration_s for row in rows)
    return {**told, "wil": 0.617, "audio_s": audio_s, "missing": 0, "rtfx": 812.34, **more}


def write_out(out: Path, sets: dict, more=None, **changes) -> Path:
    """An OUT folder of rows by set; `more` goes into every set's numbers."""
    told = {}
    for name, rows in sets.items():
        (out / name).mkdir(parents=True)
        write_hypotheses(out / name / "hypotheses.jsonl", rows)
        told[name] = numbers(rows, **(more or {}))
    write_json(out / "results.json", {"format": 1, "sets": told, **changes})
    return out


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def read(out: Path) -> Page:
    return Page(write_evaluation_report(out).read_text(encoding="utf-8"))


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


class Cells(Page):
    """Keeps the texts of the cells of each table row, too."""

    def __init__(self, page: str) -> None:
        self.rows: list[list[str]] = []
        super().__init__(page)

    def handle_starttag(self, tag, attrs) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data) -> None:
        super().handle_data(data)
        if any(tag == "td" for tag, _ in self.open):
            self.rows[-1][-1] += data


def tables(out: Path) -> Cells:
    return Cells(write_evaluation_report(out).read_text(encoding="utf-8"))


def row_of(page: Cells, first: str) -> list[list[str]]:
    """The rows of all tables whose first cell begins so."""
    return [row for row in page.rows if row and row[0].startswith(first)]


def test_the_headline_has_each_sets_numbers(tmp_path) -> None:
    macro = {"wer": 0.4567, "sets": ["talk", "read"]}
    page = tables(write_out(tmp_path, {"talk": ROWS, "read": [ENGLISH]}, macro=macro))
    told = numbers(ROWS)
    row = row_of(page, "talk")[0]
    assert row[1] == f"{100 * told['wer']:.1f} %"
    assert row[2].startswith(f"[{100 * told['ci95'][0]:.1f}, ")
    counts = [told[key] for key in ("substitutions", "deletions", "insertions", "words", "clips")]
    assert row[5:] == ["61.7 %", *map(str, counts), "0", "1", "", "", "0.01", "812.3"]
    assert row_of(page, "read")[0][1:3] == ["33.3 %", "unknown"]  # one clip has no interval
    assert "macro mean WER 45.7 % only 2 of the six sets: talk, read" in flat(page.within("tile"))
    assert sum(a.get("class") == "interval" for _, a in page.elements) == 1


@pytest.mark.parametrize(("missing", "withheld"), [(2, False), (3, True)])
def test_no_rate_of_a_set_with_over_one_per_cent_missing_is_shown(
    tmp_path, missing, withheld
) -> None:
    rows = [Hypothesis(f"c{i}", "אחת שתיים שלוש", "אחת שתיים", 1.0) for i in range(198)]
    rates = {"raw": {"wer": 0.3333}, "tolerant_wer": 0.3333, "cer": 0.3333, "wil": 0.3333}
    out = write_out(tmp_path, {"talk": rows}, rates | {"missing": missing})
    pair = {"wer_first": 0.3333, "wer_second": 0.3333, "ci95": [-0.1, 0.1], "difference": 0.0}
    write_json(out / "compare.json", {"sets": {"talk": pair}})
    write_json(out / "control" / "results.json", json.loads((out / "results.json").read_text()))
    (out / "talk" / "missing.jsonl").write_text('{"id": "c9", "reason": "cut < short"}\n{"id')
    page = tables(out)
    shown = [*row_of(page, "talk"), *row_of(page, "this model"), *row_of(page, "the control")]
    assert len(shown) == 5
    assert all(("33.3" in " ".join(row)) != withheld for row in shown)
    assert any("3 of 201 clips missing" in row for row in shown) == withheld
    assert "Missing clips: 1" in page.text
    assert row_of(page, "c9") == [["c9", "cut < short"]]


def test_the_score_as_written_and_the_tolerant_one_stand_beside_and_are_named(tmp_path) -> None:
    more = {"style": "hebrew-1", "raw": {"wer": 0.987}, "tolerant_wer": 0.123}
    page = tables(write_out(tmp_path, {"talk": ROWS}, more))
    wer = f"{100 * numbers(ROWS)['wer']:.1f} %"
    assert row_of(page, "talk")[1][:6] == ["talk", "hebrew-1", wer, "98.7 %", "1", "12.3 %"]
    assert "12.3 %" not in row_of(page, "talk")[0]
    assert row_of(page, "⟨U+200F⟩צה״ל") == [["⟨U+200F⟩צה״ל", 'צה"ל', "1"]]
    assert "orthography-tolerant WER takes spellings of one word as equal" in flat(page.text)


def test_alignments_show_the_text_that_was_scored(tmp_path) -> None:
    for style in (None, "hebrew-1"):
        out = write_out(tmp_path / str(style), {"talk": [STYLED]}, {"style": style})
        words = flat(read(out).within("words"))
        assert ("צה" in words.split()) == (style is None)  # unstyled, the gershayim splits it


def test_other_systems_figures_are_marked(tmp_path) -> None:
    figures = {"talk": 0.0512, "kan": 0.081}
    whose = {"system": "Ivrit", "source": "their board"}
    published = {name: [{**whose, "wer": wer}] for name, wer in figures.items()}
    out = write_out(tmp_path, {"talk": ROWS}, published=published)
    assert "No control was run here." in read(out).text
    content = {"model": {"name": "whisper"}, "sets": {"talk": {"wer": 0.25, "clips": 7}}}
    write_json(out / "control" / "results.json", content)
    page = tables(out)
    assert row_of(page, "Ivrit") == [["Ivrit", "5.1 %", "8.1 %", "published: their board"]]
    assert row_of(page, "the control") == [["the control, whisper", "25.0 %", "–", "measured here"]]
    assert "No control" not in page.text


@pytest.mark.parametrize(
    ("ci95", "verdict"),
    [
        ([-0.02, -0.01], "the first is better"),
        ([0.01, 0.02], "the second is better"),
        ([-0.01, 0.02], "no difference shown"),
        ([None, None], "unknown"),
    ],
)
def test_a_comparison_claims_only_what_its_interval_shows(tmp_path, ci95, verdict) -> None:
    out = write_out(tmp_path, {"talk": ROWS})
    pair = {"wer_first": 0.05, "wer_second": 0.06, "difference": -0.01234, "ci95": ci95}
    sides = {"first": "ours in a", "second": "theirs in b"}  # as `compare_folders` has them
    write_json(out / "compare.json", {**sides, "sets": {"talk": pair}, "skipped": {"kan": "why"}})
    page = tables(out)
    (row,) = (row for row in row_of(page, "talk") if row[1:3] == ["5.0 %", "6.0 %"])
    assert (row[3], row[-1]) == ("-1.23", verdict)
    assert "First: ours in a. Second: theirs in b." in page.text
    assert row_of(page, "kan") == [["kan", "why"]]


def test_confusions_are_counted_over_all_clips(tmp_path) -> None:
    pairs = [("a b", "a x"), ("b b", "x b"), ("c", ""), ("c a", "c a q"), ("c", "y")]
    rows = [Hypothesis(f"c{i}", *pair, 1.0) for i, pair in enumerate(pairs)]
    page = tables(write_out(tmp_path, {"talk": rows}))
    assert row_of(page, "b") == [["b", "x", "2"], ["b", "2", "3", "66.7 %"]]
    assert row_of(page, "c")[:3] == [["c", "y", "1"], ["c", "1"], ["c", "2", "3", "66.7 %"]]
    assert row_of(page, "q") == [["q", "1"]]
    assert row_of(page, "a") == []  # always right


def test_the_worst_twenty_come_in_order_of_errors(tmp_path) -> None:
    rows = [Hypothesis(f"c{i:02}", "w " * 40, "w " * (40 - i), 1.0) for i in range(30)]
    heads = read(write_out(tmp_path, {"talk": rows})).within("id")
    assert re.findall(r"\bc\d\d\b", heads) == [f"c{i:02}" for i in range(29, 9, -1)]
    assert "errors: 29 (≠ 0, − 29, + 0), words: 40, WER 72.5 %" in flat(heads)


def test_right_to_left_text_runs_so_and_errors_have_signs(tmp_path) -> None:
    page = read(write_out(tmp_path, {"talk": ROWS}))
    lines = [a["dir"] for _, a in page.elements if a.get("class") == "words"]
    assert Counter(lines) == {"rtl": 5, "ltr": 1}  # all but the clip without error
    assert {data for tag, _, data in page.texts if tag == "i"} == set("≠−+")
    for tag, _, data in page.texts:
        if any("\u05d0" <= letter <= "\u05ea" for letter in data):
            assert tag in ("bdi", "div"), data  # isolated, or a block with its own direction
    heads = page.within("id")
    for told in ("SNR 12 dB", "speaker", "loops: 1", "text may be missing", "silent"):
        assert told in heads


def test_slices_and_hallucinations_are_told(tmp_path) -> None:
    cut = {"name": "0 to 5 s", "wer": 0.321, "ci95": [0.2, 0.4], "words": 77, "clips": 6}
    alone = {"name": "A", "wer": 0.5, "ci95": [None, None], "words": 3, "clips": 1}
    found = {
        "loops": {"count": 1, "ids": ["m1"]},
        "text_on_silence": {"count": 1, "ids": ["n3"], "silent": 4},
        "insertion_bursts": {"count": 0, "ids": []},
    }
    more = {"slices": {"duration": [cut], "speaker": [alone], "snr": []}, "hallucinations": found}
    page = tables(write_out(tmp_path, {"talk": ROWS}, more))
    assert row_of(page, "0 to 5 s") == [["0 to 5 s", "32.1 %", "[20.0, 40.0]", "", "77", "6"]]
    assert row_of(page, "A") == [["A", "50.0 %", "unknown", "", "3", "1"]]
    assert "Text on silence, clips: 1, of 4 silent ones" in page.text
    assert "Many words added at a stretch, clips: 0" in page.text
    assert page.within("id").count("n3") == 2  # as an example and among the worst


def test_sound_is_played_where_it_lies(tmp_path) -> None:
    out, away = tmp_path / "out", tmp_path / "über #1.wav"
    (out / "talk").mkdir(parents=True)
    near = out / "talk" / "a: 1%.wav"
    for file in (near, away):
        file.write_bytes(b"RIFF")
    files = [str(near), near.name, str(away), "gone.wav", "javascript:alert(1)", "", "x" * 5000]
    rows = [Hypothesis(f"c{i}", "w " * (9 - i), "", 1.0, audio=f) for i, f in enumerate(files)]
    (out / "talk").rename(tmp_path / "kept")
    write_out(out, {"talk": rows})
    (tmp_path / "kept" / near.name).rename(near)
    page = read(out)
    players = [attributes for tag, attributes in page.elements if tag == "audio"]
    assert all("controls" in attributes for attributes in players)
    here = "./talk/a%3A%201%25.wav"
    assert [a["src"] for a in players] == [here, here, away.resolve().as_uri()]
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; media-src 'self' file:"


def test_what_is_missing_is_left_out_and_said(tmp_path) -> None:
    write_json(tmp_path / "results.json", {"sets": {"talk": {"wer": 0.5}, "none": None}})
    (tmp_path / "compare.json").write_text("{")
    page = tables(tmp_path)
    assert row_of(page, "talk")[0][1] == "50.0 %"
    assert "No breakdown." in page.text
    assert "Not checked." in page.text
    write_json(tmp_path / "results.json", {})
    assert "No set was evaluated." in read(tmp_path).text


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null"])
def test_without_results_there_is_no_page(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        write_evaluation_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_hypotheses_of_another_result_are_noticed(tmp_path) -> None:
    out = write_out(tmp_path, {"talk": ROWS})
    assert "do not belong together" not in read(out).text
    write_hypotheses(out / "talk" / "hypotheses.jsonl", ROWS[:2])
    assert "do not belong together" in read(out).text


def test_skipped_sets_overlap_and_versions_are_told(tmp_path) -> None:
    more = {"versions": {"jiwer": "4.0.1"}, "revision": "cafe", "max_clips": 7}
    model = {"source": "runs/x", "dtype": "bfloat16"}
    out = write_out(
        tmp_path, {"talk": ROWS}, more, model=model, skipped={"whatsapp": "gated:\nask"}
    )
    sound = {"clips": 23, "examples": [{"test": "t1", "train": "b", "score": 0.912}]}
    found = {"name": "talk", "clips": 70, "overlapping": 31, "id": {"clips": 8}, "audio": sound}
    train = {"name": "mine", "clips": 4000, "overlapping": ["a", "b"]}
    other = {"clips": 5, "overlapping": 5}  # of a set that is no longer among the results
    write_json(out / "overlap.json", {"train": train, "tests": {"talk": found, "gone": other}})
    page = tables(out)
    assert row_of(page, "whatsapp") == [["whatsapp", "gated:\nask"]]
    assert "2 of 4,000 clips of mine overlap a set." in flat(page.text)
    assert row_of(page, "talk")[-1] == ["talk", "70", "31", "8", "23"]
    assert row_of(page, "t1") == [["t1", "b", "0.912"]]
    assert row_of(page, "gone") == []
    assert row_of(page, "sets.talk.versions.jiwer") == [["sets.talk.versions.jiwer", "4.0.1"]]
    assert row_of(page, "model.dtype") == [["model.dtype", "bfloat16"]]
    assert "a trial: first 7 clips" in row_of(page, "talk")[0][0]


def test_the_same_files_give_the_same_page(tmp_path) -> None:
    out = write_out(tmp_path, {"talk": ROWS, "read": ROWS}, {"style": "hebrew-1"})
    first = write_evaluation_report(out).read_bytes()
    assert write_evaluation_report(out).read_bytes() == first
    for name in ("talk", "read"):  # nor does the order of clips matter to the tables of words
        write_hypotheses(out / name / "hypotheses.jsonl", ROWS[::-1])
    again = write_evaluation_report(out).read_text()
    tops = [text.split("Set talk")[0] for text in (first.decode(), again)]
    assert tops[0] == tops[1]


@settings(max_examples=25)
@given(st.lists(NASTY, min_size=5, max_size=5))
def test_text_stays_text(tmp_path_factory, texts) -> None:
    out = tmp_path_factory.mktemp("out")
    a, b, c, d, e = texts
    row = Hypothesis(a, b, f"{c} {b}", 1.0, source=c, speaker=d, audio=e)
    slices = {a: [{"name": b, "wer": 0.5, "ci95": [0.1, 0.9]}]}
    more = {"style": c, "slices": slices, "hallucinations": {d: {"ids": [a, b], "count": 2}}}
    more |= {"versions": {d: e}, "model": c}
    published = {c: [{"system": a, "source": b, "wer": 0.05}]}
    write_out(out, {"set": [row]}, more, published=published, skipped={d: e}, model={a: b})
    (out / "set" / "missing.jsonl").write_text(json.dumps({a: b, "id": c}))
    found = {"name": a, e: {"clips": b, "examples": [{c: d}]}}
    write_json(out / "overlap.json", {"train": {"name": c}, "tests": {"set": found}})
    pair = {"ci95": [0.1, 0.2]}
    write_json(out / "compare.json", {"first": {"model": a}, "sets": {b: pair}, "skipped": {c: d}})
    page = read(out)
    tags = {tag for tag, _ in page.elements}
    assert all(ALLOWED.fullmatch(tag) for tag in tags - {"a", "h4"})
    attributes = {(tag, name) for tag, found in page.elements for name in found}
    assert not {(t, n) for t, n in attributes if n.startswith("on") or n in ("src", "style")}
    assert all(found["href"] == "#set0" for tag, found in page.elements if "href" in found)
    assert b.replace("\0", "\ufffd") in page.text.replace("\0", "\ufffd")


def test_the_page_loads_nothing(tmp_path) -> None:
    page = write_evaluation_report(write_out(tmp_path, {"talk": ROWS})).read_text()
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_a_huge_text_gives_a_small_page(tmp_path) -> None:
    rows = [
        Hypothesis("words", "שלום עולם", "תודה " * 50_000, 9.0),
        Hypothesis("letters", "שלום", "א" * 300_000, 9.0),
        Hypothesis("long", "אחת שתיים " * 5_000, "אחת שתיים " * 2_000 + "שלוש", 9e3),
    ]
    page = write_evaluation_report(write_out(tmp_path, {"talk": rows}))
    assert page.stat().st_size < 400_000
    assert "more letters" in page.read_text(encoding="utf-8")
