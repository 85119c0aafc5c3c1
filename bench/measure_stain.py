"""Whether stain normalisation helps a prediction on slides of another patient, with the recipe `probe`.

    python bench/measure_stain.py FILE.h5 [--weights FILE --backbone-args pad_type=same --mean .5 --std .5]
        [--variants none vahadane ...] [--cache FOLDER] [--out FILE.json] [--table FILE.csv]

A variant is `none`; a method of normalisation, with `+luminosity` where brightness is stretched first and `@S_3` where
the reference is another slide than the first; or `jitter` (amounts of a slide's own dyes) or `references` (looks drawn
from all slides), which add altered copies to the training rows and leave the scored rows plain.

Folds hold out patients, or slides where there is one patient; the penalty is chosen on groups inside the training rows.
Intervals draw slides, then blocks in them. A difference is that to the first variant, spot by spot. Features are kept
in the cache folder, so that a second run takes seconds.
"""
import argparse
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import torch

from histokit.core.files import atomic, make_dir, read_json, write_json, write_table
from histokit.core.text import BadInput, choose
from histokit.frozen.heads import PENALTIES, fit_ridge, ridge_path
from histokit.learn.batches import predict
from histokit.learn.bootstrap import Bootstrap, mean_interval
from histokit.learn.ladder import Rung, format_ladder
from histokit.learn.scores import mean_spearman, spearman_columns, spearman_rows
from histokit.learn.views import VIEWS
from histokit.spots.cache import SlideCache
from histokit.spots.ladder import held_out_constants, spot_ladder
from histokit.spots.network import create_model
from histokit.spots.patches import HESpotDataset, PatchSampler, normalised_coords
from histokit.spots.slides import DataFactory
from histokit.spots.splits import assign_folds, check_split, slide_blocks
from histokit.spots.stain_files import compare_slides, normalise_file
from histokit.spots.targets import TargetTransform
from histokit.tissue.colour import colour_difference
from histokit.tissue.jitter import RandomReference, StainJitter
from histokit.tissue.measure import STAIN_METHODS, measure_stain

AUGMENTATIONS = dict(jitter=.2, references=1.)      # and their strengths
VARIANTS = ("none", *STAIN_METHODS, "vahadane+luminosity", "jitter", "references")
KEPT = ("lab_median", "white", "stain_matrix", "max_concentration")       # of a slide's report


# variants

def parse(variant):
    "'vahadane+luminosity@S_3' -> method, reference, luminosity; 'jitter=.4' -> jitter, .4"
    name, _, strength = variant.partition("=")
    if name in AUGMENTATIONS: return name, float(strength or AUGMENTATIONS[name])
    method, _, reference = variant.partition("@")
    method, plus, light = method.partition("+")
    if plus: choose(light, ["luminosity"], "addition to a method")
    return choose(method, ["none", *STAIN_METHODS, *AUGMENTATIONS], "variant"), reference, bool(plus)


def is_augmentation(variant): return parse(variant)[0] in AUGMENTATIONS


def alterations(variant, factory):
    "For each slide, what alters a batch; nothing where the variant is no augmentation."
    if not is_augmentation(variant): return {}
    (name, strength), reports = parse(variant), {n: measure_stain(factory.read_slide(n)) for n in factory.names()}
    if bad := [n for n, r in reports.items() if not r["ok"]]:
        raise BadInput(f"{bad[0]} has no usable stain ({reports[bad[0]]['reason']}); leave {name} out")
    if name == "jitter": return {n: StainJitter(r["stain_matrix"], strength, strength / 4) for n, r in reports.items()}
    return {n: RandomReference(list(reports.values()), r, strength) for n, r in reports.items()}


def about_slide(report, compared):
    "What is kept of a slide: how it was treated, and its measures before and after."
    found = dict(done=report["done"], reason=report["reason"], structure_kept=compared["structure_kept"])
    return found | {when: {k: compared[f"report_{when}"][k] for k in KEPT} for when in ("before", "after")}


class Altered(torch.nn.Module):
    "A model that sees an altered picture."
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def encode(self, image): return self.model.encode(self.change(image))


# features

