"""Any function of the Gram matrix is a rule: one of your own, and those of TorchJD if it is installed.

Run it: python examples/any_gram_rule.py   (pip install torchjd for the second half)
"""

import torch

import gradsurgery as gs


def loudest(gram: torch.Tensor) -> torch.Tensor:
    """Step along the longest gradient only: gram [..., K, K] -> coefficients [..., K]."""
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    return (lengths == lengths.amax(-1, keepdim=True)).to(gram)


rules = {"loudest": loudest, "gru": gs.rules.gru, "upgrad": gs.rules.upgrad}
try:
    from torchjd.aggregation import (  # pyright: ignore[reportMissingImports]
        IMTLGWeighting,
        MGDAWeighting,
        PCGradWeighting,
    )
except ImportError:
    print("without TorchJD; pip install torchjd")
else:
    # A Weighting maps [K, K] to [K], so it is a rule for scope="global"; several blocks would need torch.vmap.
    rules |= {"TorchJD MGDA": MGDAWeighting(), "TorchJD PCGrad": PCGradWeighting(), "TorchJD IMTL-G": IMTLGWeighting()}

for name, rule in rules.items():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), rule=rule)
    optimizer.join(forget=2.0 * weight[0] - weight[1], retain=0.5 * weight.square().sum() - weight[0]).backward()
    optimizer.step()
    if record := optimizer.record:
        changes = " ".join(f"{change:+.2f}" for change in record.predicted_change.tolist())
        print(f"{name:15} predicted change of forget, retain per unit of learning rate: {changes}")
