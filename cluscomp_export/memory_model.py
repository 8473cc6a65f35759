"""What a conversion needs of device, host and disk, phase by phase, from shapes, plan and options alone.

Every formula is an upper bound on what the phase adds to a process that has loaded this package (`PROCESS_BYTES`), counted as
resident memory: pages of the source that are mapped while a tensor is read count too. Terms are arrays that are there at the
same time, in bytes; `benchmarks/memory.py` holds them against real peaks. Who changes what a phase holds changes its formula
here. `docs/memory.md` shows the model on known architectures.

Letters in the formulas: W weights of a matrix, P the same with out_features filled up to a multiple of cluster_dim, V vectors
(P / cluster_dim), k clusters, d cluster_dim, n in_features, T tokens run at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluscomp_export.calibration import BATCH, CONTEXT, MAX_FEEDBACK_WINDOWS
from cluscomp_export.clustering import FIT_VECTORS_PER_CLUSTER, unit_bytes
from cluscomp_export.error_feedback import block_index
from cluscomp_export.planning import CodebookPlan, Plan, Treatment
from cluscomp_export.sources import embedding_tensor, head_tensor
from cluscomp_export.tuning.blockwise import BlockwiseOptions
from cluscomp_export.tuning.recovery import RecoveryOptions, teacher_kernel
from cluscomp_formats.errors import ClusCompError
from cluscomp_formats.ir import DTYPES, ClusteredWeight, DenseTensor, Model, Tensor
from cluscomp_kernels.clus_linear.trainable import BLOCK_BYTES
from cluscomp_kernels.kmeans.native_engine import list_length
from cluscomp_kernels.kmeans.torch_engine import DISTANCES_PER_CHUNK
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.memory import physical_bytes
from cluscomp_runtime.selftest import MAX_SENTENCE_TOKENS, RANDOM_SEQUENCES

_ADDS_TO_STREAM = (".o_proj.weight", ".down_proj.weight")

__all__ = ["PROCESS_BYTES", "Peak", "conversion_memory", "memory_warnings"]

PROCESS_BYTES = 300_000_000
"""The process before it touches a model: the interpreter with torch and a tokenizer. On a GPU the driver's context comes on
top of both columns, about half a gigabyte each."""

HEAP_BYTES = 32 << 20
"""What the allocator may keep of arrays that are gone (`return_freed_arrays` bounds it), and what libraries need for their
products: a few times 8 MB."""

DECODING = {"bfloat16": 10, "float16": 6, "float32": 4, "float64": 12}
"""Bytes per weight when `Tensor.decode` makes float32 of a stored dtype: the mapped payload and the result, of bfloat16 also
the bits before they are shifted."""

QUANTISED = 9
"""The same for a quantised GGUF tensor: at most one byte stored, gguf-py's pieces, and the result they are put together to."""


@dataclass(frozen=True)
class Peak:
    """The most bytes a phase needs at a time on each place; `host` and `device` without the process itself.

    `disk` is what the conversion occupies by the end of the phase: the kept work and the output.
    """

    phase: str
    device: int
    host: int
    disk: int


