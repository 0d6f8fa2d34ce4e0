"""The figures of a data set, as the paper shows them: words and relations per prompt, kinds, and sorts of relation."""

import base64
import html
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .manifest import words
from .pair_files import read_pairs
from .relations import family

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right}}
td:first-child,th:first-child{{text-align:left}}</style>
<h1>{title}</h1><p>{summary}</p><img alt="Four histograms" src="data:image/png;base64,{image}">
<h2>Relations</h2><table><tr><th>relation<th>stated<th>broken in the twin</tr>{rows}</table>"""


def draw_figures(path: Path, out: Path) -> str:
    """Writes `stats.png` and `stats.html` into `out`; returns a line that sums them up."""
    lengths, counts, kinds, sorts, broken = Counter(), Counter(), Counter(), Counter(), Counter()
    for record in read_pairs(path):
        lengths[words(record["prompt"])] += 1
        relations = record.get("relations", [])
        counts[len(relations)] += 1
        sorts.update(family(said["relation"]) for said in relations)
        broken.update(family(said["relation"]) for said in relations if not said["broken"])
        kinds.update(thing["kind"] for thing in record.get("things", {}).get("kept", []))
    mode = lambda counter: counter.most_common(1)[0][0]
    summary = (
        f"{lengths.total():,} pairs; {min(lengths)} to {max(lengths)} words, most often {mode(lengths)}; "
        f"{min(counts)} to {max(counts)} relations, most often {mode(counts)}; {len(kinds)} kinds of thing"
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    for axis, title, counter in ((axes[0, 0], "words per prompt", lengths), (axes[0, 1], "relations per prompt", counts)):
        axis.bar(list(counter), list(counter.values()), color="#3b6ea5")
        axis.set(title=title, ylabel="prompts")
    for axis, title, counter in ((axes[1, 0], "kinds of thing (the 30 most frequent)", kinds), (axes[1, 1], "relations", sorts)):
        named = counter.most_common(30)
        axis.bar([name for name, _ in named], [count for _, count in named], color="#c26a3d")
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=90)
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "stats.png", dpi=110)
    pyplot.close(figure)
    rows = "".join(f"<tr><td>{html.escape(s)}<td>{n:,}<td>{broken[s]:,}</tr>" for s, n in sorts.most_common())
    image = base64.b64encode((out / "stats.png").read_bytes()).decode()
    (out / "stats.html").write_text(PAGE.format(title="The data set", summary=summary, image=image, rows=rows))
    return summary
