#!/usr/bin/env python3
"""Draws docs/figures/NAME.svg from each docs/figures/NAME.json, and the road of a request. Standard library only.

    python3 docs/plots.py            # writes them
    python3 docs/plots.py --check    # fails if a picture is not what it would write, or a number does not stand on the page that it is of

A figure has a title, a note (machine and model), the page whose table it shows, the commands that made the numbers, and panels. `bars`: a panel for each
group, in it a bar for each series, [value] or [value, lowest, highest]; each panel has a scale of its own. `lines`: a panel has x, and a
series of numbers for each name; `most` cuts its scale there, and what is beyond leaves it.

Where the numbers come from: most tables were put together from several runs, often of several programs on a machine that was lent for a day, so a figure's file repeats what its
page's table says, and --check holds the two together. Where one run writes all that is drawn, its JSON is kept as it was written: a figure with `run` names that file, and each
series says where in it its pairs of x and y stand, `phases.calm.percent_within_ms`.
"""

import json
import math
import sys
from html import escape
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"
ROOT = FIGURES.parent.parent

# Series are told apart in light and in dark, by who sees no red and green too.
STYLE = """<style>
svg{background:#fff;font:12px system-ui,sans-serif;color-scheme:light dark}
text{fill:#1f2328}.quiet{fill:#59636e}.title{font-size:15px;font-weight:600}.name{font-weight:600}
.grid{stroke:#d1d9e0}.axis{stroke:#818b98}.box{fill:#f6f8fa;stroke:#818b98}.bus{fill:#ddf4ff;stroke:none}
.range{stroke:#1f2328;stroke-width:1.2}.way{stroke:#59636e;stroke-width:1.5;fill:none}.head{fill:#59636e}.kv{stroke:#bc4c00;stroke-width:5;fill:none}.kv-head,.of-kv{fill:#bc4c00}
.s0{--c:#0969da}.s1{--c:#bc4c00}.s2{--c:#1a7f37}.s3{--c:#8250df}
.fill{fill:var(--c)}.line{stroke:var(--c);stroke-width:2.2;fill:none;stroke-linejoin:round}
@media (prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#f0f6fc}.quiet{fill:#9198a1}.grid{stroke:#2f353d}.axis{stroke:#656c76}
.box{fill:#151b23;stroke:#656c76}.bus{fill:#10233d}.range{stroke:#f0f6fc}.way{stroke:#9198a1}.head{fill:#9198a1}.kv{stroke:#f0883e}.kv-head,.of-kv{fill:#f0883e}
.s0{--c:#4493f8}.s1{--c:#f0883e}.s2{--c:#3fb950}.s3{--c:#ab7df8}}
</style>"""


