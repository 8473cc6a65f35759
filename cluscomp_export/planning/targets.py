"""Make a plan from its target: a codebook size, bits per weight, a file size or a loss.

`sensitivities` are the losses from errors of each tensor. Without them all weights count alike, and the squared error is
minimised. `terms` say whose time counts, and `halving` how many bits per weight half the time for a token is worth.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cluscomp_export.planning.allocation import Chain, Either, Pick, Scope, Separate, allocate, allocate_at
from cluscomp_export.planning.candidates import DENSE, PLAIN, Group, Member, Sensitivity, Size, Terms, num_vectors
from cluscomp_export.planning.plan import CodebookPlan, Plan, Share, TensorScheme
from cluscomp_export.planning.speed import shares_read
from cluscomp_export.sources.linears import embedding_tensor, head_tensor, kind, linear_tensors
from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import MAX_CLUSTERS, ClusteredWeight, DenseTensor, Model

__all__ = ["embedding_tensors", "plan_bits", "plan_budget", "plan_fixed", "plan_loss"]

Sensitivities = Mapping[str, Sensitivity]

BUDGET_STEPS = 12


def plan_fixed(
    model: Model,
    *,
    cluster_dim: int,
    num_clusters: int,
    share: Share,
    embedding_bits: float,
    codebook_bits: int | None = None,
    terms: Terms = PLAIN,
    halving: float = 0.0,
) -> Plan:
    """The same (cluster_dim, num_clusters) for every linear layer; `share="none"` is the paper's setting.

    `codebook_bits` is 8, the default, or 16, see `plan_bits`. Raises InvalidRequestError, UnsupportedError.
    """
    if not (1 <= num_clusters <= MAX_CLUSTERS and cluster_dim >= 1):
        found = f"`dim={cluster_dim}` `clusters={num_clusters}`"
        expected = f"`dim` of at least 1, `clusters` from 1 to {MAX_CLUSTERS}"
        raise InvalidRequestError(Problem("bad_option", "the codebook size is out of range", found=found, expected=expected))
    schemes = {}
    for group in _shared_groups(_linears(model, None), share, codebook_bits):
        schemes.update(_schemes(group, (cluster_dim, num_clusters, min(group.value_widths))))
    return Plan({**_in_order(model, schemes), **_plan_embeddings(model, embedding_bits, codebook_bits, None, terms, halving)})


def plan_bits(
    model: Model,
    *,
    bits: float,
    share: Share | None,
    embedding_bits: float,
    codebook_bits: int | None = None,
    sensitivities: Sensitivities | None = None,
    terms: Terms = PLAIN,
    halving: float = 0.0,
) -> Plan:
    """The choice with the least expected loss at no more than `bits` per weight of the linear layers, codebooks included.

    With `share=None`, the planner decides which matrices share a codebook. `codebook_bits` is 8 or 16 per value of a codebook,
    the better one if None; without row scales it is always 16. Raises InvalidRequestError if nothing fits the budget,
    UnsupportedError if there is nothing to cluster.
    """
    members = _linears(model, sensitivities)
    scope = _linear_scope(members, share, codebook_bits, terms)
    picks = allocate([scope], budget=bits * sum(member.num_weights for member in members), halving=halving).picks
    if picks is None:
        remedy = "allow more bits, or share codebooks: `share='kind'` or `share='model'`"
        found = f"`bits={bits:g}`" + (f" `share={share!r}`" if share else "")
        raise InvalidRequestError(Problem("budget_too_small", "no codebook fits this budget", found=found, remedy=remedy))
    embeddings = _plan_embeddings(model, embedding_bits, codebook_bits, sensitivities, terms, halving)
    return Plan({**_in_order(model, _picked(picks)), **embeddings})


def plan_budget(
    model: Model,
    *,
    budget: int,
    size_of: Callable[[Plan], int],
    share: Share | None,
    codebook_bits: int | None = None,
    sensitivities: Sensitivities | None = None,
    terms: Terms = PLAIN,
    halving: float = 0.0,
) -> Plan:
    """The choice with the least expected loss whose artefact is at most `budget` bytes, embedding and head included.

    `size_of` gives an upper bound of the bytes of a plan's artefact. Raises InvalidRequestError, which names the smallest
    possible size, UnsupportedError if there is nothing to cluster.
    """
    scopes = _all_scopes(model, share, codebook_bits, sensitivities, terms)
    smallest = allocate(scopes, budget=0.0).extreme
    least = size_of(_plan_of(model, smallest))
    if least > budget:
        remedy = "allow more, or convert a smaller model"
        found, expected = f"{budget} bytes", f"at least {least} bytes"
        message = "not even the smallest codebooks fit this budget"
        raise InvalidRequestError(Problem("budget_too_small", message, None, None, found, expected, remedy))
    # Headers and padding depend on the plan and are not part of the bits. Correct the bits by the rest of the budget; if that
    # leaves the interval between the largest that fits and the smallest that does not, bisect.
    best, low, high = smallest, sum(pick.bits for pick in smallest), math.inf
    bits = low + 8.0 * (budget - least)
    rate = allocate(scopes, budget=bits, halving=halving).rate
    for _ in range(BUDGET_STEPS):
        picks = allocate_at(scopes, rate, budget=bits).picks
        if picks is None:
            break
        left = budget - size_of(_plan_of(model, picks))
        if left >= 0 and sum(pick.bits for pick in picks) > sum(pick.bits for pick in best):
            best = picks
        if left == 0:
            break
        low, high = (bits, high) if left > 0 else (low, bits)
        corrected = bits + 8.0 * left
        bits = corrected if low < corrected < high else (low + high) / 2
    return _plan_of(model, best)


def plan_loss(
    model: Model,
    *,
    loss: float,
    share: Share | None,
    sensitivities: Sensitivities,
    codebook_bits: int | None = None,
    terms: Terms = PLAIN,
    halving: float = 0.0,
) -> Plan:
    """The fewest bits whose expected loss is at most `loss`, embedding and head included.

    Raises InvalidRequestError, which names the least possible loss, UnsupportedError if there is nothing to cluster.
    """
    found = allocate(_all_scopes(model, share, codebook_bits, sensitivities, terms), loss=loss, halving=halving)
    if found.picks is None:
        least = sum(pick.loss for pick in found.extreme)
        message, given, expected = "no codebooks have so little loss", f"`match_loss={loss:g}`", f"at least {least:.3g}"
        raise InvalidRequestError(Problem("loss_too_small", message, None, None, given, expected, "allow more loss"))
    return _plan_of(model, found.picks)


def embedding_tensors(model: Model) -> list[str]:
    """Names of the embedding and of the head, if the head is not tied to the embedding."""
    return [name for name in (embedding_tensor(model), head_tensor(model)) if name is not None]


def _members(model: Model, names: Sequence[str], sensitivities: Sensitivities | None) -> list[Member]:
    shares = shares_read(model)
    members = []
    for name in names:
        out_features, in_features = model.tensors[name].shape
        weights = out_features * in_features
        found = Sensitivity(weights, weights) if sensitivities is None else sensitivities[name]
        members.append(Member(name, (out_features, in_features), found.relative, found.flat, shares.get(name, 0.0)))
    return members


def _linears(model: Model, sensitivities: Sensitivities | None) -> list[Member]:
    """The linear layers, in the order of the model."""
    names = linear_tensors(model)
    if not names:
        remedy = "check that the source is a language model with 2-D weights"
        raise UnsupportedError(Problem("no_linears", "no linear layer was found to cluster", remedy=remedy))
    clustered = [name for name in names if isinstance(model.tensors[name], ClusteredWeight)]
    if clustered:
        remedy = "convert the original model; a clustered one can only be repacked, without `bits` or `dim`"
        problem = Problem("already_clustered", "the source is already clustered", tensor=clustered[0], remedy=remedy)
        raise InvalidRequestError(problem)
    return _members(model, names, sensitivities)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _by_kind(members: Sequence[Member]) -> dict[str, list[Member]]:
    kinds: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        kinds[_module(kind(member.name))].append(member)
    return dict(kinds)


def _shared_groups(members: Sequence[Member], share: Share, codebook_bits: int | None) -> list[Group]:
    """The matrices grouped by the codebook that they use."""
    if share == "none":
        return [Group(_module(member.name), (member,), row_scale=False) for member in members]
    by_name = {"linears": list(members)} if share == "model" else _by_kind(members)
    return [Group(name, tuple(same), row_scale=True, codebook_bits=codebook_bits) for name, same in by_name.items()]


def _linear_scope(members: Sequence[Member], share: Share | None, codebook_bits: int | None, terms: Terms) -> Scope:
    if share in ("kind", "model"):
        return Separate(_shared_groups(members, share, codebook_bits), terms=terms)
    alone = _shared_groups(members, "none", codebook_bits)
    scaled = [replace(group, row_scale=True, codebook_bits=codebook_bits) for group in alone]
    separate = Separate(alone, scaled, terms=terms)
    if share == "none":
        return separate
    kinds = [Chain(name, same, codebook_bits, terms) for name, same in _by_kind(members).items()]
    return Either([[separate], kinds, [Chain("linears", members, codebook_bits, terms)]])


def _embedding_groups(model: Model, codebook_bits: int | None, sensitivities: Sensitivities | None) -> list[Group]:
    """Embedding and untied head, each with a codebook and row scales, or dense as `convert` stores them."""
    tensors = {name: model.tensors[name] for name in embedding_tensors(model)}
    matrices = [name for name, tensor in tensors.items() if isinstance(tensor, DenseTensor) and len(tensor.shape) == 2]
    return [
        Group(_module(member.name), (member,), True, dense_bits=16 * member.num_weights, codebook_bits=codebook_bits)
        for member in _members(model, matrices, sensitivities)
    ]


def _all_scopes(
    model: Model, share: Share | None, codebook_bits: int | None, sensitivities: Sensitivities | None, terms: Terms
) -> list[Scope]:
    linears = _linear_scope(_linears(model, sensitivities), share, codebook_bits, terms)
    return [linears, Separate(_embedding_groups(model, codebook_bits, sensitivities), terms=terms)]


def _schemes(group: Group, size: Size) -> dict[str, TensorScheme]:
    cluster_dim, num_clusters, value_bits = size
    vectors = sum(num_vectors(member.shape, cluster_dim) for member in group.members)
    names = tuple(member.name for member in group.members)
    codebook = CodebookPlan(group.name, cluster_dim, min(num_clusters, vectors), names, value_bits)
    return {member.name: TensorScheme(member.shape, codebook, group.row_scale) for member in group.members}


def _picked(picks: Sequence[Pick]) -> dict[str, TensorScheme]:
    schemes: dict[str, TensorScheme] = {}
    for pick in picks:
        if pick.size != DENSE:
            schemes.update(_schemes(pick.group, pick.size))
    return schemes


def _in_order(model: Model, schemes: Mapping[str, TensorScheme]) -> dict[str, TensorScheme]:
    """In the order of the model's tensors."""
    return {name: schemes[name] for name in model.tensors if name in schemes}


def _plan_of(model: Model, picks: Sequence[Pick]) -> Plan:
    return Plan(_in_order(model, _picked(picks)))


def _plan_embeddings(
    model: Model,
    bits: float,
    codebook_bits: int | None,
    sensitivities: Sensitivities | None,
    terms: Terms,
    halving: float,
) -> dict[str, TensorScheme]:
    """Embedding and untied head at no more than `bits` per weight; 16 keeps them dense."""
    schemes: dict[str, TensorScheme] = {}
    if bits >= 16:
        return schemes
    for group in _embedding_groups(model, codebook_bits, sensitivities):
        scope = Separate([group], terms=terms)
        picks = allocate([scope], budget=bits * group.members[0].num_weights, halving=halving).picks
        if picks is None:
            problem = Problem(
                "budget_too_small",
                "no codebook fits this budget",
                tensor=group.members[0].name,
                found=f"`embedding_bits={bits:g}`",
            )
            raise InvalidRequestError(problem)
        schemes.update(_picked(picks))
    return schemes
