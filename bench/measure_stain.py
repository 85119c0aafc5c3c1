"""Whether stain normalisation helps a prediction on slides of another patient, with the `probe` recipe (params/probe.yaml).

python tests/measure_stain.py FILE.h5 [--weights FILE --backbone-args pad_type=same --mean .5 --std .5] [--variants none vahadane …] [--cache FOLDER] [--out FILE.json] [--table FILE.csv]

A variant is `none`; a method of `stain.METHODS`, with `+luminosity` where brightness is stretched first and `@S_3` where the reference is another slide than the first;
or `jitter` (amounts of a slide's own dyes) or `references` (looks drawn from all slides), which add altered copies to the training rows and leave the scored rows plain.
Folds hold out patients, or slides where there is one patient; the penalty is chosen on groups inside the training rows. Intervals draw slides, then blocks in them.
A difference is that to the first variant, spot by spot. Features are kept in the cache folder, so that a second run takes seconds.
"""
import argparse, os, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import torch

from histokit.core.text import BadInput, choose
from histokit.core.files import atomic, read_json, write_json, write_table
from histokit.spots.slides import DataFactory
from histokit.spots.cache import SlideCache
from histokit.spots.targets import TargetTransform
from histokit.spots.splits import assign_folds, check_split, slide_blocks
from histokit.spots.patches import normalised_coords, patch_size
from histokit.spots.network import create_model
from histokit.spots.patches import HESpotDataset, PatchSampler
from histokit.tissue.measure import METHODS, measure
from histokit.tissue.jitter import RandomReference, StainJitter
from histokit.tissue.colour import colour_difference
from histokit.stain import compare_slides, normalise_file
from histokit.frozen.heads import PENALTIES, fit_ridge, ridge_path
from histokit.learn.bootstrap import Bootstrap, mean_interval
from histokit.learn.scores import mean_spearman, spearman_columns, spearman_rows
from histokit.learn.ladder import Rung, format_ladder
from histokit.spots.ladder import held_out_constants, spot_ladder
from histokit.learn.views import VIEWS
from histokit.learn.batches import predict

AUGMENTATIONS = dict(jitter=.2, references=1.)      # and their strengths
VARIANTS = ("none", *METHODS, "vahadane+luminosity", "jitter", "references")


def parse(variant):
    "'vahadane+luminosity@S_3' -> method, reference, luminosity; 'jitter=.4' -> jitter, .4"
    name, _, strength = variant.partition("=")
    if name in AUGMENTATIONS: return name, float(strength or AUGMENTATIONS[name])
    method, _, reference = variant.partition("@")
    method, plus, light = method.partition("+")
    if plus: choose(light, ["luminosity"], "addition to a method")
    return choose(method, ["none", *METHODS, *AUGMENTATIONS], "variant"), reference, bool(plus)


class Altered(torch.nn.Module):
    "A model that sees an altered picture."
    def __init__(self, model, change): super().__init__(); self.model, self.change = model, change
    def encode(self, image): return self.model.encode(self.change(image))


def changes(variant, factory):
    "For each slide, what alters a batch; nothing where the variant is no augmentation."
    if parse(variant)[0] not in AUGMENTATIONS: return {}
    (name, strength), reports = parse(variant), {n: measure(factory.read_slide(n)) for n in factory.names()}
    if bad := [n for n, r in reports.items() if not r["ok"]]: raise BadInput(f"{bad[0]} has no usable stain ({reports[bad[0]]['reason']}); leave {name} out")
    if name == "jitter": return {n: StainJitter(r["stain_matrix"], strength, strength/4) for n, r in reports.items()}
    return {n: RandomReference(list(reports.values()), r, strength) for n, r in reports.items()}


def normalised(path, variant, folder):
    "The file of a variant's slides, and the measures of `compare_slides` for each of them."
    method, reference, luminosity = parse(variant)
    out, kept = folder/f"{variant}.h5", folder/f"{variant}.json"
    if not (out.exists() and kept.exists()):
        reports = normalise_file(path, out, method, reference, **(dict(luminosity=True) if luminosity else {}))
        found = compare_slides(path, out)
        write_json(kept, {n: dict(done=reports[n]["done"], reason=reports[n]["reason"], structure_kept=f["structure_kept"],
            **{when: {k: f[f"report_{when}"][k] for k in ("lab_median", "white", "stain_matrix", "max_concentration")} for when in ("before", "after")}) for n, f in found.items()})
    return out, read_json(kept)


