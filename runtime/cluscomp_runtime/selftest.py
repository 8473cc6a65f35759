"""The self-test record: evidence that a runtime on some device computes the model that was converted.

A record has token sequences and, for every position, the `top_k` largest logits of the decoded weights in float64. A runtime
passes if its logits of those ids differ by at most a tolerance, and no other logit exceeds the largest one by more than that.

The tolerance is derived, not chosen. The same weights are run once in float64 and once in float32, both by decoding and
multiplying. With `eps` the machine epsilon of a dtype, the model's amplification of rounding errors is

    amplification = max(max |logits32 - logits64| / eps(float32), max |logits64|)
    tolerance(dtype) = 32 * amplification * eps(dtype)

over the recorded logits. The second term is the error of rounding the logits themselves, which dominates in very small models.
The factor of 32 allows for other orders of summation: a kernel that sums channel by channel has sqrt(n) / log2(n) times the
error of a matrix library, which sums in blocks (4 times at 1536 channels), and a single float32 run shows only the order of
magnitude of the rounding error. An intact SmolLM2 at 3 bits needed a factor of 15. Only the dtype of the computation matters,
since the stored weights are the same in every run.

A record in a file is only a claim. `check_record` rejects tolerances that no amplification explains: tolerances of different
dtypes that do not match, or a float32 tolerance as large as the logits, which would accept anything. `check_against_weights`
computes the same numbers again, and so proves that the record belongs to the weights in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_formats.architectures import DecoderDescription, check_tensors, describe
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem, SelfTestError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_runtime.engine import Ids, Logits
from cluscomp_runtime.language_model import LanguageModel
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = [
    "SelfTestReport",
    "SequenceReport",
    "check_against_weights",
    "check_record",
    "compare_with_record",
    "longest_record",
    "make_self_test",
    "run_self_test",
]

RECORD_VERSION = 1
SAFETY = 32.0
SENTENCE = "The quick brown fox jumps over the lazy dog. In 1912, two small boats crossed the cold river before dawn."
RANDOM_SEQUENCES = 2
DEFAULT_TOKENS = 24
DEFAULT_TOP_K = 8
MAX_SENTENCE_TOKENS = 32

MAX_SEQUENCES = 64
MAX_TOKENS = 1024
MAX_TOP_K = 256
"""Limits of a record in a file."""

MAX_RELATIVE_TOLERANCE = 1 / 16
"""Largest float32 tolerance, relative to the largest recorded logit. Real records, of models of all sizes, have less than a
thousandth."""

_LONGEST_LOGIT = -1.23456789e-300
_LONGEST_TOLERANCE = 1.234e-300

PREFILL_BEFORE_DECODE = 4
EPSILONS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Machine epsilons of the dtypes that a record has a tolerance for."""

OTHER_EPSILONS = {"int16": 2.0**-16}
"""The same for other arithmetic, whose tolerances follow from that of float32. `int16` is that of the native engine: an
activation is an integer below 2^15 times a scale for each 64 channels, so it is off by up to 2^-16 of the largest of them.
Products of integers are exact."""

LEAST_TOLERANCE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SequenceReport:
    """The worst logit of one sequence in one mode.

    `mode` is "prefill" (all tokens at once) or "decode" (one token at a time through the key-value cache, with other kernels).
    `difference` is `|found - expected|` of the logit of `token_id` at `position`; it is infinite if `found` is not finite.
    """

    sequence: int
    mode: Literal["prefill", "decode"]
    difference: float
    position: int
    token_id: int
    found: float
    expected: float


