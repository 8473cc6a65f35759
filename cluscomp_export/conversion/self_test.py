"""The self-test record: checked against a clustered source, recorded for a new artefact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_export.conversion.source_faults import faults_of
from cluscomp_formats.errors import Problem, SelfTestError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress
from cluscomp_runtime.selftest import check_against_weights, make_self_test

__all__ = ["SelfTestRecorder", "run_own_self_test"]


class SelfTestRecorder:
    """Records the self-test of a model that a writer has just written, and hands it to the writer.

    `record` is what was recorded: `known`, the record that the source brings, or a new one; None where the runtime cannot run
    the architecture. `warning` then says why.
    """

    def __init__(self, known: Mapping[str, Any] | None, on_progress: Progress) -> None:
        self.record: Mapping[str, Any] | None = None
        self.warning: str | None = None
        self._known = known
        self._on_progress = on_progress

    def __call__(self, written: Model) -> Mapping[str, Any] | None:
        """The record for the model `written`."""
        self.record = self._known
        if self.record is None:
            self._on_progress("recording the self-test", 0, 1)
            try:
                self.record = make_self_test(written)
            except UnsupportedError as error:
                self.warning = f"no self-test record: {error.problems[0].message}"
                return None
            self._on_progress("recording the self-test", 1, 1)
        return self.record

    @property
    def warnings(self) -> list[str]:
        """The warning, if there is one."""
        return [] if self.warning is None else [self.warning]


def run_own_self_test(source: Model, path: Path, on_progress: Progress) -> list[str]:
    """Check that a clustered source computes what its own self-test record says; the record goes into the artefact.

    Returns a warning where the runtime cannot run its architecture. Raises SelfTestError if it computes something else,
    InvalidFileError for a malformed record.
    """
    if source.self_test is None:
        return []
    on_progress("running the source's self-test", 0, 1)
    try:
        with faults_of(path):
            report = check_against_weights(source, source.self_test)
    except UnsupportedError as error:
        return [f"the source's self-test was not run: {error.problems[0].message}"]
    on_progress("running the source's self-test", 1, 1)
    if not report.ok:
        message = "the source does not compute what its self-test record says"
        found = f"logits differ by {report.max_difference:.3g}, tolerance {source.self_test['tolerance']['float32']:.3g}"
        expected = f"rounding explains {report.tolerance:.3g}"
        remedy = "get a valid copy, or convert the original model again"
        raise SelfTestError(Problem("self_test_failed", message, str(path), None, found, expected, remedy))
    return []
