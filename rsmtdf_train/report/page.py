"""A report as one HTML page that needs nothing else: tables, inline SVG, pictures as data URIs and a small script.

The page works without scripts. Names come from runs and datasets that may be hostile: they are escaped, and a content
security policy allows no other script than ours and no address outside.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import yaml

from rsmtdf_train.report import tables
from rsmtdf_train.report.arms import Arm
from rsmtdf_train.report.curves import Group, draw_svg, plot_groups, points_per_line
from rsmtdf_train.report.numbers import Numbers
from rsmtdf_train.report.panels import Panels

__all__ = ["render"]

_COLORS = 8  # of page.css; further arms repeat them, dashed


def render(numbers: Numbers, panels: Panels | None, no_panels: str, context: Mapping[str, Any], title: str) -> str:
    """Return the page. ``no_panels``: why there are no pictures, when there are none."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    arms = [a.arm for a in numbers.arms]
    return Template(_asset("page.html")).substitute(
        script_hash=f"'sha256-{digest}'",
        css=_asset("page.css") + _arm_css(len(arms)),
        script=script,
        title=escape(title),
        facts=_facts(numbers, context),
        notices="\n".join(_notices(arms)),
        legend="\n".join(_legend(arms)),
        sections="\n".join(_sections(numbers, panels, no_panels, context)),
    )


def _arm_css(count: int) -> str:
    rules = []
    for n in range(count):
        dash = f" stroke-dasharray: {12 * (n // _COLORS)} 8;" if n >= _COLORS else ""
        rules.append(f".a{n} {{ --c: var(--c{n % _COLORS});{dash} }} .hide{n} .plots .a{n} {{ display: none; }}")
    return "\n".join(rules)


def _facts(numbers: Numbers, context: Mapping[str, Any]) -> str:
    arms = [a.arm for a in numbers.arms]
    count = sum(len(arm.runs) for arm in arms)
    data = dict.fromkeys(str(run.recipe["data"]) for arm in arms for run in arm.runs)
    labeled = dict.fromkeys(str(run.recipe["labeled"]) for arm in arms for run in arm.runs)
    parts = [
        f"{count} run{'s' if count != 1 else ''} in {len(arms)} arm{'s' if len(arms) != 1 else ''}",
        f"dataset {', '.join(data)}",
        f"labelled subset {', '.join(labeled)}",
        f"scored on {numbers.split}",
        str(context.get("date", "")),
    ]
    return " · ".join(escape(p) for p in parts if p)


def _notices(arms: Sequence[Arm]) -> list[str]:
    open_runs = [run for arm in arms for run in arm.runs if not run.complete]
    if not open_runs:
        return []
    names = ", ".join(f"{run.label} (step {run.step} of {run.steps or '?'})" for run in open_runs)
    return [f'<p class="notice"><b>Not complete</b>, in the curves only: {escape(names)}.</p>']


def _legend(arms: Sequence[Arm]) -> list[str]:
    return [
        f'<label data-name="{escape(arm.name)}"><input type="checkbox" checked data-arm="{n}" class="js" '
        f'aria-label="show {escape(arm.name)} in the curves">{tables.arm_key(n)} {escape(arm.name)}</label>'
        for n, arm in enumerate(arms)
    ]


def _sections(numbers: Numbers, panels: Panels | None, no_panels: str, context: Mapping[str, Any]) -> list[str]:
    kind = escape(numbers.checkpoint)
    parts = [
        "<section><h2>Summary</h2>",
        tables.summary(numbers),
        '<p class="note">Percent; mean ± standard deviation over seeds. Dots: single seeds, one scale for all arms. '
        f"Differences are paired (the same seed on both sides), in percentage points, of the {kind} weights, with the "
        "95 % interval of Student’s t; <i>inconclusive</i>: the interval holds 0, or one pair gives none. Intervals "
        "are not corrected for the number of comparisons. A fair comparison differs in one thing: what an arm has "
        "other than the baseline stands under its name.</p></section>",
    ]
    if numbers.classes:
        parts += [
            f"<section><h2>IoU by class</h2>{tables.classes(numbers)}",
            f'<p class="note">Percent, {kind} weights, {escape(numbers.split)} tiles. ▲ ▼: the paired interval of the '
            f"difference to {escape(numbers.baseline.name)} lies above, below 0. <b>Bold</b>: it lies above 0 against "
            "every other arm; where nothing is bold, no arm is known to be best.</p></section>",
        ]
    matrices = tables.confusions(numbers)
    if numbers.classes:
        parts += [
            "<section><h2>Confusion</h2>",
            f'<div class="matrices">{matrices}</div><p class="note">Percent of the pixels of each label (a row), all '
            f"seeds together, {kind} weights. Point at a cell for counts.</p>"
            if matrices
            else '<p class="note">The runs’ metrics.json hold no counts, as those of older versions. Name '
            "another split with <code>--split</code>, or train again.</p>",
            "</section>",
        ]
    return [
        *parts,
        *_pictures(panels, no_panels, kind, numbers),
        *_curves(numbers),
        f"<section><h2>Speed</h2>{tables.speed(numbers)}",
        '<p class="note">Medians over the steps after the first ones, means over the runs of an arm.</p></section>',
        f"<section><h2>Recipes</h2>{tables.recipes(numbers)}{_yaml(numbers)}</section>",
        f"<section><h2>Provenance</h2>{tables.runs(numbers)}{_context(context)}</section>",
    ]


