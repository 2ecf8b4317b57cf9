"""Training steps of one implementation, in a process of its own, so that its memory and what it compiled are its own.

Reads a JSON line {"name", "size", "precision", "device"}, answers {"loss"} of a fixed batch; then for each line with a number
does so many steps and answers {"seconds", "peak_bytes", "no_graph"}: the seconds of one of them, and why they were not the CUDA
graph that was asked for. Between its turns it gives the memory of a GPU back: the processes of all implementations share it.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.baselines.plain_gpt import PlainGPT
from bench.baselines.seed_transformer import SeedTransformer

Size = dict[str, int]


class Job:
    """A model with everything around it that a step needs: `step` and the loss of a batch, to compare."""

    model: nn.Module
    step: Callable[[], Any]
    loss: Callable[[Tensor, Tensor], Tensor]


class Ours(Job):
    """What `wikigpt train` does, with its data on the device, its schedule, its log left out."""

    def __init__(self, size: Size, precision: str, device: str, start: PlainGPT, compiled: bool, graph: bool):
        from wikigpt.config import Config, DataConfig, TrainConfig
        from wikigpt.model import GPTConfig
        from wikigpt.train import Processes, TextTask, Trainer

        tokens = np.random.default_rng(1).integers(size["vocab_size"], size=200_000, dtype=np.int64)
        dataset: Any = SimpleNamespace(
            name="random", fingerprint="", tokens={"train": tokens}, tokenizer=SimpleNamespace(vocab_size=size["vocab_size"])
        )
        sizes: dict[str, Any] = {key: size[key] for key in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd")}
        model = GPTConfig(**sizes)
        train = TrainConfig(
            batch_size=size["batch_size"], precision=precision, compile=compiled, cuda_graph=graph, tensorboard=False
        )
        processes = Processes(0, 1, torch.device(device))
        directory = Path(tempfile.mkdtemp(prefix="wikigpt-bench-"))
        self.trainer = Trainer(Config(DataConfig(), model, train), TextTask(dataset), directory, processes, log=say)
        self.trainer.model.load_state_dict(start.state_dict())
        self.trainer.model.train()
        self.model = self.trainer.model
        self.step = self.trainer.train_step
        self.loss = self.trainer.forward


class Plain(Job):
    """A model of PyTorch's own, trained as its users do: autocast, backward, clipping, its optimiser."""

    def __init__(self, model: Any, loss: Callable[[Tensor, Tensor], Tensor], size: Size, precision: str, device: str):
        self.model, self.loss = model, loss
        model.to(device).train()
        optimizer = model.make_optimizer() if hasattr(model, "make_optimizer") else torch.optim.AdamW(model.parameters(), 1e-3)
        x, y = batch(size, device)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                value = loss(x, y)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        self.step = step


def say(line: str) -> None:
    print(line, file=sys.stderr)


def batch(size: Size, device: str) -> tuple[Tensor, Tensor]:
    shape = (size["batch_size"], size["context_length"] + 1)
    block = torch.randint(size["vocab_size"], shape, generator=torch.Generator().manual_seed(1)).to(device)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def initial(size: Size) -> PlainGPT:
    torch.manual_seed(0)
    model = PlainGPT(*(size[k] for k in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd")))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return model


def build(name: str, size: Size, precision: str, device: str) -> Job:
    """The implementation of that name, all with the same weights where the architecture is the same."""
    v, layers, heads, width = (size[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd"))
    start = initial(size)
    compiled = name.endswith(", compiled")
    name = name.removesuffix(", compiled")
    if name.endswith(", vocabulary padded"):
        name = name.removesuffix(", vocabulary padded")
        start = initial({**size, "vocab_size": -(-v // 64) * 64})
    if name in ("ours", "ours, eager"):
        return Ours(size, precision, device, start, compiled, graph=name == "ours")
    model: Any = start
    loss: Any = start.loss
    if name == "transformers":
        model = transformers_model(start, size)

        def loss(idx: Tensor, targets: Tensor) -> Tensor:
            # It shifts labels itself; the last target has no place in it, so this row does one token in a row less.
            labels = torch.cat((idx[:, :1], targets[:, :-1]), dim=1)
            return model(idx, labels=labels, use_cache=False).loss
    elif name == "seed document":
        model = SeedTransformer(v, width, heads, layers, dim_feedforward=4 * width)
        loss = model.loss
    if compiled:
        loss = torch.compile(loss)
    return Plain(model, loss, size, precision, device)


def transformers_model(start: PlainGPT, size: Size) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size["vocab_size"], n_positions=size["context_length"], n_embd=size["n_embd"], n_layer=size["n_layer"],
        n_head=size["n_head"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    copy_to_transformers(start, model)
    return model


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


def no_graph(job: Job) -> str | None:
    """Why the steps of ours, which were to run as one CUDA graph, do not."""
    compute: Any = job.trainer.compute if isinstance(job, Ours) else None
    return str(compute.failed) if getattr(compute, "failed", None) else None


def main() -> None:
    work = json.loads(sys.stdin.readline())
    size, device, precision = work["size"], work["device"], work["precision"]
    job = build(work["name"], size, precision, device)
    # Where it compiles, also the backward: all processes do that at the same time, before any is timed.
    compiled = work["name"].endswith(", compiled")
    with torch.set_grad_enabled(compiled), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        loss = job.loss(*batch(size, device))
    if compiled:
        loss.backward()
        job.model.zero_grad(set_to_none=True)
    answer = {"loss": float(loss)}
    del loss
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    free: Callable[[], None] = torch.cuda.empty_cache if device == "cuda" else lambda: None
    free()
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        steps = int(line)
        if device == "cuda":
            job.step()  # allocates what it gave back
            synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            job.step()
        synchronize()
        seconds = (time.perf_counter() - begin) / steps
        peak = (
            torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        free()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "no_graph": no_graph(job)}), flush=True)


if __name__ == "__main__":
    main()
