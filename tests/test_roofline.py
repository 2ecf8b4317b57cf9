"""Floors by hand and against what the ops really read and write; the snapshot's comparison; the command line."""

import json
from dataclasses import replace

import pytest
import torch
from wikigpt.kernels import cross_entropy, flash_attn_func, layer_norm, linear_cross_entropy, rms_norm, roofline, swiglu
from wikigpt.kernels.rotary import apply_rotary_emb_qk, rotary_cos_sin

H100, A100 = roofline.GPUS["H100"], roofline.GPUS["A100"]


def size(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)


def forward_and_backward(function, inputs, outputs_of=lambda y: [y]):
    """(bytes of inputs and outputs forward, bytes of the gradients in both directions) of a real call."""
    outputs = outputs_of(function(*inputs))
    grads = [torch.randn_like(y) for y in outputs]
    return size(*inputs, *outputs), size(*grads, *torch.autograd.grad(outputs, inputs, grads))


def test_attention_reads_and_writes_each_tensor_once():
    q, k, v = leaf(2, 24, 4, 16), leaf(2, 24, 2, 16), leaf(2, 24, 2, 16)
    forward, gradients = forward_and_backward(lambda q, k, v: flash_attn_func(q, k, v, causal=True), (q, k, v))
    lse = 2 * 24 * 4 * 4
    assert roofline.attention(2, 24, 24, 4, 2, 16, True, False).bytes == forward + lse
    assert roofline.attention(2, 24, 24, 4, 2, 16, True, True).bytes == forward + lse + gradients


def test_attention_counts_flops_as_flashattention_does():
    """16k tokens, width 2,048, S = 2,048: 275 GFLOP (docs/kernels/attention.md)."""
    full = roofline.attention(8, 2048, 2048, 16, 16, 128, False, False)
    assert full.flops == 4 * 16384 * 2048 * 2048
    assert roofline.attention(8, 2048, 2048, 16, 16, 128, True, False).flops == full.flops / 2
    assert roofline.attention(8, 2048, 2048, 16, 16, 128, False, True).flops == 2.5 * full.flops
    seconds, bound = full.floor(H100)
    assert bound == "tensor"
    assert seconds == pytest.approx(278e-6, rel=5e-3)


@pytest.mark.parametrize("rms", [False, True])
def test_a_norm_moves_its_rows(rms):
    x, weight, bias = leaf(8, 64), leaf(64), leaf(64)
    y = rms_norm(x, weight, 1e-5) if rms else layer_norm(x, weight, bias, 1e-5)
    assert roofline.norm(8, 64, rms, False, False).bytes == size(x, y)
    assert roofline.norm(8, 64, rms, False, True).bytes == 3 * size(x)  # dy, h, dx
    assert roofline.norm(8, 64, rms, True, False).bytes == 4 * size(x)  # x, residual, h, y
    assert roofline.norm(8, 64, rms, True, True).bytes == 4 * size(x)  # dy, h, dh, dx


def test_an_activation_moves_its_tensors():
    gate, up = leaf(8, 64), leaf(8, 64)
    forward, gradients = forward_and_backward(swiglu, (gate, up))
    assert roofline.activation(8, 64, True, False).bytes == forward
    assert roofline.activation(8, 64, True, True).bytes == size(gate, up) + gradients
    assert roofline.activation(8, 64, False, False).bytes == 2 * size(gate)
    assert roofline.activation(8, 64, False, True).bytes == 3 * size(gate)


def test_rotary_moves_q_and_k():
    q, k = leaf(2, 4, 8, 16), leaf(2, 2, 8, 16)
    cos, sin = rotary_cos_sin(torch.arange(8), 16)
    turned = apply_rotary_emb_qk(q, k, cos, sin)
    assert roofline.rotary(2, 8, 4, 2, 16).bytes == size(q, k, *turned)


def test_cross_entropies_move_logits_or_their_factors():
    logits, target = leaf(8, 128), torch.randint(128, (8,))
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    assert roofline.cross_entropy(8, 128, False).bytes == size(logits)
    assert roofline.cross_entropy(8, 128, True).bytes == size(logits, grad)
    x, w = leaf(8, 32), leaf(128, 32)
    grads = torch.autograd.grad(linear_cross_entropy(x, w, target), (x, w))
    assert roofline.linear_cross_entropy(8, 32, 128, False).bytes == size(x, w)
    assert roofline.linear_cross_entropy(8, 32, 128, True).bytes == size(x, w, *grads)
    # docs/kernels/linear_cross_entropy.md: three products of 8,192 x 4,096 by 128,256 in 26.1 ms
    assert roofline.linear_cross_entropy(8192, 4096, 128256, True).floor(H100)[0] == pytest.approx(26.1e-3, rel=1e-2)