@dataclass(frozen=True)
class SelfTestReport:
    """Result of a self-test: `sequences` has the details, the other fields the summary."""

    ok: bool
    max_difference: float
    tolerance: float
    sequences: tuple[SequenceReport, ...]

    def raise_if_failed(self) -> None:
        """Raise SelfTestError with the worst position if the test failed."""
        if self.ok:
            return
        worst = max(self.sequences, key=lambda report: report.difference)
        message = (
            f"the model does not compute the logits of its self-test record; worst: sequence {worst.sequence} ({worst.mode}), "
            f"position {worst.position}, logit of token {worst.token_id}"
        )
        expected = f"{worst.expected:.6g} within {self.tolerance:.3g}"
        remedy = 'verify the file; if it is intact, load it with kernel="reference" and report the kernel that fails'
        raise SelfTestError(Problem("self_test_failed", message, None, None, f"{worst.found:.6g}", expected, remedy))


def make_self_test(
    model: Model, *, sequences: Sequence[Sequence[int]] | None = None, tokens: int = DEFAULT_TOKENS, top_k: int = DEFAULT_TOP_K
) -> dict[str, Any]:
    """Return the record of a model, a JSON value.

    `sequences` are token ids; the default is two deterministic random sequences of `tokens` ids and, if the model has a
    tokenizer, an English sentence. Runs on the CPU and decodes one weight at a time, so memory is bounded by the logits and the
    largest tensor in float64.

    Raises InvalidRequestError if the sequences are unusable; SelfTestError if the model's logits are not finite; and the errors
    of `LanguageModel.from_model`.
    """
    exact = LanguageModel.from_model(model, dtype="float64", kernel="reference")
    chosen = (
        _default_sequences(exact.description, exact.tokenizer, tokens)
        if sequences is None
        else [list(sequence) for sequence in sequences]
    )
    if not chosen or not all(1 <= len(sequence) <= MAX_TOKENS for sequence in chosen) or len(chosen) > MAX_SEQUENCES:
        expected = f"1 to {MAX_SEQUENCES} sequences of 1 to {MAX_TOKENS} tokens"
        raise InvalidRequestError(Problem("bad_sequences", "unusable self-test sequences", expected=expected))
    top_k = min(top_k, exact.description.vocab_size, MAX_TOP_K)
    recorded, amplification = [], 0.0
    for ids, logits64, logits32 in _reference_logits(model, exact, chosen):
        top_ids = np.stack([_largest(row, top_k) for row in logits64])
        top = np.take_along_axis(logits64, top_ids, axis=-1)
        amplification = max(amplification, _amplification(top, np.take_along_axis(logits32, top_ids, axis=-1)))
        # Nine digits distinguish all float32 values and hide differences between machines in float64.
        rounded = [[float(f"{value:.9g}") for value in row] for row in top.tolist()]
        recorded.append({"input_ids": ids, "top_ids": top_ids.tolist(), "top_logits": rounded})
    return {"version": RECORD_VERSION, "sequences": recorded, "tolerance": _tolerances(amplification)}


def _largest(row: Logits, count: int) -> npt.NDArray[np.int64]:
    """Return the places of the `count` largest values, largest first; of equal ones, the first."""
    candidates = np.flatnonzero(row >= np.partition(row, -count)[-count])
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]


def _reference_logits(
    model: Model, exact: LanguageModel, sequences: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Logits, Logits]]:
    """Yield the ids of each sequence and its logits `[tokens, vocab_size]`, computed in float64 and in float32, as float64.

    Raises SelfTestError if they are not finite.
    """
    single = LanguageModel.from_model(model, dtype="float32", kernel="reference")
    for batch in _batches(sequences):
        ids = _padded(batch)
        logits64, logits32 = exact.forward(ids), single.forward(ids).astype(np.float64)
        for index, sequence in enumerate(batch):
            rows = logits64[index, : len(sequence)], logits32[index, : len(sequence)]
            if not (np.isfinite(rows[0]).all() and np.isfinite(rows[1]).all()):
                remedy = "check the weights it was made from"
                raise SelfTestError(Problem("not_finite", "the model's logits are not finite", remedy=remedy))
            yield list(sequence), *rows


def _amplification(logits64: Logits, logits32: Logits) -> float:
    """Return the amplification of rounding errors over these logits, as defined in the module docstring."""
    error = float(np.abs(logits32 - logits64).max()) / EPSILONS["float32"]
    return max(error, float(np.abs(logits64).max()))


