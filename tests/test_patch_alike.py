"""patch() swaps what computes the same on every input a module takes, and nothing that only looks alike.

Every norm and activation of torch.nn and of the installed transformers is patched and asked on inputs of all ranks, in
training and eval mode, in float32 and bfloat16: it must answer as it did.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN
from wikigpt.kernels import backend

from wikigpt.integrations import patch as patching
from wikigpt.integrations.patch import patch

N = 16
SHAPES = [
    (N,), (1, N), (5, N), (N, N), (0, N), (2, 3, N), (1, 1, N), (2, N, N), (2, N, 3), (2, N, 1),
    (2, 3, 4, N), (2, N, 3, 4), (2, N, 1, 1), (2, N, N, N), (2, 4, 4, N), (1, 2, 2, 3, N), (2, N, 2, 2, 3),
]  # fmt: skip


def answers(module):
    """What it gives for each input that it takes, by (shape, dtype, mode)."""
    given = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = copy.deepcopy(module).to(dtype)
        for shape in SHAPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(len(given)))
            x = (3 * x + 0.5).to(dtype)
            for training in (False, True):
                torch.manual_seed(0)  # of those that draw
                with contextlib.suppress(Exception), torch.no_grad():
                    given[shape, dtype, training] = module.train(training)(x.clone())
    return given


def assert_answers_stay(module):
    """Whether it was swapped, too."""
    for p in module.parameters():
        nn.init.normal_(p)
    holder = nn.Sequential(module.eval())
    before = answers(holder)
    try:
        swapped = patch(holder)
    except ValueError:  # nothing was found
        return False
    with backend("torch"):
        after = answers(holder)
    assert before.keys() <= after.keys()
    for case, y in before.items():
        tolerance = {"rtol": 2e-5, "atol": 5e-5} if y.dtype == torch.float32 else {"rtol": 4e-2, "atol": 6e-2}
        torch.testing.assert_close(after[case], y, msg=lambda text, case=case: f"{case}: {text}", **tolerance)
    return bool(swapped["norm"] or swapped["activation"])


# --- torch.nn -------------------------------------------------------------------------------------------------------

NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(N),
    "LayerNorm without bias": lambda: nn.LayerNorm(N, bias=False),
    "LayerNorm without weights": lambda: nn.LayerNorm(N, elementwise_affine=False),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((4, N)),
    "RMSNorm": lambda: nn.RMSNorm(N, eps=1e-5),
    "RMSNorm of two dimensions": lambda: nn.RMSNorm((4, N), eps=1e-5),
    "one GroupNorm": lambda: nn.GroupNorm(1, N),
    "GroupNorm": lambda: nn.GroupNorm(4, N),
    "a group each": lambda: nn.GroupNorm(N, N),
    "BatchNorm1d": lambda: nn.BatchNorm1d(N),
    "BatchNorm1d of the batch": lambda: nn.BatchNorm1d(N, track_running_stats=False),
    "BatchNorm2d of the batch": lambda: nn.BatchNorm2d(N, track_running_stats=False),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(N, affine=True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(N, affine=True),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_torch_answers_as_before_on_every_rank(name):
    swapped = assert_answers_stay(NORMS[name]())
    assert swapped == (name in ("LayerNorm", "LayerNorm without bias", "RMSNorm"))


# Their constructors need arguments, or their forward a second tensor.
ACTIVATIONS = sorted(set(nn.modules.activation.__all__) - {"MultiheadAttention", "Threshold", "Softmax2d"})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_torch_answers_as_before_on_every_rank(name):
    assert assert_answers_stay(getattr(nn, name)()) == (name == "GELU")


# --- transformers ---------------------------------------------------------------------------------------------------


@functools.cache
def norm_classes():
    """(module, class) of each norm of the modelling files; of those with the same code the first."""
    found = {}
    code = re.compile(r"^class (\w*Norm(?:\w{0,3}|PerHead))\(((?:torch\.)?nn\.\w+)\):\n((?:(?:    .*)?\n)+)", re.M)
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name, base, body in code.findall(file.read_text()):
            plain = re.sub(r"\s+|#.*", "", re.sub(r'"""[\s\S]*?"""', "", body)).replace(name, "")
            found.setdefault(
                (base.removeprefix("torch."), plain), (f"transformers.models.{file.parent.name}.{file.stem}", name)
            )
    return sorted(found.values(), key=lambda pair: pair[1])


def built(norm):
    """It, in each of the ways in which constructors of norms are called."""
    arguments = inspect.signature(norm).parameters
    options = [{}, *({"data_format": order} for order in ("channels_first", "channels_last") if "data_format" in arguments)]
    for sizes in ((N,), (1, N)):
        for option in options:
            with contextlib.suppress(Exception):
                yield norm(*sizes, **option)


@pytest.mark.slow
def test_every_norm_of_transformers_answers_as_before_on_every_rank():
    swapped, tried = set(), set()
    for path, name in norm_classes():
        for module in built(getattr(importlib.import_module(path), name)):
            tried.add(name)
            if assert_answers_stay(module):
                swapped.add(name)
    assert len(tried) > 30
    for known in ("LlamaRMSNorm", "AfmoeRMSNorm"):  # the first of those with one code
        assert known in swapped or known not in tried
    assert {"GemmaRMSNorm", "CohereLayerNorm"} <= swapped
    assert not swapped & {"PoolFormerGroupNorm", "SqueezeBertLayerNorm"}


@pytest.mark.parametrize("name", ACT2FN)
def test_an_activation_of_transformers_answers_as_before_on_every_rank(name):
    try:
        module = ACT2FN[name]
    except ImportError as error:
        pytest.skip(str(error))
    assert_answers_stay(module)


# --- what a probe could overlook ------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(N)), 1e-5

    def forward(self, x):
        return F.rms_norm(x, (N,), self.weight, self.eps)


class NormOverChannels(Norm):
    """Over dimension 1 where there are more than two, as norms of images."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 4 else super().forward(x)