class Study:
    "The training spots of a file, their folds, and what a frozen encoder sees of them in each variant."
    def __init__(self, a):
        self.a, factory = a, DataFactory(a.file)
        spots = factory.spots[factory.spots.split.eq("Train")].reset_index(drop=True)
        self.spots = spots.groupby("slide").head(a.limit).reset_index(drop=True) if a.limit else spots
        self.values, self.fold = self.spots[factory.targets].to_numpy(), assign_folds(self.spots, a.split)
        self.slide, self.blocks = self.spots.slide.to_numpy(), slide_blocks(self.spots)
        several = self.spots.groupby("patient").slide.nunique().max() > 1
        by_patient = len(np.unique(self.fold)) == self.spots.patient.nunique()
        self.by = "patient" if several and by_patient else "slide"
        weights = f"{Path(a.weights).stem or a.backbone}-{a.patch_um:g}um-{a.views}-{a.limit or 'all'}"
        self.folder = make_dir(Path(a.cache)/f"{Path(a.file).stem}-{weights}")

    @functools.cached_property
    def model(self):
        "The frozen encoder."
        a, args = self.a, dict(backbone_args=self.a.backbone_args, mean=self.a.mean, std=self.a.std)
        model = create_model(self.values.shape[1], a.backbone, a.weights, "linear", unfreeze="0", **args)
        return model.to(memory_format=torch.channels_last)

    def normalised(self, variant):
        "The file of a variant's slides, and the measures of `compare_slides` for each of them."
        method, reference, luminosity = parse(variant)
        out, kept = self.folder/f"{variant}.h5", self.folder/f"{variant}.json"
        if not (out.exists() and kept.exists()):
            reports = normalise_file(self.a.file, out, method, reference, **dict(luminosity=True) if luminosity else {})
            found = compare_slides(self.a.file, out)
            write_json(kept, {n: about_slide(reports[n], f) for n, f in found.items()})
        return out, read_json(kept)

    def encode(self, factory, change, seed):
        "(n, D) features, averaged over the views; every view sees the same alteration."
        a, scales = self.a, {n: s.um_per_px for n, s in factory.slides.items()}
        sampler = PatchSampler(SlideCache(factory.path), (a.patch_um,), a.input_px, "um", um_per_px=scales)
        coords, out, views = normalised_coords(self.spots), None, VIEWS[a.views]
        for name, rows in self.spots.groupby("slide").indices.items():
            data = HESpotDataset(self.spots.iloc[rows].reset_index(drop=True), sampler, coords=coords[rows])
            seen = Altered(self.model, change[name]) if change else self.model
            for view in views:
                torch.manual_seed(1000 * seed + int(rows[0]))
                part = predict(seen, data, 32, view=view, encode=True)[0] / len(views)
                if out is None: out = np.zeros((len(self.spots), part.shape[1]), np.float32)
                out[rows] += part
        return out

    def copy(self, variant, path, number):
        "(n, D) features of a variant's slides, or of one altered copy of the plain slides; kept."
        kept, start = self.folder/f"{variant}.{number}.npy", time.perf_counter()
        if not kept.exists():
            factory = DataFactory(path)
            values = self.encode(factory, alterations(variant, factory), number + 1)
            with atomic(kept) as tmp, open(tmp, "wb") as f: np.save(f, values)
            took = f"{len(values)} spots encoded in {time.perf_counter() - start:.0f} s"
            print(f"{time.strftime('%H:%M:%S')}  {variant}, {number + 1}: {took}", flush=True)
        return np.load(kept)

    def features(self, variant):
        "Features (n, D) that are scored, and a list of those of altered copies."
        if is_augmentation(variant):
            return self.features("none")[0], [self.copy(variant, self.a.file, i) for i in range(self.a.copies)]
        return self.copy(variant, self.normalised(variant)[0], 0), []

    def inner_group(self, rows):
        "What is left out together inside training rows: folds, slides, or blocks of the one slide."
        candidates = self.fold[rows], self.slide[rows], self.blocks[rows]
        return next(g for g in candidates if len(np.unique(g)) > 1)


# scores

def held_out(study, scored, extra):
    "Predictions of a ridge that saw nothing of the fold; the penalties, and the scores that each would have had."
    values, out, chosen, path = study.values, np.empty(study.values.shape), {}, {}
    for k in np.unique(study.fold):
        i, o = np.flatnonzero(study.fold != k), np.flatnonzero(study.fold == k)
        check_split(study.spots.iloc[i], study.spots.iloc[o])
        z, copies = TargetTransform("rank").fit(values[i]).transform(values[i]), 1 + len(extra)
        x = np.concatenate([scored[i], *(e[i] for e in extra)])
        z, group = np.tile(z, (copies, 1)), np.tile(study.inner_group(i), copies)
        fit = fit_ridge(x, z, group, mean_spearman, pca=study.a.pca)
        out[o] = scored[o] @ fit["weight"].T + fit["bias"]
        name = study.spots[study.by].iloc[o[0]]
        chosen[name] = fit["penalty"]
        solutions = ridge_path(x, z, study.a.pca)
        path[name] = [mean_spearman(scored[o] @ w.T + b, values[o]) for w, b in solutions]
    return out, chosen, path


def share_between(features, group):
    "The share of the standardised features' variance that lies between groups."
    z = (features - features.mean(0)) / (features.std(0) + 1e-6)
    between = sum(np.mean(group == g) * z[group == g].mean(0) ** 2 for g in np.unique(group))
    return float(between.sum() / z.var(0).sum())


def look(study, slides, features):
    "What a variant does to the training slides' colours, and to the features."
    after = [slides[n]["after"] for n in study.spots.slide.unique()]
    def patient_colour(table): return np.mean([slides[n]["after"]["lab_median"] for n in table.slide.unique()], 0)
    patients = [dict(lab_median=patient_colour(t)) for _, t in study.spots.groupby("patient")]
    shown = [slides[n] for n in study.spots.slide.unique()]
    return dict(colours=colour_difference(after), patients=colour_difference(patients),
        ssim=np.mean([s["structure_kept"] for s in shown]), repainted=sum(s["done"] for s in shown),
        features_slides=share_between(features, study.slide),
        features_patients=share_between(features, study.spots.patient.to_numpy()))


