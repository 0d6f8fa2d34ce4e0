"""How often the picture that keeps its prompt scores above its twin.

    spatialscore-eval pairs --server 127.0.0.1:50051            through the server's streaming call
    spatialscore-eval pairs --checkpoint models/spatialscore-mini   in transformers, without a server
    spatialscore-eval pairs --server … --baseline blank         what is left without the picture (or the prompt, or its order)

PAIRS is a data set of `spatialreward-data`, or your own in any form that training takes.
Writes `scores.json`, `eval.json` and `eval.html`: accuracy with its 95 % interval, by relation and by number of relations, whether the
standard deviation tells, and the gravest mistakes with their pictures.
"""

import argparse
import base64
import html
import json
from collections import Counter, defaultdict
from itertools import islice
from math import erf, sqrt
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .calibration import interval
from .data_sets import home
from .files import command
from .pair_files import read_pairs
from .pictures import Picture, picture_bytes
from .relations import family
from .scorers import Item, LocalScorer, Score, ServerScorer

BINS = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 0.99), (0.99, 1.01))

PAGE = """<!doctype html><meta charset="utf-8"><title>Pair accuracy</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}.pair{{display:flex;gap:1rem;margin:1.5rem 0;align-items:flex-start}}
figure{{margin:0}}img{{width:224px}}.broken{{background:#ffd9d2}}big{{font-size:2.5rem}}</style>
<h1>Pair accuracy</h1><p>{model}<p><big>{accuracy}</big> of {pairs:,} pairs
{tables}<h2>The gravest mistakes</h2>{mistakes}"""


def percent(share: dict) -> str:
    """A share with its interval, for people."""
    return f"{share['accuracy']:.1%} ({share['low']:.1%} to {share['high']:.1%})"


def certainty(kept: Score, broken: Score) -> float | None:
    """How likely the model itself holds its order of the two to be right."""
    if kept.stddev is None or broken.stddev is None:
        return None
    spread = sqrt(kept.stddev**2 + broken.stddev**2)
    return 0.5 * (1 + erf(abs(kept.mean - broken.mean) / spread / sqrt(2)))


def perturbation(record: dict) -> set[str]:
    """What was done to which things there are, in the words of the report: nothing, where they only stand otherwise."""
    if "things" not in record:
        return set()
    kept, broken = (Counter(thing["kind"] for thing in record["things"][name]) for name in ("kept", "broken"))
    lost, added = kept - broken, broken - kept
    if lost or added:
        return {"(another in its place)" if lost and added else "(missing)" if lost else "(there besides)"}
    over = lambda thing: min(thing["box"]) < -0.01 or max(thing["box"]) > 1.01
    return {"(cut off)"} if any(over(thing) for name in ("kept", "broken") for thing in record["things"][name]) else set()


def shares(judged: list[dict]) -> dict:
    """Accuracies of pairs that were judged, as a whole and by their properties."""
    groups = {"by relation": defaultdict(list), "by number of relations": defaultdict(list), "by certainty": defaultdict(list)}
    for pair in judged:
        relations = pair["record"].get("relations", [])
        groups["by number of relations"][len(relations)].append(pair["right"])
        for sort in {family(said["relation"]) for said in relations if not said["broken"]} | perturbation(pair["record"]):
            groups["by relation"][sort].append(pair["right"])
        if pair["certainty"] is not None:
            low, high = next(b for b in BINS if pair["certainty"] < b[1])
            groups["by certainty"][f"{low:.2f} to {min(high, 1):.2f}"].append(pair["right"])
    found = {"all": interval(sum(p["right"] for p in judged), len(judged))}
    return found | {
        title: {str(name): interval(sum(rights), len(rights)) for name, rights in sorted(group.items())}
        for title, group in groups.items()
    }


def blank(records: list[dict], folder: Path) -> list[dict]:
    """Every picture is the same grey one: all scores tie, and what is not a half is a fault of the measurement."""
    grey = folder / "grey.png"
    Image.new("RGB", (224, 224), (128, 128, 128)).save(grey)
    return [record | {"kept": str(grey), "broken": str(grey)} for record in records]


def shuffled(records: list[dict], folder: Path) -> list[dict]:
    """Every pair under the prompt of another."""
    return [record | {"prompt": records[i - 1]["prompt"]} for i, record in enumerate(records)]


def bag_of_words(records: list[dict], folder: Path) -> list[dict]:
    """Every prompt's words in the order of the alphabet."""
    return [record | {"prompt": " ".join(sorted(record["prompt"].split()))} for record in records]


BASELINES = {"blank": blank, "shuffled-prompts": shuffled, "bag-of-words": bag_of_words}


