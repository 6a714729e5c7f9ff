"""One small problem for each kind of module in the table of docs/compatibility.md, by the words of its first cell."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.functional import accuracy

from tests.sampling import helpers
from tests.sampling.helpers import cross_entropy, mean_squared, next_token

VOCABULARY, WIDTH = 11, 8


def in_eights(tensors: Sequence[Tensor]) -> list[Any]:
    return [tuple(t[i : i + 8] for t in tensors) for i in range(0, len(tensors[0]), 8)]


@dataclass(frozen=True)
class Problem:
    """A module, data, and the user's loss.

    Attributes:
        make: builds the user's module.
        data: the tensors, first dimension samples.
        loss_fn: the user's loss; None for a ``training_step``.
        context: what the loss is computed in (autocast).
        in_float32: plain autograd is asked of the module and its data in float32.
        batches: makes minibatches of the tensors.
        tolerance: relative, of losses and gradients.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    loss_fn: Optional[Callable[[nn.Module, Any], Any]] = mean_squared
    context: Optional[Callable[[], AbstractContextManager[Any]]] = None
    in_float32: bool = False
    batches: Callable[[Sequence[Tensor]], list[Any]] = in_eights
    tolerance: float = 3e-5


PROBLEMS: dict[str, Callable[[], Problem]] = {}
"""By the first cell of a row; called late, so that a package that is not there skips one row only."""


def row(name: str) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Register the problem of the table's row ``name``."""

    def register(make: Callable[[], Problem]) -> Callable[[], Problem]:
        assert name not in PROBLEMS
        PROBLEMS[name] = make
        return make

    return register


def regression() -> TensorDataset:
    return helpers.regression(32)


def classes() -> TensorDataset:
    return helpers.classification((5,), n=32)


def images() -> TensorDataset:
    return helpers.classification((1, 8, 8), n=32)


def series() -> TensorDataset:
    return helpers.classification((5, 4), n=32)


def tokens() -> TensorDataset:
    return TensorDataset(*(t.contiguous() for t in helpers.tokens(n=32).tensors))


def on_tokens(*body: Callable[[], nn.Module], **of_embedding: Any) -> Callable[[], Problem]:
    """Embedding, some layers, a head over the vocabulary."""

    def make() -> nn.Module:
        embedding = nn.Embedding(VOCABULARY, WIDTH, **of_embedding)
        return nn.Sequential(embedding, *(layer() for layer in body), nn.Linear(WIDTH, VOCABULARY))

    return lambda: Problem(make, tokens, next_token)


def on_images(norm: Callable[[], nn.Module]) -> Callable[[], Problem]:
    return lambda: Problem(lambda: helpers.Conv(norm), images, cross_entropy)


def dense(*hidden: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """5 inputs, hidden layers of width 8, 3 outputs."""
    return lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *(layer() for layer in hidden), nn.Linear(8, 3))


def with_loss(loss_fn: Callable[[nn.Module, Any], Any]) -> Callable[[], Problem]:
    return lambda: Problem(helpers.mlp, regression, loss_fn)


row("MLP")(lambda: Problem(helpers.mlp, regression))
row("convnet")(on_images(nn.Identity))
row("GroupNorm")(on_images(lambda: nn.GroupNorm(2, 4)))
row("LayerNorm")(on_tokens(lambda: nn.LayerNorm(WIDTH)))
row("BatchNorm")(on_images(lambda: nn.BatchNorm2d(4)))
row("Dropout")(lambda: Problem(dense(lambda: nn.Dropout(0.5)), regression))
row("nn.Embedding")(on_tokens())
row("nn.Embedding(sparse=True)")(on_tokens(sparse=True))
row("nn.Embedding(padding_idx=...)")(on_tokens(padding_idx=0))
row("tied embeddings")(lambda: Problem(helpers.Tied, tokens, next_token))
row("F.scaled_dot_product_attention")(lambda: Problem(helpers.Attention, tokens, next_token))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


