# nbdferry - plots as SVG
# SPDX-License-Identifier: BSD-3-Clause
"""A figure of panels side by side; each shows series over one x axis, as lines
through the medians, with bars from the least to the most.

    figure([{"title": "Time", "x": "size of the disk", "y": "seconds",
             "ticks": [[2, "2 GiB"], [64, "64 GiB"]], "log": True,
             "series": {"nbdferry": [[2, 0.4, 0.3, 0.5], [64, ...]]}}])
"""

import math
from xml.sax.saxutils import escape

COLOURS = ["#1f5fa8", "#c8501e", "#2e8b57", "#7a4fa3", "#8a6d1a"]
MARKS = ["circle", "square", "diamond", "circle", "square"]
WIDTH, HEIGHT = 500, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 62, 54


def nice_step(most, n=5):
    """A round number that divides 0 to 'most' into about n."""
    raw = most / n
    unit = 10 ** math.floor(math.log10(raw))
    return min((f * unit for f in (1, 2, 2.5, 5, 10)),
               key=lambda step: abs(step - raw))


def text(x, y, what, anchor="middle", size=11, extra=""):
    return ('<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%d"%s>%s'
            '</text>' % (x, y, anchor, size, extra, escape(what)))


def mark(kind, x, y, colour):
    if kind == "circle":
        return '<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>' % (x, y,
                                                                   colour)
    turn = ' transform="rotate(45 %.1f %.1f)"' % (x, y) \
        if kind == "diamond" else ""
    return ('<rect x="%.1f" y="%.1f" width="6" height="6" fill="%s"%s/>'
            % (x - 3, y - 3, colour, turn))


def panel(p, at):
    w, h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    xs = [t[0] for t in p["ticks"]]
    place = (lambda v: math.log2(v)) if p.get("log") else (lambda v: v)
    first, last = place(min(xs)), place(max(xs))
    top = max(point[3] for s in p["series"].values() for point in s)
    top = max(top, p.get("line", [0])[0]) or 1
    step = nice_step(top)
    top = math.ceil(top / step - 1e-9) * step

    def px(v):
        return LEFT + (place(v) - first) / ((last - first) or 1) * w

    def py(v):
        return TOP + h - v / top * h

    out = ['<g transform="translate(%d 0)">' % at,
           text(LEFT, 20, p["title"], "start", 13, ' font-weight="bold"')]
    for i in range(round(top / step) + 1):
        y = py(i * step)
        out.append('<path d="M%d %.1fh%d" stroke="%s"/>'
                   % (LEFT, y, w, "#333" if i == 0 else "#e2e5ea"))
        out.append(text(LEFT - 7, y + 4, "%g" % round(i * step, 9), "end"))
    for v, label in p["ticks"]:
        out.append('<path d="M%.1f %dv5" stroke="#333"/>' % (px(v), TOP + h))
        out.append(text(px(v), TOP + h + 18, label))
    out.append(text(LEFT + w / 2, HEIGHT - 12, p["x"]))
    out.append(text(0, 0, p["y"], "middle", 11,
                    ' transform="translate(15 %.1f) rotate(-90)"'
                    % (TOP + h / 2)))
    if "line" in p:
        y, label = p["line"]
        out.append('<path d="M%d %.1fh%d" stroke="#777" '
                   'stroke-dasharray="5 4"/>' % (LEFT, py(y), w))
        out.append(text(LEFT + w, py(y) - 5, label, "end", 10,
                        ' fill="#555"'))
    x = LEFT
    for i, (name, points) in enumerate(p["series"].items()):
        colour, kind = COLOURS[i % 5], MARKS[i % 5]
        out.append('<path d="M%s" fill="none" stroke="%s" stroke-width="1.8"/>'
                   % ("L".join("%.1f %.1f" % (px(v), py(m))
                               for v, m, _, _ in points), colour))
        for v, m, lo, hi in points:
            out.append('<path d="M%.1f %.1fV%.1fm-3 0h6M%.1f %.1fh6" '
                       'stroke="%s" stroke-opacity=".55"/>'
                       % (px(v), py(lo), py(hi), px(v) - 3, py(lo), colour))
            out.append(mark(kind, px(v), py(m), colour))
        out.append(mark(kind, x + 5, 38, colour))
        out.append(text(x + 13, 42, name, "start"))
        x += 24 + 5.8 * len(name)
    return "\n".join(out + ["</g>"])


def figure(panels):
    width = WIDTH * len(panels)
    return "\n".join(
        ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
         'viewBox="0 0 %d %d" font-family="sans-serif" fill="#222">'
         % (width, HEIGHT, width, HEIGHT),
         '<rect width="%d" height="%d" fill="#fff"/>' % (width, HEIGHT)]
        + [panel(p, i * WIDTH) for i, p in enumerate(panels)]
        + ["</svg>", ""])
