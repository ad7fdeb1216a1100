"""Membership inference: what each item costs a model, by six attacks, so that members can be told from non-members.

Every attack gives a *cost*: low for an item that the model finds familiar (the sign of MIMIR, Duan et al. 2024,
arXiv:2402.07841, and of OpenUnlearning). `auc` compares the costs of two sets, `calibration` chooses an attack and a
threshold on one part of the items for use on another.

- `loss`: mean NLL of the targets, nats/token (Yeom et al. 2018).
- `zlib`: that over the bytes of the zlib-compressed text (Carlini et al. 2021).
- `min_k@K`: minus the mean of the share K of lowest log-probabilities, one token at least (Shi et al. 2024,
  arXiv:2310.16789).
- `min_k_plus_plus@K`: the same of (log p - mean) / deviation, both over the vocabulary under the model's own prediction
  (Zhang et al. 2024, arXiv:2404.02936); a variance under 1e-6 counts as 1e-6, as in OpenUnlearning.
- `reference`: the loss minus that of a reference model (Carlini et al. 2021), which gold is the best of.
- `gradient_norm`: L2 norm of the loss's gradient over all weights (Wang et al. 2024, arXiv:2402.17012);
  `gradient_norm@mean_tensor`: the mean of the L2 norms of the weight tensors' gradients, MIMIR's and OpenUnlearning's.

RWKU's results call Min-K++ at 20 % `mink20`. A model that never saw the items scores an AUC of 1/2 only if members and
non-members are alike but for training; where they differ by date or author, compare with gold.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Passage, Preference, Record, content_key, subject_of
from palimpsest.errors import DataError
from palimpsest.files import write_json
from palimpsest.metrics.likelihood import answer_nll
from palimpsest.models.language_model import LanguageModel, evaluating, refuse_other_tokenizer
from palimpsest.models.scoring import predict

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""The K of Min-K and Min-K++: those of MUSE."""
CHUNK = 2**24
"""Entries of [tokens, vocabulary] worked on at a time: 64 MiB for each temporary tensor."""


@dataclass(frozen=True, eq=False)
class MembershipScores:
    """What n items cost by each attack."""

    items: tuple[str, ...]
    """The records' ids, or their text where they have none."""
    clusters: tuple[str, ...]
    """The records' subjects."""
    costs: dict[str, Tensor]
    """By attack, [n] in fp32 on the CPU."""

    def take(self, places: Sequence[int]) -> "MembershipScores":
        """Those of some of the items, in the order given."""
        chosen = list(places)
        return MembershipScores(
            tuple(self.items[place] for place in chosen),
            tuple(self.clusters[place] for place in chosen),
            {attack: costs[chosen] for attack, costs in self.costs.items()},
        )


def membership_scores(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    reference: LanguageModel | None = None,
    gradients: bool = False,
    shares: Sequence[float] = SHARES,
    template: Template = "plain",
    batch_size: int = 64,
) -> MembershipScores:
    """Every attack's cost of every item: the answer after its question, or a passage from its second token on.

    Args:
        model: the model that is attacked.
        records: n items.
        reference: a model of the same tokenizer, for the attack of that name; without one it is left out.
        gradients: measure gradient norms too, at a pass forward and back an item.
        shares: the K of Min-K and Min-K++, above 0 and at most 1.
        template: how question and answer are joined.
        batch_size: rows at a time; it never changes a cost.

    Raises:
        DataError: a record without a completion, or two items of one name.
        ModelError: the reference's tokenizer is another one.
    """
    items = tuple(record.id or str(content_key(record)[1]) for record in records)
    if len(set(items)) < len(items):
        twice = next(item for item in items if items.count(item) > 1)
        raise DataError(f"two items are called {twice!r}; give each record an id of its own")
    if reference is not None:
        refuse_other_tokenizer(model, reference)
    encoded = encode(records, model.tokenizer, template=template)
    costs = _token_costs(model, encoded, shares, batch_size)
    bytes_of = torch.tensor([len(zlib.compress(_told(record).encode())) for record in records])
    costs["zlib"] = costs["loss"] / bytes_of
    if reference is not None:
        costs["reference"] = costs["loss"] - answer_nll(reference, records, template=template, batch_size=batch_size)
    if gradients:
        costs |= _gradient_norms(model, encoded)
    return MembershipScores(items, tuple(subject_of(record) for record in records), costs)


