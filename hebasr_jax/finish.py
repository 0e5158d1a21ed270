"""What follows the last step: choose weights, score them, export, card, upload.

    members -> their mean beside each of them, on the dev sets -> the best, on the test sets
    -> final.json -> export/<layout>/ with its card -> the hub

Each part is kept once it is done, and all are made whole or not at all: a signal ends the process
at once, and the same command goes on with the part that was under way.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.average import Choice, compare, describe, finite
from hebasr_jax.card import write_card
from hebasr_jax.checkpoint import figures_of
from hebasr_jax.data.adapters import filled
from hebasr_jax.data.clips import Clip, ClipSet, synthetic_warnings
from hebasr_jax.data.shards import read_origin
from hebasr_jax.data.sources import open_sources
from hebasr_jax.distributed import any_host, is_first, on_first, place_whole
from hebasr_jax.errors import UserError
from hebasr_jax.export import write_model
from hebasr_jax.identity import weights_key
from hebasr_jax.members import best_members, member_weights
from hebasr_jax.run_config import Config
from hebasr_jax.run_folder import read_json, write_json, write_text
from hebasr_jax.run_setup import Setup, open_quarantine
from hebasr_jax.running import Run
from hebasr_jax.sharding import replicated
from hebasr_jax.train_step import cast
from hebasr_jax.trained import load_trained
from hebasr_jax.upload import check_repo_id, upload_model
from hebasr_jax.validate import DevSet, load_dev_sets, validate

FINAL = "final.json"
REPOSITORY = "HF_REPO_ID"
_ALL = 1 << 40  # samples: every text is kept
_SAMPLES = 4  # of each set in final.json


def asked_for(config: Config) -> bool:
    """Whether a run has anything to do after its last step."""
    return bool(config.export.layouts or config.data.test or config.average.best > 1)


def repository(config: Config) -> str | None:
    """The hub repository that the model goes to; what cannot work is refused, before training."""
    name = os.environ.get(REPOSITORY, "").strip()
    if not name or not config.export.upload:
        return None
    check_repo_id(name)
    if not config.export.layouts:
        raise UserError(
            f"{REPOSITORY} is set, and nothing would be uploaded",
            "export.layouts is empty",
            "set export.layouts=original, or export.upload=false",
        )
    return name


def finish(run: Run) -> None:
    """All that the config asks for after the last step; what is there from before is kept."""
    setup, folder = run.setup, run.folder
    run.stop.leave_at_once("what is done is kept, and the same command goes on")
    on_first(partial(_sweep, folder))
    choice = choose(run)
    key = weights_key(choice.params)
    test = score_tests(run, choice, key)
    facts = final_facts(setup, choice, test, key)

    def write() -> None:
        for name, scores in test.items():
            run.say(describe(f"test, {choice.name}, {name}", {name: scores}))
        done = read_json(folder / FINAL)
        facts["exports"] = done.get("exports", {})
        facts["upload"] = done.get("upload", {})
        write_json(folder / FINAL, facts)
        export_all(run, choice, facts)
        publish(run, facts)

    on_first(write)  # an early exit of the other hosts would end this one


def choose(run: Run) -> Choice:
    """The best of the best checkpoints and their mean, on the whole dev sets.

    Where no dev set was scored, or none has a word, the newest checkpoint.
    """
    setup, config, average = run.setup, run.setup.config, run.setup.config.average
    figures = [row.get(average.by) for row in figures_of(run.folder).values()]
    if not any(figure is not None for figure in figures):
        newest = run.store.steps()[-1]
        name = f"step {newest}"
        run.say(f"no checkpoint has a dev {average.by}: {name}, the last, is taken")
        return Choice(name, {name: 1.0}, load_trained(run.store.path(newest)), {}, [])
    members = best_members([run.folder], best=average.best, by=average.by, say=run.say)
    run.say(f"on the whole dev sets: {', '.join(member.name for member in members)}")
    dev_sets: list[DevSet] = []

    def score(params: Any) -> Mapping[str, Any]:
        if not dev_sets:
            dev_sets.extend(_whole_sets(run, setup.dev_sets))
        return _without_texts(_score(run, params, dev_sets))

    choice = compare(
        members,
        member_weights(members, average.weights),
        lambda member: load_trained(member.checkpoint),
        score,
        soup=average.soup,
        kept=run.folder / "eval" / "candidates",
        key=_scoring_key(config, setup.dev_sets),
        say=run.say,
    )
    assert choice is not None  # a signal ends the process here
    return choice


def score_tests(run: Run, choice: Choice, key: str) -> dict[str, Any]:
    """Scores of the whole test sets; texts and scores are kept in eval/test/, by set.

    Args:
      key: of the weights. Scores that are there for the same key and data are not made again.
    """
    found, left = {}, []
    tests = open_sources(run.setup.config.data.test)
    for line in synthetic_warnings(tests):
        run.say(f"warning: {line}")
    for clips in tests:
        wanted = [key, _scoring_key(run.setup.config, [clips])]
        path = run.folder / "eval" / "test" / clips.name / "results.json"
        kept = read_json(path)
        if any_host(kept.get("key") != wanted):
            left.append((clips, path, wanted))
        else:
            found[clips.name] = kept["scores"]
    for clips, path, wanted in left:
        scores = _score(run, choice.params, _whole_sets(run, [clips]))
        rows = scores[clips.name]["samples"]
        # What is not finite is null, as it will be read back.
        found |= json.loads(json.dumps(finite(_without_texts(scores))))
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(path.with_name("hypotheses.jsonl"), lines)
            write_json(path, {"key": wanted, "scores": found[clips.name]})
    return found


def final_facts(setup: Setup, choice: Choice, test: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What final.json and the card tell; `key` is of the weights."""
    base = setup.source
    return {
        "key": key,
        "step": setup.steps,
        "chosen": choice.name,
        "members": choice.weights,
        "candidates": choice.table,
        "scores": {"dev": choice.scores, "test": dict(test)},
        "base_model": base.source if base.revision else Path(base.source).name,
        "base_revision": base.revision,
        "stamped_clips": sum(bool(clip.segments) for s in setup.sets for clip in s.clips),
        "data": trained_on(setup),
    }


