"""What drafts are worth on real pictures and texts, of which nothing is part of the project.

    python bench/measure_reports.py REAL [--sets verdicts chest_xray adult tb notes] [--show 20]

REAL is a folder with cxr/iu_reports.csv.gz (columns uid, findings, impression, mesh), and with cxr/chest_xray, adult,
tb and notes.
verdicts: the verdict of reports against their own MeSH terms. The lexicon was tuned on reports with an even number; the
others are the test. Reports that nobody has indexed are left out. A text of verdict uncertain is not normal.
notes: how notes of physicians are read; all of these pictures show a disease.
The others: a classifier of the recipe image_probe is worded as `findings`, every labelled picture by folds that saw
nothing of its patient, and its drafts are scored."""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from histokit.core.runs import RunFolder
from histokit.learn.bootstrap import mean_interval
from histokit.pictures.classification import run_classification, stage_pictures
from histokit.pictures.classify_settings import ClassifySettings
from histokit.pictures.settings import PictureSettings
from histokit.reports.cases import find_cases
from histokit.reports.drafting import ReportSettings
from histokit.reports.scoring import prompt_sentences
from histokit.reports.task import write_reports
from histokit.reports.verdict import legacy_verdict, read_text

SETS = ("verdicts", "chest_xray", "adult", "tb", "notes")
PROBE = ClassifySettings(method="probe", backbone="tf_efficientnet_lite2", weights="package", views="none")
PATTERNS = dict(tb=r"((?:CHNCXR|MCUCXR)_\d+)")


def read_reports(path):
    "Reports with findings and terms: text, normal, tuned."
    table = pd.read_csv(path).fillna(dict(findings="", impression=""))
    table = table[table.findings.ne("") & table.mesh.ne("No Indexing")].reset_index(drop=True)
    table["text"] = table.findings + "\n\n" + table.impression
    table["normal"] = table.mesh.eq("normal")
    table["tuned"] = table.uid.str.extract(r"(\d+)")[0].astype(int) % 2 == 0
    return table


def judge(table):
    "The verdict, and whether it and the keyword score are right."
    read = [read_text(t) for t in table.text]
    verdict, keywords = ([r.verdict for r in read], [legacy_verdict(t) for t in table.text])
    called = np.isin(verdict, ["abnormal", "uncertain"])
    because = [" | ".join(r.because()) for r in read]
    legacy = np.array(keywords) != "abnormal"
    table = table.assign(verdict=verdict, because=because, right=called != table.normal)
    return table.assign(legacy_right=legacy == table.normal)


def show_verdicts(path, show):
    "Accuracy of the verdict on the half that tuned the lexicon, on the other half and on all."
    table = judge(read_reports(path))
    for name, part in (("tuned on", table[table.tuned]), ("test", table[~table.tuned]), ("all", table)):
        low, high = mean_interval(part.right.to_numpy(float))
        found = part.groupby("normal").right.mean()
        print(f"{name:9} {len(part)} reports: accuracy {part.right.mean():.4f} [{low:.4f}, {high:.4f}], "
            f"of abnormal {found[False]:.4f}, of normal {found[True]:.4f}; keywords {part.legacy_right.mean():.4f}")
    for row in table[~table.tuned & ~table.right].head(show).itertuples():
        print(f"{row.uid} {row.mesh[:60]} -> {row.verdict}: {row.because[:200]}")


def show_notes(folder):
    "How physicians' own notes are read: all pictures of the set show a disease."
    texts = [c.reference for c in find_cases(folder, "text") if c.reference]
    verdicts = pd.Series([read_text(t).verdict for t in texts]).value_counts()
    keywords = pd.Series([legacy_verdict(t) for t in texts]).value_counts()
    print(f"{len(texts)} notes, read as {verdicts.to_dict()}; by keywords {keywords.to_dict()}")


def show_drafts(name, folder, home):
    "What `findings` says of every labelled picture."
    run = RunFolder(home/name).make()
    pictures = PictureSettings(patient_pattern=PATTERNS.get(name, ""))
    metrics = run_classification(run, stage_pictures(run, str(folder), pictures), PROBE, say=lambda line: None)
    print(f"classifier: AUC {metrics['auc']['value']:.3f}")
    settings = ReportSettings(prompts="clinical_brief", images=0)
    row, = write_reports(run/"reports", run, settings, say=lambda line: None)["prompts"]
    print("\n".join(prompt_sentences(row)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--show", type=int, default=0, help="disagreements of the test half to print")
    ask = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        for name in ask.sets:
            path = ask.real/"cxr"/("iu_reports.csv.gz" if name == "verdicts" else name)
            print(f"\n== {name}" + ("" if path.exists() else f": {path} is not here; skipped"))
            if not path.exists(): continue
            if name == "verdicts": show_verdicts(path, ask.show)
            elif name == "notes": show_notes(path)
            else: show_drafts(name, path, Path(home))


if __name__ == "__main__": main()