def encode(model, factory, spots, a, change=None, seed=0):
    "(n, D) features, averaged over the views; every view sees the same alteration."
    sampler = PatchSampler(SlideCache(factory.path), ({n: patch_size(a.patch_um, s.um_per_px) for n, s in factory.slides.items()},), a.input_px)
    coords, out = normalised_coords(spots), None
    for name, rows in spots.groupby("slide").indices.items():
        data = HESpotDataset(spots.iloc[rows].reset_index(drop=True), sampler, coords=coords[rows])
        seen = Altered(model, change[name]) if change else model
        for view in VIEWS[a.views]:
            torch.manual_seed(1000*seed + int(rows[0]))
            part = predict(seen, data, 32, view=view, encode=True)[0]/len(VIEWS[a.views])
            if out is None: out = np.zeros((len(spots), part.shape[1]), np.float32)
            out[rows] += part
    return out


def features(variant, spots, a, folder, model):
    "(1, n, D) of a variant's slides, or (copies, n, D) of the plain slides' altered copies."
    augmentation, parts = parse(variant)[0] in AUGMENTATIONS, []
    path = a.file if augmentation else normalised(a.file, variant, folder)[0]
    for i in range(a.copies if augmentation else 1):
        kept, start = folder/f"{variant}.{i}.npy", time.perf_counter()
        if not kept.exists():
            factory = DataFactory(path)
            values = encode(model(), factory, spots, a, changes(variant, factory), i + 1)
            with atomic(kept) as tmp, open(tmp, "wb") as f: np.save(f, values)
            print(f"{time.strftime('%H:%M:%S')}  {variant}, {i + 1}: {len(spots)} spots encoded in {time.perf_counter() - start:.0f} s", flush=True)
        parts.append(np.load(kept))
    return np.stack(parts)


def held_out(F, extra, Y, spots, fold, a):
    "Predictions of every row by a ridge that saw nothing of its fold; the penalties, and the scores that each penalty would have had."
    out, chosen, path = np.empty(Y.shape), {}, {}
    for k in np.unique(fold):
        i, o = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        check_split(spots.iloc[i], spots.iloc[o])
        group = next(g for g in (fold[i], spots.slide.to_numpy()[i], slide_blocks(spots)[i]) if len(np.unique(g)) > 1)
        transform = TargetTransform("rank").fit(Y[i]); Z = transform.transform(Y[i])
        x, z, g = np.concatenate([F[i], *(e[i] for e in extra)]), np.tile(Z, (1 + len(extra), 1)), np.tile(group, 1 + len(extra))
        fit = fit_ridge(x, z, g, mean_spearman, pca=a.pca)
        out[o] = F[o] @ fit["weight"].T + fit["bias"]
        name = spots[a.by].iloc[o[0]]; chosen[name] = fit["penalty"]
        path[name] = [mean_spearman(F[o] @ w.T + b, Y[o]) for w, b in ridge_path(x, z, a.pca)]
    return out, chosen, path


def between(F, group):
    "The share of the standardised features' variance that lies between groups."
    z = (F - F.mean(0))/(F.std(0) + 1e-6)
    return float(sum(np.mean(group == g)*z[group == g].mean(0)**2 for g in np.unique(group)).sum()/z.var(0).sum())


def look(kept, F, spots):
    "What a variant does to the training slides' colours, and to the features."
    slides = list(spots.slide.unique()); part = [kept[n] for n in slides]
    patients = [dict(lab_median=np.mean([kept[n]["after"]["lab_median"] for n in t.slide.unique()], 0)) for _, t in spots.groupby("patient")]
    return dict(colours=colour_difference([p["after"] for p in part]), patients=colour_difference(patients), ssim=np.mean([p["structure_kept"] for p in part]),
        repainted=sum(p["done"] for p in part), features_slides=between(F, spots.slide.to_numpy()), features_patients=between(F, spots.patient.to_numpy()))


def differences(scores, spots, by):
    "Mean difference of each variant to the first with its interval, over all spots and for each group of spots."
    first, block, rows = next(iter(scores)), slide_blocks(spots), []
    for name in list(scores)[1:]:
        for group in ("all", *spots[by].unique()):
            s = (spots[by] == group).to_numpy() | (group == "all"); d = (scores[name] - scores[first])[s]
            low, high = mean_interval(d, spots.slide[s], block[s], bootstrap=Bootstrap(draws=4000))
            rows.append({"variant": name, by: group, "score": scores[name][s].mean(), "difference": d.mean(), "low": low, "high": high, "beyond": low > 0 or high < 0})
    return pd.DataFrame(rows)


