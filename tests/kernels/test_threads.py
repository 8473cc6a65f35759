"""Threads of torch and of the kernels, in one process and in forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runtime_models import clustered_model, small_config

from cluscomp_formats.packed import write_packed
from cluscomp_kernels import threads
from cluscomp_runtime import LanguageModel, make_self_test


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_torch_computes_alone_beside_the_kernels() -> None:
    assert threads.kernel_threads() == 2
    with threads.single_threaded_torch():
        assert (torch.get_num_threads(), threads.kernel_threads()) == (1, 2)
        with threads.multi_threaded_torch():
            assert (torch.get_num_threads(), threads.kernel_threads()) == (2, 2)
        with threads.single_threaded_torch():
            assert (torch.get_num_threads(), threads.kernel_threads()) == (1, 2)
        assert (torch.get_num_threads(), threads.kernel_threads()) == (1, 2)
    with threads.multi_threaded_torch():
        assert torch.get_num_threads() == 2
    assert (torch.get_num_threads(), threads.kernel_threads()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_begins_meanwhile_has_all_threads() -> None:
    """torch gives a new thread the number that any thread set last."""
    found: list[tuple[int, int]] = []

    def run() -> None:
        with threads.single_threaded_torch():
            found.append((torch.get_num_threads(), threads.kernel_threads()))
        found.append((torch.get_num_threads(), threads.kernel_threads()))

    with threads.single_threaded_torch():
        other = threading.Thread(target=run)
        other.start()
        other.join()
    assert found == [(1, 2), (2, 2)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernel", ["native", "dense"])
def test_decoding_gives_the_same_whoever_polls(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.from_model(clustered_model(small_config()), kernel=kernel)
    seen: list[int] = []
    decode = model.decoder.__class__.__call__
    monkeypatch.setattr(
        model.decoder.__class__, "__call__", lambda *a, **k: (seen.append(torch.get_num_threads()), decode(*a, **k))[1]
    )
    results = []
    for polls in (False, True):
        monkeypatch.setattr(threads, "torch_polls", polls)
        results.append(model.generate([5, 6], max_new_tokens=4).token_ids)
    assert results[0] == results[1]
    assert seen == [2] * 4 + ([2, 1, 1, 1] if kernel == "native" else [2] * 4)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_polling_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "torch_polls", True)
    monkeypatch.setattr(threads, "_warned", False)
    model = clustered_model(small_config(num_hidden_layers=1))
    with pytest.warns(RuntimeWarning, match="OMP_WAIT_POLICY=PASSIVE"):
        LanguageModel.from_model(model, kernel="native")
    LanguageModel.from_model(model, kernel="native")


FORKING = """
import multiprocessing, os, sys, warnings
import cluscomp_runtime, torch
torch.set_num_threads(2)
# So that torch's threads exist.
torch.randn(1 << 20).exp_().sum()
kernel = sys.argv[2]
model = cluscomp_runtime.load(sys.argv[1], kernel=kernel)
right = model.generate([1, 2, 3], max_new_tokens=5).token_ids

def child():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same = model.generate([1, 2, 3], max_new_tokens=5).token_ids == right
        again = cluscomp_runtime.load(sys.argv[1], kernel=kernel, selftest=True)
        loaded = again.generate([1, 2, 3], max_new_tokens=5).token_ids == right
        if kernel != "auto":
            # Large operations of torch, as in a long prompt.
            torch.randn(1 << 20).exp_().sum()
    from cluscomp_kernels import threads
    forked = ["forked" in str(one.message) for one in said]
    # The native engine starts threads of its own again.
    assert same and loaded and forked == [True] * (kernel != "auto"), (same, loaded, said)
    assert kernel == "auto" or (torch.get_num_threads(), threads.kernel_threads()) == (1, 2)

if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        sys.exit("the child hangs")
    assert model.generate([1, 2, 3], max_new_tokens=5).token_ids == right
    sys.exit(process.exitcode)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("kernel", ["auto", "native"])
def test_a_forked_process_generates(kernel: str, tmp_path: Path) -> None:
    program, path = tmp_path / "forking.py", tmp_path / "model.clus"
    program.write_text(FORKING)
    model = clustered_model(small_config())
    write_packed(replace(model, self_test=make_self_test(model)), path)
    # With two threads, whatever this process has.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, program, path, kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
