"""What is held of whole blocks, and of the model: calibration, sensitivities, error feedback, trainings, self-test. Letters are
those of the package's docstring."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cluscomp_export.calibration.activations import BATCH
from cluscomp_export.calibration.fisher import EMBEDDING, HEAD_TOKENS, WINDOWS, head_name
from cluscomp_export.compression.moments import PIECE_BYTES
from cluscomp_export.conversion.memory.matrices import (
    clustered_decoding,
    encoding,
    feedback_search,
    looking_up,
    making_vectors,
    num_vectors,
    reading,
    to_float64,
)
from cluscomp_export.planning import Plan
from cluscomp_export.sources import embedding_tensor, head_tensor, logits_tensor
from cluscomp_export.sources.linears import block_index
from cluscomp_export.training.blockwise import BlockwiseOptions
from cluscomp_export.training.recovery import RecoveryOptions, teacher_kernel
from cluscomp_formats.architectures import DecoderDescription, Experts
from cluscomp_formats.ir import ClusteredWeight, Model, Tensor
from cluscomp_kernels.clus_linear.trainable import BLOCK_BYTES
from cluscomp_runtime.selftest import MAX_SENTENCE_TOKENS, RANDOM_SEQUENCES

__all__ = ["calibration", "embedding", "error_feedback", "recovery", "row_importance", "self_test", "sensitivities", "tuning"]


def _widths(description: DecoderDescription) -> tuple[int, int, int]:
    """The most features of a token among queries, among keys, and inside a feed-forward network."""
    attentions = [attention for block in description.blocks for attention in block.attentions]
    networks = [network for block in description.blocks for network in block.networks]
    return (
        max(attention.query.out_features for attention in attentions),
        max(attention.key.out_features for attention in attentions),
        max(network.width for network in networks),
    )


def _layer_activations(description: DecoderDescription, tokens: int, width: int) -> int:
    """The widest moment of a block for `tokens` tokens of `width` bytes: the stream and its norm, and beside them either
    queries and keys four times (joined, and rotated in halves) with values, or three arrays of the feed-forward (gate, up and
    product; or the product that is observed, its squares and their shares)."""
    hidden, (queries, keys, inner) = description.hidden_size, _widths(description)
    return width * tokens * (2 * hidden + max(4 * (queries + keys) + keys, 3 * inner))


def calibration(source: Model, description: DecoderDescription, windows: int, context: int) -> int:
    """`channel_second_moments`: the sums of all channels, and the larger of two: a matrix of a block as float64 with the
    activations of `BATCH` windows as float64, or the embedding with two of their streams. The head does not multiply."""
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) == 2]
    sums = sum(8 * tensor.shape[1] for tensor in matrices)
    tokens = min(windows, BATCH) * context
    multiplying = max(to_float64(source, tensor) for tensor in matrices if block_index(tensor.name) is not None)
    return sums + max(
        multiplying + _layer_activations(description, tokens, 8),
        looking_up(source, source.tensors[EMBEDDING]) + 16 * tokens * description.hidden_size,
    )


def sensitivities(source: Model, description: DecoderDescription, context: int) -> int:
    """`measure_sensitivities`: the streams of a few windows before and after every block, with their gradients; beside them
    the most of a block or of embedding and head.

    A block: its matrices as float32 with two trial errors and, of one window, gradients and what they need
    (`_training_block`), with two arrays of the feed-forward that flow back; or while trial errors are made, a matrix as
    float64. Embedding and head: as float32 and, while trial errors are made, as float64; the logits of some tokens six times.
    """
    most = 0
    for names in _blocks(source).values():
        matrices = [tensor for name in names if len((tensor := source.tensors[name]).shape) == 2]
        weights, widest = (fold(tensor.num_weights for tensor in matrices) for fold in (sum, max))
        placing = max(reading(source, tensor)[0] for tensor in matrices)
        gradients = 4 * weights + 4 * widest + _backwards(description, context)
        most = max(most, 4 * weights + placing, 12 * weights + max(gradients, 8 * widest))
    for name in (embedding_tensor(source), head_tensor(source)):
        if name is not None:
            tensor = source.tensors[name]
            most = max(most, reading(source, tensor)[0], 12 * tensor.num_weights + _noise(description))
    return _between_blocks(description, context) + most


def row_importance(source: Model, description: DecoderDescription, context: int) -> int:
    """`row_importance`: the streams of a few windows before and after every block, with their gradients; beside them a block's
    matrices as float32, and of one window what it keeps and what flows back, once as float64 and squared. Or the head as
    float32 with the logits of some tokens six times."""
    most = 0
    for names in _blocks(source).values():
        matrices = [tensor for name in names if len((tensor := source.tensors[name]).shape) == 2]
        placing = max(reading(source, tensor)[0] for tensor in matrices)
        observed = 16 * context * max(tensor.shape[0] for tensor in matrices)
        weights = sum(tensor.num_weights for tensor in matrices)
        most = max(most, 4 * weights + max(placing, _backwards(description, context) + observed))
    head = source.tensors[head_name(source)]
    decoding, decoded = reading(source, head)
    return _between_blocks(description, context) + max(most, decoding, decoded + 4 * head.num_weights + _noise(description))


def _between_blocks(description: DecoderDescription, context: int) -> int:
    """The streams before and after every block for the windows of a `FisherPass`, and their gradients."""
    return 4 * WINDOWS * context * description.hidden_size * (description.num_layers + 2)


def _backwards(description: DecoderDescription, context: int) -> int:
    """What a block keeps of one window for its gradients, with two arrays of the feed-forward that flow back."""
    return _training_block(description, context, []) + 2 * 4 * context * _widths(description)[2]


def _noise(description: DecoderDescription) -> int:
    """The logits of some tokens, six times."""
    return 6 * 4 * HEAD_TOKENS * description.vocab_size


def error_feedback(
    source: Model, model: Model, plan: Plan, description: DecoderDescription, windows: int, context: int, *, cuda: bool
) -> tuple[int, int]:
    """Device and host bytes for the branch of a block that needs most, while its input or output projections are encoded.

    On the device, or else on the host too: the branch as float32, of the original model, while the output projections are
    encoded also of the compressed one, for a moment twice (three times the branch); activations of `BATCH` windows; the moments
    of an input (8 n²), the product that is added to them (4 n²), and the same for the residuals: n² for input projections, n x
    hidden_size for output projections.

    On the host: the streams of all windows of both models, before and after the branch (five at a time, 4 bytes x tokens x
    hidden_size), for output projections also all their inputs; the codes of the block; and what `_correcting` and `_encoding`
    return. A norm after the branch adds one stream, its input. Experts add the residuals of all tokens (one stream) and the
    moments and residuals of the input over all tokens (16 n²), and every token is copied for each of its experts.

    Or what is outside the blocks: an embedding that is encoded without feedback, or the head, with it: its vectors and codes,
    six times the piece that is encoded, and the moments of its input (24 n²).
    """
    blocks = _blocks(source)
    index = max(blocks, key=lambda block: sum(source.tensors[name].num_weights for name in blocks[block]))
    names = blocks[index]
    stream = 4 * windows * context * description.hidden_size
    tokens = min(windows, BATCH) * context
    running = _layer_activations(description, tokens, 4)
    codes = sum(2 * num_vectors(plan.schemes[name]) for name in names if name in plan.schemes)
    device = host = 0
    for branch in description.blocks[index].branches:
        # Experts are alike and encoded one after the other: the first stands for each of them.
        inputs = [[linear.weight for linear in step.groups[0]] for step in branch.part.steps]
        matrices = [name for step in branch.part.steps for name in step.weights]
        half = sum(4 * source.tensors[name].num_weights for name in matrices)
        placing = max(_to_float32(model.tensors[name]) for name in matrices)
        widths = [source.tensors[group[0]].shape[1] for group in inputs]
        experts = branch.part.top_k if isinstance(branch.part, Experts) else 0
        mixed = 4 * windows * context * widths[1] * max(1, experts)
        copied = 8 * tokens * experts * description.hidden_size
        kept = stream * ((branch.post_norm is not None) + (experts > 0)) + (16 * widths[0] ** 2 if experts else 0)
        residual = (widths[0] ** 2, widths[1] * description.hidden_size)
        # Five arrays of inputs: of both models, scaled, the residual, that scaled.
        sums = [12 * (width**2 + size) + 20 * tokens * width for width, size in zip(widths, residual, strict=True)]
        active = running + copied
        computing = (half + max(active, sums[0]), 2 * half + sums[1], 3 * half + active)
        targets = [
            max(_correcting(source, width, group), _encoding(source, plan, width, group))
            for width, group in zip(widths, inputs, strict=True)
        ]
        if cuda:
            device = max(device, *computing, half + feedback_search(plan))
            host = max(host, kept + targets[0], kept + mixed + targets[1], kept + mixed + placing)
        else:
            beside = (half + targets[0], half + mixed + targets[1], 2 * half + mixed + placing)
            most = max(computing[0], mixed + computing[1], mixed + computing[2], *beside)
            host = max(host, kept + most)
    outside = Plan({name: scheme for name, scheme in plan.schemes.items() if block_index(name) is None})
    device_outside, host_outside = encoding(source, outside, cuda=cuda)
    host = max(5 * stream + codes + host, 2 * stream + host_outside, embedding(source, description, windows, context))
    head = logits_tensor(source)
    if head is not None and head in plan.schemes:
        making, vectors = making_vectors(source, head, plan.schemes[head])
        encoded = vectors + 2 * num_vectors(plan.schemes[head]) + 6 * min(PIECE_BYTES, vectors)
        host = max(host, 2 * stream + 24 * description.hidden_size**2 + max(making, encoded))
    return max(device, device_outside), host


def embedding(source: Model, description: DecoderDescription, windows: int, context: int) -> int:
    """What flows into the first block: the embedding, and the streams of all windows."""
    return looking_up(source, source.tensors[EMBEDDING]) + 4 * windows * context * description.hidden_size


def _to_float32(tensor: Tensor) -> int:
    """A matrix on its way to float32 on the device: copied off the map or decoded, and the result."""
    if isinstance(tensor, ClusteredWeight):
        return clustered_decoding(tensor)
    return 9 * tensor.num_weights


def _correcting(source: Model, width: int, names: Sequence[str]) -> int:
    """Moments and residuals of the input (16 n²) with a matrix as float64, or the moments and their factor twice (24 n²); the
    residuals of the outputs as float64, one of them twice more."""
    residuals = [8 * width * source.tensors[name].shape[0] for name in names]
    decoding = max(max(peak, 3 * after) for peak, after in (reading(source, source.tensors[name]) for name in names))
    return sum(residuals) + max(16 * width**2 + decoding, 24 * width**2 + 2 * max(residuals))


def _encoding(source: Model, plan: Plan, width: int, names: Sequence[str]) -> int:
    """The corrections of all matrices of an input, and of one: moments and two more matrices while they are factored (24 n²),
    beside its vectors twice (8 P); then moments and factor, once more the moments as float32 (16 n²), beside vectors twice, as
    decoded and projected (16 P); or without those the products as well (20 P)."""
    corrections = sum(4 * width * source.tensors[name].shape[0] for name in names)
    squares, most = width**2, 0
    for name in names:
        if name in plan.schemes:
            making, vectors = making_vectors(source, name, plan.schemes[name])
            factoring, searching, fitting = 24 * squares + 2 * vectors, 16 * squares + 4 * vectors, 12 * squares + 5 * vectors
            most = max(most, 8 * squares + making, factoring, searching, fitting)
    return corrections + most


def _blocks(model: Model) -> Mapping[int, list[str]]:
    blocks: dict[int, list[str]] = {}
    for name in model.tensors:
        index = block_index(name)
        if index is not None:
            blocks.setdefault(index, []).append(name)
    return blocks


def tuning(
    model: Model,
    description: DecoderDescription,
    options: BlockwiseOptions,
    windows: int,
    context: int,
    shared: Collection[str],
) -> tuple[int, int]:
    """Bytes of the block that needs most, on the device or else the host too, and of the streams, which are on the host.

    The block: its codes at 16 bits; its parameters (24 bytes each as value, gradient, two moments, best state and the one it
    replaces; 4 bytes of a codebook that other blocks use, which stays as it is); activations of a batch that are kept for their
    gradients, and a matrix being decoded for them (`_training_block`). Six streams of all windows: three of the block before
    and after, two that are trained on, and one being put together.
    """
    tokens = min(options.batch, windows) * context
    most = 0
    for names in _blocks(model).values():
        weights = [tensor for name in names if isinstance(tensor := model.tensors[name], ClusteredWeight)]
        books = {stage.codebook.name: stage.codebook.values.size for weight in weights for stage in weight.stages}
        values = sum(size for name, size in books.items() if name not in shared)
        values += sum(weight.row_scale.size for weight in weights if weight.row_scale is not None)
        values += sum(model.tensors[name].num_weights for name in names if len(model.tensors[name].shape) == 1)
        codes = sum(2 * stage.codes.size for weight in weights for stage in weight.stages)
        kept = 4 * sum(size for name, size in books.items() if name in shared)
        most = max(most, codes + kept + 24 * values + _training_block(description, tokens, weights))
    return most, 6 * 4 * windows * context * description.hidden_size


def _training_block(description: DecoderDescription, tokens: int, weights: Sequence[ClusteredWeight]) -> int:
    """What a block keeps for its gradients: eight streams, queries and keys five times, six arrays of the feed-forward; beside
    them a matrix is decoded (4 P + 4 V), or in pieces with its gradient (five times `BLOCK_BYTES`)."""
    queries, keys, inner = _widths(description)
    kept = 4 * tokens * (8 * description.hidden_size + 5 * (queries + keys) + 6 * inner)
    widest = max((4 * weight.num_weights for weight in weights), default=0)
    codes = max((4 * stage.codes.size for weight in weights for stage in weight.stages), default=0)
    return kept + max(widest + codes, 5 * min(BLOCK_BYTES, widest))


def recovery(
    source: Model, model: Model, description: DecoderDescription, options: RecoveryOptions, *, cuda: bool
) -> tuple[int, int]:
    """Bytes on the device, or else all on the host, and on the host.

    Beside what is trained (4 bytes each as value, gradient, two moments, best state and the one it replaces), the codes, and
    embedding and head as float32: the original, as float32 or matrix by matrix; the streams between blocks; and either one
    block done again for its gradients (`_training_block`) or the logits of one window ten times: of both models, their
    logarithms, the divergences and their gradients with what torch needs in between, which is counted from a measured peak.
    With a device the host has a matrix on its way there, or what is trained as value, two moments and best state, to be kept.
    """
    tokens = options.batch * options.context
    ends = [model.tensors[name] for name in (embedding_tensor(model), head_tensor(model)) if name]
    # Embedding and head are decoded and not trained, so their codes and codebooks are not kept.
    trainable = [weight for weight in model.clustered.values() if weight not in ends]
    books = sum({stage.codebook.name: stage.codebook.values.size for weight in trainable for stage in weight.stages}.values())
    scales = sum(weight.row_scale.size for weight in trainable if weight.row_scale is not None)
    norms = sum(tensor.num_weights for tensor in model.tensors.values() if len(tensor.shape) == 1)
    trained = books + scales + norms
    codes = [sum(stage.codes.size for stage in weight.stages) for weight in trainable]
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) == 2]
    one = max(reading(source, tensor)[0] for tensor in matrices)
    if teacher_kernel(source) == "dense":
        teacher = sum(4 * tensor.num_weights for tensor in matrices)
    elif cuda:
        # As it is stored and as float32.
        teacher = max(8 * tensor.num_weights for tensor in matrices)
    else:
        teacher = one
    streams = 4 * tokens * description.hidden_size * (description.num_layers + 4)
    block = _training_block(description, tokens, trainable)
    logits = 10 * 4 * options.context * description.vocab_size
    frozen = sum(4 * tensor.num_weights for tensor in ends)
    working = 24 * trained + 2 * sum(codes) + frozen + teacher + streams + max(block, logits)
    return (working, max(one, 16 * trained, *map(_to_float32, ends))) if cuda else (0, working)


def self_test(model: Model, description: DecoderDescription) -> int:
    """A matrix as float64, and for every token of the sequences its logits as float64 twice (the product and what is kept of
    it) and as float32."""
    matrices = [tensor for tensor in model.tensors.values() if len(tensor.shape) == 2]
    tokens = (RANDOM_SEQUENCES + 1) * MAX_SENTENCE_TOKENS
    logits = (8 + 8 + 4) * tokens * description.vocab_size
    return max(to_float64(model, tensor) for tensor in matrices) + logits + _layer_activations(description, tokens, 8)
