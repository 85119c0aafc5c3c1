"""What reports say, how drafts are scored, and that every way of writing them is refused or kept in one line."""
import json
import shutil
import sys
import types

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from histokit.cli import app
from histokit.core.runs import RunFolder
from histokit.core.text import BadInput
from histokit.pictures.explaining import explained_run
from histokit.pictures.toy import smoke_pictures
from histokit.reports.cases import find_cases, sample_cases
from histokit.reports.controls import agreement_table, echo, grounding_gap, text_controls
from histokit.reports.drafting import ReportSettings, open_generator, write_drafts
from histokit.reports.findings import FindingsGenerator
from histokit.reports.generators import FixedAnswers
from histokit.reports.overlap import bleu_4, finding_f1, plugin_score, rouge_l
from histokit.reports.prompts import read_prompts
from histokit.reports.scoring import score_drafts, score_prompts
from histokit.reports.tiny import write_tiny_blip2, write_tiny_gemma3
from histokit.reports.verdict import legacy_verdict, read_text
import histokit.cli_draft

SENTENCES = [
    ("There is no pneumonia, consolidation, or effusion.", "normal"),
    ("Right lower lobe pneumonia.", "abnormal"),
    ("Abnormal right lung, nuclear medicine study advised.", "abnormal"),
    ("Cannot exclude early consolidation.", "uncertain"),
    ("Previously seen effusion has resolved.", "normal"),
    ("The lungs are clear.", "normal"),
    ("Lungs are clear bilaterally without focal consolidation.", "normal"),
    ("No acute cardiopulmonary abnormality.", "normal"),
    ("Heart size within normal limits.", "normal"),
    ("Unremarkable study.", "normal"),
    ("Negative for pneumothorax.", "normal"),
    ("The chest is free of infiltrates.", "normal"),
    ("Neither effusion nor pneumothorax is seen.", "normal"),
    ("Pneumothorax is not seen.", "normal"),
    ("Pneumonia has been ruled out.", "normal"),
    ("The heart is not enlarged.", "normal"),
    ("No evidence of edema, mass, or lymphadenopathy.", "normal"),
    ("Absence of pleural fluid on either side.", "normal"),
    ("The earlier infiltrate has cleared.", "normal"),
    ("The pneumothorax is no longer seen.", "normal"),
    ("Interval resolution of the left effusion.", "normal"),
    ("There isn't any consolidation.", "normal"),
    ("The lungs can't be called anything but clear.", "normal"),
    ("Bony structures are intact.", "normal"),
    ("Small left pleural effusion.", "abnormal"),
    ("Heart size is mildly enlarged.", "abnormal"),
    ("Cardiomegaly without edema.", "abnormal"),
    ("No pneumothorax, but a large right effusion.", "abnormal"),
    ("No effusion; patchy opacity in the left base.", "abnormal"),
    ("No change of the known effusion.", "abnormal"),
    ("No significant interval change in cardiomegaly.", "abnormal"),
    ("The effusion has not resolved.", "abnormal"),
    ("The lungs are not clear.", "abnormal"),
    ("This is not a normal chest.", "abnormal"),
    ("Not only atelectasis, also a mass.", "abnormal"),
    ("Ground-glass opacities in both lower lobes.", "abnormal"),
    ("Blunting of the left costophrenic angle.", "abnormal"),
    ("Multiple pulmonary nodules.", "abnormal"),
    ("No effusion with mild cardiomegaly.", "abnormal"),
    ("Aside from a granuloma, no abnormality.", "abnormal"),
    ("No pneumothorax, mild atelectasis at the bases.", "abnormal"),
    ("Low lung volumes.", "abnormal"),
    ("Lung volumes are low.", "abnormal"),
    ("Mild degenerative changes of the thoracic spine.", "abnormal"),
    ("Sternotomy wires are in place.", "abnormal"),
    ("Right IJ catheter with its tip in the SVC.", "abnormal"),
    ("Resolving pneumonia.", "abnormal"),
    ("Fractured rib.", "abnormal"),
    ("There is no effusion and there is a nodule on the right.", "abnormal"),
    ("Pulmonary vasculature is prominent.", "abnormal"),
    ("A 2.5 cm mass in the left hilum.", "abnormal"),
    ("1. Normal heart. 2. Consolidation of the lingula.", "abnormal"),
    ("Possible pneumonia.", "uncertain"),
    ("Pneumonia is suspected.", "uncertain"),
    ("Findings suspicious for malignancy.", "uncertain"),
    ("May represent atelectasis.", "uncertain"),
    ("A small effusion cannot be excluded.", "uncertain"),
    ("Pneumothorax is unlikely.", "uncertain"),
    ("Questionable nodule at the apex.", "uncertain"),
    ("Clear lungs, possible small effusion.", "uncertain"),
    ("Probably normal.", "uncertain"),
    ("No effusion, although early pneumonia cannot be ruled out.", "uncertain"),
    ("Atelectasis versus infiltrate.", "uncertain"),
    ("Evaluate for pneumonia.", "none"),
    ("History of pneumonia.", "none"),
    ("Rule out tuberculosis.", "none"),
    ("Two views of the chest.", "none"),
    ("Cough and fever for three days.", "none"),
    ("", "none"),
    ("Nuclear scan was done elsewhere.", "none"),
]


