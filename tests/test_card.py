"""The model card tells the run's own numbers, safely, and makes nothing up."""

import contextlib
import copy
import io
import json
import re
import socket
from pathlib import Path
from xml.etree import ElementTree

import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reference import noise, tiny_folder

from hebasr_jax.card import CURVE, write_card
from hebasr_jax.card_text import shown
from hebasr_jax.errors import UserError

EVIL = "a|b<script>alert(1)</script>`*_x_*`\n# [z](http://e.il) &amp; שלום"
SHA = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_secret_of_the_environment"


def scores(wer: float, **more: object) -> dict[str, object]:
    sample = {"id": "c/1", "reference": 'שלום <b>עולם</b> & "כל"', "hypothesis": "שלום\n\n# עולם"}
    return {
        **{"wer": wer, "ci95": [wer - 0.011, wer + 0.013], "cer": wer / 4, "loss": 0.4321},
        **{"cer_ci95": [wer / 4 - 0.002, wer / 4 + 0.003], "hits": 900, "words": 12345},
        **{"substitutions": 811, "deletions": 822, "insertions": 833, "clips": 567},
        **{"empty": 7, "left_out": 3, "samples": [sample] * 5},
    } | more


FACTS = {
    "step": 1800,
    "chosen": "average of steps 400, 600 and 800",
    "members": {"step 400": 0.25, "step 600": 0.3125, "step 800": 0.4375},
    "candidates": [
        {"name": "step 600", "loss": 0.6123, "wer": 0.0713},
        {"name": "average", "loss": 0.5987, "wer": 0.0694},
    ],
    "scores": {"test": {"eval-d1": scores(0.0517)}, "dev": {"dev": scores(0.0694)}},
    "layout": "transformers",
    "base_model": "Qwen/Qwen3-ASR-1.7B",
    "base_revision": SHA,
    "data": {
        "crowd": {
            **{
                "path": "data/crowd",
                "hub": "ivrit-ai/crowd-transcribe-v5",
                "revision": SHA[::-1],
                "hours": 298.5,
            },
            **{"licence": "ivrit.ai v2", "clips": 203827},
        },
        "own": {"path": "/home/dana/secret/clips.jsonl", "hours": 1.25, "clips": 321},
    },
}
NUMBERS = (
    *("1,800", "0.25", "0.3125", "0.4375", "0.6123", "7.1 %", "0.5987", "6.9 %", "5.2 %"),
    *("[4.1, 6.5]", "1.3 %", "[1.1, 1.6]", "[5.8, 8.2]", "1.7 %", "[1.5, 2.0]", "0.4321"),
    *("12,345", "811", "822", "833", "567", "298.5", "203,827", "1.25", "321"),
)
TAGS = {"h1", "h2", "p", "ul", "li", "a", "img", "strong", "pre", "code", "div", "hr"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}