def judge(scorer: ServerScorer | LocalScorer, records: list[dict]) -> list[dict]:
    """Both pictures of every pair, scored under the pair's prompt. A tie is half right."""
    items = (Item(record["prompt"], record[name]) for record in records for name in ("kept", "broken"))
    scores: dict[int, Score] = dict(tqdm(scorer.scores(items), total=2 * len(records), unit="picture"))
    judged = []
    for i, record in enumerate(records):
        kept, broken = scores[2 * i], scores[2 * i + 1]
        judged.append(
            {"record": record, "kept": kept, "broken": broken, "right": (1 + (kept.mean > broken.mean) - (kept.mean < broken.mean)) / 2, "certainty": certainty(kept, broken)}
        )
    return judged


def told(pair: dict) -> dict:
    """A judged pair as `scores.json` has it."""
    pictures = {name: dict(zip(("picture", *Score._fields), (pair["record"][name], *pair[name]))) for name in ("kept", "broken")}
    return pictures | {name: pair[name] for name in ("right", "certainty")} | {"prompt": pair["record"]["prompt"]}


def _picture(title: str, picture: Picture, score: Score) -> str:
    spread = f" ± {score.stddev:.2f}" if score.stddev is not None else ""
    data = base64.b64encode(picture_bytes(picture)).decode()
    return f'<figure><img src="data:image;base64,{data}"><figcaption>{title}: {score.mean:+.2f}{spread}</figcaption></figure>'


def _mistake(pair: dict) -> str:
    record = pair["record"]
    said = "".join(
        f'<li{"" if r["broken"] else " class=broken"}>{html.escape(r["relation"])}({html.escape(", ".join(r["about"]))})</li>'
        for r in record.get("relations", [])
    )
    pictures = _picture("keeps it", record["kept"], pair["kept"]) + _picture("breaks it", record["broken"], pair["broken"])
    return f'<div class="pair">{pictures}<div>{html.escape(record["prompt"])}<ul>{said}</ul></div></div>'


def page(model: str, found: dict, judged: list[dict], mistakes: int) -> str:
    """The report as HTML. The broken relations of a mistake are marked."""
    tables = "".join(
        f"<h2>{title.capitalize()}</h2><table>"
        + "".join(f"<tr><td>{name}<td>{percent(share)}<td>{share['pairs']:,} pairs" for name, share in group.items())
        + "</table>"
        for title, group in found.items()
        if title != "all" and group
    )
    wrong = sorted((p for p in judged if p["right"] < 1), key=lambda p: p["kept"].mean - p["broken"].mean)
    return PAGE.format(
        model=html.escape(model),
        accuracy=percent(found["all"]),
        pairs=found["all"]["pairs"],
        tables=tables,
        mistakes="".join(map(_mistake, wrong[:mistakes])) or "<p>None.",
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a data set's folder, or a manifest")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="HOST:PORT", help="a running SpatialScore")
    where.add_argument("--checkpoint", type=Path, help="a checkpoint's folder")
    parser.add_argument("--protos", type=Path, default=Path("proto"), help="where the contract lies (default: %(default)s)")
    parser.add_argument("--token", help="for a server that asks for one")
    parser.add_argument("--baseline", choices=BASELINES, help="score pairs that have lost what tells them apart")
    parser.add_argument("--limit", type=int, help="only the first so many pairs")
    parser.add_argument("--mistakes", type=int, default=24, help="how many to show (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the data set's folder)")
    parser.add_argument("--floor", type=float, default=0.0, help="end with 1 where the accuracy is below this share")
    options = parser.parse_args()
    scorer = ServerScorer(options.server, options.protos, token=options.token) if options.server else LocalScorer(options.checkpoint)
    out = options.out or home(options.pairs) / (options.baseline or "")
    out.mkdir(parents=True, exist_ok=True)
    records = list(islice(read_pairs(options.pairs), options.limit))
    if options.baseline:
        records = BASELINES[options.baseline](records, out)
    judged = judge(scorer, records)
    found, model = shares(judged), scorer.describe()
    (out / "scores.json").write_text(json.dumps([told(pair) for pair in judged], indent=1) + "\n")
    (out / "eval.json").write_text(json.dumps({"model": model} | found, indent=1) + "\n")
    (out / "eval.html").write_text(page(model, found, judged, options.mistakes))
    total = found["all"]
    print(f"{total['accuracy']:.2%} of {total['pairs']} pairs (95 %: {total['low']:.2%} to {total['high']:.2%}); {out / 'eval.html'}")
    if total["accuracy"] < options.floor:
        raise SystemExit(f"below the floor of {options.floor:.2%}")


if __name__ == "__main__":
    main()
