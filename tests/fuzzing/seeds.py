"""Small sound files of every kind, for mutations to start from."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from clustered_models import clustered, codebook
from fuzzing.containers import GgufParts, join_members, safetensors_of
from model_builders import tiny_llama

from cluscomp_formats.delta import Delta, write_delta
from cluscomp_formats.gguf import write_dense_gguf, write_gguf
from cluscomp_formats.hf import write_hf
from cluscomp_formats.ir import Array, DenseTensor, Model, Outliers, Tensor
from cluscomp_formats.packed import write_packed
from cluscomp_formats.parameters import parameters, with_parameters


def small_model() -> Model:
    """Everything the formats can say, in a few kilobytes: all kinds of weights, dtypes, shapes and side files."""
    own, shared, steps = codebook("own", 20, 4, 1), codebook("shared", 5, 3, 2, "float32"), codebook("steps", 9, 2, 3, "int8")
    tensors: dict[str, Tensor] = {
        "a.weight": clustered("a.weight", (6, 5), [own], 3),
        "b.weight": clustered("b.weight", (7, 4), [shared, own, steps], 4, row_scale=Array.of(np.linspace(0.5, 2, 7))),
        "c": clustered(
            "c",
            (4, 9),
            [shared],
            5,
            "in",
            column_scale=Array.of(np.array([0x3F80] * 9, np.uint16), "bfloat16"),
            outliers=Outliers(Array.of(np.array([1, 30], np.uint32)), Array.of(np.array([3, -4], np.float16))),
        ),
        "bias": DenseTensor("bias", Array.of(np.arange(3, dtype=np.float32))),
        "mask": DenseTensor("mask", Array.of(np.array([[True, False]]))),
        "scalar": DenseTensor("scalar", Array.of(np.array(7, np.int64))),
        "empty": DenseTensor("empty", Array.of(np.zeros((2, 0, 3), np.uint8))),
    }
    files = {"notes.txt": side_file("hello"), "tokenizer_config.json": side_file('{"bos_token":"<s>"}'), "void": side_file("")}
    config = {"model_type": "llama", "hidden_size": 6, "rope_scaling": {"factor": 2.0, "rope_type": "linear"}, "ids": [1, None]}
    return Model(config, tensors, files, {"name": "small", "seed": 1}, {"version": 1, "sequences": []})


def runnable_model() -> Model:
    """A Llama of one layer with clustered matrices of every kind, a tokenizer, a chat template and no self-test yet."""
    dense = tiny_llama(hidden=12, intermediate=10, layers=1, vocabulary=260)
    books = [codebook("wide", 300, 4, 1), codebook("narrow", 5, 3, 2), codebook("row", 9, 1, 3), codebook("long", 3, 65, 4)]
    tensors: dict[str, Tensor] = dict(dense.tensors)
    matrices = [name for name, tensor in dense.tensors.items() if len(tensor.shape) == 2]
    for number, name in enumerate(matrices):
        shape = (dense.tensors[name].shape[0], dense.tensors[name].shape[1])
        scale = Array.of(np.ones(shape[number % 2], np.float32))
        outliers = Outliers(Array.of(np.array([1, 7], np.uint32)), Array.of(np.array([3.0, -4.0], np.float32)))
        extras: dict[str, Any] = {"row_scale": scale} if number % 2 == 0 else {"column_scale": scale, "outliers": outliers}
        stages = [books[number % 4], books[(number + 1) % 4]][: 1 + number % 2]
        tensors[name] = clustered(name, shape, stages, number, "in" if number == 3 else "out", **extras)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": template}
    generation = {"eos_token_id": [257, 3]}
    files = {
        "tokenizer.json": side_file(json.dumps(byte_tokenizer(), separators=(",", ":"))),
        "tokenizer_config.json": side_file(json.dumps(settings)),
        "generation_config.json": side_file(json.dumps(generation)),
    }
    return Model(dense.config, tensors, files, {"name": "runnable"})


def tokenizer_seeds(_: Path) -> Iterator[bytes]:
    """`tokenizer.json` of bytes, of SentencePiece's kind, of BERT's kind and of Unigram's."""
    plain = byte_tokenizer()
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    text, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": False}
    yield json.dumps(plain).encode()
    yield json.dumps(
        plain
        | {
            "added_tokens": [{"id": 0, "content": "<s>", **added}],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": template,
            "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
            "model": {
                "type": "BPE",
                "vocab": {"<s>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "<0xC3>": 5, "<0xA9>": 6},
                "merges": [["a", "b"]],
                "unk_token": "<s>",
                "byte_fallback": True,
            },
        }
    ).encode()
    yield json.dumps(
        plain
        | {
            "added_tokens": [],
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, split]},
            "post_processor": None,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "vocab": {"[UNK]": 0, "a": 1, "##b": 2, "é": 3},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            },
        }
    ).encode()
    yield json.dumps(
        plain
        | {
            "added_tokens": [],
            "normalizer": {"type": "NFKC"},
            "pre_tokenizer": metaspace,
            "post_processor": None,
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["ab", -2.5]]},
        }
    ).encode()