def trained_on(setup: Setup) -> dict[str, Any]:
    """The sets that any stage trains on, with revision, licence and the clips that it can use."""
    sources = {source.name: filled(source) for source in setup.config.data.train}
    opened = {clip_set.name: clip_set.clips for clip_set in setup.sets}
    rows: dict[str, Any] = {}
    for part in setup.parts:
        table = part.feed.table
        for info, first, last in zip(table.sets, table.first_S, table.first_S[1:], strict=False):
            source = sources[info.name]
            origin = read_origin(Path(source.path).expanduser())
            at = f"{commit}; " if (commit := origin.get("revision")) else ""
            rows[info.name] = {
                "path": source.path,
                "hub": source.hub or origin.get("hub"),
                "revision": f"{at}what was read has fingerprint {info.fingerprint[:16]}",
                "licence": source.licence or origin.get("licence"),
                "hours": float(table.samples_C[first:last].sum()) / SAMPLE_RATE / 3600,
                "clips": info.clips,
                "synthetic": info.synthetic,
                "labels": _labels(origin, opened[info.name]),
            }
    return rows


def _labels(origin: Mapping[str, Any], clips: Sequence[Clip]) -> str | None:
    """Who wrote a set's texts, and of how many clips, where models did."""
    told, made = origin.get("pseudo_labels"), sum(clip.pseudo_label for clip in clips)
    if not told and not made:
        return None
    by = "a model that is not named"
    if told:
        first, second = (Path(name).name if name.startswith("/") else name for name in told["by"])
        by = f"{first}, kept where {second} has at most {told['max_cer']:.0%} CER to it"
    return f"{by} ({made:,} of {len(clips):,} clips)"


