"""Side files: those that every format keeps, those that are omitted with a note, and invalid names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import hf_models
import pytest
import transformers
from folder_contents import contents
from runtime_models import byte_tokenizer_files

from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.sources import files_left_behind, open_source
from cluscomp_export.sources.side_files import SIDE_FILES
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, OutputExistsError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.limits import side_file_name_fault
from cluscomp_formats.packed import open_packed, write_packed

TRAVEL = [
    *SIDE_FILES,
    "sentence_roberta_config.json",
    "qwen.tiktoken",
    "LICENSE",
    "License.txt",
    "NOTICE.md",
    "additional_chat_templates/rag.jinja",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
]
STAY = ["README.md", "figures/", "pytorch.py", "1_Pooling/notes.md", "1_Pooling/deep/", "tokenizer.json.bak"]
UNSEEN = [".gitattributes", ".cache/", "pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json"]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else f"content of {name}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    hf_models.llama().save_pretrained(folder)
    fill(folder, [*TRAVEL, *STAY, *UNSEEN])
    for name, array in byte_tokenizer_files().items():
        (folder / name).write_bytes(array.read().tobytes())
    return folder


def test_what_belongs_to_a_model_travels_and_the_rest_is_named(source: Path) -> None:
    model = open_source(source)
    assert sorted(model.files) == sorted(TRAVEL)
    assert files_left_behind(model, source) == sorted(STAY)
    assert files_left_behind(model, source / "model.safetensors") == sorted(STAY)
    prepared = prepare(source, ConversionOptions(bits=4, calibration="none"))
    assert [text for text in prepared.warnings if all(name in text for name in STAY)]


def test_through_every_format_and_back(source: Path, tmp_path: Path) -> None:
    files = {name: array.read().tobytes() for name, array in open_source(source).files.items()}
    convert(source, tmp_path / "a.clus", ConversionOptions(bits=4, calibration="none"))
    chain = ["a.clus", "hf", "b.gguf", "onnx", "c.clus"]
    for previous, name in itertools.pairwise(chain):
        to = {".clus": "packed", ".gguf": "gguf", "": name}[Path(name).suffix]
        convert(tmp_path / previous, tmp_path / name, ConversionOptions(to=to))
        assert {key: array.read().tobytes() for key, array in open_source(tmp_path / name).files.items()} == files, name
    assert {name: (tmp_path / "hf" / name).read_bytes() for name in TRAVEL} == files
    assert (tmp_path / "a.clus").read_bytes() == (tmp_path / "c.clus").read_bytes()
    for name in ("hf", "onnx"):
        before = contents(tmp_path / name)
        convert(tmp_path / "a.clus", tmp_path / name, ConversionOptions(to=name), force=True)
        assert contents(tmp_path / name) == before
        (tmp_path / name / "1_Pooling" / "mine.txt").write_text("not ours")
        with pytest.raises(OutputExistsError):
            convert(tmp_path / "a.clus", tmp_path / name, ConversionOptions(to=name), force=True)


def test_a_processor_opens_from_the_folder(tmp_path: Path) -> None:
    hf_models.llama().save_pretrained(tmp_path / "source")
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(["<pad>", "<unk>", "|", "a"])})
    )
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    ears = transformers.Wav2Vec2FeatureExtractor(sampling_rate=123)
    transformers.Wav2Vec2Processor(feature_extractor=ears, tokenizer=tokenizer).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "hf", ConversionOptions(bits=4, calibration="none", to="hf"))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.feature_extractor.sampling_rate == 123
    assert processor.tokenizer("a").input_ids == tokenizer("a").input_ids


@pytest.mark.parametrize("named", ["config.json", "tokenizer_config.json", None])
def test_code_travels_as_data_where_a_configuration_names_it(tmp_path: Path, named: str | None) -> None:
    folder = tmp_path / "source"
    hf_models.llama().save_pretrained(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit('this was run')")
    (folder / "not a module.py").write_text("")
    if named is not None:
        path = folder / named
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    report = convert(folder, tmp_path / "out.clus", ConversionOptions(bits=4, calibration="none"))
    carried = open_source(tmp_path / "out.clus").files
    assert ("modeling_own.py" in carried) == (named is not None)
    assert any("it is not run here" in text for text in report.warnings) == (named is not None)
    assert "not a module.py" not in carried


def test_a_link_in_a_folder_of_side_files_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    hf_models.llama().save_pretrained(folder)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("{}")
    (folder / "1_Pooling").symlink_to(tmp_path / "private")
    with pytest.raises(InvalidFileError, match="leads out of the model's folder"):
        open_source(folder)


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../x",
        "1_Pooling/",
        "1_Pooling/..",
        "1_Pooling/a/b",
        "/x",
        "1_Pooling/a\\b",
        "1_Pool.ing/a",
        "1_Pooling\n/a",
        "_P/a",
    ],
)
def test_names_that_lead_elsewhere_are_refused_by_every_format(tmp_path: Path, name: str) -> None:
    assert side_file_name_fault(name) is not None
    model = Model({}, {}, {name: Array.of(hf_models.np.zeros(1, hf_models.np.uint8))})
    for write in (write_packed, write_hf):
        with pytest.raises(InvalidRequestError, match="side file"):
            write(model, tmp_path / "out")


def test_a_side_file_cannot_be_called_like_the_folder_of_others(tmp_path: Path) -> None:
    content = Array.of(hf_models.np.zeros(1, hf_models.np.uint8))
    model = Model({}, {}, {"1_pooling": content, "1_Pooling/config.json": content})
    with pytest.raises(InvalidRequestError, match="side file"):
        write_hf(model, tmp_path / "out")
    write_packed(model, tmp_path / "out.clus")
    assert sorted(open_packed(tmp_path / "out.clus").files) == sorted(model.files)


@pytest.mark.parametrize("name", ["1_Pooling/../../x", "2_Dense/absent.json", "a/b"])
def test_a_record_that_lists_other_files_is_refused(tmp_path: Path, name: str) -> None:
    write_hf(Model({}, {}), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "cluscomp.json").read_text())
    (tmp_path / "out" / "cluscomp.json").write_text(json.dumps({**record, "files": [name]}))
    with pytest.raises(InvalidFileError):
        open_hf(tmp_path / "out")
