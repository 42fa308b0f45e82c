"""GRU in two dimensions, where it can be seen: the geometry of one step, and 60 steps with and without it.

Run it: python examples/toy_2d.py   (writes toy_2d.png)
"""

import torch
from matplotlib.figure import Figure

import gradsurgery as gs


def retain_loss(point: torch.Tensor) -> torch.Tensor:
    return 0.5 * (point[0] ** 2 + 6.0 * point[1] ** 2)  # an ellipse around the origin: stay near it


def forget_loss(point: torch.Tensor) -> torch.Tensor:
    return -point[0] - 1.4 * point[1]  # a slope: leads away, and across the ellipse


def walk(rule: str, start: tuple[float, float] = (-1.2, 0.55), steps: int = 60) -> torch.Tensor:
    point = torch.nn.Parameter(torch.tensor(start))
    optimizer = gs.GradientSurgery(torch.optim.SGD([point], lr=0.04), rule=RULES[rule])
    path = [point.detach().clone()]
    for _ in range(steps):
        optimizer.join(forget=forget_loss(point), retain=retain_loss(point)).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(point.detach().clone())
    return torch.stack(path)


RULES = {"forget gradient alone": lambda gram: gs.rules.gradient_difference(gram, alpha=0.0), "GRU": gs.rules.gru}
forget, retain = torch.tensor([1.0, 1.4]), torch.tensor([0.9, -1.3])  # the directions of descent
coefficients = gs.rules.gru(gs.gram.gram([[forget], [retain]]))
update = coefficients[0] * forget + coefficients[1] * retain

figure = Figure(figsize=(10, 4.2), layout="constrained")
left, right = figure.subplots(1, 2)
left.axline((0, 0), (-retain[1].item(), retain[0].item()), color="#9ca3af", ls="--", lw=1)
for arrow, name, colour in (
    (retain, "retain", "#1d4ed8"),
    (forget, "forget", "#c2410c"),
    (update, "GRU's update", "#15803d"),
):
    left.annotate("", arrow.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
    left.annotate(f" {name}", arrow.tolist(), color=colour, fontweight="bold")
left.plot(*zip(forget.tolist(), update.tolist(), strict=True), color="#9ca3af", lw=1, ls=":")
left.set(xlim=(-0.6, 2.8), ylim=(-1.6, 1.8), aspect="equal", title="One step: what would hurt retention is removed")
x, y = torch.meshgrid(torch.linspace(-1.6, 2.2, 80), torch.linspace(-1.0, 2.4, 80), indexing="xy")
right.contour(x, y, 0.5 * (x**2 + 6 * y**2), levels=12, colors="#bfdbfe")
for name, colour in (("forget gradient alone", "#c2410c"), ("GRU", "#15803d")):
    path = walk(name)
    right.plot(
        path[:, 0],
        path[:, 1],
        color=colour,
        marker="o",
        ms=2.5,
        label=f"{name}: retain loss {retain_loss(path[-1]):.2f}",
    )
right.set(xlim=(-1.6, 2.2), ylim=(-1.0, 2.4), title="60 steps on the retain loss's contours")
right.legend(frameon=False)
figure.savefig("toy_2d.png", dpi=150)
