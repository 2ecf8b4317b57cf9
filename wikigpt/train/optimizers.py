"""Optimisers of a run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import wikigpt.kernels as kernels
from wikigpt.config import TrainConfig


class Optimizers:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices inside the blocks and AdamW for the rest.

    `ema` is a copy of the model that follows it as its moving average, or None. AdamW alone clips gradients and keeps the
    average in its own pass over the weights; beside Muon these are passes of their own.
    """

    def __init__(self, model: nn.Module, ema: nn.Module | None, config: TrainConfig, device: torch.device, captured: bool):
        self.model, self.ema, self.config, self.device, self.captured = model, ema, config, device, captured
        self.one_pass = config.optimizer == "adamw"
        hidden: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            if p.dim() == 2 and "blocks." in name and config.optimizer == "muon":
                hidden.append(p)
            else:
                (decayed if p.dim() == 2 else plain).append(p)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = kernels.FusedAdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_grad_norm=config.clip_grad_norm if self.one_pass and config.clip_grad_norm > 0 else None,
            ema_decay=config.ema_decay if self.one_pass and ema is not None else None,
        )
        self.all: list[torch.optim.Optimizer] = [self.adamw]
        if hidden:
            self.all.append(torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95))
        self.base_lr = [config.lr, config.muon_lr]
        self._place_lr()
        self._tie_ema()

    def _place_lr(self) -> None:
        """A captured step reads its learning rates from the device, where they can change."""
        if self.captured:
            for optimizer, lr in zip(self.all, self.base_lr):
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(lr, device=self.device)

    def set_lr(self, factor: float) -> None:
        """Learning rates of the next step."""
        for optimizer, lr in zip(self.all, self.base_lr):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor

    def _tie_ema(self) -> None:
        """What AdamW keeps as averages are the weights of `ema` themselves."""
        if self.one_pass and self.ema is not None:
            for p, average in zip(self.model.parameters(), self.ema.parameters()):
                self.adamw.state[p]["ema"] = average.detach()

    def step(self) -> None:
        if not self.one_pass and self.config.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        for optimizer in self.all:
            optimizer.step()
        self.drop_gradients()
        if not self.one_pass and self.ema is not None:
            with torch.no_grad():
                averages: list[Tensor] = list(self.ema.parameters())
                torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - self.config.ema_decay)

    def drop_gradients(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """As torch's optimisers have them; the averages are the state of `ema` and not here."""
        states = [o.state_dict() for o in self.all]
        for number, state in states[0]["state"].items():
            states[0]["state"][number] = {key: value for key, value in state.items() if key != "ema"}
        return states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states):
            optimizer.load_state_dict(state)
        self._place_lr()
        self._tie_ema()


def lr_factor(config: TrainConfig, step: int, progress: float) -> float:
    """The learning rate of a step as a fraction of the highest; `progress` in 0..1 is the part of the run behind it."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    low = config.min_lr_fraction
    if config.schedule == "cosine":
        return warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if config.schedule == "wsd":
        left = min(1.0, max(0.0, 1 - progress) / config.decay_fraction) if config.decay_fraction > 0 else 1.0
        return warmup * (low + (1 - low) * left)
    return warmup


__all__ = ["Optimizers", "lr_factor"]
