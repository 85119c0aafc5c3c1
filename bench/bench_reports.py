"""The verdict of reports against their own MeSH terms: python bench/bench_reports.py iu_reports.csv.gz [--show 20]

The lexicon was tuned on reports with an even number; the others are the test. Columns uid, findings, impression, mesh.
Reports that nobody has indexed are left out. A text of verdict uncertain is not normal.
Nothing of a report is kept."""
import argparse

import numpy as np
import pandas as pd

from histokit.learn.bootstrap import mean_interval
from histokit.reports.verdict import legacy_verdict, read_text


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports")
    parser.add_argument("--show", type=int, default=0, help="disagreements of the test half to print")
    ask = parser.parse_args()
    table = judge(read_reports(ask.reports))
    for name, part in (("tuned on", table[table.tuned]), ("test", table[~table.tuned]), ("all", table)):
        low, high = mean_interval(part.right.to_numpy(float))
        found = part.groupby("normal").right.mean()
        print(f"{name:9} {len(part)} reports: accuracy {part.right.mean():.4f} [{low:.4f}, {high:.4f}], "
            f"of abnormal {found[False]:.4f}, of normal {found[True]:.4f}; keywords {part.legacy_right.mean():.4f}")
    for row in table[~table.tuned & ~table.right].head(ask.show).itertuples():
        print(f"{row.uid} {row.mesh[:60]} -> {row.verdict}: {row.because[:200]}")


if __name__ == "__main__": main()