def conversion_memory(
    source: Model,
    model: Model,
    plan: Plan | None,
    *,
    output_bytes: int,
    calibrated: bool = False,
    feedback: bool = False,
    blockwise: BlockwiseOptions | None = None,
    end_to_end: RecoveryOptions | None = None,
    windows: int = MAX_FEEDBACK_WINDOWS,
    cuda: bool = False,
) -> tuple[Peak, ...]:
    """The phases of a conversion in their order.

    `model` is what `cluster_model(source, plan)` describes, or the source itself where it is only repacked (`plan=None`);
    `output_bytes` the size of what is written. `calibrated`, `feedback`, `blockwise` and `end_to_end` say which levels of
    effort are gone through, `windows` on how much text.
    """
    if plan is None:
        return tuple(_with_heap([("writing", 0, writing(source, model), output_bytes), *_self_test(model, output_bytes)]))
    settings = _runnable(source)
    rows: list[tuple[str, int, int, int]] = [("checking the source", 0, checking(source), 0)]
    disk = 0
    if calibrated and settings is not None:
        disk = sum(4 * tensor.shape[1] for tensor in source.tensors.values() if len(tensor.shape) == 2)
        rows.append(("calibration", 0, calibration(source, settings, windows), disk))
    sizes = unit_bytes(model)
    disk += sizes["codebooks"]
    rows.append(("fitting codebooks", *fitting(source, plan, calibrated=calibrated, cuda=cuda), disk))
    disk += sizes["tensors"]
    if not feedback or settings is None:
        rows.append(("choosing codes", *encoding(source, plan, cuda=cuda), disk + output_bytes))
    else:
        host = error_feedback(source, model, plan, settings, windows)
        rows.append(("error feedback", _search_bytes(plan) if cuda else 0, host, disk))
        if blockwise is not None:
            # The values of a tuned block are kept beside those it started with.
            disk += sizes["codebooks"] + sizes["scales"]
            shared = [book.name for book in plan.codebooks if len({block_index(name) for name in book.members}) > 1]
            rows.append(("block-wise tuning", 0, tuning(model, settings, blockwise, windows, shared), disk))
    if end_to_end is not None and settings is not None:
        rows.append(("recovery", 0, recovery(source, model, settings, end_to_end), disk))
    rows.append(("writing", 0, writing(source, model), disk + output_bytes))
    rows += _self_test(model, disk + output_bytes)
    return tuple(_with_heap(rows))


def _with_heap(rows: list[tuple[str, int, int, int]]) -> Iterator[Peak]:
    """Small phases cannot leave more behind than they had."""
    for phase, device, host, disk in rows:
        yield Peak(phase, device, host + min(HEAP_BYTES, host), disk)


def memory_warnings(peaks: Sequence[Peak]) -> list[str]:
    """What to say before the work if this machine has less memory than a phase may need."""
    largest = max(peaks, key=lambda peak: peak.host)
    needed, available = largest.host + PROCESS_BYTES, physical_bytes()
    if available is None or needed <= available:
        return []
    return [f"{largest.phase} may need {needed / 1e9:.1f} GB of memory; this machine has {available / 1e9:.1f} GB"]


def _runnable(model: Model) -> DecoderSettings | None:
    """What the runtime reads from the configuration, None if it cannot run the model: then there is no calibration either."""
    try:
        settings = DecoderSettings.from_config(model.config)
        check_tensors(model, settings)
    except ClusCompError:
        return None
    return settings


def _quantised(source: Model, name: str) -> bool:
    return bool(source.provenance.get("stored_bits", {}).get(name, 16) < 16)


def _reading(source: Model, tensor: Tensor) -> tuple[int, int]:
    """Bytes while a tensor is decoded to float32, and after."""
    if isinstance(tensor, ClusteredWeight):
        return clustered_decoding(tensor), 4 * tensor.num_weights
    per_weight = QUANTISED if _quantised(source, tensor.name) else DECODING.get(tensor.values.dtype, 12)
    return per_weight * tensor.num_weights, 4 * tensor.num_weights


def clustered_decoding(tensor: ClusteredWeight) -> int:
    """`ClusteredWeight.decode`: codes as stored and as 16 bits, their vectors, the sum of the stages and its transpose."""
    vectors = max(stage.codes.size for stage in tensor.stages)
    dim = tensor.stages[0].codebook.cluster_dim
    return 4 * vectors + 4 * vectors * dim + 8 * tensor.num_weights


def checking(source: Model) -> int:
    """One payload at a time, mapped, with a flag per value whether it is finite (of bfloat16 also its exponent bits). Quantised
    tensors are decoded, with the one before still there."""
    most = before = 0
    for description, array in source.payloads():
        if _quantised(source, str(description.get("tensor"))):
            most = max(most, before + QUANTISED * array.size)
            before = array.nbytes
        else:
            flags = 3 if array.dtype == "bfloat16" else 1
            most = max(most, before + array.nbytes + flags * array.size)
            before = 0
    return most


