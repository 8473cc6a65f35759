"""Finetuning: the loss falls, only what is asked for changes, interrupted trainings go on, deltas merge into every format."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.merge import merge
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.inspection.verify import verify
from cluscomp_export.sources import open_source
from cluscomp_export.training import TrainingOptions
from cluscomp_export.training.chats import chat_examples, read_chats
from cluscomp_export.training.examples import Example, cut, make_batch, shuffled_batches, split, text_examples
from cluscomp_export.training.finetuning import TuneOptions, plan_tuning, tune
from cluscomp_export.training.loop import Training, rate_factor
from cluscomp_export.work_folder import work_path
from cluscomp_formats.delta import Delta, open_delta, write_delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, OutputExistsError
from cluscomp_formats.packed import write_packed
from cluscomp_formats.parameters import kind_of, parameters
from cluscomp_runtime import load
from cluscomp_runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at 2.5 bits, where a training has much to gain, with a chat template."""
    folder = tmp_path_factory.mktemp("source") / "stories"
    shutil.copytree(stories_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    output = folder.parent / "stories.clus"
    convert(folder, output, ConversionOptions(bits=2.5, share="kind", effort="fast", embedding_bits=16))
    return output


@pytest.fixture(scope="module")
def tokenizer(packed: Path) -> Tokenizer:
    found = Tokenizer.from_files(open_source(packed).files)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def texts(stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text to train on, and another."""
    folder = tmp_path_factory.mktemp("texts")
    text = stories_text.read_text(encoding="utf-8")
    half = len(text) // 2
    files = folder / "train.txt", folder / "unseen.txt"
    files[0].write_text(text[:half], encoding="utf-8")
    files[1].write_text(text[half:], encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def options(texts: tuple[Path, Path]) -> TuneOptions:
    return TuneOptions(text=texts[0], context=64, steps=8, batch=4, lr=1e-2, checks=4)


@pytest.fixture(scope="module")
def tuned(packed: Path, options: TuneOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "stories.delta"
    report = tune(packed, output, options)
    assert report.held_out[1] < report.held_out[0] - 0.1
    return output


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom and Lily."}]},
        {"prompt": "What?", "completion": "A big red ball.", "id": 7},
        {"question": "Where?", "answer": "In the park."},
        {
            "messages": [
                {"role": "system", "content": "Be nice."},
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Bye."},
                {"role": "assistant", "content": "See you."},
            ]
        },
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return file


# Text.


def test_the_loss_falls_on_unseen_text(packed: Path, tuned: Path, texts: tuple[Path, Path]) -> None:
    before, after = (evaluate_files(packed, text=texts[1], context=128, delta=delta).perplexity for delta in (None, tuned))
    assert after < 0.85 * before


def test_the_delta_says_what_was_done(packed: Path, tuned: Path, texts: tuple[Path, Path]) -> None:
    delta = open_delta(tuned)
    assert delta.base == open_source(packed).digest()
    assert {kind_of(name) for name in delta.arrays} == {"codebook", "row_scale", "norm"}
    record = delta.record
    assert record["options"]["steps"] == 8
    assert record["data"]["kind"] == "text"
    assert [entry["step"] for entry in record["training"]["curve"]] == [0, 2, 4, 6, 8]
    assert str(texts[0]) not in json.dumps(record)


def test_the_same_options_give_the_same_bytes(packed: Path, tuned: Path, options: TuneOptions, tmp_path: Path) -> None:
    tune(packed, tmp_path / "again.delta", options)
    assert (tmp_path / "again.delta").read_bytes() == tuned.read_bytes()
    for seed in (1, 2):
        tune(packed, tmp_path / f"{seed}.delta", replace(options, seed=seed, steps=1))
    assert open_delta(tmp_path / "1.delta").result != open_delta(tmp_path / "2.delta").result


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(
    packed: Path, tuned: Path, options: TuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    output = tmp_path / "some.delta"
    monkeypatch.setattr("cluscomp_export.training.loop.SAVE_SECONDS", 0.0)
    save = Training._save

    def interrupted(self: Training) -> None:
        save(self)
        if self.state.step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(packed, output, options)
    assert not output.exists()
    assert work_path(output).is_dir()
    report = tune(packed, output, options)
    assert report.resumed_at == stop
    assert output.read_bytes() == tuned.read_bytes()
    assert not work_path(output).exists()


def test_the_work_of_another_training_is_not_taken_up(
    packed: Path, tuned: Path, options: TuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "some.delta"
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.training.finetuning.write_delta", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(packed, output, replace(options, seed=1, steps=2))
    report = tune(packed, output, options)
    assert report.resumed_at == 0
    assert "discarded" in report.warnings[0]
    assert output.read_bytes() == tuned.read_bytes()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_only_the_kinds_asked_for_are_trained(packed: Path, options: TuneOptions, tmp_path: Path) -> None:
    report = tune(packed, tmp_path / "scales.delta", replace(options, train=("scales",), steps=4))
    assert report.held_out[1] < report.held_out[0]
    assert {kind_of(name) for name in open_delta(tmp_path / "scales.delta").arrays} == {"row_scale"}


def test_a_training_that_does_harm_gives_an_empty_delta(packed: Path, options: TuneOptions, tmp_path: Path) -> None:
    report = tune(packed, tmp_path / "none.delta", replace(options, lr=3.0, checks=8, patience=2))
    assert report.stopped is not None
    assert "no progress" in report.stopped
    assert "empty" in report.warnings[0]
    assert report.base == report.result
    assert open_delta(tmp_path / "none.delta").arrays == {}


def test_the_reference_keeps_the_model_near(
    packed: Path, stories_folder: Path, options: TuneOptions, tuned: Path, tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    near = tmp_path / "near.delta"
    tune(packed, near, replace(options, reference=packed.parent / "stories", kl=5.0))
    divergence = [
        evaluate_files(packed, text=texts[1], context=128, windows=4, delta=delta, reference=stories_folder).kl
        for delta in (tuned, near)
    ]
    assert divergence[0] is not None
    assert divergence[1] is not None
    assert divergence[1] < divergence[0]


def test_in_bfloat16_it_learns_too(packed: Path, options: TuneOptions, tmp_path: Path) -> None:
    short = replace(options, steps=4, batch=2, precision="bfloat16")
    report = tune(packed, tmp_path / "half.delta", short)
    assert report.held_out[1] < report.held_out[0]


def test_a_plan_says_what_training_takes(packed: Path, options: TuneOptions, texts: tuple[Path, Path]) -> None:
    whole = plan_tuning(packed, replace(options, held_out=texts[1]))
    part = plan_tuning(packed, options)
    assert whole.examples > part.examples
    trained = [array for name, array in parameters(open_source(packed)).items() if kind_of(name) in ("codebook", "row_scale")]
    without_norms = plan_tuning(packed, replace(options, train=("codebooks", "scales")))
    assert without_norms.delta_bytes == sum(array.nbytes for array in trained)
    assert sum(without_norms.parameters.values()) == sum(array.size for array in trained)


def test_as_many_steps_as_epochs_take(packed: Path, options: TuneOptions) -> None:
    plan = plan_tuning(packed, replace(options, epochs=2.5, steps=None))
    assert plan.steps == math.ceil(2.5 * plan.examples / 4)


def test_what_does_not_fit_is_refused_before_any_work(
    packed: Path, stories_folder: Path, options: TuneOptions, tuned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.delta"
    short = tmp_path / "short.txt"
    short.write_text("Hi")
    for wrong in (
        replace(options, held_out=1.5),
        replace(options, kl=1.0),
        replace(options, train=("codes",)),
        replace(options, context=1),
        replace(options, context=100_000),
        replace(options, steps=None, epochs=0),
        replace(options, text=short),
        replace(options, lr=-1.0),
        replace(options, batch=0),
    ):
        with pytest.raises(InvalidRequestError):
            tune(packed, output, wrong)
    with pytest.raises(InvalidRequestError, match="clustered"):
        tune(stories_folder, output, options)
    with pytest.raises(OutputExistsError):
        tune(packed, tuned, options)
    with pytest.raises(InvalidFileError, match="a delta, not a model"):
        tune(tuned, output, options)
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt"}


# Chats.


def learnt(example: Example, tokenizer: Tokenizer) -> str:
    """The text whose prediction counts."""
    return tokenizer.decode([example.ids[place + 1] for place, counts in enumerate(example.scored) if counts])


def test_only_what_the_assistant_says_counts(chat_file: Path, tokenizer: Tokenizer) -> None:
    examples = chat_examples(read_chats(chat_file), TEMPLATE, tokenizer, chat_file)
    assert [tokenizer.decode(example.ids).strip() for example in examples][1] == "user: What?\nassistant: A big red ball."
    assert [learnt(example, tokenizer).split() for example in examples] == [
        ["Tom", "and", "Lily."],
        ["A", "big", "red", "ball."],
        ["In", "the", "park."],
        ["Hello!", "See", "you."],
    ]


def test_what_generation_blocks_write_counts(chat_file: Path, tokenizer: Tokenizer) -> None:
    # Such a template may write earlier turns otherwise once the chat goes on: its blocks tell which they are.
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{{ messages | length }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    examples = chat_examples(read_chats(chat_file), template, tokenizer, chat_file)
    assert "assistant: 2A big red ball." in tokenizer.decode(examples[1].ids)
    assert [learnt(example, tokenizer).split() for example in examples] == [
        ["Tom", "and", "Lily."],
        ["A", "big", "red", "ball."],
        ["In", "the", "park."],
        ["Hello!See", "you."],
    ]


def test_a_conversation_the_assistant_begins_counts_where_blocks_say_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    block = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye."}]}')
    assert all(chat_examples(read_chats(file), block, tokenizer, file)[0].scored[:5])
    with pytest.raises(InvalidRequestError, match="no chat has a token"):
        chat_examples(
            read_chats(file), block.replace("{% generation %}", "").replace("{% endgeneration %}", ""), tokenizer, file
        )


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    lines = [
        '{"prompt": "a", "completion": "b"}',
        "not json",
        "[1]",
        '{"prompt": "a"}',
        '{"question": "a", "answer": 3}',
        '{"messages": "a"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": []}',
        '{"prompt": "\\ud800", "completion": "b"}',
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(InvalidFileError) as caught:
        read_chats(file)
    assert [problem.tensor for problem in caught.value.problems] == [f"line {number}" for number in range(2, 11)]
    file.write_text("\n \n")
    with pytest.raises(InvalidFileError, match="no chat"):
        read_chats(file)


def test_lines_that_the_template_does_not_take_are_named(chat_file: Path, tokenizer: Tokenizer) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    with pytest.raises(InvalidFileError, match="no system here") as caught:
        chat_examples(read_chats(chat_file), refusing, tokenizer, chat_file)
    assert [problem.tensor for problem in caught.value.problems] == ["line 7"]
    shifting = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(InvalidFileError, match="changes earlier text") as caught:
        chat_examples(read_chats(chat_file), shifting, tokenizer, chat_file)
    assert len(caught.value.problems) == 4


def test_a_chat_is_learnt(packed: Path, chat_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "chat.delta"
    options = TuneOptions(chat=chat_file, held_out=chat_file, steps=12, batch=4, lr=2e-2, checks=2)
    report = tune(packed, output, options)
    assert report.held_out[1] < report.held_out[0] / 2
    assert report.examples == 4


def test_chats_need_a_template(packed: Path, chat_file: Path, tmp_path: Path) -> None:
    model = open_source(packed)
    files = {name: content for name, content in model.files.items() if name != "chat_template.jinja"}
    write_packed(replace(model, files=files), tmp_path / "plain.clus")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tune(tmp_path / "plain.clus", tmp_path / "x.delta", TuneOptions(chat=chat_file))


def test_long_chats_are_cut_and_said_so(packed: Path, chat_file: Path) -> None:
    plan = plan_tuning(packed, TuneOptions(chat=chat_file, context=24))
    assert any("were cut" in warning for warning in plan.warnings)
    with pytest.raises(InvalidRequestError, match="within the context"):
        plan_tuning(packed, TuneOptions(chat=chat_file, context=4))


# Examples.


def test_windows_begin_as_texts_do(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a time there was a dog.")
    examples = text_examples(tokenizer, "Once upon a time there was a dog.", 4)
    assert all(example.ids[0] == tokenizer.bos_id for example in examples)
    assert [token for example in examples for token in example.ids[1:]] == [
        token for index, token in enumerate(ids) if index % 4
    ]
    assert all(example.scored == (*(True,) * (len(example.ids) - 1), False) for example in examples)


def test_cutting_leaves_out_what_has_nothing_to_learn() -> None:
    late, early = Example((1, 2, 3, 4), (False, False, True, False)), Example((1, 2, 3), (True, True, False))
    assert cut([late, early], 3) == [early]
    assert cut([late, early], 2) == [Example((1, 2), (True, False))]
    assert cut([late], 8) == [late]


def test_splitting_and_batches() -> None:
    examples = [Example((index,) * (index + 2), (True,) * (index + 1) + (False,)) for index in range(10)]
    kept, held_out = split(examples, 0.2, None)
    assert (kept, held_out) == (examples[:8], examples[8:])
    kept, held_out = split(examples, 0.2, 5)
    assert sorted(kept + held_out, key=examples.index) == examples
    assert held_out != examples[8:]
    assert len(split(examples[:2], 0.999, None)[0]) == 1
    batch = shuffled_batches(examples, 4, 0)
    first_epoch = [int(row[0]) for step in range(5) for row in batch(step).ids][:10]
    assert sorted(first_epoch) == list(range(10))
    assert first_epoch != list(range(10))
    both = make_batch(examples[:2])
    assert both.ids.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert both.scored.tolist() == [[True, False, False], [True, True, False]]
    assert both.count == 3


def test_rates() -> None:
    options = TrainingOptions(steps=12, warmup=2, schedule="linear")
    assert [rate_factor(options, step) for step in (0, 1, 2, 7, 12)] == [0.5, 1, 1, 0.5, 0]
    assert rate_factor(replace(options, schedule="constant"), 11) == 1
    assert rate_factor(replace(options, schedule="cosine"), 7) == pytest.approx(0.5)


# Merging and running.


@pytest.mark.parametrize("name", ["packed", "gguf", "hf", "onnx"])
def test_merging_into_every_format_from_every_format(packed: Path, tuned: Path, tmp_path: Path, name: str) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    convert(packed, base, ConversionOptions(to=name))
    report = merge(base, [tuned], output, to=name)
    delta = open_delta(tuned)
    merged = open_source(output)
    assert report.digest == delta.result == merged.digest()
    assert report.self_test
    assert merged.provenance["merges"][0]["base"] == delta.base
    assert merged.provenance["merges"][0]["deltas"][0]["record"] == delta.record
    verified = verify(output, packed, delta=tuned)
    assert verified.verdict == "equal"
    assert all(test["passed"] for test in verified.self_tests.values())
    assert verify(packed.parent / "stories", output).verdict == "derived"


def test_merging_for_stock_llama_cpp(packed: Path, tuned: Path, tmp_path: Path) -> None:
    report = merge(packed, [tuned], tmp_path / "dense.gguf", to="gguf", gguf_type="f16")
    assert report.digest is None
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = open_delta(tuned).apply(open_source(packed)).tensors[name].decode()
    np.testing.assert_array_equal(open_source(tmp_path / "dense.gguf").tensors[name].decode(), expected.astype(np.float16))


def test_merging_several(packed: Path, tuned: Path, options: TuneOptions, tmp_path: Path) -> None:
    other = tmp_path / "other.delta"
    tune(packed, other, replace(options, seed=3, steps=2, train=("norms",)))
    report = merge(packed, [tuned, other], tmp_path / "both.clus")
    assert report.weights == (0.5, 0.5)
    assert report.digest not in (open_delta(tuned).result, open_delta(other).result)
    alone = merge(packed, [tuned, other], tmp_path / "one.clus", weights=(1, 0))
    assert alone.digest == open_delta(tuned).result
    with pytest.raises(InvalidRequestError, match="weights"):
        merge(packed, [tuned], tmp_path / "x.clus", weights=(1, 2))


def test_merging_what_does_not_belong_together(packed: Path, tuned: Path, tmp_path: Path) -> None:
    merge(packed, [tuned], tmp_path / "once.clus")
    with pytest.raises(InvalidFileError, match="another model"):
        merge(tmp_path / "once.clus", [tuned], tmp_path / "twice.clus")
    with pytest.raises(OutputExistsError):
        merge(packed, [tuned], tmp_path / "once.clus")
    with pytest.raises(InvalidRequestError, match="one of the inputs"):
        merge(tmp_path / "once.clus", [tuned], tmp_path / "once.clus", force=True)
    delta = open_delta(tuned)
    lying = tmp_path / "lying.delta"
    write_delta(Delta(delta.base, delta.base, delta.arrays, delta.record), lying)
    with pytest.raises(InvalidFileError, match="another digest than the delta says"):
        merge(packed, [lying], tmp_path / "x.clus")
    assert not (tmp_path / "twice.clus").exists()
    assert not (tmp_path / "x.clus").exists()


def test_loading_with_a_delta_and_back(packed: Path, tuned: Path, tmp_path: Path) -> None:
    merge(packed, [tuned], tmp_path / "merged.clus")
    ids = [[1, 2, 3, 4, 5, 6]]
    base = load(packed).forward(ids)
    loaded = load(packed, delta=tuned, selftest=True)
    np.testing.assert_array_equal(loaded.forward(ids), load(tmp_path / "merged.clus").forward(ids))
    loaded.apply_delta(None)
    np.testing.assert_array_equal(loaded.forward(ids), base)