def byte_tokenizer() -> dict[str, Any]:
    """`tokenizer.json` of a vocabulary of a few letters and two special tokens."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 6, "content": "<s>", **special}, {"id": 7, "content": "</s>", **special}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {"a": 0, "b": 1, "c": 2, "\u0120": 3, "ab": 4, "abc": 5},
            "merges": [["a", "b"], ["ab", "c"]],
        },
    }


def side_file(text: str) -> Array:
    return Array.of(np.frombuffer(text.encode(), np.uint8))


def _written(write: Callable[[Model, Path], Any], model: Model, folder: Path) -> bytes:
    path = folder / "seed"
    write(model, path)
    if path.is_file():
        content = path.read_bytes()
        path.unlink()
    else:
        content = join_members(folder_members(path))
        shutil.rmtree(path)
    return content


def folder_members(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def packed_seeds(folder: Path) -> Iterator[bytes]:
    yield _written(write_packed, small_model(), folder)
    yield _written(write_packed, Model({}, {}), folder)


def delta_seeds(folder: Path) -> Iterator[bytes]:
    """Deltas of the small model: of everything that can change in it, and of nothing."""
    base = small_model()
    changed = {
        name: Array.of((array.read() / 2).astype(array.read().dtype), array.dtype)
        for name, array in parameters(base).items()
        if array.dtype != "bfloat16"
    }
    for arrays in (changed, {}):
        delta = Delta(
            base.digest(), with_parameters(base, arrays).digest(), arrays, {"tool": "seed", "training": {"curve": []}}
        )
        write_delta(delta, folder / "seed")
        yield (folder / "seed").read_bytes()
        (folder / "seed").unlink()


def gguf_seeds(folder: Path) -> Iterator[bytes]:
    yield _written(write_gguf, small_model(), folder)
    yield _written(write_gguf, Model({}, {}), folder)


def hf_seeds(folder: Path) -> Iterator[bytes]:
    yield _written(write_hf, small_model(), folder)
    yield _written(lambda model, path: write_hf(model, path, shard_bytes=200), small_model(), folder)


def onnx_seeds(folder: Path) -> Iterator[bytes]:
    """Graphs that use every weight of the small model, a single one, none, and those of a decoder."""
    from onnx_graphs import graph_of

    from cluscomp_export.onnx_graph import build_graph
    from cluscomp_formats.onnx.writer import write_onnx

    decoder = tiny_llama(hidden=12, intermediate=10, layers=1, vocabulary=20)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = clustered(name, (12, 10), [codebook("narrow", 300, 3, 1)], 2, "in")
    decoder = Model(decoder.config, {**decoder.tensors, name: weight}, {"notes.txt": side_file("hello")}, {}, {"version": 1})
    single = Model({}, {"w": clustered("w", (4, 3), [codebook("c", 3, 2, 1)], 1)})
    for model, graph in ((small_model(), graph_of), (single, graph_of), (Model({}, {}), graph_of), (decoder, build_graph)):
        yield _written(lambda model, path, graph=graph: write_onnx(model, path, graph(model)), model, folder)


def runtime_seeds(folder: Path) -> Iterator[bytes]:
    from cluscomp_runtime import make_self_test

    model = runnable_model()
    record = make_self_test(model, sequences=[[1, 2, 3], [4]], top_k=2)
    yield _written(write_packed, Model(model.config, model.tensors, model.files, model.provenance, record), folder)


def stock_gguf_seeds(folder: Path) -> Iterator[bytes]:
    """Dense files as llama.cpp's converter makes them, with both kinds of tokenizer, rotary divisors and a quantised type."""
    config = {"hidden": 12, "intermediate": 32, "layers": 1, "vocabulary": 8}
    plain = _written(lambda model, path: write_dense_gguf(model, path, gguf_type="f32"), tiny_llama(**config), folder)
    tokens = [b"<unk>", b"<s>", b"</s>", b"a", b"b", b"ab", b"\xe2\x96\x81", b"<0x0A>"]
    tokenizers: list[dict[bytes, tuple[int, Any]]] = [
        {
            b"tokenizer.ggml.model": (8, b"llama"),
            b"tokenizer.ggml.scores": (9, (6, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, 0.0])),
            b"tokenizer.ggml.token_type": (9, (5, [2, 3, 3, 1, 1, 1, 1, 6])),
            b"llama.rope.scaling.type": (8, b"linear"),
            b"llama.rope.scaling.factor": (6, 2.0),
        },
        {
            b"tokenizer.ggml.model": (8, b"gpt2"),
            b"tokenizer.ggml.pre": (8, b"llama-bpe"),
            b"tokenizer.ggml.merges": (9, (8, [b"a b"])),
            b"tokenizer.chat_template": (8, b"{{ messages }}"),
        },
    ]
    for keys in tokenizers:
        parts = GgufParts.of(plain)
        for key, (kind, value) in {
            **keys,
            b"tokenizer.ggml.tokens": (9, (8, tokens)),
            b"tokenizer.ggml.bos_token_id": (4, 1),
            b"tokenizer.ggml.add_bos_token": (7, 1),
        }.items():
            parts.put(key, kind, value)
        yield parts.to_bytes()
    yield _written(
        lambda model, path: write_dense_gguf(model, path, gguf_type="q8_0"), tiny_llama(**{**config, "hidden": 96}), folder
    )


