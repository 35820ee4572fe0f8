"""The tables of a report as HTML. Whatever is not a number made here is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rsmtdf_train.experiment.compare import Difference
from rsmtdf_train.report.arms import Arm, Statistic
from rsmtdf_train.report.numbers import ArmNumbers, Numbers
from rsmtdf_train.report.runs import RunRecord

__all__ = ["arm_key", "classes", "confusions", "recipes", "runs", "speed", "summary"]

_DARK = 55  # percent above which a cell of a matrix is written in the ground's colour


def arm_key(number: int) -> str:
    """Return the sample of an arm's line."""
    return (
        f'<svg class="key a{number}" viewBox="0 0 22 10" aria-hidden="true"><path class="a{number}" d="M0,5h22"/></svg>'
    )


def _head(numbers: Numbers, *first: str) -> str:
    arms = "".join(
        f'<th scope="col" class="n">{arm_key(n)} {escape(a.arm.name)}</th>' for n, a in enumerate(numbers.arms)
    )
    return "<thead><tr>" + "".join(f'<th scope="col">{name}</th>' for name in first) + arms + "</tr></thead>"


def _percent(found: Statistic | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.sd:.1f}" if found.sd is not None else "")


def _points(found: Difference | None) -> str:
    """Return a difference in percentage points with its interval."""
    if found is None:
        return "no seed in common"
    text = f"{100 * found.mean:+.1f}"
    if found.low is not None and found.high is not None:
        text += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return text.replace("-", "−")


def _verdict(found: Difference | None) -> str:
    if found is None:
        return "–"
    pairs = f"{found.pairs} pairs" if found.pairs != 1 else "1 pair: no interval"
    verdict = f'<span class="{found.verdict}">{found.verdict}</span>'
    return f'<span class="id">{verdict} <span class="note">({pairs})</span></span>'


def summary(numbers: Numbers) -> str:
    """Return the table of arms: what they are, mean IoU of each checkpoint, difference to the baseline."""
    compared = len(numbers.arms) > 1
    kinds = [k for k in numbers.kinds if any(k in a.miou for a in numbers.arms)]
    head = ["arm", "targets", "store", "seeds", *(f"mIoU, {escape(k)}" for k in kinds), "seeds alone"]
    if compared:
        head += [f"difference to {escape(numbers.baseline.name)}, {escape(numbers.checkpoint)}", "verdict"]
    low, high = _span(numbers)
    rows = []
    for n, a in enumerate(numbers.arms):
        first = a.arm.runs[0]
        cells = [
            escape(first.mode),
            f'<code class="id">{escape(first.snapshot[:8])}</code>' if first.snapshot else "none",
            _seeds(a.arm),
        ]
        cells = [f"<td>{c}</td>" for c in cells]
        cells += [f'<td class="n">{_percent(a.miou.get(k))}</td>' for k in kinds]
        cells.append(f"<td>{_strip(n, a, numbers.checkpoint, low, high)}</td>")
        if compared and a.arm is numbers.baseline:
            cells += ['<td class="n">–</td>', "<td>baseline</td>"]
        elif compared:
            found = a.differences.get(numbers.checkpoint)
            scored = found is not None or (a.arm.complete and numbers.baseline.complete)
            cells += [f'<td class="n">{_points(found) if scored else "–"}</td>', f"<td>{_verdict(found)}</td>"]
        rows.append(
            f'<tr><th scope="row">{arm_key(n)} {escape(a.arm.name)}{_says(a, numbers)}</th>{"".join(cells)}</tr>'
        )
    columns = "".join(f'<th scope="col"{_right(name)}>{name}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _right(name: str) -> str:
    return ' class="n"' if name.startswith(("mIoU", "difference")) else ""


def _says(a: ArmNumbers, numbers: Numbers) -> str:
    """Return in what an arm differs from the baseline."""
    base = numbers.baseline.says
    if a.arm is numbers.baseline or not base:
        return ""
    keys = [f"{key} {value}" for key, value in a.arm.says.items() if value != base[key]]
    return f'<div class="says">{escape(", ".join(keys) or "same recipe and store")}</div>'


def _seeds(arm: Arm) -> str:
    there = ", ".join(str(run.seed) for run in arm.complete)
    missing = [f"{run.seed} at step {run.step} of {run.steps or '?'}" for run in arm.runs if not run.complete]
    return "<br>".join(f'<span class="id">{text}</span>' for text in (there, *missing) if text)


def _span(numbers: Numbers) -> tuple[float, float]:
    values = [v for a in numbers.arms for v in a.arm.mious(numbers.checkpoint).values()]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return low - 0.005, max(high, low) + 0.005


def _strip(number: int, a: ArmNumbers, kind: str, low: float, high: float) -> str:
    """Return the seeds' mean IoU as dots on one scale for all arms, the mean as a stroke."""
    values = a.arm.mious(kind)
    if not values:
        return "–"
    place = {seed: 6 + 138 * (v - low) / (high - low) for seed, v in values.items()}
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="10" r="4.5"><title>seed {seed}: {100 * values[seed]:.2f}</title></circle>'
        for seed, x in place.items()
    )
    mean = sum(place.values()) / len(place)
    text = ", ".join(f"seed {seed}: {100 * v:.1f}" for seed, v in values.items())
    return (
        f'<svg class="strip a{number}" viewBox="0 0 150 20" role="img" aria-label="{text}">'
        f'<path class="rail" d="M0,10h150"/>{dots}<path class="at" d="M{mean:.1f},2v16"/></svg>'
    )


