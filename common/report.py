"""report.html: one run, or several compared, as a page that opens from disk. No script, no network, no library.

    python -m common.report runs/demo
    python -m common.report runs/a-s0 runs/a-s1 runs/b-s0 runs/b-s1 --out compare.html

Every run writes its own; what it shows is read from the files in the run folder. All texts in it are data: escaped.
"""

import base64
import html
import json
import math
import os
import re
import sys
from pathlib import Path

from common.metrics import mean_std
from common.run import Parser, UserError, read_json, write_atomically

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --a: #2563eb; --b: #d97706; --c: #059669; --d: #be185d; --e: #7c3aed; --f: #64748b; }
@media (prefers-color-scheme: dark) { :root { --a: #60a5fa; --b: #fbbf24; --c: #34d399; --d: #f472b6; --e: #a78bfa; --f: #94a3b8; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin-bottom: 1rem; } td, th { border-bottom: 1px solid var(--line); padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--soft); border-radius: .5rem; padding: .5rem; } figcaption { font-size: .85rem; overflow-wrap: anywhere; } svg { width: 100%; height: auto; display: block; } svg text { fill: currentColor; font-size: 10px; }
img { max-width: 100%; background: white; border-radius: .5rem; margin: .5rem 0; } .bar { background: var(--a); height: .6rem; display: inline-block; border-radius: .2rem; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; } summary { cursor: pointer; } code { overflow-wrap: anywhere; } .dim { opacity: .65; }
"""
COLOURS = "abcdef"


def text(x):
    return html.escape(str(x))


def number(x):
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return text(x)
    return f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if 1e-3 <= abs(x) < 10 else f"{x:.4g}"


def table(head, rows):
    """head: names; rows: lists of cells, numbers to the right -> HTML."""
    is_number = lambda x: (isinstance(x, (int, float)) and not isinstance(x, bool)
                           or isinstance(x, str) and " ± " in x)
    right = [any(is_number(row[k]) for row in rows) for k in range(len(head))]
    top = "".join(f"<th{' class=n' if r else ''}>{text(h)}</th>" for h, r in zip(head, right))
    cells = lambda row: "".join(f"<td{' class=n' if is_number(x) else ''}>{number(x)}</td>" for x in row)
    return (f"<div class=wide><table><tr>{top}</tr>"
            + "".join(f"<tr>{cells(row)}</tr>" for row in rows) + "</table></div>")


def in_order(keys):
    """`overall` first, then by name, numbers within names by size: ndcg@5 before ndcg@10."""
    return sorted(keys, key=lambda k: (
        k != "overall", [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", k)]))


def chart(lines, title, dots=False, square=None):
    """lines: {name: [(x, y) or (x, y, half width of the band)]} -> an SVG figure. square: (low, high) of both
    axes, with the diagonal. Three points or fewer are dots."""
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [p[0] for points in lines.values() for p in points]
    ys = [y for points in lines.values() for p in points
          for y in (p[1] - (p[2] if len(p) > 2 else 0), p[1] + (p[2] if len(p) > 2 else 0))]
    (x0, x1), (y0, y1) = ((square, square) if square else ((min(xs), max(xs)), (min(ys), max(ys))))
    at = lambda x, y: (44 + 240 * (x - x0) / ((x1 - x0) or 1), 120 - 110 * (y - y0) / ((y1 - y0) or 1))
    join = lambda points: " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in points))
    parts = [f'<polyline points="{join([(x0, y0), (x1, y1)])}" fill="none" stroke="currentColor" '
             'stroke-dasharray="3" opacity=".4"/>'] if square else []
    for k, (name, points) in enumerate(lines.items()):
        colour = f"var(--{COLOURS[k % len(COLOURS)]})"
        if len(points[0]) > 2:
            band = [(p[0], p[1] - p[2]) for p in points] + [(p[0], p[1] + p[2]) for p in reversed(points)]
            parts.append(f'<polygon points="{join(band)}" fill="{colour}" opacity=".2"/>')
        parts.append(f'<polyline points="{join([p[:2] for p in points])}" fill="none" '
                     f'stroke="{colour}" stroke-width="1.5"/>')
        if dots or len(points) <= 3:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>'
                      for a, b in (at(*p[:2]) for p in points)]
    axes = (f'<text x="40" y="12" text-anchor="end">{y1:.4g}</text>'
            f'<text x="40" y="122" text-anchor="end">{y0:.4g}</text>'
            f'<text x="44" y="135">{x0:g}</text><text x="284" y="135" text-anchor="end">{x1:g}</text>')
    legend = "" if len(lines) == 1 else ": " + " · ".join(
        f'<span style="color:var(--{COLOURS[k % len(COLOURS)]})">{text(n)}</span>'
        for k, n in enumerate(lines))
    return (f'<figure><svg viewBox="-12 0 302 140" role="img" aria-label="{text(title)}">'
            f'{"".join(parts)}{axes}</svg>'
            f"<figcaption>{text(title)}{legend}</figcaption></figure>")


def read_lines(path):
    try:
        return ([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
                if path.exists() else [])
    except ValueError:
        raise UserError(f"{path} is not readable; remove it, or start anew with --overwrite") from None


def curves(folder):
    """metrics.jsonl -> {phase: {key: [(step, value)]}}, numbers only."""
    found = {}
    for record in read_lines(folder / "metrics.jsonl"):
        for key, value in record.items():
            if key not in ("phase", "step") and isinstance(value, (int, float)):
                found.setdefault(record["phase"], {}).setdefault(key, []).append(
                    (record["step"], float(value)))
    return found


def picture(path):
    return (f'<img alt="{text(path.stem)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}">' if path.exists() else "")


def flat(record, word=""):
    """Nested dicts of numbers -> [(a.b, value)]; lists are left out."""
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += flat(value, f"{word}{key}.")
        elif isinstance(value, (int, float, str)) or value is None:
            found.append((word + key, value))
    return found


# -------------------------------------------------------------------------------- the methods' own pictures
def lcft(folder, result):
    parts = ["<h2>Calibration</h2><div class=plots>"]
    for split in ("valid", "test"):
        points = [(p, y) for p, y, _ in result.get(split, {}).get("reliability", [])]
        parts.append(chart({split: points}, f"{split}: share of likes against P(Yes)",
                           dots=True, square=(0, 1)))
    parts.append("</div><h2>The surest contradictions</h2>")
    for c in read_lines(folder / "contradictions.jsonl"):
        asked = " · ".join(f"{q} <b>{text(a)}</b>" for q, a in ((text(q), a) for q, a in c["asked"].items()))
        parts.append(f"<details><summary>{text(c['title'])} <span class=dim>user {text(c['user'])}, "
                     f"truth: {text(c['truth'])}</span><br>{asked}</summary>"
                     f"<p>liked: {text('; '.join(c['liked']) or 'nothing yet')}<br>"
                     f"disliked: {text('; '.join(c['disliked']) or 'nothing yet')}</p></details>")
    return "".join(parts)


def curec(folder, result):
    parts = ["<h2>Some users: pattern, recommendations, reasons and the attention on them</h2>"]
    for e in read_lines(folder / "examples.jsonl"):
        parts.append(f"<details><summary>user {text(e['user'])}: "
                     f"{text(e['pattern'] or '(no pattern)')}</summary>"
                     f"<p class=dim>last choices: {text('; '.join(e['history']))}</p>")
        for item in e["top"]:
            parts.append(f"<h3>{text(item['title'])} <span class=dim>score {item['score']:.2f}</span></h3>")
            parts += [f"<div><span class=bar style='width:{8 * r['weight']:.2f}rem'></span> "
                      f"{r['weight']:.0%} {text(r['text'])}</div>" for r in item["reasons"]]
            if item.get("no_reason") is not None:
                parts.append("<div class=dim>"
                             f"<span class=bar style='width:{8 * item['no_reason']:.2f}rem'></span> "
                             f"{item['no_reason']:.0%} no reason</div>")
        parts.append("</details>")
    return "".join(parts).replace("<details>", "<details open>", 1)


def sllmr(folder, result):
    found = result.get("gate_map")
    if not found:
        return ""
    cell = lambda a: "<td>–</td>" if a is None else (
        f'<td class=n style="background:color-mix(in srgb, var(--a) {100 * a:.0f}%, transparent)">'
        f"{a:.2f}</td>")
    head = "".join(f"<th class=n>{text(p)}</th>" for p in found["popularity"])
    rows = "".join(f"<tr><th>{text(h)}</th>{''.join(map(cell, row))}</tr>"
                   for h, row in zip(found["history"], found["alpha"]))
    return ("<h2>The gate: mean α by length of history (down) and popularity of the item (across)</h2>"
            f"<div class=wide><table><tr><th></th>{head}</tr>{rows}</table></div>")


def coco(folder, result):
    codes = read_lines(folder / "codes.jsonl")
    most = max([c["texts"] for c in codes], default=1) or 1
    rows = "".join(f"<tr><td class=n>{c['code']}</td><td class=n>{c['texts']}</td>"
                   "<td style='min-width:8rem'>"
                   f"<span class=bar style='width:{8 * c['texts'] / most:.2f}rem'></span></td>"
                   f"<td>{text(' '.join(c['nearest_tokens']))}</td><td style='min-width:20rem'>"
                   f"{text(' | '.join('; '.join(u['titles'][-3:]) for u in c['typical_users']))}</td></tr>"
                   for c in codes)
    parts = ["<h2>Codes</h2><div class=wide><table><tr><th>code</th><th>texts</th><th></th>"
             "<th>nearest tokens</th><th>last choices of typical users</th></tr>"
             f"{rows}</table></div>"] if codes else []
    test, without = result.get("test", {}), result.get("test_without_llm", {})
    gain = [[cell, test[cell], without[cell], test[cell] - without[cell]]
            for cell in in_order(without) if cell in test and cell != "log_loss"]
    if gain:
        parts.append("<h2>Gain by group: AUC on test</h2>"
                     + table(["users", "with the LLM", "same model without", "gain"], gain)
                     + "<p class=dim>Without: this very model with the LLM's vectors left out, "
                       "not one that was trained without an LLM.</p>")
    return "".join(parts) + "<div class=plots>" + picture(folder / "map.png") + "</div>"


def page(title, body):
    return ("<!doctype html><html lang=en><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width, initial-scale=1">'
            f"<title>{text(title)}</title>"
            f"<style>{STYLE}</style><h1>{text(title)}</h1>{body}</html>\n")


def of_run(folder):
    """The HTML of one run folder."""
    folder = Path(folder)
    result, facts, settings = (read_json(folder / f"{name}.json") for name in ("result", "header", "args"))
    script = result.get("script", "run")
    body = [f"<p><code>{text(facts.get('command', ''))}</code></p>"]
    values = {k: dict(flat(result[k]))
              for k in ("test", "test_without_llm", "valid", "ranking", "popularity", "bayes_optimal")
              if isinstance(result.get(k), dict)}
    body.append("<h2>Results</h2>" + ("<p class=dim>AUC, unless the name says otherwise</p>"
                                      if "overall" in values.get("test", {}) else ""))
    ranking = [k for k in values if k == "ranking"]              # measured on rows of its own
    for kinds in filter(None, ([k for k in values if k not in ranking], ranking)):
        keys = in_order({key for k in kinds for key in values[k]})
        body.append(table(["", *[k.replace("_", " ") for k in kinds]],
                          [[key, *[values[k].get(key, "") for k in kinds]] for key in keys]))
    own = {"lcft": lcft, "curec": curec, "sllmr": sllmr, "coco": coco}.get(script)
    body.append(own(folder, result) if own else "")
    for phase, by_key in curves(folder).items():
        still = {key: points[0][1] for key, points in by_key.items()
                 if max(abs(y - points[0][1]) for _, y in points) < 1e-4}
        body.append(f"<h2>Phase {text(phase)}</h2><div class=plots>"
                    + "".join(chart({key: points}, key) for key, points in by_key.items() if key not in still)
                    + "</div>")
        body.append("<p class=dim>constant: "
                    f"{', '.join(f'{text(key)} {number(y)}' for key, y in still.items())}</p>"
                    if still else "")
    rest = flat({k: v for k, v in result.items() if k not in values})
    body.append("<h2>What else it reported</h2>" + table(["", ""], [list(pair) for pair in rest]))
    body.append("<h2>Settings</h2><details><summary>every flag</summary>"
                + table(["flag", "value"],
                        [["--" + k.replace("_", "-"), str(v)] for k, v in settings.items()]) + "</details>")
    body.append("<h2>Machine and data</h2>"
                + table(["", ""], [[k, str(v)] for k, v in facts.items() if k != "command"]))
    return page(f"{script}: {folder.name}" + (f", seed {settings['seed']}" if "seed" in settings else ""),
                "".join(body))


def compare(folders):
    """The HTML of several runs: seeds of one setting (folders NAME-sSEED or sSEED/NAME) are one row, mean ±
    std, and one band."""
    groups, root = {}, Path(os.path.commonpath([Path(f).parent for f in folders]))
    for folder in map(Path, folders):
        name = "/".join(re.sub(r"-s\d+$", "", part) for part in folder.relative_to(root).parts
                        if not re.fullmatch(r"s\d+", part))
        groups.setdefault(name or folder.name, []).append(folder)
    results = {name: [dict(flat(read_json(f / "result.json").get("test", {}))) for f in found]
               for name, found in groups.items()}
    keys = in_order({k for rs in results.values() for r in rs for k, v in r.items()
                     if isinstance(v, (int, float)) and k != "n"})
    rows = []
    for name, rs in results.items():
        cells = [mean_std([r[k] for r in rs]) if all(k in r for r in rs) else None for k in keys]
        rows.append([name, len(rs), *["" if c is None else f"{c[0]:.3f} ± {c[1]:.3f}" if len(rs) > 1 else c[0]
                                      for c in cells]])
    body = ["<h2>Test</h2>" + table(["", "runs", *keys], rows)]
    settings = {name: read_json(found[0] / "args.json") for name, found in groups.items()}
    flags = [k for k in dict.fromkeys(k for s in settings.values() for k in s)
             if k not in ("run", "seed") and len({json.dumps(s.get(k)) for s in settings.values()}) > 1]
    facts = read_json(Path(folders[0]) / "header.json")
    body.append("<h2>What differs</h2>"
                + table(["", *["--" + k.replace("_", "-") for k in flags]],
                        [[name, *[str(s.get(k, "")) for k in flags]] for name, s in settings.items()])
                if flags else "")
    body.append("<h2>What was run</h2>"
                + table(["", ""], [[k, str(v)] for k, v in facts.items() if k != "minutes"]))
    drawn = {}
    for name, found in groups.items():
        for many in [curves(f) for f in found]:
            for phase, by_key in many.items():
                for key, points in by_key.items():
                    if key.startswith("valid"):
                        drawn.setdefault((phase, key), {}).setdefault(name, []).append(points)
    body.append("<h2>Validation, mean and spread over seeds, as far as all seeds went</h2><div class=plots>")
    for (phase, key), by_name in drawn.items():
        lines = {}
        for name, many in by_name.items():
            steps = sorted(set.intersection(*[{s for s, _ in points} for points in many]))
            stats = [(s, *mean_std([dict(points)[s] for points in many])) for s in steps]
            lines[name] = [p if p[2] == p[2] else p[:2] for p in stats]
        body.append(chart(lines, f"{phase}: {key}"))
    # what an ablation drew
    above = {folder for f in map(Path, folders) for folder in f.parents if folder.is_relative_to(root)}
    pictures = [picture(path) for folder in sorted(above) for path in sorted(folder.glob("*.png"))]
    return page("Comparison of runs", "".join(body) + "</div>"
                + ("<h2>Pictures</h2>" + "".join(pictures) if pictures else ""))


def write(folders, out):
    """Write the page of one folder, or of several."""
    write_atomically(out, of_run(folders[0]) if len(folders) == 1 else compare(folders))


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", help="file to write (default: report.html in the first folder)")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not (Path(folder) / "result.json").exists():
            print(f"error: {folder}: no finished run there (no result.json)", file=sys.stderr)
            sys.exit(1)
    out = args.out or Path(args.runs[0]) / "report.html"
    try:
        write([Path(folder).resolve() for folder in args.runs], out)
    except OSError as problem:
        print(f"error: --out {out}: {problem.strerror}", file=sys.stderr)
        sys.exit(1)
    print(out)


if __name__ == "__main__":
    main()