def test_the_optimiser_and_the_sampler_are_bound_by_memory():
    assert roofline.adamw(1000).bytes == 32_000
    assert roofline.sampling(64, 1000).bytes == 64 * 1000 * 4
    for gpu in roofline.GPUS.values():
        assert roofline.adamw(10**8).floor(gpu)[1] == "memory"
        assert roofline.sampling(64, 128256).floor(gpu)[1] == "memory"


def test_the_larger_bound_is_the_floor():
    work = roofline.Work(bytes=3.35e12, flops=1)
    assert work.floor(H100) == (pytest.approx(1.0), "memory")
    assert roofline.Work(1, 989.4e12).floor(H100) == (pytest.approx(1.0), "tensor")
    assert roofline.Work(1, 19.5e12, tensor=False).floor(A100) == (pytest.approx(1.0), "float32")
    twice = work + work
    assert (twice.bytes, twice.flops) == (2 * work.bytes, 2 * work.flops)


def test_every_shape_has_a_floor_on_every_gpu():
    found = roofline.cases()
    assert len({(case.op, case.shape) for case in found}) == len(found)
    for case in found:
        for gpu in roofline.GPUS.values():
            seconds, _ = case.work.floor(gpu)
            assert 1e-9 < seconds < 1, case


def test_groups_are_named_as_the_benchmarks_name_them():
    """Every group that a GPU benchmark would write is one of a case, word by word."""
    known = {case.group for case in roofline.cases()}
    assert "attention forward, head_dim 64, causal, S 512" in known
    assert "attention forward and backward, head_dim 128, full, S 16384" in known
    assert "decoding, batch 16, context 8192" in known
    assert "layer_norm with residual, backward, 8,192 x 4,096" in known
    assert "swiglu packed, forward, 8,192 x 11,008" in known
    assert "rotary halves, forward, batch 8, S 2048, 32 + 8 heads of 128" in known
    assert "linear cross-entropy, forward and backward, 8,192 x 4,096, vocabulary 128,256" in known
    assert "cross-entropy, forward and backward, 4,096 x 128,256" in known
    assert "AdamW with clipping, 124M parameters in 148 tensors" in known
    assert "sample, top_p 0.9, 64 x 128,256" in known


GROUP = "rotary halves, forward, batch 8, S 2048, 32 + 8 heads of 128"


def test_a_measured_time_shows_as_a_part_of_the_floor(tmp_path, capsys):
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    floor, _ = roofline.rotary(8, 2048, 32, 8, 128).floor(H100)
    rows = [{"group": GROUP, "name": "ours", "median": 2 * floor}, {"group": GROUP, "name": "liger", "median": floor}]
    (folder / "ops.json").write_text(json.dumps({"passed": True, "rotary": {"rows": rows}}))
    roofline.main(["rotary", "--results", str(tmp_path), "--gpu", "H100", "A100"])
    legend, forward, *_ = capsys.readouterr().out.split("\n\n")
    assert "not measured" in legend
    assert forward.startswith("rotary, forward\n")
    assert forward.count("50%") == 1
    assert forward.count("%") == 1, "of what is not measured there is only the floor"


def test_a_journal_of_gpu_check_counts_and_its_last_right_row(tmp_path):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    rows = [{"group": GROUP, "name": "ours", "median": 3.0}, {"group": GROUP, "name": "ours", "median": 2.0},
            {"group": GROUP, "name": "ours", "median": 1.0, "wrong": "off by 3"}]  # fmt: skip
    lines = [json.dumps({"part": "ops/others", "kind": "row", **row}) for row in rows]
    (folder / "journal.jsonl").write_text("\n".join([*lines, '{"part": "ops/oth']))
    assert roofline.measured(tmp_path) == {"H200": {GROUP: 2.0}}


@pytest.mark.parametrize("arguments", [[], ["--gpu", "H200"], ["--gpu", "H100", "H200"]])
def test_no_line_is_wider_than_a_hundred_columns(arguments, capsys):
    roofline.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("not measured" in line for line in lines) == 1


