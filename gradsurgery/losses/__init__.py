r"""Losses for forgetting and for retaining: pure functions that take no mean.

Most are functions of logits ``[N, V]`` and labels ``[N]`` with one value per token; the table says which look at whole
rows of logits, at a sequence's likelihood or at hidden states. They are exact for forgotten and for certain tokens,
where the usual code gives a model rounding noise or NaN.

| loss | of | paper |
|---|---|---|
| `ceu` | a token | [CE-U, 2503.01224](https://arxiv.org/abs/2503.01224) |
| `unlikelihood` | a token | [1908.04319](https://arxiv.org/abs/1908.04319) |
| `jensen_shannon_label`, `jensen_shannon` | a token; a row | JensUn, [2509.02820](https://arxiv.org/abs/2509.02820) |
| `inverted_hinge` | a token | [LoKU, 2408.06621](https://arxiv.org/abs/2408.06621) |
| `gradient_ascent`, `cross_entropy` | a token | [TOFU, 2401.06121](https://arxiv.org/abs/2401.06121) |
| `weighted_gradient_ascent` | a token | [G-effect, 2502.19301](https://arxiv.org/abs/2502.19301) |
| `satimp` | a token | SatImp in open-unlearning |
| `npo` | a sequence's likelihood | [2404.05868](https://arxiv.org/abs/2404.05868) |
| `simnpo` | a sequence's likelihood | [2410.07163](https://arxiv.org/abs/2410.07163) |
| `dpo` | a sequence's likelihood | [2305.18290](https://arxiv.org/abs/2305.18290) |
| `undial` | a row of logits, and a reference's | [2402.10052](https://arxiv.org/abs/2402.10052) |
| `kl_divergence` | a row of logits, and a reference's | [TOFU, 2401.06121](https://arxiv.org/abs/2401.06121) |
| `uniform` | a row of logits | [ULD, 2406.08607](https://arxiv.org/abs/2406.08607) |
| `logit_margin` with `DualVariable` | a row of logits | [PDU, 2506.05314](https://arxiv.org/abs/2506.05314) |
| `rmu` | hidden states | [2403.03218](https://arxiv.org/abs/2403.03218) |

From a model's logits to a loss: `answer_tokens` shifts and masks, a loss gives values, `token_mean` or `sequence_sum`
makes one number of them, or one per sequence.

>>> import torch
>>> logits, labels = torch.zeros(2, 4, 10, requires_grad=True), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
>>> tokens = answer_tokens(logits, labels, skip_first=1)
>>> token_mean(ceu(*tokens), tokens[1]).backward()

`linear` applies any loss of a token or a row to hidden states and a language-model head. Only answer tokens go through
the head, chunk by chunk, the gradient is computed on the way, and ``[tokens, vocabulary]`` is never held. A `Head`
describes a head that has more than a weight, and ``Loss.of`` binds the `Reference` that a loss compares with.

>>> hidden, head = torch.randn(5, 8, requires_grad=True), Head(torch.randn(10, 8), softcap=30.0)
>>> linear(hidden, head, torch.tensor([-100, 1, 2, 3, 4]), "ceu").sum().backward()
>>> compared = Loss.of(kl_divergence, reference=Reference(hidden.detach()))
>>> linear(hidden, head, torch.tensor([-100, 1, 2, 3, 4]), compared).sum().item()
0.0

**Your own loss** is one function of the labels' log-odds $d = \log(p_y / (1 - p_y))$. It works everywhere that the
losses above do; a plain function of logits and labels does too.

>>> from functools import partial
>>> from torch.nn.functional import softplus
>>> @token_loss
... def patient_unlikelihood(odds, *, patience=2.0):
...     return softplus(odds) * (odds > -patience)  # unlikelihood that lets go once the odds are below exp(-patience)
>>> patient_unlikelihood(torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0]))
tensor([0.6931, 0.0000])
>>> values = linear(hidden, head, torch.tensor([-100, 1, 2, 3, 4]), partial(patient_unlikelihood, patience=3.0))
"""

from gradsurgery.losses import _rows, _sequences, _tokens
from gradsurgery.losses._answers import answer_lengths, answer_tokens, sequence_sum, token_mean
from gradsurgery.losses._backend import backend
from gradsurgery.losses._checks import IGNORED
from gradsurgery.losses._head import Head, Reference
from gradsurgery.losses._linear import linear
from gradsurgery.losses._loss import Loss
from gradsurgery.losses._multiplier import DualVariable
from gradsurgery.losses._representations import rmu, rmu_direction
from gradsurgery.losses._rows import *  # noqa: F403 (its __all__ is its table of losses)
from gradsurgery.losses._sequences import *  # noqa: F403 (its __all__ is its table of losses)
from gradsurgery.losses._table import LOSSES, ROW_LOSSES, SEQUENCE_LOSSES, as_row_loss, by_name
from gradsurgery.losses._token_loss import TokenLoss, token_loss
from gradsurgery.losses._tokens import *  # noqa: F403 (its __all__ is its table of losses)

__all__ = [
    "IGNORED",
    "LOSSES",
    "ROW_LOSSES",
    "SEQUENCE_LOSSES",
    "DualVariable",
    "Head",
    "Loss",
    "Reference",
    "TokenLoss",
    "answer_lengths",
    "answer_tokens",
    "as_row_loss",
    "backend",
    "by_name",
    "linear",
    "rmu",
    "rmu_direction",
    "sequence_sum",
    "token_loss",
    "token_mean",
]
__all__ += _tokens.__all__
__all__ += _rows.__all__
__all__ += _sequences.__all__