row("nn.MultiheadAttention")(on_tokens(SelfAttention))
row("nn.TransformerEncoder")(on_tokens(encoder))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], packed: bool = False) -> None:
        super().__init__()
        self.body = kind(4, 6, 2, batch_first=True, dropout=0.5)
        self.head = nn.Linear(6, 4)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = 3 + (x[:, 0, 0] > 0).long().cpu()
            state = self.body(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        return self.head(self.body(x)[0][:, -1])


class ByHand(nn.Module):
    """A loop over time in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state)


row("nn.RNN")(lambda: Problem(lambda: Recurrent(nn.RNN), series, cross_entropy))
row("nn.GRU")(lambda: Problem(lambda: Recurrent(nn.GRU), series, cross_entropy))
row("nn.LSTM")(lambda: Problem(lambda: Recurrent(nn.LSTM), series, cross_entropy))
row("packed sequences")(lambda: Problem(lambda: Recurrent(nn.GRU, packed=True), series, cross_entropy))
row("nn.GRUCell in a loop")(lambda: Problem(ByHand, series, cross_entropy))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def block(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


row("checkpoint(use_reentrant=True)")(lambda: Problem(lambda: Checkpointed(True), regression))
row("checkpoint(use_reentrant=False)")(lambda: Problem(lambda: Checkpointed(False), regression))


def with_item(module: nn.Module, batch: Any) -> Tensor:
    loss = mean_squared(module, batch)
    return loss * (1.0 + 0.0 * loss.item())


def with_numpy(module: nn.Module, batch: Any) -> Tensor:
    loss = mean_squared(module, batch)
    assert loss.detach().numpy() >= 0
    return loss


def masked(module: nn.Module, batch: Any) -> Tensor:
    error = (module(batch[0]) - batch[1]).square().sum(-1)
    return error[error > 0.5].mean()


def weighted(module: nn.Module, batch: Any) -> Tensor:
    error = (module(batch[0]) - batch[1]).square().sum(-1)
    keep = error > 0.5
    return torch.where(keep, error, 0.0).sum() / keep.sum()


def branching(module: nn.Module, batch: Any) -> Tensor:
    out = module(batch[0])
    return (out - batch[1]).square().mean() if out.mean() > -100.0 else out.square().mean()


row(".item() in the step")(with_loss(with_item))
row(".numpy() in the step")(with_loss(with_numpy))
row("outputs indexed by a mask")(with_loss(masked))
row("torch.where in place of a mask")(with_loss(weighted))
row("if or while on a tensor")(with_loss(branching))


def ignoring(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x).flatten(0, 1), torch.where(y > 2, y, -100).flatten(), ignore_index=-100)


row("ignore_index")(lambda: Problem(on_tokens()().make, tokens, ignoring))


class Experts(nn.Module):
    """Each sample to the expert that its gate likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == k).squeeze(-1)
            out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return out


row("mixture of experts with nonzero")(lambda: Problem(Experts, regression))


class FillsZeros(nn.Module):
    """Writes into a tensor of zeros that vmap knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 3)
        out[:, :1] = self.first(x)
        out[:, 1:] = self.second(x)
        return out


class InList(nn.Module):
    """Uses its parameters through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weights = [self.layer.weight, self.layer.bias]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.weights)


