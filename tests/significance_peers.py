"""NIST's sctk and kaldialign on seeded systems; prints what tests/golden_significance.json holds.

Run: python tests/significance_peers.py > tests/golden_significance.json (Debian's sctk, and
kaldialign of PyPI, must be installed).
"""

import json
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hebasr_jax.metrics import AlignedWord, align_words

# seed, clips, and how wrong each system is: near, apart, hopeless
SETS = ((1, 60, 0.20, 0.24), (2, 200, 0.10, 0.16), (3, 40, 0.95, 0.90), (4, 300, 0.08, 0.08))
_LETTER = {"equal": "C", "substitute": "S", "delete": "D", "insert": "I"}


def systems(seed: int, clips: int, *shares: float) -> tuple[list[str], ...]:
    """References, and hypotheses with about those shares of wrong words; some are empty."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(60)]

    def said(reference: Sequence[str], share: float) -> list[str]:
        heard: list[str] = []
        for word in [] if rng.random() < 0.03 else reference:
            kind = rng.random() / share
            if kind >= 0.3:
                heard.append(rng.choice(words) if kind < 0.7 else word)
            while rng.random() < 0.3 * share:
                heard.append(rng.choice(words))
        return heard

    references = [rng.choices(words, k=rng.randint(1, 40)) for _ in range(clips)]
    heard = [[said(reference, share) for reference in references] for share in shares]
    return tuple([" ".join(text) for text in side] for side in (references, *heard))


def by_sctk(sgml: str) -> dict[str, float]:
    """What sc_stats finds in the alignments of two systems."""
    command = ["sctk", "sc_stats", "-p", "-t", "mapsswe", "-v", "-n", "-"]
    done = subprocess.run(command, input=sgml, capture_output=True, text=True, check=True)
    found = re.search(r"\(# segs: (\d+)\).*\(Z Stat: *(\S+)\)", done.stdout)
    assert found, done.stdout
    return {"segments": int(found[1]), "z": float(found[2])}


def our_alignments(references: list[str], *sides: list[str]) -> str:
    """Our alignments of each system in the format of sclite."""
    return "".join(
        f'<SYSTEM title="s{i}" ref_fname="r" hyp_fname="s{i}" creation_date="" format="2.4" '
        'frag_corr="FALSE" opt_del="FALSE" weight_ali="FALSE" weight_filename="">\n'
        f'<SPEAKER id="a">\n{_paths(references, side)}</SPEAKER>\n</SYSTEM>\n'
        for i, side in enumerate(sides)
    )


def _paths(references: list[str], side: list[str]) -> str:
    rows = [align_words(*pair) for pair in zip(references, side, strict=True)]
    return "".join(
        f'<PATH id="(a-{row})" word_cnt="{len(columns)}" sequence="{row}">\n'
        f"{':'.join(map(_column, columns))}\n</PATH>\n"
        for row, columns in enumerate(rows)
    )


def _column(column: AlignedWord) -> str:
    ours, theirs = (f'"{word}"' if word else "" for word in column[:2])
    return f"{_LETTER[column.operation]},{ours},{theirs}"


def sclite_alignments(references: list[str], *sides: list[str]) -> str:
    """sclite's own, which weighs a substitution 4 and the others 3."""
    with tempfile.TemporaryDirectory() as folder:
        names = ["r", *(f"s{i}" for i in range(len(sides)))]
        for name, texts in zip(names, (references, *sides), strict=True):
            lines = (f"{text} (a-{row})\n" for row, text in enumerate(texts))
            (Path(folder) / name).write_text("".join(lines))
        return "".join(
            subprocess.run(
                ["sctk", "sclite", "-r", "r", "trn", "-h", name, "trn", "-i", "rm"]
                + ["-o", "sgml", "stdout"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for name in names[1:]
        )


def sctk_figures(align: Callable[..., str]) -> list[dict[str, float]]:
    return [by_sctk(align(*systems(*of_set))) for of_set in SETS]


def kaldialign_figures() -> list[dict[str, float]]:
    """Bounds of both systems' intervals, and how often the second one is the better."""
    from kaldialign import bootstrap_wer_ci

    figures = []
    for of_set in SETS:
        sides = [[text.split() for text in side] for side in systems(*of_set)]
        found = bootstrap_wer_ci(*sides, replications=10_000, seed=0)
        bounds = {
            f"{end}_{system[-1]}": round(found[system][f"ci95{end}"], 6)
            for system in ("system1", "system2")
            for end in ("min", "max")
        }
        figures.append({**bounds, "second_better": found["p_s2_improv_over_s1"]})
    return figures


if __name__ == "__main__":
    golden = {
        "sc_stats": sctk_figures(our_alignments),
        "sclite": sctk_figures(sclite_alignments),
        "kaldialign": kaldialign_figures(),
    }
    print(json.dumps(golden, indent=1))
