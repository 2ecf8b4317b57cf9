"""Greedy generation on one CPU thread: ours and transformers, the same weights and the same tokens.

    pytest bench/bench_generation.py --benchmark-disable-gc -q

Groups are shapes; the column tokens/s stands in extra_info.
"""

import pytest
import torch

from wikigpt import hub
from wikigpt.generate import generate

PROMPT, NEW = 32, 128


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A few rows gain little from threads, which on a shared machine wait long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[128, 192], ids=lambda width: f"4x{width}")
def models(request, tmp_path_factory):
    """The same random GPT-2 with the words of WikiText-2, in transformers and here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=33278, n_positions=256, n_embd=request.param, n_layer=4, n_head=4, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    # Without an end token it makes all NEW tokens.
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    for p in theirs.parameters():
        # Wider than at the start of training, where every prompt leads to one repeated token.
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    directory = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(directory)
    return hub.from_pretrained(str(directory)).eval(), theirs


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("implementation", ["wikigpt", "transformers"])
def test_generation(benchmark, models, batch_size, implementation):
    ours, theirs = models
    prompts = torch.randint(33278, (batch_size, PROMPT), generator=torch.Generator().manual_seed(1))

    def run_ours():
        return generate(ours, prompts, NEW, temperature=0)

    def run_theirs():
        mask = torch.ones_like(prompts)
        out = theirs.generate(prompts, attention_mask=mask, max_new_tokens=NEW, use_cache=True, do_sample=False)
        return out[:, PROMPT:].tolist()

    assert run_ours() == run_theirs()
    benchmark.group = f"{theirs.config.n_layer} x {theirs.config.n_embd}, batch {batch_size}"
    run = run_ours if implementation == "wikigpt" else run_theirs
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = round(batch_size * NEW / benchmark.stats.stats.median)
    print(f"\n{benchmark.group}, {implementation}: {benchmark.extra_info['tokens_per_second']} tokens/s")
