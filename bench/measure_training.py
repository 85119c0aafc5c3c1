"""Which ideas help: every one of them leave-one-slide-out (or patient), with its gain over the probe and an interval.

    python bench/measure_training.py FILE.h5|RUN/slides.h5 [--weights FILE --backbone-args pad_type=same]
        [--mean .5 --std .5] [--cache FOLDER] [--out TABLE.csv]

All ideas see the same spots, folds and frozen encoder. What an idea has to choose (penalty, epochs, rounds, candidate)
it chooses on groups inside its training rows. Intervals draw slides, then blocks in them; gains are paired, spot by
spot. Features are kept in the cache folder, so that a second run takes minutes.
"""
import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import torch

from histokit.core.files import write_table
from histokit.core.runs import RunFolder
from histokit.core.settings import settings_from
from histokit.frozen.heads import fit_boost, fit_kernel, fit_pls, fit_ridge
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head, head_answer
from histokit.learn.bootstrap import mean_difference
from histokit.learn.losses import Loss
from histokit.learn.networks import start_at
from histokit.learn.scores import mean_spearman, row_ranks, spearman_columns, spearman_rows
from histokit.learn.trainer import Trainer
from histokit.pipeline import find_recipe, read_recipe, resolve
from histokit.spots.context import ContextDataset, fit_context
from histokit.spots.crossval import EncodedSpots, FrozenHead, left_out, open_spots
from histokit.spots.kriging import (KrigingData, KrigingSettings, appearance_features, appearances, centred_places,
    krige_fold, place_features, similarity_features, with_places)
from histokit.spots.lattice import neighbour_table, smooth
from histokit.spots.settings import NetworkSettings, TrainingSettings
from histokit.spots.targets import TargetTransform