def run(a):
    "All variants: tables, printed and returned."
    factory = DataFactory(a.file)
    spots = factory.spots[factory.spots.split.eq("Train")].reset_index(drop=True)
    if a.limit: spots = spots.groupby("slide").head(a.limit).reset_index(drop=True)
    fold, Y = assign_folds(spots, a.split), spots[factory.targets].to_numpy()
    a.by = "patient" if spots.groupby("patient").slide.nunique().max() > 1 and len(np.unique(fold)) == spots.patient.nunique() else "slide"
    folder = Path(a.cache)/f"{Path(a.file).stem}-{Path(a.weights).stem or a.backbone}-{a.patch_um:g}um-{a.views}-{a.limit or 'all'}"; folder.mkdir(parents=True, exist_ok=True)
    made = []
    def model():
        if not made: made.append(create_model(len(factory.targets), a.backbone, a.weights, "linear", unfreeze="0", backbone_args=a.backbone_args, mean=a.mean, std=a.std).to(memory_format=torch.channels_last))
        return made[0]
    plain = features("none", spots, a, folder, model)[0]
    predictions, looks, penalties, paths = held_out_constants(Y, fold), {}, {}, {}
    for variant in a.variants:
        F = features(variant, spots, a, folder, model)
        augmentation = parse(variant)[0] in AUGMENTATIONS
        predictions[variant], penalties[variant], paths[variant] = held_out(plain if augmentation else F[0], F if augmentation else [], Y, spots, fold, a)
        if not augmentation: looks[variant] = look(normalised(a.file, variant, folder)[1], F[0], spots)
    return report(predictions, looks, penalties, paths, Y, spots, a)


def report(predictions, looks, penalties, paths, Y, spots, a):
    "The tables of a run."
    pd.options.display.width, pd.options.display.max_rows = 220, 500
    rungs = {n: Rung(p, "constant" if n.startswith("constant") else "model") for n, p in predictions.items()}
    steps = spot_ladder(rungs, Y, spots.slide, slide_blocks(spots))
    scores = {n: spearman_rows(p, Y) for n, p in predictions.items()}
    paired = differences({n: scores[n] for n in a.variants}, spots, a.by)
    groups = {n: pd.Series(s).groupby(spots[a.by]).mean().to_dict() for n, s in scores.items()}
    maps = {n: {s: spearman_columns(predictions[n][r], Y[r]).mean() for s, r in spots.groupby("slide").indices.items()} for n in a.variants}
    hindsight = pd.DataFrame({n: {g: max(p) for g, p in path.items()} for n, path in paths.items()}).T
    tables = {"Slides and features after each variant": pd.DataFrame(looks).T, f"Score of each {a.by}": pd.DataFrame(groups).T, "Mean over types of the Spearman inside a slide": pd.DataFrame(maps).T,
        f"Difference to {a.variants[0]}, spot by spot": paired,
        "Penalty chosen inside the training rows": pd.DataFrame(penalties).T, "Score with the best penalty in hindsight": hindsight}
    print(f"\n{len(spots)} spots, one {a.by} held out at a time\n{format_ladder(steps)}")
    for title, table in tables.items(): print(f"\n{title}\n{table.to_string(float_format=lambda v: f'{v:.4g}' if abs(v) >= 10 else f'{v:.4f}')}")
    return dict(file=Path(a.file).name, by=a.by, ladder=steps.to_dict("records"), looks=looks, groups=groups, maps=maps, differences=paired.to_dict("records"), penalties=penalties,
        paths=dict(penalties=PENALTIES, scores=paths))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file"); p.add_argument("--variants", nargs="+", default=list(VARIANTS)); p.add_argument("--split", default="auto"); p.add_argument("--copies", type=int, default=4)
    p.add_argument("--backbone", default="mobilenetv2_100"); p.add_argument("--weights", default=""); p.add_argument("--backbone-args", default=""); p.add_argument("--mean", default=""); p.add_argument("--std", default="")
    p.add_argument("--patch-um", type=float, default=224.); p.add_argument("--input-px", type=int, default=224); p.add_argument("--views", default="flips"); p.add_argument("--pca", type=int, default=128)
    p.add_argument("--limit", type=int, default=0, help="spots of each slide; 0 for all"); p.add_argument("--cache", default="runs/measure_stain"); p.add_argument("--out", default="")
    p.add_argument("--table", default="", help="CSV of the scores and of the differences over all spots")
    a = p.parse_args()
    for variant in a.variants: parse(variant)
    result = run(a)
    if a.out: write_json(a.out, result)
    if a.table:
        gain = pd.DataFrame(result["differences"]); gain = gain[gain[a.by] == "all"].set_index("variant")[["difference", "low", "high"]]
        steps = pd.DataFrame(result["ladder"]).set_index("name")[["per_spot", "per_type"]].join(gain).join(pd.DataFrame(result["looks"]).T[["colours", "ssim"]])
        write_table(Path(a.table), steps.rename_axis("idea").reset_index().round(4))


if __name__ == "__main__": main()