def _tolerances(amplification: float) -> dict[str, float]:
    return {
        # A model whose weights are all zero is exact in every dtype, but a tolerance must be positive.
        name: max(float(f"{SAFETY * amplification * epsilon:.4g}"), LEAST_TOLERANCE)
        for name, epsilon in EPSILONS.items()
    }


def check_against_weights(model: Model, record: Mapping[str, Any]) -> SelfTestReport:
    """Check that a record belongs to this model, by computing its logits and tolerance again in float64 and float32.

    The check passes if no logit differs from the recorded one by more than the float32 tolerance of this machine, and the
    recorded tolerance is at most `SAFETY` times that, since a single float32 run shows only its order of magnitude. Needs as
    much memory as `make_self_test`, and two passes over the weights per `MAX_TOKENS` tokens.

    Raises InvalidFileError if the record is malformed; SelfTestError if the logits are not finite; and the errors of
    `LanguageModel.from_model`.
    """
    exact = LanguageModel.from_model(model, dtype="float64", kernel="reference")
    check_record(record, exact.description.vocab_size, exact.description.max_position_embeddings)
    sequences, reports, amplification = record["sequences"], [], 0.0
    computed = _reference_logits(model, exact, [sequence["input_ids"] for sequence in sequences])
    for index, (sequence, (_, logits64, logits32)) in enumerate(zip(sequences, computed, strict=True)):
        reports.append(_compare(index, "prefill", sequence, logits64))
        ids = np.array(sequence["top_ids"], dtype=np.int64)
        both = (np.take_along_axis(logits, ids, axis=-1) for logits in (logits64, logits32))
        amplification = max(amplification, _amplification(*both))
    explained = _tolerances(amplification)["float32"]
    worst = max(report.difference for report in reports)
    ok = worst <= explained and float(record["tolerance"]["float32"]) <= SAFETY * explained
    return SelfTestReport(ok, worst, explained, tuple(reports))


def longest_record(model: Model) -> dict[str, Any] | None:
    """Return an upper bound of the record of `make_self_test(model)` as text; None if the architecture is not supported.

    It has the record's structure, with numbers of maximal length, so its size bounds the size of the real record. Reads only
    the configuration and the tokenizer, and computes no logits.
    """
    try:
        description = describe(model.config)
        check_tensors(model, description)
    except UnsupportedError:
        return None
    top_k = min(DEFAULT_TOP_K, description.vocab_size)
    row_ids, row_logits = [description.vocab_size - 1] * top_k, [_LONGEST_LOGIT] * top_k
    recorded = [
        {"input_ids": ids, "top_ids": [row_ids] * len(ids), "top_logits": [row_logits] * len(ids)}
        for ids in _default_sequences(description, Tokenizer.from_files(model.files), DEFAULT_TOKENS)
    ]
    tolerance = dict.fromkeys(EPSILONS, _LONGEST_TOLERANCE)
    return {"version": RECORD_VERSION, "sequences": recorded, "tolerance": tolerance}


def run_self_test(model: LanguageModel, record: Mapping[str, Any]) -> SelfTestReport:
    """Compare the logits of a loaded model with a record.

    Runs the sequences in batches of at most `MAX_TOKENS` tokens, which bounds the memory of the logits. Then runs the first
    sequence again through the key-value cache: a few tokens at once, the others one at a time. The tolerance of float32 applies
    to float64, too. Raises InvalidFileError if the record is malformed.
    """
    check_record(record, model.description.vocab_size, model.description.max_position_embeddings)
    return compare_with_record(record, model.arithmetic, model.forward, model.forward_cached)