def write_run(run: Path) -> Path:
    run.mkdir(parents=True)
    entry = {"value": "/home/dana/models/base", "origin": "/home/dana/configs/round2.py"}
    config = {
        "model.path": entry,
        "seed": {"value": 4711, "origin": "--set"},
        "runs_dir": {"value": "/home/dana/runs", "origin": "--set"},
        "optim.beta1": {"value": 0.9191, "origin": "default"},
        "text.stamp_share": {"value": 0.0, "origin": "default"},
        "data.max_clip_s": {"value": 31.5, "origin": "round2.py"},
    }
    start = {"host": socket.gethostname(), "commit": "abc1234", "devices": "8 x H200"}
    start |= {"packages": {"jax": "0.11.1"}, "platform": "Linux-dana"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "env.json").write_text(json.dumps({"fixed": {}, "starts": [{}, start]}))
    plan = {"sets": [{"name": "crowd", "clips": 203827, "effective_epochs": 1.375}]}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "quarantine.jsonl").write_text('{"set": "crowd"}\n' * 17)
    lines = [
        {"kind": "train", "step": s, "loss": 4 / s, "skipped": 2, "steps": 1800}
        for s in range(1, 9)
    ]
    dev = {"wer": 0.5, "ci95": [0.4, 0.6], "loss": 2.5}
    lines += [{"kind": "train", "step": 9, "loss": None, "skipped": 2}]
    lines += [{"kind": "validation", "step": s, "sets": {EVIL: dev, "dev": dev}} for s in (4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def card(folder: Path, facts: dict, run: Path | None = None) -> str:
    """The text of README.md; its head is what the hub reads, its body has no tag of others."""
    folder.mkdir(exist_ok=True)
    write_card(folder, run or folder / "no-run", facts)
    text = (folder / "README.md").read_text(encoding="utf-8")
    loaded = ModelCard(text)
    assert loaded.data.language == "he"
    assert loaded.data.pipeline_tag == "automatic-speech-recognition"
    page = rendered(text)
    assert set(re.findall("<([a-zA-Z][^ />]*)", page)) <= TAGS
    links = re.findall('(?:href|src)="([^"]*)', page)
    assert [link for link in links if link != CURVE and "//huggingface.co/" not in link] == []
    return text


def rendered(text: str) -> str:
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(ModelCard(text).text)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("card")
    return card(folder / "model", FACTS, write_run(folder / "run"))


def test_every_number_is_there(full) -> None:
    cells = re.sub(r"[|*]", " ", full)
    assert [number for number in NUMBERS if f" {number} " not in cells] == []
    for told in ("average of steps 400, 600 and 800", SHA, SHA[::-1], "ivrit.ai v2"):
        assert told in full
    for told in ("| seed | 4711 |", "8 x H200", "abc1234", "0.11.1", "bad: 17", "1.375", "31.5 s"):
        assert told in full
    assert "Last logged step: 9, training loss unknown" in full
    assert "No time stamps" in full
    assert "unknown" not in full.split("## Results")[1].split("## How")[0]


def test_the_head_is_what_the_hub_reads(full) -> None:
    head = yaml.safe_load(full.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen3-ASR-1.7B"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert head["datasets"] == ["ivrit-ai/crowd-transcribe-v5"]
    [index] = head["model-index"]
    found = {
        (r["dataset"]["name"], r["dataset"]["split"], m["type"]): m["value"]
        for r in index["results"]
        for m in r["metrics"]
    }
    assert found["eval-d1", "test", "wer"] == 5.17
    assert found["dev", "validation", "wer"] == 6.94
    assert len(found) == 4
    assert len(ModelCard(full).data.eval_results) == 4


def test_what_it_must_not_be_used_for_and_the_warnings(full) -> None:
    for told in ("Deepfakes", "Surveillance", "Medical", "no human checks", "other than Hebrew"):
        assert told in full
    assert "licence and revision of own is not known" in full
    assert "of crowd is not known" not in full


def test_nothing_of_the_machine(full, monkeypatch) -> None:
    for secret in ("dana", "/home", socket.gethostname(), "0.9191", "Linux"):
        assert secret not in full
    assert "| model.path | base | round2.py |" in full
    assert "| clips.jsonl |" in full


def test_the_environment_is_not_read(tmp_path, monkeypatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_REPO_ID", "USER"):
        monkeypatch.setenv(name, SECRET)
    text = card(tmp_path / "model", FACTS, write_run(tmp_path / "run"))
    assert SECRET not in text + (tmp_path / "model" / CURVE).read_text()


def test_the_curve_is_a_drawing_of_its_own(tmp_path) -> None:
    text = card(tmp_path / "model", FACTS, write_run(tmp_path / "run"))
    assert f"]({CURVE})" in text
    drawing = ElementTree.fromstring((tmp_path / "model" / CURVE).read_bytes())
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(drawing.itertext())
    for told in ("training", "dev", "Loss", "WER", "שלום"):
        assert told in words
    assert not [e for e in drawing.iter() if "script" in e.tag]
    assert len(drawing.findall(".//{*}polyline")) == 5
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", CURVE]


@pytest.mark.parametrize("name", [EVIL, "עברית", "---", "- x: y", "'\"", " ", "\ud800", "a" * 300])
def test_any_name_is_shown_and_does_nothing(tmp_path, name) -> None:
    facts = copy.deepcopy(FACTS)
    texts = dict.fromkeys(("id", "reference", "hypothesis"), name)
    facts["scores"]["test"] = {name: scores(0.0517, samples=[texts])}
    facts["data"] = {name: {"path": f"x/{name}", "licence": name, "revision": name}}
    facts |= {"chosen": name, "members": {name: 1.0}, "candidates": [{"name": name}], "repo": None}
    text = card(tmp_path / "model", facts, write_run(tmp_path / "run"))
    page = rendered(text)
    tables = page.split("<table>")[1:]
    for table in tables:
        rows = table.split("</table>")[0].split("<tr>")[1:]
        assert len({len(re.findall("<t[hd]", row)) for row in rows}) == 1
    assert len(tables) == 8
    if name == EVIL:
        assert "<td>a|b&lt;script&gt;alert(1)&lt;/script&gt;`*_x_*` # [z](http" in page


def test_hebrew_samples_run_from_the_right_and_are_text(full) -> None:
    part = full.split("## Samples")[1]
    assert '<div dir="rtl">שלום &lt;b&gt;עולם&lt;/b&gt; &amp; &quot;כל&quot;</div>' in part
    assert '<div dir="rtl">שלום  # עולם</div>' in part
    assert part.count("<hr>") == 6
    assert rendered(full).count('<div dir="rtl">שלום  # עולם</div>') == 6


def without(tree: dict, path: tuple[str, ...]) -> dict:
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return tree


def paths(tree: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return []
    return [p for k, v in tree.items() for p in [(*above, k), *paths(v, (*above, k))]]


@pytest.mark.parametrize("path", paths(FACTS), ids=".".join)
def test_any_part_may_be_missing(tmp_path, path) -> None:
    part = without(FACTS, path)
    text = card(tmp_path, part)
    node = part
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = None  # null says no more than nothing
    if len(path) == 1 or path[-1] in FACTS["data"]["crowd"] or len(path) == 4:  # no set's name
        assert card(tmp_path, part) == text
    if path[-1] in ("wer", "cer", "words", "licence", "hours", "step", "chosen"):
        assert "unknown" in text


@given(st.dictionaries(st.text(), st.dictionaries(st.sampled_from(["wer", "cer", "words", "ci95"]),
       st.none() | st.floats() | st.integers(0, 9)).map(lambda s: s | {"ci95": None})))  # fmt: skip
def test_any_scores(tmp_path_factory, sets) -> None:
    folder = tmp_path_factory.getbasetemp() / "scores"
    text = card(folder, {"scores": {"test": sets}})
    assert len(re.findall("<td><strong>", rendered(text))) == len(sets)


def test_an_empty_run_says_that_nothing_is_known(tmp_path) -> None:
    text = card(tmp_path / "model", {})
    for told in ("was not scored", "what data it was trained on is not known", "Settings: unknown"):
        assert told in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "unknown"
    assert not head.keys() & {"base_model", "datasets", "model-index", "library_name"}
    assert not (tmp_path / "model" / CURVE).exists()
    assert not re.search(r"\d %|\[\d", text.split("## How")[0])


def test_a_local_base_is_no_hub_id(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    text = card(tmp_path / "m", {"base_model": "org/model", "base_revision": None})
    assert "base_model" not in text
    assert "org/model" not in text
    assert "base_model: org/model" in card(tmp_path / "m", {"base_model": "org/model",
                                                            "base_revision": SHA})  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "told"), [("transformers", "AutoProcessor"), ("original", "qwen_asr"), (None, "")]
)
def test_the_use_is_that_of_the_layout(tmp_path, layout, told) -> None:
    use = card(tmp_path, {"layout": layout, "repo": "org/x"}).split("## How to use")[1]
    assert told in use
    assert "hebasr transcribe org/x" in use
    assert ("qwen_asr" in use) == (layout == "original")


def test_the_transformers_code_runs(tmp_path, monkeypatch) -> None:
    """What the card tells to type, typed: on a tiny model of the real class."""
    text = card(tmp_path, {"layout": "transformers"}).split("```python\n")[1].split("```")[0]
    soundfile.write(tmp_path / "talk.wav", noise(16000), 16000)
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(text.replace("FOLDER", str(tiny_folder())), {})
    assert printed.getvalue().strip()
    assert "<asr_text>" not in printed.getvalue()


def test_a_folder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match=r"README.md cannot be written"):
        write_card(tmp_path / "none", tmp_path, {})


@given(st.text() | st.text("|\\`*_{}[]<>()&~$@#!a \n"))
def test_shown_text_is_plain_text(text) -> None:
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(
        f"| x{shown(text)}y | z |\n|---|---|\n"
    )
    assert set(re.findall("</?([a-z0-9]+)", page)) == {"table", "thead", "tr", "th"}
    assert page.count("<th>") == 2
