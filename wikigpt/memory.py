"""How much memory a training run needs, and how much there is: asked before a run starts, since a machine that runs out of
it grinds for minutes and then kills the process without a word."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .config import Config, GPTConfig
from .errors import UserError

CGROUPS = Path("/sys/fs/cgroup")


def count_parameters(config: GPTConfig, vocab_size: int) -> int:
    """The parameters of GPT(config), without making one."""
    c, bias, layers = config.n_embd, int(config.bias), config.n_layer
    heads, width = _heads(config), _mlp_width(config)
    norm = c * (1 + (bias if config.norm == "layernorm" else 0))
    attention = heads * (c + bias) + config.n_head * config.head_dim * c + bias * c  # type: ignore[operator]
    mlp = width * (c + bias) + config.intermediate_size * c + bias * c  # type: ignore[operator]
    embeddings = vocab_size * c * (1 if config.tie_embeddings else 2)
    embeddings += config.context_length * c if config.position == "learned" else 0
    return embeddings + layers * (2 * norm + attention + mlp) + norm


def _heads(config: GPTConfig) -> int:
    """Width of queries, keys and values side by side."""
    return (config.n_head + 2 * config.n_kv_head) * config.head_dim  # type: ignore[operator]


def _mlp_width(config: GPTConfig) -> int:
    return config.intermediate_size * (2 if config.activation == "swiglu" else 1)  # type: ignore[operator]


def estimate_memory(config: Config, vocab_size: int, device_type: str, processes: int = 1) -> int:
    """Bytes that one of `processes` needs to train: weights, gradients, the optimiser's averages, the moving average, and
    what a micro-step keeps for its backward. On the CPU 0.7 to 1.1 of the peaks measured, 0.4 to 1.6 GB."""
    model, train = config.model, config.train
    parameters = count_parameters(model, vocab_size)
    # Weights, gradients and AdamW's two averages; muon has one, and as much in passing.
    state = 4 * 4 * parameters
    if train.parallel == "fsdp" and processes > 1:
        state = max(4 * parameters, state // processes)  # each process makes the whole model first
    if train.ema_decay > 0:
        state += 4 * parameters
    return state + train.batch_size * _sequence(config, vocab_size, device_type) + _places(config)


def _places(config: Config) -> int:
    """Bytes of where the sequences of a whole step begin."""
    return 2 * 8 * config.train.batch_size * config.train.accumulate


def _sequence(config: Config, vocab_size: int, device_type: str) -> int:
    """Bytes that grow with each sequence of the batch."""
    model, train, length = config.model, config.train, config.model.context_length
    c, attended = model.n_embd, model.n_head * model.head_dim  # type: ignore[operator]
    # Kept in each block: both norms' inputs and outputs, queries, keys and values, what attention gives, the MLP's two ends.
    block = 4 * c + _heads(model) + 2 * attended + _mlp_width(model) + model.intermediate_size  # type: ignore[operator]
    activations = model.n_layer * block * (3 if train.precision == "bf16" else 4) + 4 * 4 * c
    if device_type == "cpu":
        activations *= 2  # measured: what is made in passing, and what the allocator does not give back
    if model.backend == "reference":
        activations += model.n_layer * 2 * 4 * model.n_head * length  # weights before and after the softmax
    if model.backend in ("reference", "torch"):
        activations += 3 * 4 * vocab_size  # logits, probabilities, gradient
    elif device_type != "cpu":
        activations += 4 * vocab_size // 32  # a chunk of them
    tokens = 3 * 8  # places, inputs, targets
    return length * (activations + tokens)


def machine_memory(device: torch.device) -> int | None:
    """Bytes that the device has (for the CPU: the machine, or the container around this process); None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    return min([memory, *_container_limits()])


def _container_limits() -> list[int]:
    """The limits of this process's control groups: /proc/self/cgroup has lines like 0::/a/b (v2) or 4:memory:/a/b (v1)."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        # Inside a container the path may be that of the host, and the limit stands at the root.
        folders = [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]
        for folder in folders[: folders.index(root) + 1]:
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # "max"
                continue
    return limits


def check_memory(config: Config, vocab_size: int, device: torch.device, processes: int = 1) -> None:
    """Raises UserError where training clearly needs more memory than there is, with a setting that fits."""
    have = machine_memory(device)
    needed = estimate_memory(config, vocab_size, device.type, processes)
    # An estimate: what is near the limit may try.
    if have is None or needed <= 1.5 * have:
        return
    sequence = _sequence(config, vocab_size, device.type)
    state = needed - config.train.batch_size * sequence - _places(config)
    where = f"this machine has {_size(have)}" if device.type == "cpu" else f"{device} has {_size(have)}"
    parameters = count_parameters(config.model, vocab_size)
    if state > have:
        raise UserError(
            f"a model of {parameters / 1e6:,.0f}M parameters needs about {_size(state)} to train and {where}; "
            "use a smaller model.n_embd or model.n_layer"
        )
    if needed - _places(config) <= have:
        raise UserError(
            f"train.accumulate: {config.train.accumulate:,} micro-steps need about {_size(_places(config))} for the places of "
            f"their sequences alone and {where}; use fewer"
        )
    fits = int((have - state) / sequence / 1.25)
    if fits < 1:
        raise UserError(
            f"model.context_length: one sequence of {config.model.context_length:,} tokens needs about {_size(needed)} to "
            f"train and {where}; use a shorter one or a smaller model"
        )
    fits = 1 << (fits.bit_length() - 1)
    raise UserError(
        f"train.batch_size: {config.train.batch_size:,} sequences of {config.model.context_length:,} tokens need about "
        f"{_size(needed)} and {where}; train.batch_size={fits} fits, and train.accumulate makes steps of more"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count < 2**40 else f"{count / 2**40:,.1f} TiB"


__all__ = ["check_memory", "count_parameters", "estimate_memory", "machine_memory"]
