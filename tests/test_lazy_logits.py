"""LazyLogits: what trainers compute from outputs.logits is what they computed from the Tensor, made when it is used."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutputWithPast
from wikigpt.kernels import FusedAdamW

from tests.test_patch import batch, build
from wikigpt.integrations import lazy_logits
from wikigpt.integrations import patch as patching
from wikigpt.integrations.lazy_logits import LazyHead, LazyLogits
from wikigpt.integrations.transformers import patch

V = 11


def head(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(6, V, bias=bias).to(dtype)


def both(bias=True, dtype=torch.float32):
    """(lazy, the logits themselves) of a (2, 5) batch."""
    layer = head(bias, dtype)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    return LazyHead(layer)(x), layer(x)


def made(x):
    return x.tensor() if isinstance(x, LazyLogits) else x


def assert_same(ours, theirs):
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same(a, b)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(made(ours), theirs)
        assert made(ours).requires_grad == theirs.requires_grad
    else:
        assert ours == theirs


MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])

ROWS = {
    "all but the last": lambda x: x[..., :-1, :],
    "all but the first": lambda x: x[:, 1:],
    "one of the batch": lambda x: x[1],
    "the last": lambda x: x[:, -1],
    "by a mask": lambda x: x[MASK],
    "by a mask, all entries": lambda x: x[MASK, :],
    "by indices": lambda x: x[:, torch.tensor([3, 1])],
    "one dimension more": lambda x: x[None],
    "flattened": lambda x: x.view(-1, V),
    "flattened by reshape": lambda x: x.reshape((-1, V)),
    "by torch.reshape": lambda x: torch.reshape(x, (10, V)),
    "flattened, then cut": lambda x: x.view(10, x.size(-1))[3:],
    "contiguous": lambda x: x[:, 1:].contiguous(),
    "split": lambda x: x.reshape(-1, V).split(4),
    "split by torch": lambda x: torch.split(x, 2, dim=1),
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "to its device": lambda x: x.to(torch.device("cpu")),
    "detached": lambda x: x.detach(),
    "scaled": lambda x: x * 0.5 / 3,
    "capped": lambda x: torch.tanh(x / 2.0) * 2.0,
}


@pytest.mark.parametrize("how", ROWS)
def test_rows_and_casts_are_lazy_and_the_same(how):
    lazy, logits = both()
    ours = ROWS[how](lazy)
    assert all(isinstance(x, LazyLogits) for x in (ours if isinstance(ours, tuple) else (ours,)))
    assert lazy._made is None
    assert_same(ours, ROWS[how](logits))


ANYTHING = {
    "one entry of each row": lambda x: x[..., 0],
    "some entries": lambda x: x[:, :, 2:5],
    "entries by a mask of all": lambda x: x[(x > 0) if isinstance(x, torch.Tensor) else (x.tensor() > 0)],
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 1, dtype=torch.long)),
    "torch.gather": lambda x: torch.gather(x, -1, torch.zeros(2, 5, 1, dtype=torch.long)),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: torch.topk(x, 3).indices,
    "argmax": lambda x: x.argmax(-1),
    "argmax by name": lambda x: torch.argmax(x, dim=2),
    "argmax of all": lambda x: x.argmax(),
    "argmax of the batch": lambda x: x.argmax(0),
    "argmax, dimension kept": lambda x: x.argmax(-1, keepdim=True),
    "sum": lambda x: x.square().mean(),
    "plus": lambda x: 1 + x + 2,
    "minus": lambda x: (3 - x, x - 3, -x),
    "by a tensor": lambda x: (x / torch.ones(V), x * torch.ones(V)),
    "of a number": lambda x: 2.0 / x,
    "power": lambda x: x**2,
    "product": lambda x: x @ torch.ones(V, 2),
    "compared": lambda x: (x > 0, x == 0, x != x),
    "transposed": lambda x: x.transpose(1, 2),
    "another shape": lambda x: x.view(2, 5 * V),
    "concatenated": lambda x: torch.cat([x, x], 1),
    "stacked": lambda x: torch.stack((x, x)),
    "where": lambda x: torch.where(MASK[..., None], x, 0.0),
    "iterated": lambda x: list(x),
    "shape": lambda x: (x.shape, x.size(), x.size(-1), x.dim(), x.ndim, x.numel(), len(x), x.dtype, x.device),
    "sharpness": lambda x: (x.is_floating_point(), x.requires_grad, x.is_contiguous()),
    "numpy": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "list": lambda x: x.tolist(),
    "cross-entropy over dimension 1": lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(2, 5, dtype=torch.long)),
    "cross-entropy of probabilities": lambda x: F.cross_entropy(x[0], torch.full((5, V), 1 / V)),
    "arguments of a Tensor": lambda x: (
        x.argmax(axis=-1),
        x.split(split_size=2, dim=1),
        x.reshape(shape=(-1, V)),
        x.view(size=(-1, V)),
        torch.reshape(x, shape=(-1, V)),
        torch.split(x, split_size_or_sections=2, dim=1),
        torch.mul(x, other=2),
        torch.div(x.detach(), 2, rounding_mode="floor"),
        torch.argmax(x, -1, out=torch.empty(2, 5, dtype=torch.long)),
        x[()],
    ),
    "remainder": lambda x: (x % 2, 3 % x, x // 2, 3 // x),
    "nll": lambda x: F.nll_loss(F.log_softmax(x.view(-1, V), -1), torch.zeros(10, dtype=torch.long)),
}


@pytest.mark.parametrize("how", ANYTHING)
def test_anything_else_is_computed_from_the_logits(how):
    lazy, logits = both()
    assert_same(ANYTHING[how](lazy), ANYTHING[how](logits))


def test_writing_into_them_stays():
    lazy, _ = both()
    lazy = lazy.detach()
    lazy[..., 3] = -7.0
    assert (lazy[:, :, 3] == -7).all()
    lazy.clamp_(min=-1)
    assert lazy[0, 0, 3] == -1


IN_PLACE = {
    "a method": lambda x, rows: rows(x).mul_(2),
    "a function": lambda x, rows: F.relu(rows(x), inplace=True),
    "out": lambda x, rows: torch.neg(rows(x), out=rows(x)),
    "entries": lambda x, rows: rows(x).__setitem__((..., 3), 5.0),
    "of the whole, after the rows": lambda x, rows: (taken := rows(x), x.zero_(), taken)[2].add_(1),
}


@pytest.mark.parametrize("rows", ["all but the last", "the last", "flattened", "flattened, then cut", "one dimension more"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_a_change_of_rows_is_a_change_of_what_they_were_taken_from(how, rows):
    lazy, logits = (x.detach() for x in both())
    for x in (lazy, logits):
        IN_PLACE[how](x, ROWS[rows])
    assert_same(lazy, logits)
    assert_same(F.cross_entropy(ROWS[rows](lazy).reshape(-1, V)[:1], TARGET[:1]),
                F.cross_entropy(ROWS[rows](logits).reshape(-1, V)[:1], TARGET[:1]))  # fmt: skip


@pytest.mark.parametrize("how", ["all but the last", "flattened, then cut"])
def test_rows_that_were_made_before_a_change_of_the_whole_are_changed_too(how):
    lazy, logits = (x.detach() for x in both())
    for x in (lazy, logits):
        rows = ROWS[how](x)
        rows.softmax(-1)
        x.zero_()
        assert not rows.any()


def test_what_rows_copy_no_later_change_reaches():
    lazy, logits = (x.detach() for x in both())
    assert_same(*((x[:, :-1].reshape(-1, V), x.zero_())[0] for x in (lazy, logits)))


def test_rows_keep_their_gradient_when_they_are_next_used_without():
    layer, x = head(), torch.randn(2, 5, 6)
    lazy = LazyHead(layer)(x)
    rows = lazy[:, 1:]
    lazy.tensor()
    with torch.no_grad():
        assert not (rows * 2).requires_grad
    ours, theirs = (torch.autograd.grad(made(of).square().sum(), layer.weight)[0] for of in (rows, layer(x)[:, 1:]))
    torch.testing.assert_close(ours, theirs)


def test_an_assignment_in_place_changes_the_same_object():
    lazy, logits = both()
    for x in (lazy, logits):
        same = x
        same /= 2
        same += 1
    assert_same(lazy, logits)


@pytest.mark.parametrize("how", ["float", "scaled", "capped", "all but the last", "by a mask"])
def test_what_is_taken_without_gradients_trains_nothing(how):
    layer = head(dtype=torch.bfloat16)
    with torch.no_grad():
        whole = LazyHead(layer)(torch.randn(2, 5, 6).bfloat16())
    outside = LazyHead(layer)(torch.randn(2, 5, 6).bfloat16())
    with torch.no_grad():
        taken = ROWS[how](outside)
    for x in (ROWS[how](whole), taken):
        x = x.reshape(-1, V)
        assert not F.cross_entropy(x, TARGET[: len(x)]).requires_grad
        assert not x.tensor().requires_grad


def test_they_are_made_once():
    lazy, _ = both()
    assert lazy.tensor() is lazy.tensor()


@pytest.mark.parametrize("grad", [True, False])
def test_their_gradient_is_that_of_the_head_whenever_they_are_made(grad):
    layer, x = head(), torch.randn(3, 6, requires_grad=True)
    with torch.set_grad_enabled(grad):
        lazy = LazyHead(layer)(x)
    with torch.no_grad():
        lazy.sum()
    assert lazy.tensor().requires_grad == grad
    if grad:
        (lazy * torch.arange(V)).sum().backward()
        torch.testing.assert_close(layer.bias.grad, 3.0 * torch.arange(V))


# --- the loss -------------------------------------------------------------------------------------------------------

TARGET = torch.tensor([3, 0, -100, 10, 4, 4, -100, 2, 1, 9])
LOSSES = {
    **{f"{r}, smoothing {s}": {"reduction": r, "label_smoothing": s} for r in ("mean", "sum", "none") for s in (0.0, 0.2)},
    "another ignored": {"ignore_index": 4},
    "class weights": {"weight": torch.linspace(0.1, 1, V)},
    "the old arguments": {"size_average": False},
}
STEPS = {
    "as they are": lambda x: x,
    "float": lambda x: x.float(),
    "capped": lambda x: torch.tanh(x / 2.0) * 2.0,
    "scaled": lambda x: x * 0.5,
    "scaled and capped": lambda x: (x / 2 / 3.0).tanh() * 3.0,
    "capped to something else": lambda x: torch.tanh(x / 2.0) * 3.0,
    "capped and scaled": lambda x: torch.tanh(x / 2.0) * 2.0 * 0.5,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:size_average")
def test_cross_entropy_and_its_gradients_are_those_of_the_logits(loss, step, bias):
    results = []
    for lazy in (True, False):
        layer, x = head(bias), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        logits = LazyHead(layer)(x) if lazy else layer(x)
        target = TARGET if "ignore_index" not in LOSSES[loss] else TARGET.clamp(min=0)
        value = F.cross_entropy(STEPS[step](logits).view(-1, V), target, **LOSSES[loss])
        (value * torch.arange(1.0, 11.0) if value.dim() else value).sum().backward()
        results.append([value, x.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("step", ["as they are", "float", "capped", "scaled", "scaled and capped"])
def test_cross_entropy_makes_no_logits(step):
    lazy = LazyHead(head(), may_be_made=False)(torch.randn(2, 5, 6))
    assert F.cross_entropy(STEPS[step](lazy).view(-1, V), TARGET).isfinite()
    assert nn.CrossEntropyLoss()(STEPS[step](lazy)[:, 1:].reshape(-1, V), torch.zeros(8, dtype=torch.long)).isfinite()


def test_the_loss_has_the_dtype_of_the_logits():
    lazy, logits = both(dtype=torch.bfloat16)
    for cast in (lambda x: x, lambda x: x.float()):
        ours, theirs = (F.cross_entropy(cast(x).view(-1, V), TARGET) for x in (lazy, logits))
        torch.testing.assert_close(ours, theirs)


def test_the_loss_is_float32_under_autocast():
    layer, x = head(), torch.randn(10, 6)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = F.cross_entropy(LazyHead(layer)(x), TARGET), F.cross_entropy(layer(x), TARGET)
    assert ours.dtype == theirs.dtype == torch.float32


def test_a_target_that_pytorch_refuses_is_refused_alike():
    lazy, logits = both()
    for target in (torch.zeros(9, dtype=torch.long), torch.zeros(10, dtype=torch.int32)):
        messages = []
        for x in (lazy, logits):
            with pytest.raises((RuntimeError, ValueError)) as error:
                F.cross_entropy(x.view(-1, V), target)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_under_autocast_they_have_its_dtype_and_outside_of_it_too():
    layer, x = head(), torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        lazy, logits = LazyHead(layer)(x), layer(x)
    assert lazy.dtype == logits.dtype == torch.bfloat16
    assert torch.equal(lazy.tensor(), logits)


@pytest.mark.parametrize("x", [torch.randn(2, 7), torch.randn(2, 6).double()], ids=["size", "dtype"])
def test_what_the_head_refuses_is_refused_at_once(x):
    with pytest.raises(RuntimeError, match="mat1"):
        LazyHead(head())(x)


def test_what_is_no_plain_tensor_gets_its_logits():
    assert type(LazyHead(head().to("meta"))(torch.randn(2, 6, device="meta"))) is torch.Tensor
    parameter = nn.Parameter(torch.randn(2, 6))
    assert torch.equal(LazyHead(head())(parameter), head()(parameter))


# --- when the weights change ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [["weight", "bias"], ["bias"]], ids=" and ".join)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, FusedAdamW])
def test_logits_of_weights_that_are_gone_are_refused(optimizer, trained):
    layer = head()
    for name, p in layer.named_parameters():
        p.requires_grad_(name in trained)
    lazy = LazyHead(layer)(torch.randn(2, 6))
    F.cross_entropy(lazy, torch.tensor([1, 2])).backward()
    optimizer(layer.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"outputs.logits: the head's weight has changed .* patch\(model, loss=False\)"):
        lazy.argmax(-1)


USES = {
    "argmax": lambda logits: logits.argmax(-1),
    "rows": lambda logits: logits[:1],
    "loss": lambda logits: F.cross_entropy(logits, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("changed", ["weight", "last hidden state"])
def test_whatever_is_asked_of_logits_whose_factors_have_changed_is_refused(changed, use):
    layer, hidden = head(), torch.randn(2, 6)
    lazy = LazyHead(layer)(hidden)
    with torch.no_grad():
        (layer.weight if changed == "weight" else hidden).mul_(2)
    with pytest.raises(RuntimeError, match=rf"outputs.logits: the .*{changed} has changed since the forward pass"):
        use(lazy)


def test_logits_made_before_the_weights_change_stay():
    layer = head()
    lazy = LazyHead(layer)(torch.randn(2, 6))
    before = lazy.tensor().clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(lazy.tensor(), before)


# --- trainers -------------------------------------------------------------------------------------------------------


def token_accuracy_and_entropy(outputs, labels):
    """As trainers of chat models log them at every step."""
    with torch.no_grad():
        rows = []
        for chunk in outputs.logits.reshape(-1, outputs.logits.shape[-1]).split(8, dim=0):
            log_p = F.log_softmax(chunk, dim=-1)
            rows.append(-(log_p.exp() * log_p).sum(-1))
        entropy = torch.cat(rows).reshape(outputs.logits.shape[:-1])
        shifted, wanted = outputs.logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        hits = (shifted.argmax(dim=-1) == wanted) & (wanted != -100)
        return hits.sum() / (wanted != -100).sum(), entropy.mean()


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "Mixtral"])
def test_token_accuracy_and_entropy_of_a_training_step_never_hold_all_logits(name, monkeypatch):
    model, x = build(name), batch()
    plain = model(**x)
    expected = token_accuracy_and_entropy(plain, x["labels"])
    patch(model)
    monkeypatch.setattr(lazy_logits, "_PIECE", 8 * 61)
    outputs = model(**x)
    outputs.loss.backward()
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *w: rows.append(x.shape[:-1].numel()) or linear(x, *w))
    torch.testing.assert_close(token_accuracy_and_entropy(outputs, x["labels"]), expected)
    assert max(rows) <= 8


def test_a_trainer_with_token_accuracy_trains_as_before(tmp_path):
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            accuracy, entropy = token_accuracy_and_entropy(outputs, inputs["labels"])
            self.seen.append((float(loss), float(self.accelerator.gather_for_metrics(accuracy).mean()), float(entropy)))
            return (loss, outputs) if return_outputs else loss

    def seen(patched, bf16):
        model = build("Llama")
        if patched:
            patch(model)
        rows = [{name: t[i] for name, t in batch(batch=8).items()} for i in range(8)]
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, seed=0, bf16=bf16,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.seen = []
        trainer.train()
        return torch.tensor(trainer.seen)

    torch.testing.assert_close(seen(True, False), seen(False, False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen(True, True), seen(False, True), rtol=3e-2, atol=3e-2)


def test_accelerates_conversion_to_float32_leaves_them_lazy():
    operations = pytest.importorskip("accelerate.utils.operations")
    lazy, logits = both(dtype=torch.bfloat16)
    converted = operations.convert_outputs_to_fp32(lambda: CausalLMOutputWithPast(loss=logits.sum(), logits=lazy))()
    assert isinstance(converted.logits, LazyLogits)
    assert converted.logits.dtype == converted.loss.dtype == torch.float32
    torch.testing.assert_close(converted.logits.tensor(), logits.float())


@pytest.fixture
def one_process():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel_passes_them_on(one_process, options):
    model, x = build("Llama"), batch()
    plain = model(**x)
    plain.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    patch(model)
    parallel = DistributedDataParallel(model, **options)
    outputs = parallel(**x)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits.tensor(), plain.logits)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5)


def test_a_replica_of_data_parallel_gives_what_can_be_gathered():
    model = build("Llama")
    patch(model)
    replica = model._replicate_for_data_parallel()
    outputs = replica(**batch())
    torch.testing.assert_close(outputs.loss, model(**batch()).loss)
    assert outputs.logits is None
    assert "logits" not in outputs


@pytest.mark.parametrize("through", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy], ids=["pickle", "copy"])
def test_a_copy_of_the_outputs_holds_a_tensor(through):
    lazy, logits = both()
    copied = through(CausalLMOutputWithPast(logits=lazy.detach()))
    assert torch.equal(made(copied.logits), logits.detach())


def test_the_outputs_convert_as_before():
    model, x = build("Llama"), batch()
    plain = model(**x)
    patch(model)
    ours = model(**x)
    assert list(ours) == list(plain)
    torch.testing.assert_close(ours.to_tuple()[1].tensor(), plain.logits)
    torch.testing.assert_close(ours["logits"].tensor(), plain["logits"])
    assert repr(ours.logits) == "LazyLogits(shape=(2, 13, 61), dtype=torch.float32, device=cpu)"


def test_a_compiled_model_gives_them_too():
    model, x = build("Llama"), batch()
    plain = model(**x)
    patch(model)
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(**x)
    assert isinstance(outputs.logits, LazyLogits)
    torch.testing.assert_close(outputs.logits[:, 1:].argmax(-1), plain.logits[:, 1:].argmax(-1))
    torch.testing.assert_close(outputs.logits.tensor(), plain.logits)


class LossAndLogits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids, labels=labels, use_cache=False)


strict = pytest.mark.skipif(
    not patching._TELLS_EXPORT_FROM_COMPILE, reason="torch too old: it does not tell export from compile"
)


@pytest.mark.parametrize("mode", [False, pytest.param(True, marks=strict)], ids=["default", "strict"])
def test_an_exported_model_gives_tensors(mode):
    model, x = build("Llama"), batch()
    plain = model(**x)
    patch(model)
    outputs = torch.export.export(LossAndLogits(model), (), x, strict=mode).module()(**x)
    torch.testing.assert_close((outputs.loss, outputs.logits), (plain.loss, plain.logits))
