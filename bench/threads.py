"""What the ways in which threads wait cost on a quiet machine and gain on a busy one: tokens/s of training on the CPU.

    python -m bench.threads [--busy 0,2,4] [--rounds 7] [--steps 3]

Each setting trains the model of the preset quick in a process of its own, started with that setting's environment. The
processes take turns of some steps, beside as many busy programs as --busy says; whoever waits for its turn sleeps. "wikigpt" is
what the command line sets (wikigpt/threads.py). Other programs on the machine are in the figures too: look at the load that is
printed, and at the span from the slowest turn to the fastest. On Linux a terminal of its own keeps them away as root:
`echo -20 > /proc/self/autogroup` before the command.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from wikigpt.threads import WAITS

from . import machine

SIZE = {"vocab_size": 33278, "context_length": 128, "n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8}
TOKENS = SIZE["batch_size"] * SIZE["context_length"]
SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's own": {},
    "wikigpt": WAITS,
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread fewer": {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))},
}


class Worker:
    """A process that trains when it is asked to."""

    def __init__(self, setting: dict[str, str]):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.training_worker"], cwd=machine.ROOT, env={**clean, **setting},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.tell(json.dumps({"name": "ours", "size": SIZE, "precision": "fp32", "device": "cpu"}))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tokens_per_second(self, steps: int) -> float:
        self.tell(str(steps))
        return TOKENS / self.answer()["seconds"]


def measure(workers: dict[str, Worker], busy: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Setting -> tokens/s of each round."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        time.sleep(0.5)
        for turn in range(rounds):
            for name in list(workers)[:: -1 if turn % 2 else 1]:
                found[name].append(workers[name].tokens_per_second(steps))
    finally:
        for process in others:
            process.kill()
            process.wait()
    return found


def table(columns: dict[int, dict[str, list[float]]]) -> str:
    """A row for each setting; a column for each number of busy programs: median (slowest to fastest)."""
    names = list(next(iter(columns.values())))
    width = max(map(len, ["tokens/s", *names]))
    lines = [f"{'tokens/s':{width}}" + "".join(f"{f'beside {busy} busy':>24}" for busy in columns)]
    for name in names:
        cells = (
            f"{statistics.median(found[name]):,.0f} ({min(found[name]):,.0f} to {max(found[name]):,.0f})"
            for found in columns.values()
        )
        lines.append(f"{name:{width}}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--busy", default="0,2,4", help="numbers of busy programs beside the training")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each setting")
    parser.add_argument("--steps", type=int, default=3, help="training steps in a turn")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which of the settings")
    options = parser.parse_args(arguments)

    names = options.settings.split(",")
    print(f"{machine.cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    workers = {name: Worker(SETTINGS[name]) for name in names}
    try:
        for worker in workers.values():
            worker.answer()
            worker.tokens_per_second(2)  # the first steps allocate
        counts = [int(count) for count in options.busy.split(",")]
        print(table({busy: measure(workers, busy, options.rounds, options.steps) for busy in counts}))
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()


if __name__ == "__main__":
    main()