@pytest.mark.parametrize(("text", "verdict"), SENTENCES)
def test_a_sentence_has_its_verdict(text, verdict): assert read_text(text).verdict == verdict


def test_there_are_sixty_sentences_and_keywords_fail_on_many():
    assert len(SENTENCES) >= 60
    right = np.mean([legacy_verdict(t) == v for t, v in SENTENCES])
    assert right < .7, "the published score would have done as well"


@pytest.mark.parametrize("text", [None, float("nan"), "。", "1. 2. 3.", "\n\n\t", "…" * 9, "🫁", "no " * 500])
def test_any_text_can_be_read(text):
    assert read_text(text).verdict in ("none", "normal")
    assert legacy_verdict(text) in ("normal", "abnormal", "none")


def test_bleu_and_rouge_have_their_limits():
    assert bleu_4([""], ["a b c d"]) == 0 and rouge_l("", "") == 0
    assert bleu_4(["a b c d e"], ["a b c d e"]) == rouge_l("a b", "a b") == 1
    assert bleu_4(["a b c d", "x"], ["a b c d", "y"]) == pytest.approx((4/5 * 3/3 * 2/2 * 1/1) ** .25)
    with pytest.raises(BadInput, match="2 texts"): finding_f1(["a", "b"], ["a"])


def test_a_scorer_that_is_not_installed_says_so():
    with pytest.raises(BadInput, match="pip install RadEval"): plugin_score("radeval", ["a"], ["b"])


@pytest.mark.parametrize("seed", range(6))
def test_a_generator_that_ignores_the_picture_reads_zero(seed):
    cases = [c for c in find_cases(smoke_pictures()) if c.truth]
    drawn = FixedAnswers(("The lungs are clear.", "Right lower lobe pneumonia.", "Possible nodule."), seed=seed)
    verdicts = [read_text(d.text).verdict for d in drawn.draft(cases, "basic", "")]
    gap = grounding_gap(agreement_table(verdicts, [c.truth for c in cases]), [c.patient for c in cases])
    assert gap["low"] <= 0 <= gap["high"] and gap["high"] - gap["low"] < .5
    same = grounding_gap(agreement_table(["abnormal"] * len(cases), [c.truth for c in cases]),
        [c.patient for c in cases])
    assert abs(same["gap"]) < 1e-12 and abs(same["low"]) < 1e-12 and abs(same["high"]) < 1e-12
    right = grounding_gap(agreement_table([c.truth for c in cases], [c.truth for c in cases]))
    assert right["low"] > .3


def test_an_echo_is_caught():
    prompt = read_prompts()["clinical_structured"]
    found = text_controls([prompt, "", "Clear lungs."], prompt)
    assert found["echo"] == pytest.approx(1 / 3) and found["empty"] == pytest.approx(1 / 3)
    assert echo("Answer: lung fields, heart, pleura, impression", prompt) > .8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("classified"))
    explained_run(folder)
    return folder


