"""Which frozen encoder serves best, alone and together: probe and kriging, each slide (or patient) left out in turn.

    python bench/measure_encoders.py FILE.h5 [--encoders tf_efficientnet_lite0 tf_efficientnet_lite2 …]
        [--weights FILE --weights-of mobilenetv2_100 --backbone-args pad_type=same] [--together 2]
        [--cache FOLDER] [--out TABLE.csv]

All rows see the same spots and folds, patches of four sizes, four flips. Together means the features of several
encoders side by side. Everything that is chosen is chosen inside the training slides. Gains are paired, spot by spot,
against the probe of the first encoder; intervals draw slides, then blocks in them. Features stay in the cache folder.
"""
import argparse
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from histokit.core.files import write_table
from histokit.core.runs import RunFolder
from histokit.core.settings import settings_from
from histokit.learn.bootstrap import mean_difference
from histokit.learn.scores import mean_spearman, spearman_columns, spearman_rows
from histokit.pipeline import find_recipe, read_recipe, resolve
from histokit.spots.crossval import EncodedSpots, FrozenHead, left_out, open_spots
from histokit.spots.settings import NetworkSettings, TrainingSettings


def settings_of(recipe):
    "The network and training settings of a recipe."
    ask = resolve(read_recipe(find_recipe(recipe)))
    return settings_from(NetworkSettings, ask["02_model"]), settings_from(TrainingSettings, ask["03_train"])


def encode(name, data, settings, network, a):
    "What one encoder makes of all spots at all scales."
    own = name == a.weights_of
    asked = dict(backbone=name, weights=a.weights if own else "package", backbone_args=a.backbone_args if own else "")
    asked |= dict(mean="0.5", std="0.5")
    start = time.time()
    found = EncodedSpots(data, settings, replace(network, **asked).recipe(), None, a.cache)
    print(f"{name}: {len(found.blocks)} blocks of features, {time.time() - start:.0f} s", flush=True)
    return found


def together(encoded, scales):
    "Several encoders as one: at each scale the stages of all of them."
    per = [len(e.blocks) // scales for e in encoded]
    blocks = [b for i in range(scales) for e, n in zip(encoded, per) for b in e.blocks[i * n:(i + 1) * n]]
    last = [e.blocks[n - 1] for e, n in zip(encoded, per)]              # pooled features of the first scale
    pooled = last[0] if len(last) == 1 else np.concatenate(last, 1)
    return SimpleNamespace(data=encoded[0].data, blocks=blocks, mean=pooled, views=[pooled],
        view=lambda rows: [np.asarray(pooled[rows], np.float32)])


def out_of_fold(encoded, settings):
    "Predictions of every training spot by a head that saw nothing of its slide."
    data, head = encoded.data, FrozenHead(encoded, settings)
    oof = np.full(data.Y.shape, np.nan)
    for _, train, held in left_out(data):
        oof[held] = head.fit(data.is_train[train], data.is_train[held]).answers[0]
    return oof


def measure(a):
    "The table: a row for each set of encoders and each way to learn."
    network, kriging = settings_of("best")
    probe = replace(settings_of("probe")[1], stages="", context_um=kriging.context_um)
    data, rows, base = open_spots(RunFolder().make(), a.file, kriging), [], None
    encoded = {name: encode(name, data, kriging, network, a) for name in a.encoders}
    sets = [c for n in range(1, a.together + 1) for c in itertools.combinations(a.encoders, n)]
    for names, (what, settings) in itertools.product(sets, dict(probe=probe, best=kriging).items()):
        oof = out_of_fold(together([encoded[n] for n in names], len(kriging.sizes_um)), settings)
        each = spearman_rows(oof, data.Y)
        base = each if base is None else base
        gain = mean_difference(base, each, data.train.slide, data.block)
        row = dict(idea=f"{what}: {' + '.join(names)}", per_spot=mean_spearman(oof, data.Y),
            per_type=spearman_columns(oof, data.Y).mean())
        rows.append(row | {k: float(gain[k]) for k in ("difference", "low", "high")})
        print("{idea:60} {per_spot:.4f} {per_type:.4f}  {difference:+.4f}".format(**rows[-1]), flush=True)
    return pd.DataFrame(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("file")
    p.add_argument("--encoders", nargs="+", default=["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
    p.add_argument("--weights", default="")
    p.add_argument("--weights-of", default="")
    p.add_argument("--backbone-args", default="")
    p.add_argument("--together", type=int, default=2)
    p.add_argument("--cache", default=None)
    p.add_argument("--out", default="")
    a = p.parse_args()
    table = measure(a)
    if a.out: write_table(a.out, table)


if __name__ == "__main__": main()