def compare_with_record(
    record: Mapping[str, Any],
    arithmetic: str,
    forward: Callable[[Ids], Logits],
    decode: Callable[[list[int], int], Logits],
) -> SelfTestReport:
    """Compare logits that are computed in some `arithmetic` (see `Engine`) with a record that `check_record` has accepted.

    `forward` maps ids `[batch, tokens]` to logits `[batch, tokens, vocab_size]`. `decode(ids, first)` maps the ids of a
    sequence to logits `[tokens, vocab_size]`: the first `first` tokens at once, the others one at a time through the key-value
    cache.
    """
    sequences = record["sequences"]
    tolerance = _tolerance(record, arithmetic)
    reports: list[SequenceReport] = []
    for batch in _batches([sequence["input_ids"] for sequence in sequences]):
        for logits in forward(_padded(batch)):
            reports.append(_compare(len(reports), "prefill", sequences[len(reports)], logits))
    ids = sequences[0]["input_ids"]
    first = max(1, min(PREFILL_BEFORE_DECODE, len(ids) - 1))
    reports.append(_compare(0, "decode", sequences[0], decode(ids, first)))
    worst = max(report.difference for report in reports)
    return SelfTestReport(worst <= tolerance, worst, tolerance, tuple(reports))


def _tolerance(record: Mapping[str, Any], arithmetic: str) -> float:
    single = float(record["tolerance"]["float32"])
    if arithmetic in OTHER_EPSILONS:
        return single * OTHER_EPSILONS[arithmetic] / EPSILONS["float32"]
    return float(record["tolerance"].get(arithmetic, single))


def _compare(index: int, mode: Literal["prefill", "decode"], sequence: Mapping[str, Any], logits: Logits) -> SequenceReport:
    computed = logits[: len(sequence["input_ids"])].astype(np.float64)
    ids = np.array(sequence["top_ids"], dtype=np.int64)
    recorded = np.array(sequence["top_logits"], dtype=np.float64)
    # The last column compares the highest logit of all with the highest recorded one, which it must not exceed.
    highest_ids = computed.argmax(axis=-1, keepdims=True)
    highest, limit = np.take_along_axis(computed, highest_ids, axis=-1), recorded.max(axis=-1, keepdims=True)
    found = np.concatenate((np.take_along_axis(computed, ids, axis=-1), highest), axis=-1)
    expected = np.concatenate((recorded, limit), axis=-1)
    with np.errstate(invalid="ignore"):
        difference = np.concatenate((np.abs(found[:, :-1] - recorded), np.maximum(highest - limit, 0)), axis=-1)
    difference = np.nan_to_num(difference, nan=math.inf, posinf=math.inf)
    position, column = divmod(int(difference.argmax()), difference.shape[1])
    token = np.concatenate((ids, highest_ids), axis=-1)[position, column]
    return SequenceReport(
        index,
        mode,
        float(difference[position, column]),
        position,
        int(token),
        float(found[position, column]),
        float(expected[position, column]),
    )