def test_every_sentence_of_findings_leads_to_its_number(run):
    writer, cases = FindingsGenerator(run, "cpu"), sample_cases(find_cases(run), 6)
    table = run.table("oof.parquet").set_index("file")
    for case, draft in zip(cases, writer.draft(cases, "clinical_structured", "")):
        fact, = draft.facts
        assert fact["sentence"] in draft.text and "no physician" in draft.text
        assert fact["number"] == table.p[str(case.path.relative_to(writer.answered.data.root))]
        said = read_text(fact["sentence"]).verdict
        p, t = fact["number"], writer.threshold
        assert said == ("abnormal" if p >= (1 + t) / 2 else "uncertain" if p >= t / 2 else "normal")


def test_findings_need_a_run(tmp_path):
    with pytest.raises(BadInput, match="holds none"): open_generator(ReportSettings(), smoke_pictures())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return dict(blip2=write_tiny_blip2(home/"blip2"), gemma3=write_tiny_gemma3(home/"gemma3"))


@pytest.mark.parametrize("kind", ["blip2", "gemma3"])
def test_a_model_drafts_and_goes_on_where_it_stopped(models, kind, tmp_path):
    from histokit.reports.vision_language import ModelGenerator, ModelSettings
    writer = ModelGenerator(str(models[kind]), ModelSettings(batch_size=2, max_new_tokens=4, device="cpu"))
    cases, prompts = sample_cases(find_cases(smoke_pictures()), 4), read_prompts(names="basic,clinical_brief")
    drafts = write_drafts(tmp_path, writer, cases, prompts)
    assert len(drafts) == 8 and all(len(t.split()) <= 4 for t in drafts.text)
    assert echo(drafts.text[0], writer.asked(prompts["basic"])) < 1
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path/"drafts").iterdir()}
    gone = next(iter(kept))
    gone.unlink()
    again = write_drafts(tmp_path, writer, cases, prompts)
    assert again.equals(drafts)
    assert {p: p.stat().st_mtime_ns for p in kept if p != gone} == {p: t for p, t in kept.items() if p != gone}
    scored = score_drafts(again, prompts)
    assert len(score_prompts(scored, prompts)) == 2


def test_memory_that_runs_out_is_one_line_and_loses_nothing(models, tmp_path, monkeypatch):
    import torch
    from histokit.reports.vision_language import ModelGenerator, ModelSettings
    writer = ModelGenerator(str(models["blip2"]), ModelSettings(batch_size=2, max_new_tokens=2, device="cpu"))
    cases, prompts = sample_cases(find_cases(smoke_pictures()), 4), read_prompts(names="basic")
    whole, calls = writer.model.generate, []

    def runs_out(**given):
        calls.append(1)
        if len(calls) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(**given)

    monkeypatch.setattr(writer.model, "generate", runs_out)
    with pytest.raises(BadInput, match="use batch_size=1"): write_drafts(tmp_path, writer, cases, prompts)
    assert len(list((tmp_path/"drafts").iterdir())) == 2


def draft(*words): return CliRunner().invoke(app, ["draft", *map(str, words)])


