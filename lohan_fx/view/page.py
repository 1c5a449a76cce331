"""The page: data, style and scripts put together into one HTML file.

Scripts and styles are the files of `assets/`, joined in the order given here. The page's own policy
(Content-Security-Policy) allows these texts by their hashes and nothing else: no network, no other
script. Data is JSON in an element that no browser executes, without any character that could end it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from lohan_fx.errors import LohanError
from lohan_fx.plan import Plan
from lohan_fx.tracing import Trace

from .data import labels, plan_data
from .differences import differences
from .measured import disagreements
from .timeline import timeline_data

_STYLES = ("vendor/uPlot.min", "style/base", "style/charts", "style/table")
_LIBRARY = "vendor/uPlot.iife.min"
_SCRIPTS = (
    "element",
    "units",
    "palette",
    "model",
    "range",
    "selection",
    "header",
    "lanes",
    "memory",
    "stages",
    "table",
    "detail",
    "comparison",
    "agreement",
    "main",
)


def render(
    plans: Sequence[tuple[str, Plan]],
    measured: Trace | None = None,
    *,
    any_plan: bool = False,
) -> str:
    """The HTML page of one or more (name, plan), with a run's last step over its prediction.

    The run is shown with the first plan of the same graph. Raises PlanMismatch where there is none,
    unless `any_plan`, which takes the first plan then; LohanError where that plan has no timeline.
    """
    if not plans:
        raise LohanError("there is no plan to show")
    data: dict[str, Any] = {
        "plans": [
            plan_data(plan, label) for (_, plan), label in zip(plans, labels(plans), strict=True)
        ],
        "measured": None,
        "differences": None,
    }
    only_plans = [plan for _, plan in plans]
    if len(plans) > 1:
        data["differences"] = differences(only_plans)
    if measured is not None:
        data["measured"] = _measured(only_plans, measured, data["plans"], any_plan)
    return _assemble(" | ".join(dict.fromkeys(plan.model for plan in only_plans)), data)


def _measured(
    plans: Sequence[Plan], trace: Trace, shown: Sequence[dict[str, Any]], any_plan: bool
) -> dict[str, Any]:
    number = next((k for k, p in enumerate(plans) if p.fingerprint == trace.fingerprint), 0)
    plan = plans[number]
    if not any_plan:
        trace.check_matches(plan)
    if plan.timeline is None:
        raise LohanError(f"the plan of {plan.model} has no timeline to lay a measured step over")
    last = trace.steps[-1]
    names = shown[number]["items"]
    rows = {(kind, index): row for row, (kind, index, _) in enumerate(names)}
    timeline = timeline_data(last, rows, names)
    notes = shown[number]["item_notes"]
    notes.extend("" for _ in range(len(names) - len(notes)))
    return {
        "plan": number,
        "model": trace.model,
        "device": trace.device,
        "steps_s": [step.step_s for step in trace.steps],
        "same_graph": trace.fingerprint == plan.fingerprint,
        "timeline": timeline,
        "disagreements": disagreements(plan.timeline, last),
    }


def write(path: Path, text: str) -> None:
    """Write a page. Raises LohanError where that is not possible."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as exc:
        raise LohanError(f"the page cannot be written to {path} ({exc.strerror})") from exc


def _assemble(title: str, data: Any) -> str:
    style = "\n".join(_asset(f"{name}.css") for name in _STYLES)
    library = _asset(f"{_LIBRARY}.js")
    modules = "\n".join(_asset(f"script/{name}.js") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{modules}\n}})();\n'
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(library)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        data=_embedded(data),
        library=library,
        script=script,
    )


def _embedded(data: Any) -> str:
    """JSON in ASCII that holds no `<`, `>` or `&`, so that nothing in it can end its element."""
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as exc:
        raise LohanError(
            "the plan holds a number that is not finite, so it cannot be shown"
        ) from exc
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", *name.split("/")).read_text("utf-8")