def test_the_last_column_wraps():
    lines = [["row", "verdict"], ["Blocks(1)", "right " * 20], ["Blocks(2)", ""]]
    first, second, third, *_, last = roofline.aligned(lines, 60).splitlines()
    assert first == "row        verdict"
    assert second.startswith("Blocks(1)  right")
    assert third.startswith("           right")
    assert last == "Blocks(2)"


def test_json_holds_the_same(capsys, tmp_path):
    roofline.main(["adamw", "--gpu", "B200", "--json", "--results", str(tmp_path)])
    rows = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in rows] == ["adamw"] * 3
    assert rows[0]["gpus"]["B200"] == {"floor": pytest.approx(32 * 10_121_216 / 8e12), "bound": "memory", "measured": None}


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        roofline.main(["attenton"])
    assert "unknown op 'attenton', known are attention" in capsys.readouterr().err


# --- the snapshot ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshot():
    pytest.importorskip("triton", reason="triton is for Linux alone")
    return roofline.read_snapshot()[1]


def test_the_snapshot_has_every_op_and_the_instruction_of_each_generation(snapshot):
    for op, arch in roofline.snapshot_keys():
        assert [k for k in snapshot if (k.op, k.arch) == (op, arch)], (op, arch)
    instructions = {k.arch: k.instruction for k in snapshot if k.case == "bfloat16 128 causal" and k.name == "_forward"}
    assert instructions == {80: "mma", 90: "wgmma", 100: "tcgen05"}


def test_what_is_equal_has_no_difference(snapshot):
    assert roofline.differences(snapshot, list(snapshot)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": 3}, None),
        ({"registers": -8}, None),
        ({"registers": 9}, "registers was"),
        ({"spills": 8}, "spills was"),
        ({"shared": 16}, "shared was"),
        ({"instructions": -1}, "instructions was"),
        ({"barriers": 1}, "barriers was"),
        ({"blocks": -1}, "blocks was"),
    ],
)
def test_a_change_of_one_kernel_is_named(snapshot, change, found):
    (name, by), kernel = next(iter(change.items())), snapshot[5]
    now = [*snapshot[:5], replace(kernel, **{name: getattr(kernel, name) + by}), *snapshot[6:]]
    differences = roofline.differences(snapshot, now)
    if found is None:
        assert differences == []
    else:
        assert len(differences) == 1
        assert found in differences[0]
        assert f"{kernel.op} sm_{kernel.arch}, {kernel.case}, {kernel.name}" in differences[0]


def test_narrower_loads_and_missing_and_new_kernels_are_named(snapshot):
    narrow = [replace(snapshot[0], load="4 B"), *snapshot[1:]]
    assert "load was async 16 B, is 4 B" in roofline.differences(snapshot, narrow)[0]
    assert roofline.differences(snapshot, snapshot[1:])[0].endswith("compiled no more")
    assert roofline.differences(snapshot[1:], snapshot)[0].endswith("not in the snapshot")


def test_kernels_of_one_name_are_compared_in_their_order(snapshot):
    twice = [snapshot[0], replace(snapshot[0], registers=snapshot[0].registers - 100)]
    assert roofline.differences(twice, list(twice)) == []
    assert len(roofline.differences(twice, twice[:1])) == 1


def test_what_is_written_is_read_again_with_a_line_for_each_kernel(snapshot, tmp_path, monkeypatch):
    path = tmp_path / "snapshot.json"
    roofline.write_snapshot(snapshot, "3.7.1", path)
    assert len(path.read_text().splitlines()) == len(snapshot) + 2
    monkeypatch.setattr(roofline, "SNAPSHOT_FILE", path)
    assert roofline.read_snapshot() == ("3.7.1", snapshot)


def test_the_kernels_of_the_snapshot_can_be_printed(snapshot, capsys):
    roofline.main(["rotary", "--kernels"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("triton ")
    assert sum(line.startswith("  _") for line in lines) == sum(kernel.op == "rotary" for kernel in snapshot)
    roofline.main(["rotary", "--kernels", "--markdown"])
    assert len(capsys.readouterr().out.splitlines()) == 3 + sum(kernel.op == "rotary" for kernel in snapshot)


def test_the_kernels_of_the_snapshot_fit_a_hundred_columns(snapshot, capsys):
    roofline.main(["--kernels"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