def export_all(run: Run, choice: Choice, facts: dict[str, Any]) -> None:
    """A model folder with its card for each layout; those of other weights are replaced."""
    setup, export = run.setup, run.setup.config.export
    wanted = f"{facts['key']} {export.dtype}"
    for layout in export.layouts:
        folder = run.folder / "export" / layout
        if facts["exports"].get(layout) != wanted or not folder.is_dir():
            if folder.exists():
                shutil.rmtree(folder)
            write_model(
                choice.params,
                setup.model,
                setup.files,
                folder,
                layout,
                dtype=jax.numpy.dtype(export.dtype),
            )
            run.say(f"exported {choice.name} to {folder}")
        card = _for_the_card(facts) | {"layout": layout, "repo": repository(setup.config)}
        write_card(folder, run.folder, card)
        facts["exports"] = facts["exports"] | {layout: wanted}
        write_json(run.folder / FINAL, facts)


def publish(run: Run, facts: dict[str, Any]) -> None:
    """Uploads the first layout, if HF_REPO_ID names a place; what fails is told and recorded."""
    config = run.setup.config
    repo = repository(config)
    if repo is None:
        return
    layout = config.export.layouts[0]
    folder = run.folder / "export" / layout
    card = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    what = {"repository": repo, "layout": layout, "weights": facts["exports"][layout], "card": card}
    if {name: facts["upload"].get(name) for name in what} == what:
        return
    try:
        where = upload_model(folder, repo, private=config.export.private, say=run.say)
    except UserError as error:  # the run is whole without it
        run.say(f"not uploaded: {error}")
        run.say(f"the model is in {folder}; the same command tries the upload again")
        return
    facts["upload"] = {**what, "commit": where}
    write_json(run.folder / FINAL, facts)
    run.say(f"uploaded to {where}")


def _scoring_key(config: Config, sets: Sequence[ClipSet]) -> str:
    """What scores depend on besides the weights."""
    fixed = {s.name: s.fingerprint for s in sets}
    text = [config.text.language, config.text.language_in_prompt]
    return json.dumps([fixed, config.compute.dtype, config.validation.bootstrap, text, config.seed])


def _whole_sets(run: Run, sets: Sequence[ClipSet]) -> list[DevSet]:
    """Sets with all of their clips, ready to be scored."""
    setup, config = run.setup, run.setup.config
    whole = replace(config, validation=replace(config.validation, max_clips=None))
    quarantine = open_quarantine(sets, config, run.folder / "eval" / "quarantine.jsonl")
    return load_dev_sets(sets, setup.tokenizer, whole, quarantine, setup.mesh.size)


def _score(run: Run, params: Any, sets: Sequence[DevSet]) -> dict[str, Any]:
    """Scores of host weights on every device, with the texts of all clips."""
    setup = run.setup
    config = setup.config
    every = replace(config, validation=replace(config.validation, samples=_ALL))
    whole = replicated(setup.mesh)
    placed = jax.tree.map(lambda leaf: place_whole(leaf, whole), cast(params, setup.compute.dtype))
    scores = validate(
        placed,
        sets,
        setup.model,
        setup.tokenizer,
        every,
        compute=setup.compute,
        mesh=setup.mesh,
    )
    assert scores is not None
    return scores


def _for_the_card(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without texts of clips: a set may be gated, and a card is public."""
    scores = {
        part: {name: {**row, "samples": []} for name, row in sets.items()}
        for part, sets in facts["scores"].items()
    }
    return {**facts, "scores": scores}


def _without_texts(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with a few samples, spread over the set."""
    found = {}
    for name, row in scores.items():
        every = max(1, len(row["samples"]) // _SAMPLES)
        found[name] = {**row, "samples": row["samples"][::every][:_SAMPLES]}
    return found


def _sweep(run: Path) -> None:
    """Removes what a signal left of an export that was under way."""
    (run / "eval").mkdir(exist_ok=True)
    for partial_folder in (run / "export").glob(".*.partial-*"):
        shutil.rmtree(partial_folder, ignore_errors=True)