def _float64(source: Model, tensor: Tensor) -> int:
    """A matrix on its way to float64 in the runtime's reference mode: the stored values copied off the map, or decoded, and the
    result of 8 bytes. Products then need the result alone."""
    if isinstance(tensor, ClusteredWeight):
        return max(clustered_decoding(tensor), 12 * tensor.num_weights)
    if _quantised(source, tensor.name):
        return 12 * tensor.num_weights
    width = DTYPES[tensor.values.dtype].itemsize
    return max(2 * width, width + 8) * tensor.num_weights


def _layer_activations(settings: DecoderSettings, tokens: int, width: int) -> int:
    """The widest moment of a block for `tokens` tokens of `width` bytes: the stream and its norm, and beside them either
    queries and keys four times (joined, and rotated in halves) with values, or three arrays of the feed-forward (gate, up and
    product; or the product that is observed, its squares and their shares)."""
    hidden, inner = settings.hidden_size, settings.intermediate_size
    queries, keys = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    return width * tokens * (2 * hidden + max(4 * (queries + keys) + keys, 3 * inner))


def calibration(source: Model, settings: DecoderSettings, windows: int) -> int:
    """`channel_energies`: a matrix as float64, the activations of `BATCH` windows as float64, the sums of all channels."""
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) == 2]
    sums = sum(8 * tensor.shape[1] for tensor in matrices)
    return (
        max(_float64(source, tensor) for tensor in matrices)
        + _layer_activations(settings, min(windows, BATCH) * CONTEXT, 8)
        + sums
    )


def _vectors(source: Model, name: str, treatment: Treatment) -> tuple[int, int]:
    """Bytes while the vectors of a matrix are made, and what they take (4 P): the matrix decoded; with row scales its squares
    as float64, then both the matrix and the scaled one; the transpose into filled up vectors."""
    reading, decoded = _reading(source, source.tensors[name])
    held = 4 * _num_vectors(treatment) * treatment.codebook.cluster_dim
    squares = 3 * decoded if treatment.row_scale else 0
    return max(reading, squares, 2 * decoded, decoded + held), held


