"""Train scorers on crops with ordinal scores, judge them on another slide, and score crops of another patient.

    python bench/measure_scores.py FOLDER [--out scores.csv] [--threads 1] [--finetune] [--only NAME …] [--table …]

FOLDER holds scores.csv (path, split, slide, and a column for each measure, 0 to 3), train/ and test/. Everything is
chosen on `train` alone, on slides left out in turn; `val` is looked at once, for the table. Its crops are of one slide,
so that intervals are drawn over crops. The answers to test/ go to --out.

nbs/measured/scores_her2st_crops.csv has what was measured, nbs/measured/scores_her2st_test.csv the answers to test/."""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histokit.core.files import write_table
from histokit.core.text import choose
from histokit.review.measures import Measure
from histokit.review.scorer_training import PUBLISHED_SCORER, ScorerSettings, train_scorer
from histokit.review.scorer import Scorer
from histokit.review.scores import compare_answers, degeneracy, leave_one_out_mean

MEASURES = tuple(Measure(key, high=3) for key in ("tumour", "stroma", "immune", "vascular"))
KEYS = [m.key for m in MEASURES]

# The reference is the pooled end of one encoder and rounding. Each further line adds one idea.
PLAIN = ScorerSettings(stages="", cuts="round", input_px=200, views="dihedral", folds=4)
TRIED = {
    "pooled, rounded": PLAIN,
    "+ matched cuts": replace(PLAIN, cuts="matched"),
    "+ stages chosen": replace(PLAIN, cuts="matched", stages="auto"),
    "+ stain of each slide": replace(PLAIN, cuts="matched", stages="auto", stain="macenko", stain_by="sample"),
    "+ a second encoder": replace(PLAIN, cuts="matched", stages="auto", stain="macenko", stain_by="sample",
        backbone="tf_efficientnet_lite0,tf_efficientnet_lite2")}
FINAL = "+ a second encoder"
TUNED = replace(PUBLISHED_SCORER, backbone="tf_efficientnet_lite0", weights="package", input_px=200, folds=4, epochs=15,
    patience=4, cuts="matched", views="flips")


def read_scores(folder):
    "The table with whole paths, slides as samples."
    table = pd.read_csv(folder/"scores.csv")
    return table.assign(path=[str(folder/"train"/p) for p in table.path], group=table.slide)


def answers(file, paths):
    "A model's scores of the crops of one slide, (n, M)."
    return np.array([[d[k] for k in KEYS] for d in Scorer.load(file).draft_sample(paths)])


def measured(table, settings, file):
    "Train on the slides of `train`; what was measured on those left out, and the scores of `val`."
    start = time.time()
    train, val = table[table.split == "train"], table[table.split == "val"]
    metrics = train_scorer(train, MEASURES, settings, file, log=lambda line: None)
    return metrics, answers(file, val.path), time.time() - start


def judged(found, val, train):
    "Every answer and the baselines on `val`, with intervals: a row an answer."
    true = val[KEYS].to_numpy(float)
    known = {"mean of training": np.broadcast_to(train[KEYS].mean().to_numpy(), true.shape)}
    known["sample's other crops"] = leave_one_out_mean(true, val.group)
    given = known | {name: pred for name, (_, pred, _) in found.items()}
    table, rows = compare_answers(given, true, MEASURES, np.arange(len(true))), []
    for name in given:
        each = table[table.answer == name].set_index("measure")
        about = dict(answer=name, left_out=found[name][0]["mean_kappa"] if name in found else np.nan)
        ends = ("", "_low", "_high")
        about |= {f"kappa{end}": each.loc["mean"][f"kappa{end}"] for end in ends}
        about |= {f"{what}_{key}{end}": each.loc[key][f"{what}{end}"]
            for what in ("kappa", "mae") for key in KEYS for end in ends}
        rows.append(about | dict(seconds=round(found[name][2]) if name in found else 0))
    return pd.DataFrame(rows)


def show(table):
    "The table of every answer, without the intervals of each measure."
    for row in table.to_dict("records"):
        kappas, errors = (" ".join(f"{row[f'{what}_{key}']:5.2f}" for key in KEYS) for what in ("kappa", "mae"))
        inner = "    –" if np.isnan(row["left_out"]) else f"{row['left_out']:.3f}"
        interval = f"{row['kappa']:.3f} [{row['kappa_low']:.3f}, {row['kappa_high']:.3f}]"
        print(f"{row['answer']:32}{inner:>8}   {interval}   {kappas}   {errors} {row['seconds']:5.0f} s")


def chosen_tries(asked):
    "The settings that are tried, by name; the last is the one whose answers to test/ are written."
    tried = TRIED | ({"fine-tuned": TUNED} if asked.finetune else {})
    if not asked.only: return tried, FINAL
    for name in asked.only: choose(name, tried, "try")
    return {name: tried[name] for name in asked.only}, asked.only[-1]


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("folder", type=Path)
    ask.add_argument("--out", type=Path, default=Path("scores_test.csv"))
    ask.add_argument("--threads", type=int, default=0, help="of torch; 0 = as it is")
    ask.add_argument("--finetune", action="store_true", help="also train the last stage of an encoder (15 minutes)")
    ask.add_argument("--table", type=Path, help="write what was measured here, a .csv")
    ask.add_argument("--only", nargs="+", metavar="NAME", help="these alone, by their names in the table")
    asked = ask.parse_args()
    if asked.threads: torch.set_num_threads(asked.threads)
    table, (tried, final) = read_scores(asked.folder), chosen_tries(asked)
    train, val = table[table.split == "train"], table[table.split == "val"]
    print(degeneracy(train[KEYS].to_numpy(float), MEASURES)["sentence"])
    models = {name: asked.out.parent/f"{asked.out.stem}_{i}.safetensors" for i, name in enumerate(tried)}
    found = {name: measured(table, settings, models[name]) for name, settings in tried.items()}
    print(f"\n{'':32}{'left out':>8}   mean kappa on val        {' / '.join(KEYS)}: kappa, then mean error")
    table = judged(found, val, train)
    show(table)
    if asked.table: write_table(asked.table, table.round(4))
    print(f"\nchosen on train by {final!r}: {found[final][0]['chosen']}")
    paths = sorted((asked.folder/"test").iterdir())
    scores = answers(models[final], paths)
    answer = pd.DataFrame(scores.astype(int), columns=KEYS)
    answer.insert(0, "id", [p.stem for p in paths])
    write_table(asked.out, answer)
    print(f"{len(paths)} crops of test/ scored: {asked.out}, means {dict(zip(KEYS, scores.mean(0).round(2).tolist()))}")
    for file in models.values(): file.unlink()


if __name__ == "__main__": main()
