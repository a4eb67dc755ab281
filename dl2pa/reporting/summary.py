"""One page that tells a run: what ran, whether it went well, what to do with it. It stands alone."""

from __future__ import annotations

import html
import shlex
import time
from collections.abc import Mapping, Sequence

from dl2pa.config.identity import describe, identity_of
from dl2pa.reporting.class_metrics import class_rows, worst_pairs
from dl2pa.reporting.document import (
    Block,
    Grid,
    Heading,
    Html,
    Paragraph,
    Picture,
    code,
    data_url,
    to_html,
)
from dl2pa.reporting.pages import pair_rows
from dl2pa.reporting.run_data import Beside, Finding, RunData
from dl2pa.reporting.samples import Chosen

_PAIRS, _WORST = 12, 12
_MARKS = {"good": "✓", "note": "!", "bad": "✗"}


def summary_page(
    run_data: RunData,
    found: Sequence[Finding],
    beside: Sequence[Beside],
    pictures: Mapping[str, bytes],
    chosen: Chosen | None,
    thumbnails: Mapping[int, bytes],
) -> str:
    """The page.

    Args:
        pictures: PNG by name; those missing are left out.
        thumbnails: JPEG or PNG of the chosen samples.
    """
    blocks: list[Block] = [
        Html(_STYLE),
        Heading(1, run_data.name),
        Paragraph(_in_a_line(run_data)),
        _cards(run_data, beside),
    ]
    blocks += [Heading(2, "Did it go well?"), _verdict(found)]
    if beside:
        blocks += [Heading(2, "Beside the published figure"), _published(run_data, beside)]
    blocks += _picture(
        pictures, "curves", "Curves", "Loss, accuracy, learning rate and step time over the epochs"
    )
    blocks += _classes(run_data, pictures)
    blocks += _picture(
        pictures,
        "reliability",
        "Can its confidence be trusted?",
        "Accuracy beside confidence in 15 bins, and the images in each",
    )
    if chosen is not None and thumbnails:
        blocks += _samples(run_data, chosen, thumbnails)
    if {"assignment_flow", "prototype_cosines"} & pictures.keys():
        blocks.append(Heading(2, "Prototypes and labels"))
        blocks += _picture(pictures, "prototype_cosines", None, "Cosines between class vectors")
        blocks += _picture(pictures, "assignment_flow", None, "Each label's way from prototype to prototype")
    blocks += [
        Heading(2, "What ran"),
        _what_ran(run_data),
        Heading(2, "Use it, go on, do it again"),
        *_how(run_data),
    ]
    return to_html(blocks, run_data.name)


def _in_a_line(run_data: RunData) -> str:
    config, of = run_data.config, run_data.images
    model = config.model
    kind = f"{config.method.name} ({config.assignment} assignment) on {model.backbone}, d = {model.embedding_dim}"
    data = f"{config.data.dataset} with {len(run_data.classes):,} classes"
    data += f", {of[0]:,} images to train on, {of[1]:,} to validate"
    ended = time.strftime("%d %B %Y %H:%M UTC", time.gmtime(run_data.ended))
    return f"{kind}; {data}. Finished {ended}."


def _cards(run_data: RunData, beside: Sequence[Beside]) -> Html:
    result = run_data.result
    curve = run_data.points.get("val/top1", ())
    best_step = max(curve, key=lambda point: (point[1], -point[0]))[0] if curve else 0
    cards = [
        ("top-1, last", f"{result['top1_last']:.2f} %", f"{result['num_validated']:,} images"),
        ("top-1, best", f"{result['top1_best']:.2f} %", f"epoch {best_step / run_data.steps_per_epoch:.4g}"),
        ("top-5, last", f"{result['top5_last']:.2f} %", ""),
        ("calibration error", f"{result['ece_last']:.2f} %", "15 bins"),
    ]
    groups = [(name, result.get(f"top1_{name}")) for name in ("head", "medium", "tail")]
    cards += [
        (f"top-1, {name}", f"{value:.2f} %", "mean over classes")
        for name, value in groups
        if value is not None
    ]
    full = next((b for b in beside if b.length == "full"), None)
    if full is not None:
        gap = result["top1_best"] - full.cell.top1
        cards.append(("published", f"{full.cell.top1:g} %", f"ours, best: {gap:+.2f} points"))
    speed = result.get("images_per_second")
    if speed:
        world = result["world_size"]
        cards.append(("images per second", f"{speed:,.0f}", f"{world} process{'es' * (world != 1)}"))
    cards.append(
        (
            "from start to end",
            _span(run_data.ended - run_data.started),
            f"{result['epochs']} epochs, {result['steps']:,} steps",
        )
    )
    inside = "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>"
        for name, value, note in cards
    )
    return Html(f'<div class="cards">{inside}</div>')


