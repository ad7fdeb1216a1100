"""Greedy generation by the whole network, quicker: its first blocks draft, the others check many drafts at once.

The first k blocks and the head say a few tokens in a row. What they drafted waits before block k, goes through the
other blocks as one stack, and is kept as far as the whole network would have said the same; the token after that is
its own. So the answer is that of greedy decoding, no block sees a token twice, and one cache serves draft and check
(Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710, section 4.3).

It is no early exit: nothing is lost, and what is gained hangs on how often the draft is right.

Shapes: B rows, g drafts a round.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.early_exit.decoding import Decoding
from palimpsest.early_exit.generation import Answers, Generated, Heads, answer_all, refuse_unusable
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import SpecError
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Report


def speculate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    blocks: int,
    drafts: int = 4,
    max_new_tokens: int,
    lens: Lens | None = None,
    batch_size: int = 1,
    stack: Stack | None = None,
    report: Report | None = None,
) -> list[Generated]:
    """How a model goes on greedily after each prompt: what `generate` says when every token runs every block.

    The exit of a token is `blocks` where it was drafted and kept, and L where the whole network said it.

    Args:
        model: a decoder of one of `stack.DECODERS`.
        prompts: token ids, none of them empty.
        blocks: k, how many draft; fewer than there are.
        drafts: g, how many tokens are drafted before they are checked.
        max_new_tokens: the longest answer, in tokens.
        lens: reads the drafts in place of the bare final norm.
        batch_size: rows at a time; a round keeps as many drafts as the row that keeps fewest.
        stack: the model's, where it is at hand.
        report: called with (prompts done, of how many, a note).

    Raises:
        ModelError: an architecture, attention or window that this does not do; a lens of another depth; logits that are
            not finite.
        SpecError: no such block, or nothing to draft.
        DataError: an empty prompt, one longer than the model's positions, or a token that the model does not have.
    """
    stack, heads = stack or Stack.of(model.network), Heads(model, lens)
    refuse_unusable(stack, (blocks,), lens)
    if blocks == stack.n_layers or drafts < 1:
        raise SpecError(
            f"{drafts} drafts by {blocks} blocks: name one draft or more, and fewer blocks than the model's "
            f"{stack.n_layers}"
        )

    def answer(batch: Batch, answers: Answers) -> None:
        decoding = Decoding(stack, batch, max_new_tokens, "catch_up")
        tokens = heads.tokens(heads.logits(decoding.prefill(), stack.n_layers))
        going = answers.add(tokens, stack.n_layers)
        while going:
            tokens, going = draft_and_check(decoding, heads, answers, tokens, blocks, drafts)

    return answer_all(model, prompts, answer, max_new_tokens=max_new_tokens, batch_size=batch_size, report=report)


def draft_and_check(
    decoding: Decoding, heads: Heads, answers: Answers, tokens: Tensor, blocks: int, drafts: int
) -> tuple[Tensor, bool]:
    """One round.

    Args:
        decoding: the batch, in the fill `catch_up`; it is as many columns further after it as tokens were kept.
        heads: what is read.
        answers: what is added to.
        tokens: [B] the newest.
        blocks: how many draft.
        drafts: the most to draft.

    Returns:
        [B] the newest tokens, and whether any row goes on.
    """
    before, n_layers = decoding.n_columns, decoding.stack.n_layers
    missing = int((answers.longest - len(answers.tokens))[answers.going].max())
    drafted = _draft(decoding, heads, tokens, blocks, min(drafts, missing - 1))
    hidden = decoding.called(blocks)
    for layer in range(blocks, n_layers):
        hidden = decoding.run(layer, hidden)
    said = heads.tokens(heads.logits(hidden, n_layers))
    # Of each row the drafts before its first wrong one; rows that ended keep whatever the others keep.
    agreed = (drafted == said[:, :-1]).long().cumprod(1).sum(1)
    kept = int(agreed[answers.going].min())
    decoding.crop(before + kept + 1)
    exits = [blocks] * kept + [n_layers]  # the last is the network's own, drafted or not
    going = all(answers.add(said[:, place], exit) for place, exit in enumerate(exits))
    return said[:, kept], going


def _draft(decoding: Decoding, heads: Heads, tokens: Tensor, blocks: int, n: int) -> Tensor:
    """[B, n] what the first blocks say one after the other; the last of it has gone through them too."""
    drafted: list[Tensor] = []
    while True:
        hidden = decoding.enter(tokens)
        for layer in range(blocks):
            hidden = decoding.run(layer, hidden)
        decoding.wait(blocks, hidden)
        if len(drafted) == n:
            return torch.stack(drafted, 1) if drafted else tokens[:, None][:, :0]
        tokens = heads.tokens(heads.logits(hidden[:, -1], blocks))
        drafted.append(tokens)
