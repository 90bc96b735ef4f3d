"""The SVGs of goodput.py: attainment and times over the rate, and how first tokens and times between tokens are distributed at each rate."""

import math

COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a"]
WIDTH, HEIGHT, LEFT, TOP = 340, 220, 44, 44
STEP = HEIGHT + TOP + 46


def open_svg(across, down, mixes):
    width, height = across * (WIDTH + LEFT) + 20, down * STEP + 18 * len(mixes)
    return [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
            '<style>text{fill:#57606a}</style><rect width="100%" height="100%" fill="#ffffff"/>']


def close_svg(out, down, mixes, path):
    for number, (colour, mix) in enumerate(zip(COLOURS * 9, mixes)):
        at = down * STEP + 6 + 18 * number
        out.append(f'<rect x="{LEFT}" y="{at - 9}" width="18" height="4" fill="{colour}"/><text x="{LEFT + 26}" y="{at}">{mix}</text>')
    path.write_text("\n".join(out) + "\n</svg>\n")


def panel(place, title, x_label, ticks, x, most, lines):
    """One panel: `place` is its column and row, `x` brings a value of `ticks` to 0 … 1, each line is a colour, dashes and points of x and y."""
    across, down = place
    y = lambda value: HEIGHT - min(value, most) / most * HEIGHT  # noqa: E731
    wide = WIDTH - 20
    out = [f'<g transform="translate({across * (WIDTH + LEFT) + LEFT},{down * STEP + TOP})"><text y="-14" font-weight="bold">{title}</text>']
    for part in range(5):
        at = HEIGHT - part * HEIGHT / 4
        out.append(f'<line x1="0" x2="{wide}" y1="{at}" y2="{at}" stroke="#d0d7de"/><text x="-6" y="{at + 4}" text-anchor="end">{part * most / 4:g}</text>')
    for tick in ticks:
        out.append(f'<text x="{x(tick) * wide:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{tick:g}</text>')
    for colour, dashes, points in lines:
        drawn = " ".join(f"{x(at) * wide:.1f},{y(value):.1f}" for at, value in points)
        out.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">{x_label}</text></g>')
    return out


def over_rate(rows, load, path):
    """Three panels over the rate: attainment, first token, between tokens. `load` has the level, which is dotted."""
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    rates = sorted({row["rate"] for row in rows})
    low, high = rates[0], rates[-1] if rates[-1] > rates[0] else rates[0] + 1
    panels = [
        ("within the service level, %", lambda r: [100 * r["attainment"]], 100, 95),
        ("first token, ms: p50 and p99 (dashed)", lambda r: [r["ttft"]["p50"], r["ttft"]["p99"]], 2.5 * load["ttft"], load["ttft"]),
        ("mean between tokens, ms: p50 and p99 (dashed)", lambda r: [r["itl"]["p50"], r["itl"]["p99"]], 2.5 * load["itl"], load["itl"]),
    ]
    out = open_svg(3, 1, mixes)
    for number, (title, values, most, mark) in enumerate(panels):
        lines = [("#57606a", ' stroke-dasharray="2 3"', [(low, mark), (high, mark)])]
        for colour, mix in zip(COLOURS * 9, mixes):
            mine = sorted((row for row in rows if row["mix"] == mix), key=lambda row: row["rate"])
            for kind, dashes in zip(range(len(values(mine[0]))), ["", ' stroke-dasharray="5 4"']):
                lines.append((colour, dashes, [(row["rate"], values(row)[kind]) for row in mine]))
        out += panel((number, 0), title, "requests/s", rates, lambda rate: (rate - low) / (high - low), most, lines)
    close_svg(out, 1, mixes, path)


def distribution(values, count):
    """Points of a time and the percent of `count` requests that took no longer. What failed took for ever: a curve may end below 100."""
    values = sorted(value for value in values if value > 0)
    return [(value, 100 * (number + 1) / count) for number, value in enumerate(values)]


def distributions(rows, load, path):
    """A row of two panels for each rate: which share of the requests had its first token within a time, and its mean time between tokens."""
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    rates = sorted({row["rate"] for row in rows})
    out = open_svg(2, len(rates), mixes)
    for down, rate in enumerate(rates):
        for across, (what, place, level) in enumerate([("first token", 0, load["ttft"]), ("mean between tokens", 1, load["itl"])]):
            # From a twentieth of the level to ten times as long.
            low, high = math.log(level / 20), math.log(level * 10)
            lines = [("#57606a", ' stroke-dasharray="2 3"', [(level, 0), (level, 100)])]
            for colour, mix in zip(COLOURS * 9, mixes):
                for row in rows:
                    if (row["mix"], row["rate"]) == (mix, rate):
                        lines.append((colour, "", distribution([each[place] for each in row["each"]], row["requests"])))
            ticks = [level * part for part in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)]
            x = lambda value: (min(max(math.log(value), low), high) - low) / (high - low)  # noqa: E731
            out += panel((across, down), f"{what}, % of requests within ms, at {rate:g}/s", "ms", ticks, x, 100, lines)
    close_svg(out, len(rates), mixes, path)