def _verdict(found: Sequence[Finding]) -> Html:
    order = {"bad": 0, "note": 1, "good": 2}
    items = "".join(
        f'<li class="{f.kind}"><b aria-label="{f.kind}">{_MARKS[f.kind]}</b> {_code_spans(f.text)}</li>'
        for f in sorted(found, key=lambda f: order[f.kind])
    )
    return Html(f'<ul class="verdict">{items}</ul>')


def _code_spans(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _published(run_data: RunData, beside: Sequence[Beside]) -> Grid:
    length = {"full": "full length", "short": "shorter than published", "other": "another length"}
    rows = [
        [
            f"{b.cell.table}: {b.cell.row}, {b.cell.column}",
            f"{b.cell.top1:g}",
            f"{run_data.result['top1_best']:.2f}",
            f"{run_data.result['top1_last']:.2f}",
            f"{run_data.result['top1_best'] - b.cell.top1:+.2f}",
            length[b.length] + (f"; the figure is suspect: {b.cell.suspect}" if b.cell.suspect else ""),
        ]
        for b in beside
    ]
    return Grid(["table ", "published", "ours, best", "ours, last", "difference", "remark "], rows)


def _classes(run_data: RunData, pictures: Mapping[str, bytes]) -> list[Block]:
    confusion = run_data.confusion
    trained, groups = run_data.trained, run_data.groups
    arrays = (run_data.targets, run_data.predicted, run_data.confidence, run_data.in_top5)
    rows = [r for r in class_rows(*arrays, run_data.classes, trained, groups) if r.top1 is not None]
    rows.sort(key=lambda r: (r.top1 or 0.0, r.label))
    blocks: list[Block] = [Heading(2, "Which classes, and taken for which?")]
    spread = [r.top1 or 0.0 for r in rows]
    middle = sorted(spread)[len(spread) // 2]
    blocks.append(
        Paragraph(
            f"Top-1 by class: lowest {min(spread):.1f} %, median {middle:.1f} %, highest {max(spread):.1f} %. "
            "All classes to sort are in `per_class.html`, the matrix to zoom into in `confusion.html`."
        )
    )
    blocks += _picture(pictures, "confusion", None, "Confusion matrix by share of the true class")
    pairs = worst_pairs(confusion, _PAIRS)
    if pairs:
        heads = ["true ", "taken for ", "images", "of true", "other way round"]
        blocks += [Heading(3, "Most frequent mistakes"), Grid(heads, pair_rows(pairs, run_data.classes))]
    if len(rows) > 1:
        low = rows[:_WORST]
        cells = [
            [
                r.name,
                *([] if groups is None else [r.group or ""]),
                *([] if trained is None else [f"{r.trained:,}"]),
                f"{r.images:,}",
                f"{r.top1:.1f}",
                "" if r.precision is None else f"{r.precision:.1f}",
                "" if r.taken_for is None else f"{r.taken_for} ({r.taken_for_count})",
            ]
            for r in low
        ]
        heads = [
            "class ",
            *([] if groups is None else ["group "]),
            *([] if trained is None else ["trained on"]),
        ]
        heads += ["images", "top-1 %", "precision %", "most taken for "]
        blocks += [Heading(3, "Lowest accuracy"), Grid(heads, cells)]
    return blocks


def _samples(run_data: RunData, chosen: Chosen, thumbnails: Mapping[int, bytes]) -> list[Block]:
    blocks: list[Block] = [
        Heading(2, "Samples"),
        Paragraph(
            "As the model saw them in the last validation: predicted class and confidence, true class below."
        ),
    ]
    for title, samples in (
        ("Most confident mistakes", chosen.mistakes),
        ("Most confident hits", chosen.hits),
    ):
        shown = [i for i in samples if i in thumbnails]
        if shown:
            blocks += [Heading(3, title), _strip(run_data, shown, thumbnails)]
    by_class = {c: [i for i in s if i in thumbnails] for c, s in chosen.by_class.items()}
    if any(by_class.values()):
        blocks.append(
            Heading(3, "Classes of the lowest accuracy: mistakes first, then the least confident hits")
        )
    rows = "".join(
        f'<div class="row"><h4>{html.escape(run_data.classes[c])}</h4>'
        f"{_strip(run_data, samples, thumbnails).text}</div>"
        for c, samples in by_class.items()
        if samples
    )
    return [*blocks, Html(rows)]


def _strip(run_data: RunData, samples: Sequence[int], thumbnails: Mapping[int, bytes]) -> Html:
    return Html(
        '<div class="strip">' + "".join(_figure(run_data, i, thumbnails[i]) for i in samples) + "</div>"
    )


def _figure(run_data: RunData, sample: int, picture: bytes) -> str:
    true = run_data.classes[int(run_data.targets[sample])]
    guess = run_data.classes[int(run_data.predicted[sample])]
    right = true == guess
    below = "" if right else f"<br><small>is {html.escape(true)}</small>"
    said = f"{html.escape(guess)} {100 * run_data.confidence[sample]:.0f} %"
    return (
        f'<figure title="sample {sample}"><img alt="{html.escape(true)}" src="{data_url(picture)}">'
        f'<figcaption class="{"good" if right else "bad"}">{said}{below}</figcaption></figure>'
    )


def _what_ran(run_data: RunData) -> Grid:
    config, env = run_data.config, run_data.environment
    commit = str(env.get("git_commit") or "unknown") + (" with changes" if env.get("git_dirty") else "")
    job = " ".join(str(env[k]) for k in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if env.get(k))
    rows = [
        ["recipe", describe(identity_of(config))],
        ["data", f"{config.data.dataset}, fingerprint {code(run_data.fingerprint)}"],
        ["seed", str(config.train.seed)],
        [
            "hardware",
            f"{run_data.result['world_size']} × {env.get('device')} ({env.get('processor')}), "
            f"{env.get('threads')} threads each",
        ],
        ["hosts", str(env.get("hosts", ""))],
        [
            "software",
            ", ".join(
                f"{k} {env[k]}" for k in ("torch", "nvidia-dali-cuda130", "python", "dl2pa") if env.get(k)
            ),
        ],
        ["code", code(commit)],
        ["command", code(env.get("command", ""))],
        ["attempts", str(len(run_data.attempts))],
        ["SLURM job", job],
        [
            "MLflow run",
            code(run_data.run_id or f"tags.`dl2pa.run_uuid` = {run_data.run_uuid}".replace("`", "")),
        ],
        ["run directory", code(run_data.run_dir)],
    ]
    return Grid(["what ", "value "], [row for row in rows if row[1]])


def _how(run_data: RunData) -> list[Block]:
    run, env = shlex.quote(str(run_data.run_dir)), run_data.environment
    where = f"--artifact-uri runs:/{run_data.run_id}/model" if run_data.run_id else ""
    blocks: list[Block] = [
        Heading(3, "Predict"),
        _shell(f"dl2pa predict {run} image.jpg --top 5"),
        Paragraph("or, from anywhere, with the model that this run logged:"),
        _shell(
            f"mlflow artifacts download {where} --dst-path here\n"
            "dl2pa predict here/artifacts/model.safetensors image.jpg"
        )
        if where
        else Html(""),
        Heading(3, "Register it, serve it"),
        _shell(
            f"dl2pa register {run} --name NAME --alias candidate\n"
            "mlflow models serve -m models:/NAME@candidate --env-manager local"
        ),
        Heading(3, "Validate it again, export it"),
        _shell(f"dl2pa evaluate {run}\ndl2pa export {run} --out exported"),
        Heading(3, "Go on"),
        Paragraph(
            "The same command on the same run directory goes on from the last checkpoint; more epochs train further."
        ),
        _shell(str(env.get("command", ""))),
        Heading(3, "Do it again"),
        _shell(_again(run_data)),
    ]
    return [block for block in blocks if block != Html("")]


def _again(run_data: RunData) -> str:
    env = run_data.environment
    lines = [f"git checkout {env['git_commit']}"] if env.get("git_commit") else []
    if env.get("git_dirty"):
        lines.append(
            f"git apply attempt-{len(run_data.attempts)}.diff    # artifact code/, where tracked files had changed"
        )
    lines.append("pip install -r requirements.txt    # artifact code/")
    lines.append(
        f"dl2pa train config.yaml --nproc {run_data.result['world_size']} --run-dir again    # artifact config.yaml"
    )
    return "\n".join(lines)


def _shell(text: str) -> Html:
    return Html(f"<pre>{html.escape(text)}</pre>")


def _picture(pictures: Mapping[str, bytes], name: str, title: str | None, text: str) -> list[Block]:
    if name not in pictures:
        return []
    heading: list[Block] = [Heading(2, title)] if title else []
    return [*heading, Picture(name, pictures[name], text)]


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


_STYLE = """<style>
body { max-width: 68rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0 }
.cards div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem;
  display: flex; flex-direction: column }
.cards span, .cards small { color: #7d7d89; font-size: .82rem }
.cards b { font-size: 1.25rem; font-variant-numeric: tabular-nums }
.verdict { list-style: none; padding: 0 } .verdict li { margin: .25rem 0 }
.verdict b { display: inline-block; width: 1.4em; height: 1.4em; line-height: 1.4em; text-align: center;
  border-radius: 50%; color: #fff; margin-right: .4em; font-size: .85em }
.verdict .good b { background: #2f8f57 } .verdict .note b { background: #c98a00 }
.verdict .bad b { background: #c0392b }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: .4rem 0 }
figure { margin: 0; width: 6.6rem } figure img { width: 100%; border: 1px solid var(--line) }
figcaption { font-size: .78rem; line-height: 1.25; overflow-wrap: anywhere } figcaption.good { color: #2f8f57 }
figcaption.bad { color: #d0453a } figcaption small { color: #7d7d89; font-size: 1em }
.row h4 { margin: .8rem 0 .2rem; font-size: .95rem }
pre { background: var(--shade); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto;
  font: .87rem/1.5 ui-monospace, monospace }
</style>"""