def _num_vectors(treatment: Treatment) -> int:
    out_features, in_features = treatment.shape
    return in_features * -(-out_features // treatment.codebook.cluster_dim)


def fitting(source: Model, plan: Plan, *, calibrated: bool, cuda: bool) -> tuple[int, int]:
    """Device and host bytes of the codebook that needs most."""
    pairs = [_fitting(source, plan, book, calibrated=calibrated, cuda=cuda) for book in plan.codebooks]
    shared = sum(2 * book.num_clusters * book.cluster_dim for book in plan.codebooks if book.shared)
    return max(device for device, _ in pairs), max(host for _, host in pairs) + shared


def _fitting(source: Model, plan: Plan, book: CodebookPlan, *, calibrated: bool, cuda: bool) -> tuple[int, int]:
    """The sample of n points, 4 d + 4 bytes each with its weight, twice while it is put together from its tensors; beside it
    the vectors of one tensor and, where only a part of them is drawn, a permutation of them (8 bytes each).

    Then k-means. On the CPU: the points and their weights again in the order of the tree, and per point that order, codes and
    distances old and new, and the order by cluster old and new (26 bytes); neighbour lists old and new, the nodes of the tree,
    and centroids in several layouts. One dimension is sorted instead: prefix sums and terms as float64 (90 bytes). On a GPU:
    the points, sorted by code as float32 and, with their weights, as float64 twice; codes, order, distances and shares as
    integers and floats of 8 bytes (100 bytes).
    """
    treatments = {name: plan.treatments[name] for name in book.members}
    counts = {name: _num_vectors(treatment) for name, treatment in treatments.items()}
    dim, clusters, total = book.cluster_dim, book.num_clusters, sum(counts.values())
    scaled = any(treatment.row_scale for treatment in treatments.values())
    points = min(total, FIT_VECTORS_PER_CLUSTER * clusters) if scaled else total
    row = 4 * dim + (4 if calibrated else 0)
    most = 0
    for name, treatment in treatments.items():
        making, held = _vectors(source, name, treatment)
        drawing = held + (12 if points < total else 4) * counts[name]
        most = max(most, making, drawing)
    # Weights of 1 are made even if nothing is calibrated.
    gathering = most + (4 * dim + 4) * (points if len(book.members) > 1 else 0)
    joined = (8 * dim + 8) * points
    if cuda:
        tree = (row + 6) * points
        host, device = row * points + tree, (20 * dim + 100) * points + 2 * DISTANCES_PER_CHUNK * 12
    else:
        lists = 8 * clusters * list_length(dim, clusters)
        nodes = 12 * clusters * (36 + 4 * dim)
        per_point = 90 if dim == 1 else row + 26
        host, device = (row + per_point) * points + lists + nodes + 32 * clusters * dim, 0
    return device, max(gathering, joined, host)


def encoding(source: Model, plan: Plan, *, cuda: bool) -> tuple[int, int]:
    """Device and host bytes of the matrix that needs most: its vectors; per vector a guess, codes old and new, distances and an
    order by cluster old and new (18 bytes); then, for the scales, the decoded vectors. The codes of the tensor before are still
    kept (2 V). On a GPU the vectors, codes and distances, and the distances of a chunk to all centroids."""
    host = device = before = 0
    for name, treatment in plan.treatments.items():
        making, held = _vectors(source, name, treatment)
        vectors = _num_vectors(treatment)
        centroids = 16 * treatment.codebook.num_clusters * treatment.codebook.cluster_dim
        lists = (
            4 * treatment.codebook.num_clusters * list_length(treatment.codebook.cluster_dim, treatment.codebook.num_clusters)
        )
        searching = held + 18 * vectors + lists
        scaling = 2 * held + 2 * vectors if treatment.row_scale else 0
        host = max(host, before + centroids + max(making, searching, scaling))
        device = max(device, held + 8 * vectors + 2 * DISTANCES_PER_CHUNK * 12)
        before = 2 * vectors
    return (device if cuda else 0), host


def _search_bytes(plan: Plan) -> int:
    """On a GPU the search of error feedback holds the codebook, 64 channels of the weights three times, and the distances of a
    chunk to all centroids."""
    widest = max(treatment.shape[0] for treatment in plan.treatments.values())
    codebook = max(4 * book.num_clusters * book.cluster_dim for book in plan.codebooks)
    return codebook + 3 * 64 * 4 * widest + 2 * DISTANCES_PER_CHUNK * 12


def error_feedback(source: Model, model: Model, plan: Plan, settings: DecoderSettings, windows: int) -> int:
    """The most of four moments in a block, beside four streams of all windows (4 bytes x tokens x hidden_size: of both models,
    before and after the half being done) and the codes of the block.

    Observing: that half as float32 twice, for both models; inputs of `BATCH` windows in both and three times scaled; the
    moments of an input and what it lacks (8 n² each), once the product that is added to them (4 n²), and what the stream
    lacks. Correcting its matrices: moments and their factor twice (24 n²), or moments and lacks (16 n²) with a matrix as
    float64; what their outputs lack as float64, one of them twice. Encoding one: moments and two more matrices while they are
    factored (24 n²), beside the vectors twice (8 P) and the corrections of all; then moments and factor, once more the moments
    as float32 (16 n²), beside vectors twice, as decoded and projected (16 P); or without those the products as well (20 P).
    Going on: half the block as float32, one of its matrices being decoded from its codes, a fifth stream, activations.
    """
    names = max(_blocks(source).values(), key=lambda block: sum(source.tensors[name].num_weights for name in block))
    stream = 4 * windows * CONTEXT * settings.hidden_size
    tokens = min(windows, BATCH) * CONTEXT
    activations = _layer_activations(settings, tokens, 4)
    codes = sum(2 * _num_vectors(plan.treatments[name]) for name in names if name in plan.treatments)
    most = 0
    for half in (True, False):
        parts = [name for name in names if (".self_attn." in name) == half]
        held = sum(4 * source.tensors[name].num_weights for name in parts)
        decoding = max(peak - after for peak, after in (_reading(source, source.tensors[name]) for name in parts))
        for name in parts:
            weight = model.tensors[name]
            if isinstance(weight, ClusteredWeight):
                decoding = max(decoding, clustered_decoding(weight) - 4 * weight.num_weights)
        # A float32 payload is a map, of which the runtime makes a copy for every product.
        copied = max((4 * tensor.num_weights for tensor in _mapped_float32(source, parts)), default=0)
        most = max(most, 2 * held + decoding, stream + held + max(decoding, activations + copied))
        for width, members in _inputs(source, parts):
            observed = 4 * tokens * (2 * settings.hidden_size + 5 * width)
            lacking = 8 * width * settings.hidden_size if members[0].endswith(_ADDS_TO_STREAM) else 0
            most = max(most, 2 * held + copied + max(activations, observed) + 20 * width**2 + lacking)
            most = max(most, _correcting(source, width, members) + lacking, _encoding(source, plan, width, members))
    return 4 * stream + codes + most


def _correcting(source: Model, width: int, names: list[str]) -> int:
    shapes = [source.tensors[name].shape for name in names]
    lacks = [8 * width * shape[0] for shape in shapes]
    reading = max(
        max(_reading(source, source.tensors[name])[0], 3 * _reading(source, source.tensors[name])[1]) for name in names
    )
    return sum(lacks) + max(16 * width**2 + reading, 24 * width**2 + max(lacks))


def _encoding(source: Model, plan: Plan, width: int, names: list[str]) -> int:
    corrections = sum(4 * width * source.tensors[name].shape[0] for name in names)
    most = 0
    for name in names:
        if name in plan.treatments:
            making, vectors = _vectors(source, name, plan.treatments[name])
            factoring, feeding, fitting_scales = (
                24 * width**2 + 2 * vectors,
                16 * width**2 + 4 * vectors,
                12 * width**2 + 5 * vectors,
            )
            most = max(most, 8 * width**2 + making, factoring, feeding, fitting_scales)
    return corrections + most


def tuning(model: Model, settings: DecoderSettings, options: BlockwiseOptions, windows: int, shared: Collection[str]) -> int:
    """Six streams of all windows: three of the block before and after, what is trained on, and one being put together.

    The block that needs most: its codes at 16 bits; its parameters (24 bytes each as value, gradient, two moments, best state
    and the one it replaces; 4 bytes of a codebook that other blocks use, which stays as it is); activations of a batch that are
    kept for their gradients, and a matrix being decoded for them (`_training_block`).
    """
    tokens = min(options.batch, windows) * CONTEXT
    most = 0
    for names in _blocks(model).values():
        weights = [tensor for name in names if isinstance(tensor := model.tensors[name], ClusteredWeight)]
        books = {stage.codebook.name: stage.codebook.values.size for weight in weights for stage in weight.stages}
        values = sum(size for name, size in books.items() if name not in shared)
        values += sum(weight.row_scale.size for weight in weights if weight.row_scale is not None)
        values += sum(model.tensors[name].num_weights for name in names if len(model.tensors[name].shape) == 1)
        codes = sum(2 * stage.codes.size for weight in weights for stage in weight.stages)
        kept = 4 * sum(size for name, size in books.items() if name in shared)
        most = max(most, codes + kept + 24 * values + _training_block(settings, tokens, weights))
    return 6 * 4 * windows * CONTEXT * settings.hidden_size + most


def _training_block(settings: DecoderSettings, tokens: int, weights: Sequence[ClusteredWeight]) -> int:
    """What a block keeps for its gradients: eight streams, queries and keys five times, six arrays of the feed-forward; beside
    them a matrix is decoded (4 P + 4 V), or in pieces with its gradient (five times `BLOCK_BYTES`)."""
    queries, keys = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    kept = 4 * tokens * (8 * settings.hidden_size + 5 * (queries + keys) + 6 * settings.intermediate_size)
    widest = max((4 * weight.num_weights for weight in weights), default=0)
    codes = max((4 * stage.codes.size for weight in weights for stage in weight.stages), default=0)
    return kept + max(widest + codes, 5 * min(BLOCK_BYTES, widest))


def _blocks(model: Model) -> Mapping[int, list[str]]:
    blocks: dict[int, list[str]] = {}
    for name in model.tensors:
        if name.startswith("model.layers."):
            blocks.setdefault(int(name.split(".")[2]), []).append(name)
    return blocks


def _mapped_float32(source: Model, names: list[str]) -> list[DenseTensor]:
    tensors = (source.tensors[name] for name in names if not _quantised(source, name))
    return [tensor for tensor in tensors if isinstance(tensor, DenseTensor) and tensor.values.dtype == "float32"]


def _inputs(source: Model, names: list[str]) -> Iterator[tuple[int, list[str]]]:
    """The distinct inputs of half a block: their width, and the matrices that multiply them."""
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        members = [name for part in group for name in names if name.endswith(f".{part}.weight")]
        if members:
            yield source.tensors[members[0]].shape[1], members


def writing(source: Model, model: Model) -> int:
    """One payload at a time, beside the codes of the tensor before (2 V): codes as they were kept, and packed at their width; a
    dense payload mapped, or, where it is stored as another dtype, decoded, rounded and flagged (3 bytes per weight)."""
    most = before = 0
    for tensor in model.tensors.values():
        if isinstance(tensor, ClusteredWeight):
            codes = sum(stage.codes.size for stage in tensor.stages)
            bits = max(stage.codebook.code_bits for stage in tensor.stages)
            most = max(most, before + 2 * codes + -(-bits * codes // 8))
            before = 2 * codes
            continue
        origin = source.tensors[tensor.name]
        rounded = isinstance(origin, DenseTensor) and origin.values.dtype != tensor.values.dtype
        reading, decoded = _reading(source, origin)
        held = max(reading, decoded + 3 * tensor.num_weights) if rounded else tensor.values.nbytes
        most = max(most, before + held)
    return max(most, *(array.nbytes for array in model.files.values()), 0)


def recovery(source: Model, model: Model, settings: DecoderSettings, options: RecoveryOptions) -> int:
    """Beside what is trained (4 bytes each as value, gradient, two moments, best state and the one it replaces), the codes,
    and embedding and head as float32: the original, as float32 or matrix by matrix; the streams between blocks; and either one
    block done again for its gradients or the logits of one window eight times (of both models, their logarithms, the
    divergences and three gradients).
    """
    tokens = options.batch * options.context
    books = sum(book.values.size for book in model.codebooks.values())
    scales = sum(weight.row_scale.size for weight in model.clustered.values() if weight.row_scale is not None)
    norms = sum(tensor.num_weights for tensor in model.tensors.values() if len(tensor.shape) == 1)
    frozen = sum(4 * model.tensors[name].num_weights for name in (embedding_tensor(model), head_tensor(model)) if name)
    codes = [sum(stage.codes.size for stage in weight.stages) for weight in model.clustered.values()]
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) == 2]
    if teacher_kernel(source) == "dense":
        teacher = sum(4 * tensor.num_weights for tensor in matrices)
    else:
        teacher = max(_reading(source, tensor)[0] for tensor in matrices)
    streams = 4 * tokens * settings.hidden_size * (settings.num_layers + 4)
    block = _training_block(settings, tokens, list(model.clustered.values()))
    logits = 8 * 4 * options.context * settings.vocab_size
    return 24 * (books + scales + norms) + 2 * sum(codes) + frozen + teacher + streams + max(block, logits)


def _self_test(model: Model, disk: int) -> list[tuple[str, int, int, int]]:
    settings = _runnable(model)
    return [] if settings is None or model.self_test is not None else [("self-test", 0, self_test(model, settings), disk)]


def self_test(model: Model, settings: DecoderSettings) -> int:
    """A matrix as float64, and for every token of the sequences its logits as float64 twice (the product and what is kept of
    it) and as float32."""
    matrices = [tensor for tensor in model.tensors.values() if len(tensor.shape) == 2]
    tokens = (RANDOM_SEQUENCES + 1) * MAX_SENTENCE_TOKENS
    logits = (8 + 8 + 4) * tokens * settings.vocab_size
    return max(_float64(model, tensor) for tensor in matrices) + logits + _layer_activations(settings, tokens, 8)