def write_membership(path: str | Path, members: MembershipScores, nonmembers: MembershipScores) -> None:
    """Write what every item costs by every attack to one JSON file: a list of objects, members first.

    Raises:
        DataError: a cost is not a finite number.
        StorageError: the file cannot be written.
    """
    for side in (members, nonmembers):
        for attack, costs in side.costs.items():
            for place in (~costs.isfinite()).nonzero()[:1, 0].tolist():
                broken = f"item {side.items[place]!r} costs {costs[place]} by attack {attack!r}"
                raise DataError(f"{broken}, not a finite number; the model is broken there")
    rows = [
        {"item": item, "cluster": cluster, "member": side is members, "costs": costs}
        for side in (members, nonmembers)
        for item, cluster, costs in zip(side.items, side.clusters, _by_item(side), strict=True)
    ]
    write_json(path, rows)


def _by_item(scores: MembershipScores) -> list[dict[str, float]]:
    return [
        dict(zip(scores.costs, values, strict=True)) for values in torch.stack(list(scores.costs.values()), 1).tolist()
    ]


def _token_costs(
    model: LanguageModel, encoded: Sequence[Encoded], shares: Sequence[float], batch_size: int
) -> dict[str, Tensor]:
    """The attacks that read nothing but the predictions of the targets, in one forward pass."""
    names = ["loss", *(f"min_k@{share:g}" for share in shares), *(f"min_k_plus_plus@{share:g}" for share in shares)]
    costs = torch.empty(len(names), len(encoded), dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            batch = batch.to(model.device)
            predictions, lengths = predict(network, batch), batch.targets.sum(1).tolist()
            logprobs = predictions.logprobs()
            standardised = _standardised(logprobs, predictions.logits)
            for row, plain, scores in zip(
                batch.rows, logprobs.split(lengths), standardised.split(lengths), strict=True
            ):
                lowest = [_lowest(values, shares) for values in (plain, scores)]
                costs[:, row] = torch.cat([-plain.mean()[None], *lowest]).cpu()
    return dict(zip(names, costs.unbind(), strict=True))


def _lowest(values: Tensor, shares: Sequence[float]) -> Tensor:
    """[shares] minus the mean of the lowest share of the values, one of them at least."""
    counts = torch.tensor([max(1, int(len(values) * share)) for share in shares], device=values.device)
    return -values.sort().values.cumsum(0)[counts - 1] / counts


def _standardised(logprobs: Tensor, logits: Tensor) -> Tensor:
    """[N] each target's log-probability in deviations from the mean of log p under p, for logits [N, V]."""
    found = []
    tokens = max(1, CHUNK // logits.shape[1])
    for target, part in zip(logprobs.split(tokens), logits.split(tokens), strict=True):
        every = part.log_softmax(-1)
        p, every = every.exp(), every.where(every > -torch.inf, 0.0)
        mean = (p * every).sum(-1)
        variance = (p * (every - mean[:, None]).square()).sum(-1)
        found.append((target - mean) / variance.clamp(min=1e-6).sqrt())
    return torch.cat(found)


def _gradient_norms(model: LanguageModel, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """Both gradient norms, an item at a time; gradients that are kept in the weights are left alone."""
    norms = torch.empty(2, len(encoded), dtype=torch.float32)
    weights = list(model.network.parameters())
    frozen = [weight for weight in weights if not weight.requires_grad]
    with evaluating(model) as network, torch.inference_mode(False), torch.enable_grad():
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            for batch in batches(encoded, batch_size=1):
                loss = -predict(network, batch.to(model.device)).logprobs().mean()
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                by_tensor = torch.stack([gradient.float().norm() for gradient in gradients if gradient is not None])
                norms[:, batch.rows[0]] = torch.stack([by_tensor.norm(), by_tensor.mean()]).cpu()
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
    return {"gradient_norm": norms[0], "gradient_norm@mean_tensor": norms[1]}


def _told(record: Record) -> str:
    """The text that is scored."""
    match record:
        case QA():
            return record.answer
        case Passage():
            return record.text
        case Preference():
            return record.chosen
    raise DataError(f"record {record.id!r}: a {type(record).__name__} has no single completion to train or score")
