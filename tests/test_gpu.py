"""The model and its training on a CUDA device, against the CPU. Runs by itself where a GPU is present."""

import copy

import pytest
import torch

from tests.conftest import assert_as_accurate_as
from wikigpt.config import resolve
from wikigpt.data import prepare
from wikigpt.generate import generate
from wikigpt.model import GPT, GPTConfig
from wikigpt.train import Processes, TextTask, Trainer, read_log

pytestmark = pytest.mark.gpu

LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}


def make_model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=1000, context_length=128, n_layer=2, n_head=4, n_embd=128, **options))


@pytest.mark.parametrize("options", [{}, LLAMA, {"position": "alibi"}], ids=["gpt2", "llama", "alibi"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_loss_and_gradients_equal_those_of_the_cpu_in_float64(options, backend):
    truth = make_model(**options, backend="reference").double()
    model = copy.deepcopy(truth).cuda()
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    model.config.backend = backend
    x = torch.randint(1000, (3, 100))
    expected, loss = truth(x, x.roll(-1, 1)), model(x.cuda(), x.roll(-1, 1).cuda())
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(truth.named_parameters(), model.parameters()):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, LLAMA, {"position": "alibi"}], ids=["gpt2", "llama", "alibi"])
def test_the_triton_backend_is_as_accurate_as_the_reference_in_float32(options):
    truth = make_model(**options, backend="reference").double().cuda()
    x = torch.randint(1000, (3, 100)).cuda()

    def run(model):
        loss = model(x, x.roll(-1, 1))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    expected = run(truth)
    plain, ours = (run(make_model(**options, backend=name).cuda()) for name in ("reference", "triton"))
    assert_as_accurate_as(ours[0], plain[0], expected[0])
    for name, grad in expected[1].items():
        assert_as_accurate_as(ours[1][name], plain[1][name], grad, absolute=1e-7)


def test_generation_with_the_cache_equals_the_full_forward():
    model = make_model(**LLAMA).double().cuda().eval()
    prompt = torch.randint(1000, (2, 20)).cuda()
    made = generate(model, prompt, 10, temperature=0)
    ids = prompt
    for _ in range(10):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert made == ids[:, 20:].tolist()


def run_on_the_gpu(tmp_path, monkeypatch, name, *changes, resume=False):
    """A short run; returns its trainer and the logged losses by step."""
    monkeypatch.setenv("WIKIGPT_CACHE_DIR", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 400)
    config = resolve(None, None, [
        f"dataset={text}", "n_layer=2", "n_head=2", "n_embd=64", "context_length=32", "batch_size=8", "lr=1e-2",
        "precision=bf16", "tensorboard=false", "device=cuda", *changes,
    ])  # fmt: skip
    dataset = prepare(config.data.dataset, "word")
    trainer = Trainer(config, TextTask(dataset), tmp_path / name, Processes(0, 1, torch.device("cuda")), resume)
    trainer.run()
    return trainer, {line["step"]: line for line in read_log(tmp_path / name) if "loss" in line}


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_training_on_the_gpu_learns_and_resumes(tmp_path, monkeypatch, compiled):
    losses = []
    for resume, steps in ((False, 30), (True, 40)):
        trainer, _ = run_on_the_gpu(tmp_path, monkeypatch, "run", f"steps={steps}", f"compile={compiled}", resume=resume)
        losses.append(trainer.train_loss)
    assert losses[0] < 1.0
    assert losses[1] <= losses[0] + 0.05


# Everything that a captured step must carry: dropout, accumulation, a schedule, a moving average.
FULL_STEP = (
    "batch_size=4", "accumulate=2", "warmup_steps=3", "dropout=0.1", "ema_decay=0.9", "log_interval=1", "save_interval=9",
)  # fmt: skip


def test_steps_of_a_captured_graph_equal_steps_run_one_kernel_at_a_time(tmp_path, monkeypatch):
    graph, graph_log = run_on_the_gpu(tmp_path, monkeypatch, "graph", *FULL_STEP, "steps=20")
    eager, eager_log = run_on_the_gpu(tmp_path, monkeypatch, "eager", *FULL_STEP, "steps=20", "cuda_graph=false")
    assert graph.compute.graph is not None
    assert graph.compute.failed is None
    assert set(graph_log) == set(eager_log) == set(range(1, 21))
    for step in graph_log:
        assert graph_log[step]["lr"] == eager_log[step]["lr"]
        assert graph_log[step]["loss"] == pytest.approx(eager_log[step]["loss"], rel=2e-3), f"step {step}"
    for (name, p), q in zip(graph.model.named_parameters(), eager.model.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_that_cannot_be_captured_leaves_the_run_as_it_would_be_without(tmp_path, monkeypatch):
    """It waits for the device, which ends a capture. The generator, the gradients and the stream must survive that."""
    eager, eager_log = run_on_the_gpu(tmp_path, monkeypatch, "eager", *FULL_STEP, "steps=12", "cuda_graph=false")
    compute = Trainer._compute

    def waits(self, places):
        loss = compute(self, places)
        loss.item()
        return loss

    monkeypatch.setattr(Trainer, "_compute", waits)
    failed, failed_log = run_on_the_gpu(tmp_path, monkeypatch, "failed", *FULL_STEP, "steps=12")
    assert failed.compute.graph is None
    assert failed.compute.failed
    for step in eager_log:
        assert failed_log[step]["loss"] == pytest.approx(eager_log[step]["loss"], rel=1e-5), f"step {step}"
    for (name, p), q in zip(failed.model.named_parameters(), eager.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_every_replay_of_the_graph_drops_other_elements(tmp_path, monkeypatch):
    """With a learning rate of 0 the same batch gives another loss only through dropout."""
    trainer, _ = run_on_the_gpu(tmp_path, monkeypatch, "run", *FULL_STEP, "steps=6", "lr=0", "dropout=0.5")
    places = trainer.batches.places(0, 8)
    losses = [float(trainer.compute(places)) for _ in range(8)]
    assert trainer.compute.graph is not None
    assert len(set(losses)) == len(losses)


def test_a_run_of_graphs_resumes_to_the_same_bits(tmp_path, monkeypatch):
    run_on_the_gpu(tmp_path, monkeypatch, "parts", *FULL_STEP, "steps=9", "schedule=constant")
    parts, _ = run_on_the_gpu(tmp_path, monkeypatch, "parts", *FULL_STEP, "steps=18", "schedule=constant", resume=True)
    whole, _ = run_on_the_gpu(tmp_path, monkeypatch, "whole", *FULL_STEP, "steps=18", "schedule=constant")
    assert parts.step == whole.step == 18
    for p, q in zip(parts.model.parameters(), whole.model.parameters()):
        assert torch.equal(p, q)
