"""Loading a model from a file, and modules that the runtime must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import byte_tokenizer_files, clustered_model, small_config

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, SelfTestError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.packed import write_packed
from cluscomp_kernels import native
from cluscomp_runtime import LanguageModel, load, make_self_test


@pytest.fixture(scope="module")
def model() -> Model:
    config = small_config(vocab_size=258, tie_word_embeddings=True)
    return clustered_model(config, byte_tokenizer_files(), row_scale=True)


def test_a_packed_file_runs_as_the_model_it_holds(model: Model, tmp_path: Path) -> None:
    write_packed(model, tmp_path / "model.clus", self_test=make_self_test)
    loaded = load(tmp_path / "model.clus", selftest=True)
    assert torch.equal(loaded(torch.arange(9)[None]), LanguageModel.from_model(model)(torch.arange(9)[None]))
    assert loaded.engine == "native"
    assert loaded.generate("Hello", max_new_tokens=5) is not None
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)


def test_options_reach_the_model(model: Model, tmp_path: Path) -> None:
    write_packed(model, tmp_path / "model.clus")
    loaded = load(str(tmp_path / "model.clus"), dtype=torch.bfloat16, kernel="reference", context=50)
    assert (loaded.dtype, loaded.context, loaded.kernel_summary) == (torch.bfloat16, 50, "reference (22 matrices)")


def test_a_record_of_another_model_fails(model: Model, tmp_path: Path) -> None:
    other = Model({**model.config, "rope_theta": 500.0}, model.tensors, model.files)
    write_packed(model, tmp_path / "model.clus", self_test=lambda _: make_self_test(other))
    load(tmp_path / "model.clus")
    with pytest.raises(SelfTestError, match="does not compute"):
        load(tmp_path / "model.clus", selftest=True)


def test_a_self_test_needs_a_record(model: Model, tmp_path: Path) -> None:
    write_packed(model, tmp_path / "model.clus")
    with pytest.raises(InvalidRequestError, match="no self-test record"):
        load(tmp_path / "model.clus", selftest=True)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no model")
    for path in (tmp_path / "missing", tmp_path / "text"):
        with pytest.raises(InvalidFileError):
            load(path)


def test_an_unknown_architecture_is_refused(model: Model, tmp_path: Path) -> None:
    write_packed(Model({**model.config, "model_type": "bert"}, model.tensors), tmp_path / "model.clus")
    with pytest.raises(UnsupportedError, match="architecture"):
        load(tmp_path / "model.clus")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "vulkan"])
def test_a_device_that_is_not_there(model: Model, device: str) -> None:
    with pytest.raises(InvalidRequestError, match="device") as error:
        LanguageModel.from_model(model, device=device)
    assert error.value.problems[0].found == device


@pytest.mark.parametrize("dtype", ["int8", "double", torch.int64])
def test_a_dtype_that_does_not_compute(model: Model, dtype: str | torch.dtype) -> None:
    with pytest.raises(InvalidRequestError, match="dtype"):
        LanguageModel.from_model(model, dtype=dtype)


@pytest.mark.parametrize("context", [0, -1, 129])
def test_a_context_out_of_range(model: Model, context: int) -> None:
    with pytest.raises(InvalidRequestError, match="context"):
        LanguageModel.from_model(model, context=context)


def test_the_default_context() -> None:
    assert LanguageModel.from_model(clustered_model(small_config())).context == 128
    assert LanguageModel.from_model(clustered_model(small_config(max_position_embeddings=10**6))).context == 2048


def test_the_runtime_stays_minimal() -> None:
    unwanted = [
        "transformers",
        "onnx",
        "onnxruntime",
        "gguf",
        "click",
        "rich",
        "safetensors",
        "jinja2",
        "tokenizers",
        "torch",
        "cluscomp_export",
    ]
    assert run_alone(f"import sys, cluscomp_runtime; print([name for name in {unwanted} if name in sys.modules])") == "[]"


def run_alone(code: str, *arguments: str) -> str:
    """What a new process prints."""
    path = [str(Path(entry).resolve()) for entry in sys.path if entry]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}", *arguments]
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.skipif(native.library("_engine") is None, reason=native.missing_reason("_engine"))
def test_generating_needs_no_torch(model: Model, tmp_path: Path) -> None:
    """Loading, the self-test, generating, sampling and logits import numpy and tokenizers, and nothing as heavy as torch."""
    path = tmp_path / "model.clus"
    write_packed(model, path, self_test=make_self_test)
    code = """
import cluscomp_runtime
model = cluscomp_runtime.load(sys.argv[1], selftest=True)
assert len(model.generate("Hello", max_new_tokens=5, temperature=0.7, top_p=0.9).token_ids) == 5
assert model.forward([[1, 2, 3]]).shape == (1, 3, 258)
ours = {"cluscomp_formats", "cluscomp_kernels", "cluscomp_runtime"}
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items() if "." not in name}
print(sorted(name for name, file in files.items() if "site-packages" in file and name not in ours and not name.startswith("_")))
"""
    imported = set(ast.literal_eval(run_alone(code.replace("\n", "\n"), str(path))))
    assert imported - {"psutil", "cython_runtime"} == {"numpy", "tokenizers"}