def _curves(numbers: Numbers) -> list[str]:
    arms = [a.arm for a in numbers.arms]
    groups = plot_groups(arms)
    if not groups:
        return []
    points, names, number = points_per_line(groups), [arm.name for arm in arms], 0
    parts = [
        "<section><h2>Curves</h2>",
        '<p class="note">Over steps. Thick: the mean over complete seeds of a moving average over 1/20 of the run; '
        "thin: single seeds, averaged to at most 150 points. Learning rate and validation are not smoothed.</p>",
    ]
    for group in groups:
        figures = []
        for plot in group.plots:
            figures.append(
                f"<figure><figcaption>{escape(plot.title)}</figcaption>{draw_svg(plot, names, number, points)}</figure>"
            )
            number += 1
        parts.append(_group(group, "\n".join(figures)))
    return [*parts, "</section>"]


def _group(group: Group, figures: str) -> str:
    body = f'<div class="plots">{figures}</div>'
    if group.folded:
        return f'<details class="plotted"><summary>{escape(group.title)} ({len(group.plots)})</summary>{body}</details>'
    return f"<h3>{escape(group.title)}</h3>{body}"


def _pictures(panels: Panels | None, no_panels: str, kind: str, numbers: Numbers) -> list[str]:
    if panels is None:
        return [f'<section><h2>Pictures</h2><p class="note">{escape(no_panels)}</p></section>'] if no_panels else []
    order = {a.arm.name: n for n, a in enumerate(numbers.arms)}
    chips = "".join(
        f'<li><span class="chip" style="background:rgb{tuple(int(v) for v in c.color)}"></span>{escape(c.name)}</li>'
        for c in panels.classes
    )
    if panels.unlabelled:
        chips += '<li><span class="chip" style="background:#fff"></span>not labelled</li>'
    head = "".join(
        f'<th scope="col">{tables.arm_key(order[name])} {escape(name)}, seed {seed}</th>'
        for name, seed in panels.seeds.items()
    )
    rows = []
    for row in panels.rows:
        tile = escape(row.tile)
        cells = [
            f'<td><img alt="image of {tile}" src="{row.image}"></td>',
            f'<td><img alt="label of {tile}" src="{row.label}"></td>',
        ]
        for cell, name in zip(row.predictions, panels.seeds, strict=True):
            right = "" if cell.right is None else f"{cell.right:.0%} of pixels right"
            cells.append(f'<td><img alt="{escape(name)} on {tile}" src="{cell.uri}">{right}</td>')
        rows.append(f'<tr><th scope="row">{tile}</th>{"".join(cells)}</tr>')
    return [
        f'<section><h2>Pictures</h2><ul class="chips">{chips}</ul><div class="scroll"><table class="tiles"><thead><tr>'
        f'<th scope="col">tile</th><th scope="col">image</th><th scope="col">label</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        f'<p class="note">{escape(numbers.split.capitalize())} tiles chosen by their labels alone, so that the classes '
        f"are shown; {kind} weights. {escape(panels.attribution)}</p></section>",
    ]


def _yaml(numbers: Numbers) -> str:
    return "".join(
        f"<details><summary>Recipe of {escape(a.arm.name)}</summary><pre>"
        f"{escape(yaml.safe_dump(dict(a.arm.runs[0].recipe), sort_keys=False, allow_unicode=True))}</pre></details>"
        for a in numbers.arms
    )


def _context(context: Mapping[str, Any]) -> str:
    lines = []
    for key, value in context.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        lines.append(f"<tr><th scope='row'>{escape(str(key))}</th><td>{escape(text)}</td></tr>")
    if not lines:
        return ""
    return f"<h3>This page</h3><div class='scroll'><table><tbody>{''.join(lines)}</tbody></table></div>"


def _asset(name: str) -> str:
    return (files("rsmtdf_train.report") / name).read_text(encoding="utf-8")