def _floats(count: int) -> bytes:
    return struct.pack(f"<{count}f", *(number / 8 for number in range(count)))


def stock_folder_seeds(folder: Path) -> Iterator[bytes]:
    """Checkpoints as transformers saves them: one file and shards."""
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 4, "quantization_config": None}
    arrays = {
        "model.embed_tokens.weight": ("F32", [4, 3], _floats(12)),
        "lm_head.weight": ("F32", [4, 3], _floats(12)),
        "model.layers.0.mlp.up_proj.weight": ("BF16", [2, 2], bytes(8)),
        "mask": ("BOOL", [2], b"\0\1"),
    }
    yield join_members(
        {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": safetensors_of(arrays),
            "tokenizer.json": json.dumps(byte_tokenizer()).encode(),
            **token_files(),
        }
    )
    first = {name: arrays[name] for name in list(arrays)[:2]}
    second = {name: arrays[name] for name in list(arrays)[2:]}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {**dict.fromkeys(first, names[0]), **dict.fromkeys(second, names[1])}}
    yield join_members(
        {
            "config.json": json.dumps({**config, "tie_word_embeddings": False}).encode(),
            "model.safetensors.index.json": json.dumps(index).encode(),
            names[0]: safetensors_of(first),
            names[1]: safetensors_of(second),
            "tokenizer.model": sentencepiece_model(),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}).encode(),
        }
    )


def token_files() -> dict[str, bytes]:
    """Tokens in all the files beside `tokenizer.json` that may have some."""
    entry = {"content": "<x>", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    values: dict[str, Any] = {
        "tokenizer_config.json": {"bos_token": "<s>", "extra_special_tokens": ["<y>"], "tokenizer_class": "LlamaTokenizer"},
        "special_tokens_map.json": {"pad_token": entry, "additional_special_tokens": ["<z>"]},
        "added_tokens.json": {"<x>": 9, "<w>": 8},
        "generation_config.json": {"eos_token_id": [1, 3]},
    }
    return {name: json.dumps(value).encode() for name, value in values.items()}


def sentencepiece_model() -> bytes:
    """A byte-pair model of a few pieces: each its text, its score and its kind."""
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("ab", -0.0, 1),
        ("\u2581", -1.0, 1),
        ("a", -2.0, 1),
        ("b", -3.0, 1),
    ]
    content = b""
    for text, score, kind in pieces:
        stored = text.encode()
        piece = b"\x0a" + bytes([len(stored)]) + stored + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(piece)]) + piece
    return content + b"\x12\x05\x18\x02\x98\x02\x01\x1a\x02\x20\x00"


def reference_seeds(folder: Path) -> Iterator[bytes]:
    """A checkpoint of the authors' code."""
    sizes: Mapping[str, Any] = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 6, "num_key_value_heads": 1}
    config = {"model_type": "llama", "num_clusters": 5, "cluster_dim": 4, **sizes}
    arrays = {}
    for module, vectors in (("model.layers.0.self_attn.k_proj", 4), ("model.layers.0.mlp.up_proj", 8)):
        arrays[f"{module}.cluster"] = ("F16", [5, 4], bytes(40))
        arrays[f"{module}.index"] = ("I32", [vectors], struct.pack(f"<{vectors}i", *(n % 5 for n in range(vectors))))
    arrays["model.norm.weight"] = ("F32", [4], _floats(4))
    yield join_members({"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_of(arrays)})
