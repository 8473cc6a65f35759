"""What is held of single matrices: read, made into vectors, clustered, written. Letters are those of the package's
docstring."""

from __future__ import annotations

from cluscomp_export.compression.jobs import fitted_vectors
from cluscomp_export.planning import CodebookPlan, Plan, TensorScheme
from cluscomp_formats.ir import DTYPES, ClusteredWeight, DenseTensor, Model, Tensor
from cluscomp_kernels.kmeans.native_engine import list_length
from cluscomp_kernels.kmeans.torch_engine import DISTANCES_PER_CHUNK

__all__ = [
    "checking",
    "clustered_decoding",
    "encoding",
    "feedback_search",
    "fitting",
    "looking_up",
    "making_vectors",
    "num_vectors",
    "quantised",
    "reading",
    "to_float64",
    "writing",
]

DECODING = {"bfloat16": 10, "float16": 6, "float32": 4, "float64": 12}
"""Bytes per weight when `Tensor.decode` makes float32 of a stored dtype: the mapped payload and the result, of bfloat16 also
the bits before they are shifted."""

QUANTISED = 9
"""The same for a quantised GGUF tensor: at most one byte stored, gguf-py's pieces, and the result they are put together to."""


def quantised(source: Model, name: str) -> bool:
    return bool(source.provenance.get("stored_bits", {}).get(name, 16) < 16)


def reading(source: Model, tensor: Tensor) -> tuple[int, int]:
    """Bytes while a tensor is decoded to float32, and after."""
    if isinstance(tensor, ClusteredWeight):
        return clustered_decoding(tensor), 4 * tensor.num_weights
    per_weight = QUANTISED if quantised(source, tensor.name) else DECODING.get(tensor.values.dtype, 12)
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
        if quantised(source, str(description.get("tensor"))):
            most = max(most, before + QUANTISED * array.size)
            before = array.nbytes
        else:
            flags = 3 if array.dtype == "bfloat16" else 1
            most = max(most, before + array.nbytes + flags * array.size)
            before = 0
    return most


def to_float64(source: Model, tensor: Tensor) -> int:
    """A matrix on its way to float64 in the runtime's reference mode: the stored values copied off the map, or decoded, and the
    result of 8 bytes. Products then need the result alone."""
    if isinstance(tensor, ClusteredWeight):
        return max(clustered_decoding(tensor), 12 * tensor.num_weights)
    if quantised(source, tensor.name):
        return 12 * tensor.num_weights
    width = DTYPES[tensor.values.dtype].itemsize
    return max(2 * width, width + 8) * tensor.num_weights


def looking_up(source: Model, tensor: Tensor) -> int:
    """Rows of an embedding in the runtime's reference mode: the stored values copied off the map, or decoded."""
    if quantised(source, tensor.name) or isinstance(tensor, ClusteredWeight):
        return reading(source, tensor)[0]
    return 2 * tensor.values.nbytes


def making_vectors(source: Model, name: str, scheme: TensorScheme) -> tuple[int, int]:
    """Bytes while the vectors of a matrix are made, and what they take (4 P): the matrix decoded; with row scales its squares
    as float64, then both the matrix and the scaled one; the transpose into filled up vectors."""
    decoding, decoded = reading(source, source.tensors[name])
    held = 4 * num_vectors(scheme) * scheme.codebook.cluster_dim
    squares = 3 * decoded if scheme.row_scale else 0
    return max(decoding, squares, 2 * decoded, decoded + held), held


def num_vectors(scheme: TensorScheme) -> int:
    out_features, in_features = scheme.shape
    return in_features * -(-out_features // scheme.codebook.cluster_dim)


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
    schemes = {name: plan.schemes[name] for name in book.members}
    counts = {name: num_vectors(scheme) for name, scheme in schemes.items()}
    dim, clusters, total = book.cluster_dim, book.num_clusters, sum(counts.values())
    scaled = any(scheme.row_scale for scheme in schemes.values())
    points = fitted_vectors(clusters, total) if scaled else total
    row = 4 * dim + (4 if calibrated else 0)
    most = 0
    for name, scheme in schemes.items():
        making, held = making_vectors(source, name, scheme)
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
    for name, scheme in plan.schemes.items():
        making, held = making_vectors(source, name, scheme)
        vectors = num_vectors(scheme)
        centroids = 16 * scheme.codebook.num_clusters * scheme.codebook.cluster_dim
        lists = 4 * scheme.codebook.num_clusters * list_length(scheme.codebook.cluster_dim, scheme.codebook.num_clusters)
        searching = held + 18 * vectors + lists
        scaling = 2 * held + 2 * vectors if scheme.row_scale else 0
        host = max(host, before + centroids + max(making, searching, scaling))
        device = max(device, held + 8 * vectors + 2 * DISTANCES_PER_CHUNK * 12)
        before = 2 * vectors
    return (device if cuda else 0), host


def feedback_search(plan: Plan) -> int:
    """On a GPU the search of error feedback holds the codebook, 64 channels of the weights three times, and the distances of a
    chunk to all centroids."""
    widest = max(scheme.shape[0] for scheme in plan.schemes.values())
    codebook = max(4 * book.num_clusters * book.cluster_dim for book in plan.codebooks)
    return codebook + 3 * 64 * 4 * widest + 2 * DISTANCES_PER_CHUNK * 12


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
        decoding, decoded = reading(source, origin)
        held = max(decoding, decoded + 3 * tensor.num_weights) if rounded else tensor.values.nbytes
        most = max(most, before + held)
    return max(most, *(array.nbytes for array in model.files.values()), 0)
