#!/usr/bin/python3
# nbdferry - the report of the benchmarks
# SPDX-License-Identifier: BSD-3-Clause
"""Put what benchmarks have measured into docs/performance.md, between the lines
that say so, and draw its plots.

usage: report.py DOCUMENT RESULTS.json...

    for b in bench/bench-*.py; do
        builddir=BUILD $b --json results/$(basename $b .py).json; done
    bench/report.py docs/performance.md results/*.json
"""

import json
import os
import sys

from ferrybench import number
from svgplot import figure


def cell(c):
    return number(c).replace("|", "\\|")


def markdown(head, rows):
    yield "| %s |" % " | ".join(head)
    yield "|%s|" % "|".join(["---"] + ["---:"] * (len(head) - 1))
    for r in rows:
        yield "| %s |" % " | ".join(cell(c) for c in r)
    yield ""


def goals(results):
    rows = [[g["row"], g["what"], float(g["value"]),
             "≤ %g" % g["most"] if g["least"] is None
             else "≥ %g" % g["least"],
             "yes" if g["reached"] else "**no**"]
            for r in results for g in r["goals"]]
    yield from markdown(["row", "what", "is", "goal", "reached"], rows)


def tables(results, folder):
    for r in results:
        for t in r["tables"]:
            yield "### " + t["title"][0].upper() + t["title"][1:]
            yield ""
            yield from markdown(t["head"], t["rows"])
        for name, p in r.get("plots", {}).items():
            svg = "performance-%s.svg" % name
            with open(os.path.join(folder, svg), "w") as f:
                f.write(figure(p["panels"]))
            yield "![growth with the %s](%s)" % (name, svg)
            yield ""


def machine(results):
    m = results[0]["machine"]
    yield "%d CPUs (%s), Linux %s; %s. Measured %s." % (
        m["cpus"], m["cpu"], m["kernel"],
        "; ".join(t for t in m["tools"] if t),
        " to ".join(sorted({min(r["when"] for r in results),
                            max(r["when"] for r in results)})))
    yield ""


def fill(text, name, lines):
    begin, end = "<!-- %s -->\n" % name, "<!-- end of %s -->\n" % name
    before, rest = text.split(begin)
    return before + begin + "\n" + "\n".join(lines) + "\n" + end + \
        rest.split(end)[1]


def main():
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    document, results = sys.argv[1], []
    for name in sys.argv[2:]:
        with open(name) as f:
            results.append(json.load(f))
    with open(document) as f:
        text = f.read()
    text = fill(text, "machine", machine(results))
    text = fill(text, "goals", goals(results))
    text = fill(text, "tables", tables(results, os.path.dirname(document)))
    with open(document, "w") as f:
        f.write(text)


main()
