"""Fuzz a reader with atheris, guided by coverage: `python tools/fuzz.py TARGET --seconds 300 --corpus DIR` (Linux).

Targets, seeds, mutations and the contract they hold are those of the tests (`tests/fuzzing`). The run ends at the first
violation, whose input lies beside the corpus as `crash-...`. `--keep` then copies from the corpus to `tests/fuzzing/corpus` the
smallest input for each thing a reader can say, where there is none yet.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests"), str(ROOT)]
INSTRUMENTED = ["cluscomp_formats", "cluscomp_runtime", "cluscomp_export.sources"]
MAX_BYTES = 1 << 16
MAX_KEPT_BYTES = 14 << 10
STRUCTURED = 4
"""One of this many mutations is libFuzzer's own, which knows what the code compared the bytes with."""

with atheris.instrument_imports(include=INSTRUMENTED):
    from fuzzing.targets import CORPUS, TARGETS, Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, required=True, help="the folder inputs grow in")
    parser.add_argument("--keep", action="store_true", help="keep the corpus's inputs that show something new; do not fuzz")
    options = parser.parse_args()
    target = TARGETS[options.target]
    options.corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.keep:
            keep(target, options.corpus, Path(scratch))
        else:
            fuzz(target, options.corpus, Path(scratch), options.seconds)


def fuzz(target: Target, corpus: Path, scratch: Path, seconds: int) -> None:
    """Fuzz from the seeds, the kept inputs and what is in the corpus already."""
    for content in [*target.seeds(scratch), *(path.read_bytes() for path in target.kept())]:
        (corpus / hashlib.sha1(content, usedforsecurity=False).hexdigest()).write_bytes(content)

    def once(data: bytes) -> None:
        # libFuzzer has an alarm of its own.
        target.run(data, scratch, alarm=False)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)  # noqa: S311
        if random.randrange(STRUCTURED) == 0:
            return bytes(atheris.Mutate(data, max_size))
        changed = data
        for _ in range(random.choice([1, 1, 2, 4])):
            changed = target.mutate(changed, random)
        return changed if len(changed) <= max_size else data

    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=30", "-rss_limit_mb=4096"]
    outputs = [f"-artifact_prefix={corpus.parent}/{target.name}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *outputs, str(corpus)], once, custom_mutator=mutate)
    atheris.Fuzz()


def keep(target: Target, corpus: Path, scratch: Path) -> None:
    """Copy the smallest input for each outcome the kept ones do not show."""
    known = {target.run(path.read_bytes(), scratch) for path in target.kept()}
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        if path.stat().st_size > MAX_KEPT_BYTES:
            break
        content = path.read_bytes()
        outcome = target.run(content, scratch)
        if outcome not in known:
            known.add(outcome)
            name = outcome.split(": ")[-1]
            (folder / name).write_bytes(content)
            print(f"{len(content):6} bytes  {outcome}")


if __name__ == "__main__":
    main()
