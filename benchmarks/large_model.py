"""Convert a model several times larger than the memory it may use: `python benchmarks/large_model.py [--json]`. Linux only.

A synthetic Llama of random weights in many shards is converted with `--dim 8 --clusters 256` under `ulimit -v`, which bounds
the address space, file mappings, the interpreter and torch included; then from format to format and back, and verified:

    source -> packed -> Hugging Face folder -> GGUF -> packed

Checked: every digest is the same, and the last file has the bytes of the first. With `--kills N` a conversion is killed N
times (SIGKILL) on the way and must still give those bytes. Reported per step: the peak resident size, the peak address space
and the time. Sizes are in MB = 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.hf.safetensors import Entry, header_bytes

HIDDEN, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 4096
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "mlp.down_proj": (HIDDEN, INNER),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
}
LAYER_BYTES = sum(2 * int(np.prod(shape)) for shape in SHAPES.values())

CHILD = """
import sys
from pathlib import Path
from cluscomp_export.cli import main
report = Path(sys.argv.pop(1))
try:
    main()
finally:
    report.write_text(Path("/proc/self/status").read_text())
"""


def make_source(folder: Path, layers: int) -> int:
    """Write the model, a shard per layer, and give its size in bytes. All matrices are cut from one random block."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(HIDDEN * INNER + 4096 * layers, dtype=np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    norm = np.full(HIDDEN, 0x3F80, dtype=np.uint16)
    weight_map: dict[str, str] = {}
    shards: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()} for layer in range(layers)
    ]
    shards.append({"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    total = 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries, position = {}, 0
        for name, shape in shapes.items():
            end = position + 2 * int(np.prod(shape))
            entries[name] = Entry("bfloat16", shape, position, end)
            position = end
            weight_map[name] = file
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(entries))
            for place, shape in enumerate(shapes.values()):
                start = 4096 * (number - 1) + 64 * place
                size = int(np.prod(shape))
                stream.write((norm if len(shape) == 1 else block[start : start + size]).data)
            total += stream.tell()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def step_line(step: dict[str, Any]) -> str:
    resident, address_space = (f"{step[key] / 1e6:5.0f} MB" for key in ("resident", "address_space"))
    return f"  {step['step']:34} peak {resident} resident, {address_space} of address space, {step['seconds']:5.0f} s"


class Bounded:
    """Runs the command line under the bound and notes what each step took."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit = folder, limit_bytes
        self.steps: list[dict[str, Any]] = []

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (self.limit, self.limit))

        command = [sys.executable, "-c", CHILD, str(self.folder / "status"), *map(str, arguments)]
        return subprocess.Popen(command, preexec_fn=bound, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: PLW1509

    def run(self, label: str, *arguments: object) -> Any:
        """The JSON a command prints. Exits with its messages if it fails."""
        started = time.perf_counter()
        process = self.start(*arguments, "--json")
        out, err = process.communicate()
        if process.returncode != 0:
            sys.exit(f"{label}: exit code {process.returncode}\n{out}\n{err}")
        status = dict(line.split(":", 1) for line in (self.folder / "status").read_text().splitlines())
        peaks = {key: int(status[name].split()[0]) * 1024 for key, name in (("resident", "VmHWM"), ("address_space", "VmPeak"))}
        self.steps.append({"step": label, "seconds": time.perf_counter() - started, **peaks})
        print(step_line(self.steps[-1]), file=sys.stderr, flush=True)
        return json.loads(out)


def kill_on_the_way(bounded: Bounded, work: Path, kills: int, *arguments: object) -> None:
    """Start a conversion `kills` times and kill it whenever it has finished twenty more units of work."""
    for attempt in range(1, kills + 1):
        process = bounded.start(*arguments)
        while process.poll() is None and (not work.is_dir() or len(list(work.glob("*.safetensors"))) < 20 * attempt):
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit(f"the conversion ended before kill {attempt}")
        process.send_signal(signal.SIGKILL)
        process.communicate()


def measure(folder: Path, layers: int, limit: int, kills: int, *, verify: bool) -> dict[str, Any]:
    source = folder / "source"
    source.mkdir()
    source_bytes = make_source(source, layers)
    bounded = Bounded(folder, limit)
    first, hf, gguf, last = (folder / name for name in ("first.clus", "folder", "model.gguf", "last.clus"))
    cluster = ("convert", source, first, "--dim", 8, "--clusters", 256, "--share", "kind", "--embedding-bits", 16)
    report = bounded.run("source to packed", *cluster)
    digests = {
        report["digest"],
        bounded.run("packed to hf", "convert", first, hf, "--to", "hf")["digest"],
        bounded.run("hf to gguf", "convert", hf, gguf, "--to", "gguf")["digest"],
        bounded.run("gguf to packed", "convert", gguf, last)["digest"],
        bounded.run("inspect hf", "inspect", hf)["digest"],
        bounded.run("inspect gguf", "inspect", gguf)["digest"],
        bounded.run("inspect packed", "inspect", last)["digest"],
    }
    assert len(digests) == 1, f"the digests differ: {digests}"
    assert first.read_bytes() == last.read_bytes(), "the last file is not the first"
    if kills:
        again = folder / "again.clus"
        arguments = (*cluster[:2], again, *cluster[3:])
        kill_on_the_way(bounded, folder / ".again.clus.work", kills, *arguments)
        resumed = bounded.run(f"source to packed, after {kills} kills", *arguments)
        assert resumed["reused"] >= 20 * kills, resumed
        assert first.read_bytes() == again.read_bytes(), "the resumed conversion made another file"
    if verify:
        verified = bounded.run("verify source, packed", "verify", source, first)
        assert verified["verdict"] == "derived", verified
    largest = 2 * HIDDEN * INNER
    return {
        "source_bytes": source_bytes,
        "limit_bytes": limit,
        "largest_tensor_bytes": largest,
        "packed_bytes": first.stat().st_size,
        "steps": bounded.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--megabytes", type=int, default=4500, help="size of the source (default 4500)")
    parser.add_argument("--limit", type=int, default=1100, help="address space of each command, in MB (default 1100)")
    parser.add_argument("--kills", type=int, default=1, help="how often a conversion is killed on the way (default 1)")
    parser.add_argument(
        "--verify", action="store_true", help="also verify the packed file against the source, matrix by matrix"
    )
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    layers = max(1, -(-options.megabytes * 1_000_000 // LAYER_BYTES))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(Path(name), layers, options.limit * 1_000_000, options.kills, verify=options.verify)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    megabytes = {key: result[f"{key}_bytes"] / 1e6 for key in ("source", "limit", "largest_tensor", "packed")}
    print(
        f"source {megabytes['source']:.0f} MB, {megabytes['source'] / megabytes['limit']:.1f} times the bound of "
        f"{megabytes['limit']:.0f} MB; largest tensor {megabytes['largest_tensor']:.1f} MB; packed {megabytes['packed']:.0f} MB"
    )
    for step in result["steps"]:
        print(step_line(step))


if __name__ == "__main__":
    main()
