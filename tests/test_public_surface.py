"""What each package offers to others: a name that comes or goes shows here."""

from importlib import import_module

import pytest

ERRORS = (
    "ClusCompError InvalidFileError InvalidRequestError OutputExistsError Problem SelfTestError StorageError UnsupportedError "
    "WorkersLostError"
)
NAMES = {
    "cluscomp_export": f"{ERRORS} ConversionKeywords ConversionReport DeltaInspection Evaluation Inspection MergeReport "
    "PlanReport Progress Speed TaskEvaluation TuneKeywords TunePlan TuneReport Verification __version__ bench convert evaluate "
    "evaluate_tasks inspect inspect_delta merge open_source plan plan_tuning tune verify",
    "cluscomp_formats": f"{ERRORS} Array ClusteredWeight Codebook DenseTensor Format Model Outliers Stage Tensor __version__ "
    "check_payloads detect find_format formats open_model tiled_codes",
    "cluscomp_formats.delta": "Delta changes combine is_delta open_delta write_delta",
    "cluscomp_formats.gguf": "DENSE_TYPES DenseReport FORMAT dense_format dense_gguf_notes dense_gguf_size looks_gguf "
    "open_gguf write_dense_gguf write_gguf",
    "cluscomp_formats.hf": "FORMAT SHARD_BYTES WriteReport holds_only_model looks_hf open_hf write_hf",
    "cluscomp_formats.onnx": "FORMAT holds_only_onnx looks_onnx open_onnx",
    "cluscomp_formats.packed": "FORMAT PackedHeader WriteReport looks_packed open_packed read_header write_packed",
    "cluscomp_kernels.clus_linear": "PathStatus PreparedCodebook PreparedWeight choose_path linear paths prepare "
    "prepare_codebook",
    "cluscomp_kernels.kmeans": "KMeansResult assign assign_with_feedback feedback_factor kmeans",
    "cluscomp_runtime": "Generation GenerationStream LanguageModel SelfTestReport load make_self_test run_self_test",
    "cluscomp_runtime.chat": "Chat Rendered render_chat render_chats",
    "cluscomp_runtime.hf": "ClusCompConfig ClusCompQuantizer",
    "cluscomp_runtime.tokenizer": "Tokenizer end_tokens token_batch token_ids",
}


@pytest.mark.parametrize("package", NAMES)
def test_public_names(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    assert all(hasattr(module, name) for name in module.__all__)