def differences(study, scores):
    "Mean difference of each variant to the first with its interval, over all spots and for each group of spots."
    first, of, rows = next(iter(scores)), study.spots[study.by].to_numpy(), []
    for name in list(scores)[1:]:
        for group in ("all", *pd.unique(of)):
            s = (of == group) | (group == "all")
            d = (scores[name] - scores[first])[s]
            low, high = mean_interval(d, study.slide[s], study.blocks[s], bootstrap=Bootstrap(draws=4000))
            row = {"variant": name, study.by: group, "score": scores[name][s].mean(), "difference": d.mean()}
            rows.append(row | dict(low=low, high=high, beyond=low > 0 or high < 0))
    return pd.DataFrame(rows)


# tables

def run(a):
    "All variants: tables, printed and returned."
    study = Study(a)
    predictions, looks, penalties, paths = held_out_constants(study.values, study.fold), {}, {}, {}
    for variant in a.variants:
        scored, extra = study.features(variant)
        predictions[variant], penalties[variant], paths[variant] = held_out(study, scored, extra)
        if not extra: looks[variant] = look(study, study.normalised(variant)[1], scored)
    return report(study, predictions, dict(looks=looks, penalties=penalties, paths=paths))


def map_scores(study, prediction):
    "The mean over types of the Spearman inside each slide."
    slides = study.spots.groupby("slide").indices.items()
    return {s: spearman_columns(prediction[rows], study.values[rows]).mean() for s, rows in slides}


def report(study, predictions, found):
    "The tables of a run, printed; and all of it as a dictionary."
    variants, by = study.a.variants, study.by
    rungs = {n: Rung(p, "constant" if n.startswith("constant") else "model") for n, p in predictions.items()}
    steps = spot_ladder(rungs, study.values, study.spots.slide, study.blocks)
    scores = {n: spearman_rows(p, study.values) for n, p in predictions.items()}
    paired = differences(study, {n: scores[n] for n in variants})
    groups = {n: pd.Series(s).groupby(study.spots[by]).mean().to_dict() for n, s in scores.items()}
    maps = {n: map_scores(study, predictions[n]) for n in variants}
    best = {n: {g: max(p) for g, p in path.items()} for n, path in found["paths"].items()}
    print(f"\n{len(study.spots)} spots, one {by} held out at a time\n{format_ladder(steps)}")
    show_tables({"Slides and features after each variant": found["looks"], f"Score of each {by}": groups,
        "Mean over types of the Spearman inside a slide": maps, f"Difference to {variants[0]}, spot by spot": paired,
        "Penalty chosen inside the training rows": found["penalties"],
        "Score with the best penalty in hindsight": best})
    return dict(file=Path(study.a.file).name, by=by, ladder=steps.to_dict("records"), groups=groups, maps=maps,
        differences=paired.to_dict("records"), looks=found["looks"], penalties=found["penalties"],
        paths=dict(penalties=PENALTIES, scores=found["paths"]))


def show_tables(tables):
    "Tables, or dictionaries with a row each, under their titles."
    def number(v): return f"{v:.4g}" if abs(v) >= 10 else f"{v:.4f}"
    pd.options.display.width, pd.options.display.max_rows = 220, 500
    for title, table in tables.items():
        if isinstance(table, dict): table = pd.DataFrame(table).T
        print(f"\n{title}\n{table.to_string(float_format=number)}")


def summary(result):
    "The scores and the differences over all spots, a row a variant."
    gain = pd.DataFrame(result["differences"])
    gain = gain[gain[result["by"]] == "all"].set_index("variant")[["difference", "low", "high"]]
    steps = pd.DataFrame(result["ladder"]).set_index("name")[["per_spot", "per_type"]].join(gain)
    looks = pd.DataFrame(result["looks"]).T[["colours", "ssim"]]
    return steps.join(looks).rename_axis("idea").reset_index().round(4)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", help="HDF5 in the competition's layout")
    p.add_argument("--variants", nargs="+", default=list(VARIANTS))
    p.add_argument("--split", default="auto")
    p.add_argument("--copies", type=int, default=4, help="altered copies of each training patch")
    p.add_argument("--backbone", default="mobilenetv2_100")
    for name in ("--weights", "--backbone-args", "--mean", "--std"): p.add_argument(name, default="")
    p.add_argument("--patch-um", type=float, default=224.)
    p.add_argument("--input-px", type=int, default=224)
    p.add_argument("--views", default="flips")
    p.add_argument("--pca", type=int, default=128)
    p.add_argument("--limit", type=int, default=0, help="spots of each slide; 0 for all")
    p.add_argument("--cache", default="runs/measure_stain")
    p.add_argument("--out", default="", help="JSON of everything")
    p.add_argument("--table", default="", help="CSV of the scores and of the differences over all spots")
    a = p.parse_args()
    for variant in a.variants: parse(variant)
    result = run(a)
    if a.out: write_json(a.out, result)
    if a.table: write_table(Path(a.table), summary(result))


if __name__ == "__main__": main()