class Keeps(nn.Module):
    """Keeps its last activation, for the user to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.last: Optional[Tensor] = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


row("outputs written into torch.zeros")(lambda: Problem(FillsZeros, regression))
row("parameters used through a plain list")(lambda: Problem(InList, regression))
row("activations kept as attributes")(lambda: Problem(Keeps, regression))
row("a module that cannot be copied")(lambda: Problem(Uncopyable, regression))


@dataclass
class Pair:
    x: Tensor
    y: Tensor


def pairs(tensors: Sequence[Tensor]) -> list[Any]:
    return [Pair(*batch) for batch in in_eights(tensors)]


def ragged(tensors: Sequence[Tensor]) -> list[Any]:
    return [*in_eights(tensors)[:3], tuple(t[-5:] for t in tensors)]


def of_pair(module: nn.Module, batch: Pair) -> Tensor:
    return mean_squared(module, (batch.x, batch.y))


row("batches of different shapes")(lambda: Problem(helpers.mlp, regression, batches=ragged))
row("batches that are a dataclass")(lambda: Problem(helpers.mlp, regression, of_pair, batches=pairs))


@dataclass
class Registered:
    x: Tensor
    y: Tensor


torch.export.register_dataclass(Registered)


def registered(tensors: Sequence[Tensor]) -> list[Any]:
    return [Registered(*batch) for batch in in_eights(tensors)]


row("batches that are a registered dataclass")(lambda: Problem(helpers.mlp, regression, of_pair, batches=registered))


def with_penalty(module: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    out = module(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, batch[1]) + (slope.norm(dim=1) - 1).square().mean()


def with_flatness(module: nn.Module, batch: Any) -> Tensor:
    loss = mean_squared(module, batch)
    slopes = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    return loss + 0.1 * sum(slope.square().sum() for slope in slopes)


def on_adversaries(module: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    mean_squared(module, (x, batch[1])).backward()
    assert x.grad is not None
    return mean_squared(module, (batch[0] + 0.1 * x.grad.sign(), batch[1]))


row("a derivative by the inputs (gradient penalty)")(lambda: Problem(helpers.mlp, regression, with_penalty))
row("a derivative by the weights (flatness penalty)")(lambda: Problem(helpers.mlp, regression, with_flatness))
row("backward() in the step (adversarial inputs)")(lambda: Problem(helpers.mlp, regression, on_adversaries))


def ctc(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    log_probs = module(x).log_softmax(-1).transpose(0, 1)
    lengths: Any = (x.shape[1],) * len(x), (2,) * len(x)
    return F.ctc_loss(log_probs, y[:, :2] % (VOCABULARY - 1) + 1, *lengths)


row("CTC loss")(lambda: Problem(on_tokens()().make, tokens, ctc))


class GivesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        out = self.layer(x)
        return {"out": out, "hidden": [x, out.tanh()], "size": len(x)}


def of_dict(module: nn.Module, batch: Any) -> Any:
    output = module(batch[0])
    return {"loss": (output["hidden"][1] - batch[1]).square().mean(), "more": output["out"]}


row("dict outputs")(lambda: Problem(GivesDict, regression, of_dict))


def per_sample(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


row("one loss a sample")(lambda: Problem(lambda: nn.Linear(5, 4), classes, per_sample))


class MetricIsLoss(LightningModule):
    """The value of a torchmetric is the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.error(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


class FunctionalMetric(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        self.log("accuracy", accuracy(logits.softmax(-1), y, task="multiclass", num_classes=4))
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


class ItemInLog(LightningModule):
    """Logs Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss.item())
        return loss


row("torchmetrics and self.log in the step")(lambda: Problem(helpers.WithMetric, classes, None))
row("torchmetrics.functional in the step")(lambda: Problem(FunctionalMetric, classes, None))
row("a torchmetric as the loss")(lambda: Problem(MetricIsLoss, regression, None))
row("self.log of .item()")(lambda: Problem(ItemInLog, classes, None))


class OldSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class NewSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Square(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


row("autograd.Function, old style")(lambda: Problem(dense(lambda: Square(OldSquare)), regression))
row("autograd.Function with setup_context and a vmap rule")(
    lambda: Problem(dense(lambda: Square(NewSquare)), regression)
)
row("scripted submodule")(lambda: Problem(helpers.Scripted, regression))


class Compiled(nn.Module):
    """Part of it compiled, with a backend that costs no time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), backend="eager")
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


row("torch.compile of a submodule")(lambda: Problem(Compiled, regression))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(8, 8))


row("parametrizations.weight_norm")(
    lambda: Problem(dense(lambda: parametrizations.weight_norm(nn.Linear(8, 8))), regression)
)
row("parametrizations.spectral_norm")(
    lambda: Problem(dense(lambda: parametrizations.spectral_norm(nn.Linear(8, 8))), regression)
)
row("nn.utils.weight_norm (hook)")(lambda: Problem(dense(old_weight_norm), regression))
row("nn.utils.spectral_norm (hook)")(
    lambda: Problem(dense(lambda: nn.utils.spectral_norm(nn.Linear(8, 8))), regression)
)


class Noisy(nn.Module):
    """Random numbers in the forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.decoder = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return self.decoder(mean + torch.randn_like(mean))


row("random numbers in the step")(lambda: Problem(Noisy, regression))


def regression_in(dtype: torch.dtype) -> Callable[[], TensorDataset]:
    return lambda: TensorDataset(*(t.to(dtype) for t in regression().tensors))


class Casts(nn.Module):
    """Casts its input, so that its weights cannot be float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.bfloat16()).float()


row("bfloat16 weights")(
    lambda: Problem(lambda: helpers.mlp().bfloat16(), regression_in(torch.bfloat16), in_float32=True)
)
row("bfloat16 weights and casts in the forward")(lambda: Problem(Casts, regression))
row("float64 weights")(lambda: Problem(lambda: helpers.mlp().double(), regression_in(torch.float64), tolerance=1e-10))
row("bfloat16 autocast")(
    lambda: Problem(helpers.mlp, regression, context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=2e-2)
)


@row("Hugging Face GPT-2")
def gpt2() -> Problem:
    hf = pytest.importorskip("transformers")
    sizes = {"n_positions": 8, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    config = hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    return Problem(lambda: hf.GPT2LMHeadModel(config), tokens, lambda m, batch: m(input_ids=batch[0], labels=batch[0]))


@row("Hugging Face BERT")
def bert() -> Problem:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)
    return Problem(lambda: hf.BertForMaskedLM(config), tokens, lambda m, batch: m(input_ids=batch[0], labels=batch[1]))