def test_bad_input_is_one_line(run, models, tmp_path, monkeypatch):
    from histokit.reports.vision_language import _TOKENS
    for name in _TOKENS: monkeypatch.delenv(name, raising=False)
    bare = tmp_path/"bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"): (bare/file).write_bytes((models["blip2"]/file).read_bytes())
    (tmp_path/"empty").mkdir()
    (tmp_path/"picture.png").write_text("no picture")
    csv = tmp_path/"texts.csv"
    csv.write_text("file,words\na.png,Normal.\n")
    bad = [(smoke_pictures(), [], "holds none"), (tmp_path/"empty", [], "holds no pictures"),
        (tmp_path/"nowhere", [], "does not exist"), (tmp_path/"picture.png", [], "picture.png"),
        (run.path, ["--generator", "medgemma"], "accept its terms"),
        (run.path, ["--generator", bare], "processor"), (run.path, ["--generator", "blip3"], "no generator"),
        (run.path, ["--texts", tmp_path/"none.csv"], "no table of texts"), (run.path, ["--texts", csv], "'text'"),
        (run.path, ["--texts", csv, "--generator", "blip2"], "takes the place of --generator"),
        (run.path, ["--reference", "note"], "no such column"),
        (run.path, ["--scorers", "radgraph"], "reference=COLUMN"),
        (run.path, ["--reference", "note", "--scorers", "bleurt"], "unknown scorer"),
        (run.path, ["--generator", models["gemma3"], "--precision", "fp16"], "NaN"),
        (run.path, ["--lexicon", "brain"], "no lexicon"), (run.path, ["--images", "-1"], "images=-1")]
    for source, ask, why in bad:
        said = draft(source, "-o", tmp_path/"out", *ask)
        assert said.exit_code == 1 and why in said.stderr, (ask, said.stderr)
        assert len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert not (tmp_path/"out"/"all_reports.csv").exists()


def test_memory_that_runs_out_is_said_by_the_command(models, tmp_path, monkeypatch):
    import torch
    from transformers import Blip2ForConditionalGeneration
    def full(*args, **given): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Blip2ForConditionalGeneration, "generate", full)
    said = draft(smoke_pictures(), "-o", tmp_path/"out", "--generator", models["blip2"], "--device", "cpu")
    lines = said.stderr.strip().splitlines()
    assert said.exit_code == 1 and "out of memory while writing 4 drafts: use batch_size=2" in lines[-1]
    assert sum(line.startswith("histokit: ") for line in lines) == 1 and "million weights" in lines[0]


@pytest.fixture
def described(tmp_path):
    "Six pictures with what a person wrote of them, and texts of two prompts from elsewhere."
    cases, home = [c for c in find_cases(smoke_pictures()) if c.truth][:6], tmp_path/"described"
    home.mkdir()
    for case in cases: shutil.copy(case.path, home/case.path.name)
    wrote = dict(normal="The heart and lungs are normal.", abnormal="Opacity in the right lung. No effusion.")
    table = pd.DataFrame([dict(file=c.path.name, label=c.truth, note=wrote[c.truth]) for c in cases])
    table.to_csv(home/"notes.csv", index=False)
    said = dict(short="Opacity on the right.", long="Pleural effusion on the left side.")
    texts = pd.concat([table[["file"]].assign(prompt=p, text=t) for p, t in said.items()])
    texts.to_csv(tmp_path/"texts.csv", index=False)
    return home/"notes.csv", tmp_path/"texts.csv"


def test_texts_of_others_are_scored_against_references(described, tmp_path):
    said = draft(described[0], "-o", tmp_path/"out", "--texts", described[1], "--reference", "note", "--json")
    assert said.exit_code == 0, said.stderr
    short, long = json.loads(said.stdout)["prompts"]
    hits = pd.read_csv(described[0]).label.eq("abnormal").sum()
    assert (short["prompt"], short["texts"], short["referenced"]) == ("short", 6, 6)
    assert short["finding_f1"] == pytest.approx(2 * hits / (6 + hits)) and long["finding_f1"] == 0
    assert abs(short["reference_gap"]) < 1e-9 and short["sameness"] == pytest.approx(1 / 6)
    table = pd.read_csv(tmp_path/"out"/"all_reports.csv")
    assert {"reference", "finding_f1", "rouge_l"} <= set(table) and len(table) == 12
    text = (tmp_path/"out"/"task2_report_generation.md").read_text()
    assert "Against 6 reference texts" in text and "sentences that they read differently" in text


