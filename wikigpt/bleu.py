"""BLEU (Papineni et al. 2002) of the completions a model writes, as sacrebleu counts it by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, integer
from .files import write_bytes
from .pairs import Pair

if TYPE_CHECKING:
    from .data import Tokenizer
    from .model import GPT


@dataclass(frozen=True)
class BleuResult:
    score: float  # 0 to 100
    signature: str  # sacrebleu's: version and settings
    hypotheses: list[str]  # one line each, in the order of the pairs
    references: list[str]
    exact_match: float  # share of hypotheses equal to their reference, 0 to 1

    def __str__(self) -> str:
        text = f"BLEU {self.score:.2f} ({self.signature})\n"
        text += f"exact match {self.exact_match:.1%} of {len(self.references):,}"
        if all(len(reference.split()) < 4 for reference in self.references):
            text += "\nBLEU counts runs of four words, and no completion here has four: go by exact match"
        return text


def evaluate_bleu(
    model: GPT,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BleuResult:
    """BLEU of greedily decoded completions against those of the pairs.

    A completion ends at <eos> or at `max_new_tokens` (None: twice the longest reference). progress(done, total) is called
    after each batch.
    White space in hypotheses and references (line breaks of code too) is reduced to single spaces, since to
    sacrebleu a segment is a line; the score is the one of its command line on files of these lines.

    Raises UserError for a prompt that leaves no room in the context, ValueError where there are no pairs and for completions
    of no token.
    """
    import sacrebleu

    from .generate import generate

    if not pairs:
        raise ValueError("pairs: got none, must be 1 or more")
    if max_new_tokens is not None and integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, must be 1 or more")
    prompts = [tokenizer.encode_prompt(pair.prompt) for pair in pairs]
    context = model.config.context_length
    for pair, prompt in zip(pairs, prompts):
        if len(prompt) > context:
            raise UserError(
                f"{pair.where}: the prompt's {len(prompt)} tokens do not fit into the model's context of {context}; shorten it"
            )
    if max_new_tokens is None:
        max_new_tokens = 2 * max(len(tokenizer.encode(pair.completion)) for pair in pairs) + 1

    hypotheses = [""] * len(pairs)
    # Prompts of similar length together, which wastes the least on padding.
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        new = generate(model, [prompts[i] for i in rows], max_new_tokens, temperature=0.0, eos_id=tokenizer.eos_id)
        for i, ids in zip(rows, new):
            hypotheses[i] = _line(tokenizer.decode(ids))
        if progress:
            progress(start + len(rows), len(order))

    references = [_line(pair.completion) for pair in pairs]
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(hypotheses, [references]).score
    matches = sum(hypothesis == reference for hypothesis, reference in zip(hypotheses, references))
    return BleuResult(score, str(metric.get_signature()), hypotheses, references, matches / len(pairs))


def _line(text: str) -> str:
    # Half of a surrogate pair, which JSON can spell, has no UTF-8.
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def write_hypotheses(result: BleuResult, path: str | Path) -> None:
    """Write the hypotheses, one a line, as `sacrebleu references.txt -i PATH` reads them.

    Raises UserError where the file cannot be written.
    """
    text = "".join(f"{line}\n" for line in result.hypotheses)
    write_bytes(path, text.encode())


__all__ = ["BleuResult", "evaluate_bleu", "write_hypotheses"]