def _batches(sequences: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Divide sequences into batches of at most `MAX_TOKENS` tokens with padding, which bounds the memory of the logits."""
    together = max(1, MAX_TOKENS // max(len(sequence) for sequence in sequences))
    return [sequences[start : start + together] for start in range(0, len(sequences), together)]


def _padded(sequences: Sequence[Sequence[int]]) -> Ids:
    """Return sequences as one batch, padded at the end; causal attention keeps padding from affecting earlier logits."""
    longest = max(len(sequence) for sequence in sequences)
    return np.array([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], dtype=np.int64)


def _default_sequences(description: DecoderDescription, tokenizer: Tokenizer | None, tokens: int) -> list[list[int]]:
    vocab_size, longest = description.vocab_size, description.max_position_embeddings
    random = np.random.default_rng(0)
    sequences: list[list[int]] = random.integers(0, vocab_size, (RANDOM_SEQUENCES, min(tokens, longest))).tolist()
    if tokenizer is not None:
        sentence = tokenizer.encode(SENTENCE)[: min(MAX_SENTENCE_TOKENS, longest)]
        if sentence and max(sentence) < vocab_size:
            sequences.append(sentence)
    return sequences


def check_record(record: Mapping[str, Any], vocab_size: int, longest: int) -> None:
    """Check an untrusted record before it is used. Raises InvalidFileError with every problem."""
    if not isinstance(record, Mapping) or record.get("version") != RECORD_VERSION:
        found = repr(record.get("version") if isinstance(record, Mapping) else type(record).__name__)
        message = "the self-test record has an unknown version"
        raise InvalidFileError(Problem("bad_self_test", message, found=found, expected=str(RECORD_VERSION)))
    problems: list[Problem] = []
    tolerance = record.get("tolerance")
    for name in EPSILONS:
        value: Any = tolerance.get(name) if isinstance(tolerance, Mapping) else None
        if not (_is_number(value) and value > 0):
            problems.append(_bad(f"tolerance.{name}", value, "a positive number"))
    sequences = record.get("sequences")
    if not isinstance(sequences, list) or not 1 <= len(sequences) <= MAX_SEQUENCES:
        problems.append(_bad("sequences", type(sequences).__name__, f"a list of 1 to {MAX_SEQUENCES}"))
        sequences = []
    for index, sequence in enumerate(sequences):
        where = f"sequences[{index}]"
        if not isinstance(sequence, Mapping):
            problems.append(_bad(where, sequence, "an object"))
            continue
        ids: Any = sequence.get("input_ids")
        if not _is_ids(ids, vocab_size) or not 1 <= len(ids) <= min(MAX_TOKENS, longest):
            expected = f"1 to {min(MAX_TOKENS, longest)} token ids below {vocab_size}"
            problems.append(_bad(f"{where}.input_ids", ids, expected))
            continue
        problems += _check_rows(where, sequence, len(ids), vocab_size)
    if not problems:
        problems = _check_tolerances(record)
    if problems:
        raise InvalidFileError(problems)


def _check_rows(where: str, sequence: Mapping[str, Any], positions: int, vocab_size: int) -> list[Problem]:
    top_ids: Any = sequence.get("top_ids")
    top_logits: Any = sequence.get("top_logits")
    for name, rows in (("top_ids", top_ids), ("top_logits", top_logits)):
        if not isinstance(rows, list) or len(rows) != positions:
            return [_bad(f"{where}.{name}", rows, f"{positions} rows, one per token")]
    width = len(top_ids[0]) if isinstance(top_ids[0], list) else 0
    if not all(_is_ids(row, vocab_size) and 1 <= len(row) == width <= MAX_TOP_K for row in top_ids):
        return [_bad(f"{where}.top_ids", top_ids, f"rows of equally many token ids below {vocab_size}")]
    if not all(isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in top_logits):
        return [_bad(f"{where}.top_logits", top_logits, f"rows of {width} finite numbers")]
    return []


def _check_tolerances(record: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of tolerances that no amplification of rounding errors explains."""
    tolerance = record["tolerance"]
    least = LEAST_TOLERANCE
    rows = (row for sequence in record["sequences"] for row in sequence["top_logits"])
    largest = max(abs(value) for row in rows for value in row)
    single = tolerance["float32"]
    if single > max(MAX_RELATIVE_TOLERANCE * largest, least):
        return [_bad("tolerance.float32", single, f"at most {MAX_RELATIVE_TOLERANCE:g} of the largest logit, {largest:.6g}")]
    for name, epsilon in EPSILONS.items():
        expected = single * epsilon / EPSILONS["float32"]
        # Tolerances are stored with four digits, and values below `least` are raised to it.
        if tolerance[name] > least and not math.isclose(tolerance[name], expected, rel_tol=2e-3):
            source = f"{expected:.4g}, from tolerance.float32 and the precision of {name}"
            return [_bad(f"tolerance.{name}", tolerance[name], source)]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_ids(value: object, vocab_size: int) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < vocab_size for token in value)


def _bad(name: str, found: object, expected: str) -> Problem:
    return Problem("bad_self_test", f"the self-test record's {name} is malformed", found=repr(found)[:200], expected=expected)
