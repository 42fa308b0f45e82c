"""A plan of deletion requests as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

WIDEST = 10
"""So many requests' cosines fit into a terminal's line."""


def plan_table(plan: Mapping[str, Any]) -> Table:
    """A line for each request, group by group; the cosine with each other one where they are few."""
    requests, groups = plan["requests"], plan["groups"]
    numbers = {request["id"]: number for number, request in enumerate(requests)}
    few = len(requests) <= WIDEST
    title = "Requests in groups that are cheap to do together; cosine with retention, and with each other request"
    drawn = Table(title=title, title_style="bold", header_style="bold")
    for heading in ("group", "request", "rows", "known", "retention"):
        drawn.add_column(heading, justify="left" if heading == "request" else "right", overflow="fold")
    for number in range(len(requests) if few else 0):
        drawn.add_column(str(number + 1), justify="right")
    for number, group in enumerate(groups, start=1):
        for place, name in enumerate(group["requests"]):
            request = requests[numbers[name]]
            cells = [str(number), f"{numbers[name] + 1} {name}", str(request["rows"]), f"{request['probability']:.3f}"]
            cells.append(f"{request['retain_cosine']:.2f}")
            if few:
                row = plan["cosines"][numbers[name]]
                cells += ["" if other == numbers[name] else f"{value:.2f}" for other, value in enumerate(row)]
            drawn.add_row(*map(escape, cells), end_section=place == len(group["requests"]) - 1)
    return drawn


def group_table(plan: Mapping[str, Any]) -> Table:
    """A line for each group: the steps that it is estimated to take, together and apart."""
    drawn = Table(title="Steps, in those of one request alone", title_style="bold", header_style="bold")
    for heading in ("group", "requests", "together", "apart", "saved"):
        drawn.add_column(heading, justify="left" if heading == "requests" else "right", overflow="fold")
    for number, group in enumerate(plan["groups"], start=1):
        names = group["requests"]
        cells = [str(number), ", ".join(names), f"{group['steps']:.2f}", str(len(names)), f"{group['saved']:.0%}"]
        drawn.add_row(*map(escape, cells))
    return drawn


def plan_figure(plan: Mapping[str, Any]) -> Any:
    """The cosine of every two requests, and of each with retention, as a matplotlib figure; group by group."""
    import numpy as np
    from matplotlib.figure import Figure

    requests = plan["requests"]
    numbers = {request["id"]: number for number, request in enumerate(requests)}
    order = [numbers[name] for group in plan["groups"] for name in group["requests"]]
    field = np.array(
        [[plan["cosines"][one][other] for other in order] + [requests[one]["retain_cosine"]] for one in order]
    )
    count = len(order)
    drawn = Figure(figsize=(3.4 + 0.55 * count, 1.8 + 0.45 * count), layout="constrained")
    axes = drawn.subplots()
    shown = axes.imshow(field, cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto")
    drawn.colorbar(shown, ax=axes)
    for row, column in np.ndindex(field.shape) if count <= 2 * WIDEST else ():
        colour = "white" if abs(field[row, column]) > 0.6 else "#1c1917"
        axes.text(column, row, f"{field[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    ends = np.cumsum([len(group["requests"]) for group in plan["groups"]]) - 0.5
    for end in ends:
        axes.axhline(end, color="#1c1917", linewidth=1.5)
    axes.axvline(count - 0.5, color="#1c1917", linewidth=1.5)
    axes.set_xticks(range(count + 1), [*(str(number + 1) for number in order), "retention"], fontsize=8)
    labels = [f"{number + 1} {requests[number]['id']}"[:24] for number in order]
    axes.set_yticks(range(count), labels, fontsize=8, parse_math=False)
    axes.set_title("Cosine of the requests' gradients, by group; negative: they conflict", fontsize=10)
    return drawn