def classes(numbers: Numbers) -> str:
    """Return the table of IoU by class and arm."""
    pixels = {
        c["name"]: c.get("pixels") for a in numbers.arms for run in a.arm.complete[:1]
        for c in run.scores.get(numbers.checkpoint, {}).get("classes", ())
    }  # fmt: skip
    total = sum(v or 0 for v in pixels.values())
    rows = []
    for name in numbers.classes:
        cells = [f'<td class="n">{100 * (pixels.get(name) or 0) / total:.1f} %</td>' if total else "<td>–</td>"]
        for a in numbers.arms:
            text = _percent(a.classes.get(name))
            if name in a.best:
                text = f"<b>{text}</b>"
            found = a.class_differences.get(name)
            mark = {"better": ' <span class="better">▲</span>', "worse": ' <span class="worse">▼</span>'}
            note = f' title="{_points(found)} to {escape(numbers.baseline.name)}"' if found else ""
            cells.append(f'<td class="n"{note}>{text}{mark.get(found.verdict, "") if found else ""}</td>')
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    means = "".join(f'<td class="n">{_percent(a.miou.get(numbers.checkpoint))}</td>' for a in numbers.arms)
    rows.append(f'<tr class="mean"><th scope="row">mean</th><td></td>{means}</tr>')
    head = _head(numbers, "class", "of labelled pixels")
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def confusions(numbers: Numbers) -> str:
    """Return a matrix for each arm that has counts: shares of each label's pixels, rows sum to 100."""
    return "".join(_confusion(n, a, numbers.classes) for n, a in enumerate(numbers.arms) if a.confusion is not None)


def _confusion(number: int, a: ArmNumbers, names: Sequence[str]) -> str:
    counts = a.confusion
    if counts is None:
        return ""
    shown = [escape(n) for n in names]
    head = "".join(f'<th scope="col"><span>{n}</span></th>' for n in shown)
    rows = []
    for i, label in enumerate(shown):
        total = int(counts[i].sum())
        cells = []
        for j, predicted in enumerate(shown):
            count = int(counts[i, j])
            share = 100 * count / total if total else 0.0
            note = f"{label} seen as {predicted}: {count:,} of {total:,} pixels ({share:.2f} %)"
            look = "none" if count == 0 else "hi" if share > _DARK else ""
            kind = f' class="{look}"' if look else ""
            text = "" if count == 0 else f"{share:.0f}"
            cells.append(f'<td{kind} style="--v:{share:.0f}" title="{note}">{text}</td>')
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    return (
        f'<figure><figcaption>{arm_key(number)} {escape(a.arm.name)}</figcaption><div class="scroll">'
        f'<table class="matrix"><thead><tr><th class="note">label ↓ prediction →</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<output class="readout js" aria-live="off"></output></figure>'
    )


def speed(numbers: Numbers) -> str:
    """Return the table of how fast the arms trained."""
    rows = []
    for n, a in enumerate(numbers.arms):
        s = a.speed
        cells = [
            _known(s.seconds_per_step, "{:.3g} s"),
            _known(s.samples_per_s, "{:.3g}"),
            _known(None if s.data_wait is None else 100 * s.data_wait, "{:.1f} %"),
            _known(s.gpu_memory_mb, "{:,.0f} MB"),
            "–" if s.hours is None else f"{int(s.hours)}:{int(s.hours * 60) % 60:02}:{int(s.hours * 3600) % 60:02}",
        ]
        values = "".join(f'<td class="n">{c}</td>' for c in cells)
        rows.append(f'<tr><th scope="row">{arm_key(n)} {escape(a.arm.name)}</th>{values}</tr>')
    names = ("a step", "crops per second", "waiting for data", "GPU memory, most", "all steps of a run, h:mm:ss")
    head = '<th scope="col">arm</th>' + "".join(f'<th scope="col" class="n">{n}</th>' for n in names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _known(value: float | None, text: str) -> str:
    return "–" if value is None else text.format(value)


def recipes(numbers: Numbers) -> str:
    """Return the table of the recipe keys in which the arms differ."""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td>{escape(a.arm.says[key])}</td>" for a in numbers.arms)
        + "</tr>"
        for key in numbers.baseline.says
    )
    if not rows:
        return "<p>The arms do not differ in any recipe key or in the store.</p>" if len(numbers.arms) > 1 else ""
    head = _head(numbers, "key").replace(' class="n"', "")
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def runs(numbers: Numbers) -> str:
    """Return the table of single runs."""
    rows = []
    for n, a in enumerate(numbers.arms):
        for run in a.arm.runs:
            state = f"complete, {run.step} steps" if run.complete else f"step {run.step} of {run.steps or '?'}"
            state = f'<span class="id">{state}</span>'
            cells = [
                f"{arm_key(n)} {escape(a.arm.name)}", str(run.seed), state, _scores(run, numbers.kinds),
                f"<code>{escape(run.snapshot[:16] if run.snapshot else 'none')}</code>"
                + (f"<br>{escape(run.store)}" if run.store else ""),
            ]  # fmt: skip
            rows.append(f'<tr><th scope="row">{escape(run.label)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    head = "".join(
        f'<th scope="col">{n}</th>' for n in ("run", "arm", "seed", "state", "mIoU", "store snapshot, place")
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _scores(run: RunRecord, kinds: Sequence[str]) -> str:
    found = [f'<span class="id">{escape(k)} {100 * v:.2f}</span>' for k in kinds if (v := run.miou(k)) is not None]
    return "<br>".join(found) or "–"
