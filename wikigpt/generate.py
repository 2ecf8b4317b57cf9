"""Text generation with a key/value cache: sampling, batches, streaming.

Shapes: B batch, S positions, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UserError, integer
from .kernels import sample
from .kernels.sampling import RANGES
from .model import GPT

if TYPE_CHECKING:
    from .data import Tokenizer


@torch.inference_mode()
def generate(
    model: GPT,
    prompt_ids: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Up to max_new_tokens new token ids for each prompt; a row ends early with eos_id, which is included.

    `prompt_ids` are rows of any lengths or a tensor (B, S); an empty row starts from eos_id. Sampling is
    as in `wikigpt.kernels.sample`. Each row has a seed of its own, drawn from `seed` (None: torch's global
    generator), so the random numbers of a row depend on no other row's length. The function
    `stream(row, token)` sees each token as it comes. When the context is full, its older half is dropped.

    Raises UserError for a prompt longer than the context and for a token outside the vocabulary, ValueError
    for arguments out of range, for an empty prompt without eos_id, and for logits that are NaN or inf.
    """
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, must be 0 or more")
    check_seed(seed)
    rows = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else [list(row) for row in prompt_ids]
    groups: dict[int, list[int]] = {}  # prompts of one length run as one batch, which needs no padding
    for i, row in enumerate(rows):
        if not row:
            if eos_id is None:
                raise ValueError("prompt_ids: a prompt is empty, which needs an eos_id to start from")
            rows[i] = row = [eos_id]
        check_tokens(model, row)
        groups.setdefault(len(row), []).append(i)
    device = model.head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(integer("seed", seed))
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(rows),), device=device, generator=generator)
    new: list[list[int]] = [[] for _ in rows]

    def on_token(row: int, token: int) -> bool:
        """Keep a token; whether its row goes on."""
        new[row].append(token)
        if stream is not None:
            stream(row, token)
        return token != eos_id

    training = model.training
    model.eval()
    try:
        for members in groups.values():
            prompts = torch.tensor([rows[i] for i in members], device=device)
            own_seeds = seeds[members]

            def pick(logits: Tensor, step: int, own_seeds: Tensor = own_seeds) -> Tensor:
                return sample(logits, temperature, top_k, top_p, min_p, seed=own_seeds, offset=step)

            going = dict(enumerate(members))
            for tokens in _continuations(model, prompts, max_new_tokens, pick):
                if min(tokens) < 0:  # sample says so on a GPU; check_nan would wait for it once more
                    row = members[tokens.index(min(tokens))]
                    raise ValueError(f"logits: row {row} has NaN, +inf or nothing but -inf")
                going = {i: row for i, row in going.items() if on_token(row, tokens[i])}
                if not going:
                    break
    finally:
        model.train(training)
    return new


def check_seed(seed: int | None) -> None:
    """Raises ValueError for what torch takes for no seed, TypeError for what is no integer."""
    if seed is not None and not -(2**63) <= integer("seed", seed) < 2**64:
        raise ValueError(f"seed: got {seed}, must have at most 64 bits")


def check_sampling(**options: float | None) -> None:
    """Raises ValueError for a temperature, top_k, top_p or min_p that `sample` refuses."""
    for name, value in options.items():
        allowed, text = RANGES[name]
        if value is not None and not allowed(value):
            raise ValueError(f"{name}: got {value}, must be {text}")


def check_tokens(model: GPT, ids: Sequence[int]) -> None:
    """Raises UserError for more ids than the model's context holds and for ids outside its vocabulary."""
    config = model.config
    if len(ids) > config.context_length:
        raise UserError(
            f"the text has {len(ids):,} tokens, the model's context holds {config.context_length:,}: shorten the text"
        )
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"token id {token} is outside the model's vocabulary of {config.vocab_size:,}: "
                "use the tokenizer that the model was trained with"
            )


def cropped(model: GPT, tokenizer: Tokenizer, prompt: str) -> tuple[list[int], int]:
    """(ids, n): the end of a prompt's token ids, as many as the model's context holds, and how many it had."""
    ids, context = tokenizer.encode_prompt(prompt), model.config.context_length
    if len(ids) <= context:
        return ids, len(ids)
    first = [tokenizer.first_id] if tokenizer.adds_bos and context > 1 else []
    return [*first, *ids[len(first) - context :]], len(ids)