def number(value):
    """As tables write it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def text(x, y, words, kind="", anchor="start"):
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}">{escape(words)}</text>'


def svg(width, height, label, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(label, quote=True)}">'
    return "\n".join([head, STYLE, *parts, "</svg>\n"])


def legend(names, y):
    """Names side by side, each after its colour."""
    x, parts = 24, []
    for at, name in enumerate(names):
        parts += [f'<g class="s{at}"><rect class="fill" x="{x}" y="{y - 9}" width="14" height="10" rx="2"/></g>', text(x + 20, y, name)]
        x += 44 + 7 * len(name)
    return parts


def scale(most):
    """A round number above the most, and how many parts it has."""
    step = 10 ** math.floor(math.log10(most))
    parts = next(n for n in (1, 2, 2.5, 5, 10) if n * step >= most)
    return parts * step, 4 if parts in (1, 2, 10) else 5


def frame(x, y, width, height, most, parts):
    drawn = []
    for part in range(parts + 1):
        at = y + height - part * height / parts
        drawn += [f'<line class="{"axis" if part == 0 else "grid"}" x1="{x}" x2="{x + width}" y1="{at:.1f}" y2="{at:.1f}"/>', text(x - 6, at + 4, number(part * most / parts), "quiet", "end")]
    return drawn


def bars(figure):
    groups, series = figure["panels"], figure["series"]
    left, gap, top, height = 58, 56, 74, 190
    width = (860 - left - 20 - gap * (len(groups) - 1)) / len(groups)
    parts = []
    for at, group in enumerate(groups):
        x = left + at * (width + gap)
        values = [one["values"][at] for one in series]
        most, lines = scale(1.08 * max(map(max, values)))
        parts += frame(x, top, width, height, most, lines)
        parts.append(text(x, top - 12, group, "name"))
        bar = width / len(series)
        for place, value in enumerate(values):
            def y(amount, most=most):
                return top + height - amount / most * height
            middle = x + (place + 0.5) * bar
            parts.append(f'<g class="s{place}"><rect class="fill" x="{middle - bar * 0.38:.1f}" y="{y(value[0]):.1f}" width="{bar * 0.76:.1f}" height="{top + height - y(value[0]):.1f}"/></g>')
            if len(value) == 3:
                parts.append(f'<line class="range" x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(value[1]):.1f}" y2="{y(value[2]):.1f}"/>')
            parts.append(text(middle, y(max(value)) - 4, number(value[0]), "", "middle"))
    return parts, [one["name"] for one in series], top + height + 30


def readable(values, x):
    """Those whose numbers do not run into each other: the last one, and of the others who comes first."""
    ends = lambda value: (x(value) - 4.5 * len(number(value)), x(value) + 4.5 * len(number(value)))  # noqa: E731
    kept, limit = [], ends(values[-1])[0]
    for value in values[:-1]:
        first, last = ends(value)
        if last < limit and (not kept or first > ends(kept[-1])[1]):
            kept.append(value)
    return [*kept, values[-1]]


def lines(figure):
    panels = figure["panels"]
    left, gap, top, height = 58, 58, 74, 190
    width = (860 - left - 24 - gap * (len(panels) - 1)) / len(panels)
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    parts = ['<defs>']
    parts += [f'<clipPath id="p{at}"><rect x="{left + at * (width + gap) - 5:.1f}" y="{top - 5}" width="{width + 10:.1f}" height="{height + 10}"/></clipPath>' for at in range(len(panels))]
    parts.append("</defs>")
    for at, panel in enumerate(panels):
        origin = left + at * (width + gap)
        place = math.log if panel.get("is_log") else float
        low, high = place(panel["x"][0]), place(panel["x"][-1])
        most, cuts = scale(panel.get("most") or max(map(max, panel["series"].values())))

        def x(value, origin=origin, low=low, high=high, place=place):
            return origin + 8 + (place(value) - low) / (high - low) * (width - 16)

        def y(value, most=most):
            return top + height - value / most * height

        parts += frame(origin, top, width, height, most, cuts)
        parts.append(text(origin, top - 12, panel["name"], "name"))
        parts += [text(x(value), top + height + 17, number(value), "quiet", "middle") for value in readable(panel["x"], x)]
        parts.append(text(origin + width / 2, top + height + 34, panel["x_label"], "quiet", "middle"))
        for name, values in panel["series"].items():
            points = [(x(value), y(amount)) for value, amount in zip(panel["x"], values, strict=True)]
            drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            dots = "".join(f'<circle class="fill" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points)
            parts.append(f'<g class="s{names.index(name)}" clip-path="url(#p{at})"><polyline class="line" points="{drawn}"/>{dots}</g>')
    return parts, names, top + height + 58


def draw(figure):
    made, names, y = {"bars": bars, "lines": lines}[figure["kind"]](figure)
    parts = [text(24, 26, figure["title"], "title"), text(24, 44, figure["note"], "quiet"), *made, *legend(names, y)]
    return svg(860, y + 16, figure["title"], parts)


def road():
    """What happens to a request."""
    box = lambda x, y, w, h, name, more: [f'<rect class="box" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>', text(x + w / 2, y + h / 2 - 3, name, "name", "middle"), text(x + w / 2, y + h / 2 + 14, more, "quiet", "middle")]  # noqa: E731

    def way(x1, x2, y, words):
        tip = -7 if x2 > x1 else 7
        return [f'<path class="way" d="M{x1} {y}H{x2 + tip}"/>', f'<path class="head" d="M{x2} {y}l{tip} -4v8z"/>', text((x1 + x2) / 2, y - 6, words, "", "middle")]

    parts = [
        '<rect class="bus" x="390" y="14" width="220" height="292" rx="6"/>', text(500, 34, "NATS", "name", "middle"),
        *box(16, 125, 90, 70, "client", "OpenAI"), *box(230, 40, 140, 240, "API server", "routes, retries"),
        *box(640, 40, 200, 86, "context worker", "runs the prompt"), *box(640, 194, 200, 86, "decode worker", "generates"),
        *way(106, 230, 148, "1 request"), *way(230, 106, 184, "7 stream"),
        *way(370, 640, 68, "2 prompt"), *way(640, 370, 106, "3 first token, KV handle"),
        *way(370, 640, 220, "4 decode job with the handle"), *way(640, 370, 258, "6 tokens"),
        '<path class="kv" d="M740 126V180"/>', '<path class="kv-head" d="M740 193l-9 -14h18z"/>', text(728, 164, "5 KV, read over UCX", "of-kv name", "end"),
    ]
    return svg(860, 320, "A request goes to the API server, its prompt over NATS to a context worker, the KV handle to a decode worker, which reads the KV over UCX and streams tokens back", parts)


def filled(figure):
    """The figure with the numbers of its run."""
    if "run" not in figure:
        return figure
    run = json.loads((FIGURES / figure["run"]).read_text())

    def at(place):
        value = run
        for word in place.split("."):
            value = value[word]
        return value

    for panel in figure["panels"]:
        pairs = {name: at(place) for name, place in panel["series"].items()}
        panel["x"] = [x for x, _ in next(iter(pairs.values()))]
        panel["series"] = {name: [y for _, y in of_it] for name, of_it in pairs.items()}
    return figure


def missing(figure, page):
    """Numbers and commands that do not stand on the page."""
    panels = figure["panels"]
    if figure["kind"] == "bars":
        values = [value for one in figure["series"] for group in one["values"] for value in group]
    else:
        values = [value for panel in panels for one in panel["series"].values() for value in one]
    # As it is written in the figure's file, or with what the page has after the point.
    stands = lambda value: any(form in page for form in (str(value), f"{value:,}", f"{value:.1f}", f"{value:.2f}"))  # noqa: E731
    commands = [figure["command"], *figure.get("commands", [])]
    flat = " ".join(page.replace("\\\n", " ").split())
    return [str(value) for value in values if not stands(value)] + [command for command in commands if " ".join(command.split()) not in flat]


def main():
    check, faults = sys.argv[1:] == ["--check"], []
    pictures = {FIGURES / "road.svg": road()}
    for path in sorted(FIGURES.glob("*.json")):
        figure = filled(json.loads(path.read_text()))
        pictures[path.with_suffix(".svg")] = draw(figure)
        faults += [f"{path.name}: {it} does not stand on {figure['page']}" for it in missing(figure, (ROOT / figure["page"]).read_text())]
    if check:
        faults += [f"{path} is not what docs/plots.py draws: run it" for path, drawn in pictures.items() if not path.exists() or path.read_text() != drawn]
        faults += [f"{path} is drawn from nothing" for path in FIGURES.glob("*.svg") if path not in pictures]
    else:
        for path, drawn in pictures.items():
            path.write_text(drawn)
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
