"""What is said before the work about sources that the runtime does not run, and remedies that help."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cluscomp_export.cli.main import cli
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.conversion.where_to_run import nowhere_to_run
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, UnsupportedError
from cluscomp_runtime import load


@pytest.fixture
def opt(tmp_path: Path, stories_folder: Path) -> Path:
    """A folder of an architecture that only transformers runs."""
    torch.manual_seed(0)
    folder = tmp_path / "opt"
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, vocab_size=512, max_position_embeddings=64)).save_pretrained(
        folder
    )
    shutil.copy(stories_folder / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"effort": "fast"}, {"calibration": "none"}, {"effort": "fast", "seed": 1}])
def test_fast_works_everywhere(opt: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = convert(opt, tmp_path / "out.clus", ConversionOptions(bits=4, **options))
    told = [text for text in report.warnings if text.startswith("clustered without a calibration text")]
    assert len(told) == (0 if "calibration" in options else 1)
    assert not any("nothing will run" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"effort": "balanced"}, "`effort`"),
        ({"effort": "best"}, "`effort`"),
        ({"blockwise_epochs": 2}, "`effort` and its options"),
        ({"sensitivity": "measured"}, "`sensitivity`"),
        ({"match_loss": 0.1}, "`match_loss`"),
        ({"sensitivity": "measured", "effort": "best"}, "`sensitivity` and `effort`"),
    ],
)
def test_what_needs_a_calibration_is_refused_before_the_work_with_all_that_asks_for_it(
    opt: Path, options: dict[str, Any], named: str
) -> None:
    wanted = options if "match_loss" in options else {"bits": 4, **options}
    with pytest.raises(UnsupportedError, match="does not know this architecture") as error:
        prepare(opt, ConversionOptions(**wanted), measure=False)
    remedy = error.value.problems[0].remedy or ""
    assert f"leave out {named}" in remedy
    assert prepare(opt, ConversionOptions(bits=4), measure=False).text is None, "the remedy helps"


def test_a_source_without_a_tokenizer_is_no_reason_to_fail_unless_a_text_is_given(tmp_path: Path, stories_text: Path) -> None:
    hf_models.llama().save_pretrained(tmp_path / "source")
    prepared = prepare(tmp_path / "source", ConversionOptions(bits=4))
    assert any("no tokenizer" in text for text in prepared.warnings)
    with pytest.raises(InvalidRequestError, match="no tokenizer") as error:
        prepare(tmp_path / "source", ConversionOptions(bits=4, calibration=str(stories_text)))
    assert "leave out `calibration`" in (error.value.problems[0].remedy or "")


def test_a_tokenizer_with_more_tokens_than_the_model_is_found_before_the_work(tmp_path: Path, stories_folder: Path) -> None:
    hf_models.llama().save_pretrained(tmp_path / "source")
    shutil.copy(stories_folder / "tokenizer.json", tmp_path / "source")
    prepared = prepare(tmp_path / "source", ConversionOptions(bits=4))
    assert any("tokens that the model does not have" in text for text in prepared.warnings)


def test_what_will_run_nowhere_is_said_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    hf_models.gpt2().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange", "architectures": ["StrangeModel"]}))
    told: list[str] = []
    options = ConversionOptions(bits=4, calibration="none")

    def progress(stage: str, done: int, total: int) -> None:
        assert any("nothing will run the result" in text for text in told), stage

    convert(folder, tmp_path / "out.clus", options, on_progress=progress, on_warning=told.append)
    said = next(text for text in told if "nothing will run" in text)
    assert "does not know this architecture" in said.split("in transformers, ")[1]


def test_remote_code_may_run_it() -> None:
    model = hf_models.clustered_model(hf_models.gpt2(), [])
    strange = {**model.config, "model_type": "strange", "auto_map": {"AutoModel": "modeling.Strange"}}
    assert nowhere_to_run(type(model)(strange, model.tensors)) is None


def test_the_remedy_of_the_runtime_is_a_way_that_works(opt: Path, tmp_path: Path) -> None:
    import cluscomp_runtime.hf  # noqa: F401 - registers the quantizer

    convert(opt, tmp_path / "out.clus", ConversionOptions(bits=4))
    with pytest.raises(UnsupportedError) as error:
        load(tmp_path / "out.clus", selftest=True)
    remedy = error.value.problems[0].remedy or ""
    command = re.search(r"cluscomp-export (convert MODEL FOLDER --to hf)", remedy)
    assert command is not None
    places = {"MODEL": str(tmp_path / "out.clus"), "FOLDER": str(tmp_path / "hf")}
    arguments = [places.get(word, word) for word in command[1].split()]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generate(torch.tensor([[1, 2]]), max_new_tokens=1)


def test_a_thousand_tensors_of_other_names_are_one_error(tmp_path: Path) -> None:
    config = hf_models.llama(num_hidden_layers=3).config
    transformers.LlamaForQuestionAnswering(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out.clus", ConversionOptions(bits=4))
    assert open_source(tmp_path / "out.clus").clustered
    with pytest.raises(ClusCompError, match="other names than the decoder's") as error:
        load(tmp_path / "out.clus")
    assert len(error.value.problems) == 1


def test_embedding_bits_that_find_nothing_are_told(opt: Path) -> None:
    path = opt / "model.safetensors"
    tensors = {name.replace("embed_tokens", "lexicon"): values for name, values in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    prepared = prepare(opt, ConversionOptions(bits=4, embedding_bits=8, calibration="none"))
    assert any("`embedding_bits` has no effect" in text for text in prepared.warnings)


@pytest.mark.parametrize(("size", "share"), [(1e-9, "none"), (1e6, None)])
def test_weights_past_float16_end_in_a_way_out_or_in_none(tmp_path: Path, size: float, share: Any) -> None:
    peer = hf_models.llama()
    with torch.no_grad():
        for layer in peer.model.layers:
            layer.mlp.up_proj.weight.mul_(0).add_(size)
    peer.save_pretrained(tmp_path / "source")
    options = {"dim": 4, "clusters": 16, "calibration": "none"}
    with pytest.raises(InvalidFileError, match="row scales do not fit") as error:
        convert(tmp_path / "source", tmp_path / "out.clus", ConversionOptions(**options, share="kind", codebook_bits=16))
    assert ("`share='none'`" in (error.value.problems[0].remedy or "")) == (share == "none")
    if share is not None:
        convert(tmp_path / "source", tmp_path / "out.clus", ConversionOptions(**options, share=share))


@pytest.mark.parametrize(("experts", "told"), [(1, False), (64, True)])
def test_weights_that_are_not_matrices_are_told_if_they_are_many(opt: Path, experts: int, told: bool) -> None:
    path = opt / "model.safetensors"
    more = {"model.decoder.layers.0.experts.up_proj": torch.ones(experts, 16, 16)}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    warnings = prepare(opt, ConversionOptions(bits=4, calibration="none")).warnings
    assert any("more than two dimensions" in text for text in warnings) == told


def test_the_command_says_each_warning_once(opt: Path, tmp_path: Path) -> None:
    (opt / "README.md").write_text("about other weights")
    done = CliRunner().invoke(cli, ["convert", str(opt), str(tmp_path / "out.clus"), "--bits", "4", "--effort", "fast"])
    assert done.exit_code == 0
    for text in ("clustered without a calibration text", "README.md", "no self-test record"):
        assert done.stderr.count(text) == 1