class NormOverChannelsOfTheirNumber(Norm):
    """Channels first where the sizes say so."""

    def forward(self, x):
        first = x.dim() > 2 and x.shape[1] == N
        return super().forward(x.transpose(1, -1)).transpose(1, -1) if first else super().forward(x)


class NormOverTokens(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean((-2, -1) if x.dim() == 3 else -1, keepdim=True) + self.eps) * self.weight


class NormWithNoise(Norm):
    def forward(self, x):
        return super().forward(x) * (1.5 if self.training else 1.0)


class NormThatClips(Norm):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class NormInFloat32(Norm):
    def forward(self, x):
        return super().forward(x).float()


class NormOfOne(Norm):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


class ClippedGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x).clamp(max=12)


class GELUInTraining(nn.Module):
    def forward(self, x):
        return F.gelu(F.dropout(x, 0.5, self.training))


class GELUOfRows(nn.Module):
    def forward(self, x):
        return F.gelu(x if x.dim() < 3 else x - x.mean(1, keepdim=True))


class GELUInFloat32(nn.Module):
    def forward(self, x):
        return F.gelu(x.float())


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(N, 24), nn.Linear(N, 24), nn.Linear(24, N)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = nn.Linear(N, 48), nn.Linear(24, N), nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.activation_fn(gate) * up)


class PackedMLPUpFirst(PackedMLP):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.activation_fn(gate) * up)


class PackedMLPInterleaved(PackedMLP):
    def forward(self, x):
        packed = self.gate_up_proj(x)
        return self.down_proj(self.activation_fn(packed[..., ::2]) * packed[..., 1::2])


class MLPWithDropout(MLP):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


class MLPThatClips(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x).clamp(-7.0, 7.0))


class MLPOverTokens(MLP):
    def forward(self, x):
        return super().forward(x if x.dim() < 3 else x.roll(1, -2))


class MLPInFloat32(MLP):
    def forward(self, x):
        return super().forward(x).float()


ALIKE = [NormOverChannels, NormOverChannelsOfTheirNumber, NormOverTokens, NormWithNoise, NormThatClips, NormInFloat32,
         NormOfOne, ClippedGELU, GELUInTraining, GELUOfRows, GELUInFloat32, PackedMLPUpFirst, PackedMLPInterleaved,
         MLPWithDropout, MLPThatClips, MLPOverTokens, MLPInFloat32]  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("training", [False, True])
def test_what_differs_on_some_inputs_only_is_left_alone(kind, training):
    with pytest.raises(ValueError, match="found nothing to swap"):
        patch(nn.Sequential(kind().train(training)), rotary=False, loss=False)


@pytest.mark.parametrize("kind", [Norm, MLP, PackedMLP])
@pytest.mark.parametrize("training", [False, True])
def test_what_does_not_is_swapped(kind, training):
    assert assert_answers_stay(kind().train(training))


class Rotating(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary(q, k, cos, sin)


def apply_rotary(q, k, cos, sin):
    """Llama's where cos is as wide as q; of a part of the width, the last features turn."""
    halves = [x[..., x.shape[-1] - cos.shape[-1] :] for x in (q, k)]
    turned = [(x * cos[:, None]) + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin[:, None] for x in halves]
    return tuple(torch.cat((x[..., : x.shape[-1] - cos.shape[-1]], y), -1) for x, y in zip((q, k), turned))


def test_a_rotation_of_the_last_features_is_left_alone():
    with patching._probing():
        assert patching._rotary(Rotating()) is None