def _continuations(
    model: GPT, prompts: Tensor, max_new_tokens: int, pick: Callable[[Tensor, int], Tensor]
) -> Iterator[list[int]]:
    """The next token of every row, again and again, for prompts (B, S) of at least one token."""
    batch_size, prompt_length = prompts.shape
    context_length = model.config.context_length
    tokens = prompts.new_empty(batch_size, prompt_length + max_new_tokens)
    tokens[:, :prompt_length] = prompts
    cache = model.make_cache(batch_size)
    head = model.head.weight.t()  # (C, V)
    if head.device.type == "cpu" and max_new_tokens >= 32:
        # MKL multiplies a few rows by this layout 1.3 to 1.8 times as fast, one row on AMD three times, and the head is half of
        # the work.
        head = head.contiguous()
    seen = 0  # tokens[:, :seen] have been through the model
    for end in range(prompt_length, tokens.shape[1]):
        if cache.length + end - seen > context_length:
            cache.length = 0
            seen = end - (context_length + 1) // 2
        x = model.hidden(tokens[:, seen:end], cache)[:, -1]  # (B, C): the head is for the last position alone
        seen = end
        tokens[:, end] = pick(x @ head, end - prompt_length)
        yield tokens[:, end].tolist()


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop_at_eos: bool = True,
    stream_text: Callable[[str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, a text or its token ids: the text to put right behind it, without a final <eos>.

    With stop_at_eos False a text goes on after <eos> (for words: after the line) up to max_new_tokens. A prompt starts
    with the token that the tokenizer puts before a text, an empty one with <eos> where there is none. `stream_text` is
    called with pieces that add up to the returned text; a piece is held back as long as later tokens could change it. It
    takes a single prompt, ValueError otherwise. Further arguments and errors as in `generate`.
    """
    if stream_text is not None and len(prompts) != 1:
        raise ValueError(f"stream_text: got {len(prompts)} prompts, can follow 1")
    rows = [tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    so_far: list[int] = []
    sent = 0

    def on_token(_: int, token: int) -> None:
        nonlocal sent
        if stop_at_eos and token == tokenizer.eos_id:
            return
        so_far.append(token)
        text, settled = _continuation(tokenizer, rows[0], so_far)
        if settled > sent:
            send(text[sent:settled])
            sent = settled

    def send(piece: str) -> None:
        if stream_text is not None and piece:
            stream_text(piece)

    new = generate(
        model,
        rows,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        eos_id=tokenizer.eos_id if stop_at_eos else None,
        stream=None if stream_text is None else on_token,
    )
    texts = []
    for row, tokens in zip(rows, new):
        if stop_at_eos and tokens and tokens[-1] == tokenizer.eos_id:
            tokens = tokens[:-1]
        texts.append(_continuation(tokenizer, row, tokens)[0])
    if stream_text is not None:
        send(texts[0][sent:])
    return texts


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> tuple[str, int]:
    """The text of `new` as it goes on after the prompt's, and how much of it no later token can change."""
    pretty = tokenizer.kind == "word"
    before = tokenizer.decode(prompt, pretty=pretty)
    text = tokenizer.decode(prompt + new, pretty=pretty)
    if not pretty:
        # A character may lack its last bytes yet.
        return text[len(before) :], len(text.rstrip("\ufffd")) - len(before)
    # Later words can move spaces in the prompt's text and join its "@-@": count all other characters.
    count = len(re.sub("[ @]", "", before))
    match = re.match(rf"(?:[ @]*[^ @]){{{count}}}", text)
    start = match.end() if match else len(before)
    settled = len(re.sub(r" ?@[-,.]@$", "", text))
    line = text.rfind("\n") + 1
    if text[line:].startswith((" =", "=")):  # a heading takes shape with its last sign
        settled = line
    elif text.count('"', line) % 2:  # the closing quote pulls both to the words between them
        settled = min(settled, text.rindex('"'))
    return text[start:], settled - start


__all__ = ["check_sampling", "check_seed", "check_tokens", "complete", "cropped", "generate"]
