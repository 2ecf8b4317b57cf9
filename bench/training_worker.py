"""One training step of one implementation, in a process of its own, so that its peak memory is its own.

Reads a JSON line {"name", "size", "precision", "device"}, answers {"loss"}; then for each line "step" does one step and
answers {"seconds", "peak_bytes"}.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

IMPLEMENTATIONS = ("ours", "plain-sdpa", "transformers", "seed")


def build(name: str, size: dict[str, int], precision: str, device: str) -> tuple[nn.Module, Callable, torch.optim.Optimizer]:
    """(model, loss function of (idx, targets), optimiser), all with the same weights where the architecture is the same."""
    v, t, layers, heads, width = (size[k] for k in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"))
    from bench.baselines.plain_gpt import PlainGPT
    from bench.baselines.seed_transformer import SeedTransformer

    torch.manual_seed(0)
    plain = PlainGPT(v, t, layers, heads, width)
    for p in plain.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    model: nn.Module = plain
    loss: Callable[[Tensor, Tensor], Tensor] = plain.loss
    if name == "ours":
        from wikigpt.model import GPT, GPTConfig

        model = GPT(GPTConfig(vocab_size=v, context_length=t, n_layer=layers, n_head=heads, n_embd=width))
        model.load_state_dict(plain.state_dict())
        loss = model
    elif name == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=v, n_positions=t, n_embd=width, n_layer=layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        copy_to_transformers(plain, model)

        def loss(idx: Tensor, targets: Tensor) -> Tensor:
            # It shifts labels itself; the last target has no place in it, so this row does one token in a row less.
            labels = torch.cat((idx[:, :1], targets[:, :-1]), dim=1)
            return model(idx, labels=labels, use_cache=False).loss
    elif name == "seed":
        model = SeedTransformer(v, width, heads, layers, dim_feedforward=4 * width)
        loss = model.loss  # type: ignore[assignment]
    model.to(device).train()
    if isinstance(model, PlainGPT | SeedTransformer):
        optimizer = model.make_optimizer()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, loss, optimizer


def copy_to_transformers(plain: nn.Module, model: nn.Module) -> None:
    """The weights of PlainGPT into GPT2LMHeadModel, whose linear layers are stored transposed."""
    source = plain.state_dict()
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
             "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}  # fmt: skip
    target = {"transformer.wte.weight": source["wte.weight"], "transformer.wpe.weight": source["wpe.weight"],
              "transformer.ln_f.weight": source["norm.weight"], "transformer.ln_f.bias": source["norm.bias"],
              "lm_head.weight": source["wte.weight"]}  # fmt: skip
    for key, value in source.items():
        if key.startswith("blocks."):
            _, layer, rest = key.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            target[f"transformer.h.{layer}.{names[part]}.{kind}"] = value.t() if value.dim() == 2 else value
    model.load_state_dict(target)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    size, device, precision = job["size"], job["device"], job["precision"]
    model, loss_of, optimizer = build(job["name"], size, precision, device)
    generator = torch.Generator().manual_seed(1)
    shape = (size["batch_size"], size["context_length"] + 1)
    block = torch.randint(size["vocab_size"], shape, generator=generator).to(device)
    x, y = block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def compute() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(x, y)

    def step() -> None:
        compute().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.no_grad():
        print(json.dumps({"loss": float(compute())}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        peak = (
            torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