class Study:
    "The spots of a file, their folds, and what a frozen encoder saw of them: those of the recipe `best`."
    def __init__(self, a):
        network, self.best = settings_of("best", a)
        run = RunFolder(Path(a.file).parent) if a.file.endswith("slides.h5") else RunFolder().make()
        self.data = open_spots(run, a.file, self.best)
        self.encoded = EncodedSpots(self.data, self.best, network.recipe(), run.json_or("stain.json"), a.cache or None)
        self.blocks, self.views, self.encoder = self.encoded.blocks, self.encoded.views, self.encoded.encoder
        self.scales, self.kriging = len(self.best.sizes_um), FrozenHead(self.encoded, self.best)
        self.spots, self.values, self.slide = self.data.spots, self.data.values, self.data.slide
        self.group = self.kriging.group                    # what is left out inside training rows

    @property
    def first(self):
        "The blocks of the first scale, the pooled features last."
        return self.blocks[:len(self.blocks) // self.scales]

    def pooled_views(self):
        "The pooled features of the first scale, view by view."
        last = len(self.first) - 1
        return [self.encoder.blocks(np.asarray(v, np.float32))[last] for v in self.views]

    def units(self, rows):
        "The same groups for all spots, as kriging takes it."
        units = np.full(len(self.spots), "", object)
        units[rows] = self.group(rows)
        return units


def settings_of(recipe, a):
    "The network and training settings of a recipe, with the encoder that was asked for."
    network = {n: getattr(a, n) for n in ("backbone", "weights", "backbone_args", "mean", "std") if getattr(a, n)}
    ask = resolve(read_recipe(find_recipe(recipe)), [f"{n}={v}" for n, v in network.items()])
    return settings_from(NetworkSettings, ask["02_model"]), settings_from(TrainingSettings, ask["03_train"])


# ---- ideas: each a function of training and held-out rows (of all spots) that predicts the latter

def constant(study):
    return lambda r, c: np.tile(row_ranks(study.values[r]).mean(0), (len(c), 1))


def rows_of(x, rows): return [b[rows] for b in x] if isinstance(x, list) else x[rows]


def head(study, fit, x, kind="rank", **kw):
    "A head on features, on a list of blocks of them, or for the network on a list of views."
    def predict(r, c):
        t = TargetTransform(kind).fit(study.values[r])
        def score(p, q): return mean_spearman(t.inverse(p), t.inverse(q))
        found = fit(rows_of(x, r), t.transform(study.values[r]), study.group(r), score, **kw)
        return t.natural(found.predict(rows_of(x, c)))
    return predict


def with_neighbours(study):
    "A network head with attention over the neighbours."
    views = study.pooled_views()
    table = neighbour_table(study.spots[["x", "y"]].to_numpy(), study.slide)
    def predict(r, c):
        t, z = TargetTransform("rank").fit(study.values[r]), np.zeros(study.values.shape)
        z[r] = t.transform(study.values[r])
        data = ContextDataset(views, table, z)
        fit = fit_context(data.at(r), study.group(r), mean_spearman, "attention", epochs=(5, 10))
        return fit.predict(data.at(c))
    return predict


def published(study, loss, lr, at_mean=False):
    "Head and schedule of a published recipe on the frozen encoder, begun as published, or at the targets' mean."
    views, pooled = study.pooled_views(), study.first[-1]
    def predict(r, c):
        z = TargetTransform("log").fit(study.values[r]).transform(study.values[r])
        torch.manual_seed(0)
        model = HeadModel(pooled[r].mean(0), pooled[r].std(0) + 1e-6, z.shape[1], "mlp")
        if at_mean: start_at(model, z.mean(0))
        trainer = Trainer(model, Loss(loss), None, epochs=5, batch_size=32, lr_head=lr, scheduler="cosine")
        trainer.fit(FeatureDataset(rows_of(views, r), z))
        return head_answer(rows_of(views, c), model)
    return predict


def published_ideas(study):
    mse, soft = ("mse", 3e-4), ("0.85*soft_spearman+0.15*mse", 1e-4)
    return {"published: squared error, rate 3e-4, begun at 0": published(study, *mse),
        "the same, begun at the mean": published(study, *mse, at_mean=True),
        "published: soft Spearman, rate 1e-4, begun at 0": published(study, *soft),
        "the same, begun at the mean too": published(study, *soft, at_mean=True)}


def head_ideas(study):
    pooled, views = study.first[-1], study.pooled_views()
    return {"probe: ridge on ranks": head(study, fit_ridge, pooled),
        "ridge on logs": head(study, fit_ridge, pooled, "log"),
        "ridge on centred log-ratios": head(study, fit_ridge, pooled, "clr"),
        "partial least squares": head(study, fit_pls, pooled),
        "kernel ridge": head(study, fit_kernel, pooled),
        "boosted trees": head(study, fit_boost, pooled),
        "network head, soft Spearman": head(study, fit_head, views, loss="soft_spearman(strength=0.1)"),
        "network head, neighbours by attention": with_neighbours(study),
        "ridge, stages of the encoder": head(study, fit_ridge, study.first),
        f"ridge, stages, {study.scales} scales": head(study, fit_ridge, study.blocks)}


class Kriging:
    "Kriging with one part after another."
    def __init__(self, study):
        self.study, spots = study, study.spots
        several = spots.groupby("patient").slide.nunique().max() > 1
        tissue = spots.patient.to_numpy() if several else np.zeros(len(spots))
        pitch = spots.slide.map({n: s.pitch_px for n, s in study.data.factory.slides.items()})
        self.place = centred_places(spots[["x", "y"]].to_numpy(), study.slide, pitch)
        self.near = place_features(self.place, tissue)
        self.distance, self.patient_of = study.kriging.similar.distance, study.kriging.similar.patient_of

    def idea(self, candidates, length_scale, order=0., known=True):
        "`known`: whether the patient of each slide is."
        study = self.study
        data = KrigingData(candidates, study.slide, self.distance, self.patient_of if known else None)
        settings = KrigingSettings(slide_length_scale=length_scale, order=order)
        def predict(r, c):
            labels = np.full(study.values.shape, np.nan)
            labels[r] = study.values[r]
            return krige_fold(data, labels, r, c, unit=study.units(r), settings=settings).answer
        return predict

    def recipe(self):
        "What the recipe does, by the recipe's own code."
        return lambda r, c: self.study.kriging.fit(r, c).answers[0]

    def smoothed(self, candidates):
        predict = self.idea(candidates, .5)
        return lambda r, c: smooth(predict(r, c), self.study.spots.iloc[c], .7)

    def ideas(self):
        study, near, n = self.study, self.near, self.study.scales
        one, every = (appearance_features(b, study.slide, 384) for b in (study.first, study.blocks))
        seen = appearances(study.blocks, n, study.slide, self.place)
        lines = with_places(every, near, (0, .3))
        gauss, best = (with_places(similarity_features(v), near) for v in (seen[:n], seen))
        found = {"kriging: place alone": self.idea([near], 0),
            "kriging: look, one scale": self.idea([one], 0),
            f"kriging: look, {n} scales": self.idea([every], 0),
            "kriging: look and place": self.idea(lines, 0),
            "kriging: + level of slides that look alike": self.idea(lines, .5),
            "kriging: + Gaussian likeness at each scale": self.idea(gauss, .5),
            "kriging: + in each stage, and with neighbours": self.idea(best, .5),
            "kriging: + maps in the order of each type (best)": self.recipe()}
        patients = len(set(self.patient_of.values()))
        if patients not in (1, len(self.patient_of)):
            found["the same, patients not told apart"] = self.idea(best, .5, 1., known=False)
        return found | {"kriging, smoothed over 0.7 pitches": self.smoothed(best)}


def all_ideas(study):
    "Name -> prediction."
    heads, kriging = head_ideas(study), Kriging(study).ideas()
    return {"constant: mean rank": constant(study)} | heads | kriging | published_ideas(study)


# ---- the table

def cross_validate(study, predict):
    "(training spots, T): every spot predicted while its fold was held out."
    data = study.data
    out = np.empty(data.Y.shape)
    for _, train, held in left_out(data): out[held] = predict(data.is_train[train], data.is_train[held])
    return out


def gain(study, base, each):
    "Difference to the probe and its interval; nan for what comes before it, and for itself."
    if base is None: return dict(difference=np.nan, low=np.nan, high=np.nan)
    found = mean_difference(base, each, study.data.train.slide.to_numpy(), study.data.block)
    return {k: float(found[k]) for k in ("difference", "low", "high")}


def show(row):
    scores = f"{row['idea']:44} {row['per_spot']:.4f} {row['per_type']:7.4f}"
    interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    print(f"{scores}  gain {interval}  {row['seconds']} s", flush=True)


def measure(a):
    "The table of ideas."
    study, rows, base = Study(a), [], None
    true = study.data.Y
    for name, predict in all_ideas(study).items():
        if a.only and not any(part in name for part in ["constant", "probe", *a.only]): continue
        start = time.time()
        out = cross_validate(study, predict)
        each = spearman_rows(out, true)
        per_type = np.nan if name.startswith("constant") else spearman_columns(out, true).mean()
        row = dict(idea=name, per_spot=each.mean(), per_type=per_type) | gain(study, base, each)
        if name.startswith("probe"): base = each
        rows.append(row | dict(seconds=round(time.time() - start, 1)))
        show(rows[-1])
    return pd.DataFrame(rows)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("file")
    for name in ("backbone", "weights", "backbone-args", "mean", "std"):
        p.add_argument(f"--{name}", default="", help="another encoder than the recipe's")
    p.add_argument("--cache", default="", help="folder of features; the user's cache if not given")
    p.add_argument("--only", nargs="*", help="parts of the names of the ideas to try")
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    a = arguments()
    result = measure(a)
    if a.out: write_table(a.out, result.round(4))