def test_another_scorer_is_asked_where_it_is_installed(described, tmp_path, monkeypatch):
    "A stand-in for CheXbert; one that is missing, or that fails, is one line, and the drafts are kept."
    ask = [described[0], "-o", tmp_path/"out", "--texts", described[1], "--reference", "note", "--json"]
    missing = draft(*ask, "--scorers", "radeval")
    assert missing.exit_code == 1 and "pip install RadEval" in missing.stderr and not (tmp_path/"out").exists()
    words = lambda **options: lambda hyps, refs: (sum(len(t.split()) for t in hyps) / len(refs), [])
    monkeypatch.setitem(sys.modules, "f1chexbert", types.SimpleNamespace(F1CheXbert=words))
    said = draft(*ask, "--scorers", "chexbert")
    assert [p["chexbert"] for p in json.loads(said.stdout)["prompts"]] == [4, 6]
    assert "chexbert" in (tmp_path/"out"/"report.html").read_text()
    def broken(**options): raise OSError("no weights")
    monkeypatch.setitem(sys.modules, "f1chexbert", types.SimpleNamespace(F1CheXbert=broken))
    failed = draft(*ask, "--scorers", "chexbert")
    assert failed.exit_code == 1 and "the scorer chexbert failed (OSError: no weights)" in failed.stderr
    assert len(list((tmp_path/"out"/"drafts").iterdir())) == 6


def test_a_text_is_never_made_up(described, tmp_path):
    "Pictures without a text are left out, and texts without a picture are named."
    texts = pd.read_csv(described[1])
    half = texts[~((texts.prompt == "long") & (texts.file == texts.file[0]))]
    pd.concat([half, pd.DataFrame([dict(file="nobody.png", prompt="long", text="Normal.")])]).to_csv(described[1])
    said = draft(described[0], "-o", tmp_path/"out", "--texts", described[1])
    assert said.exit_code == 0 and "1 name no picture here (nobody.png)" in said.stderr
    assert len(pd.read_csv(tmp_path/"out"/"all_reports.csv")) == 10
    again = draft(described[0], "-o", tmp_path/"out", "--texts", described[1], "--prompts", "long")
    assert again.exit_code == 1 and "other prompts" in again.stderr


def test_the_drafts_table_of_a_run_can_be_scored_again(run, tmp_path):
    "What was written is read back to the same scores: a text is found by the id of its picture."
    first = json.loads(draft(run.path, "-o", tmp_path/"a", "--device", "cpu", "--json").stdout)
    again = draft(run.path, "-o", tmp_path/"b", "--texts", tmp_path/"a"/"all_reports.csv", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["prompts"] == first["prompts"]


def test_pictures_without_labels_can_be_drafted(models, tmp_path):
    for case in find_cases(smoke_pictures())[:2]: shutil.copy(case.path, tmp_path/case.path.name)
    ask = ["--generator", models["blip2"], "--device", "cpu", "--max-new-tokens", 2, "--prompts", "basic"]
    said = draft(tmp_path, "-o", tmp_path/"out", *ask)
    assert said.exit_code == 0, said.stderr
    assert "Grounding gap: not known" in said.stdout and "with the label: not known" in said.stdout


@pytest.mark.parametrize("free, cards", [(40 << 30, 1), (15 << 30, 2)])
def test_a_model_is_spread_only_where_one_card_cannot_hold_it(monkeypatch, free, cards):
    "MedGemma's size in float32, on two cards."
    from histokit.reports import vision_language as models
    monkeypatch.setattr(models, "gpus", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (free, free))
    size = models.ModelSize(4_300_000_000, 17_200_000_000, 2 * free, "cuda")
    size.check()
    assert models.is_spread(size) is (cards == 2)
    assert not models.is_spread(models.ModelSize(4_300_000_000, 17_200_000_000, free, "cuda:1"))


def test_the_command_writes_what_was_published(run, tmp_path):
    said = draft(run.path, "-o", tmp_path, "--device", "cpu", "--json")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    table = pd.read_csv(tmp_path/"all_reports.csv")
    assert found["drafts"] == len(table) == 40 and table.prompt.nunique() == 4 and table.id.nunique() == 10
    for name in ("report_cards.png", "prompt_comparison.png", "task2_report_generation.md", "report.html"):
        assert (tmp_path/name).stat().st_size > 500
    assert "Grounding gap" in (tmp_path/"task2_report_generation.md").read_text()


assert histokit.cli_draft
