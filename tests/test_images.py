"What the pages on folders of pictures cannot say about themselves: layouts, and bad input in one line each."
import os
import pickle
import shutil
import time
import tracemalloc
import unicodedata

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histokit.core import dicom
from histokit.core.dicom import write_dicom
from histokit.core.pictures import picture_size, read_picture
from histokit.core.runs import RunFolder
from histokit.core.text import BadInput
from histokit.learn.batches import loader
from histokit.pictures.augment import PictureAugmentation, augment_pictures
from histokit.pictures.check_pictures import check_duplicates, check_files, check_pictures, giveaways
from histokit.pictures.folders import find_pictures
from histokit.pictures.prepared import decode_pictures, open_pictures, prepare_pictures, read_square
from histokit.pictures.settings import PictureSettings
from histokit.pictures.toy import ToySettings, toy_pictures

SMALL = ToySettings(n=24, test=8, px=32)
QUICK = PictureSettings(input_px=16, folds=3)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    "A toy set in each layout and of each kind, not to be changed."
    home = tmp_path_factory.mktemp("toys")
    toy_pictures(home/"csv", SMALL)
    toy_pictures(home/"folders", ToySettings(n=40, test=8, px=32), "folders")
    toy_pictures(home/"multiclass", ToySettings(n=30, test=8, px=32, kind="multiclass"))
    toy_pictures(home/"multilabel", ToySettings(n=30, test=8, px=32, kind="multilabel"))
    return home


@pytest.fixture
def toy(toys, tmp_path):
    "A copy of the set with tables, to be changed."
    return shutil.copytree(toys/"csv", tmp_path/"set")


def prepared(folder, tmp_path, settings=QUICK):
    return prepare_pictures(RunFolder(tmp_path/"run").make(), find_pictures(folder, settings), settings)


def fails(text, folder, **settings):
    "The one line that says what is wrong."
    with pytest.raises(BadInput) as caught: find_pictures(folder, PictureSettings(**settings))
    line = str(caught.value)
    assert text in line and "\n" not in line, line
    return line


def labels(folder): return pd.read_csv(folder/"train_labels.csv", dtype=str)
def write_labels(folder, table): table.to_csv(folder/"train_labels.csv", index=False)


# layouts

def test_tables_beside_folders(toys):
    found = find_pictures(toys/"csv")
    assert (found.kind, found.classes, found.label_columns) == ("binary", ("0", "1"), ["label"])
    assert list(found.train.index) == list(range(24)) and list(found.test.index) == list(range(8))
    assert found.items.columns[:7].tolist() == ["id", "file", "split", "label", "patient", "site", "view"]
    assert found.form.columns == ["id", "label"] and found.form.ids == tuple(found.test.id)
    assert found.targets().dtype == np.int64 and set(found.items.label[24:]) == {-1}


def test_ids_with_and_without_suffix_give_the_same_pictures(toy):
    bare = find_pictures(toy)
    write_labels(toy, labels(toy).assign(id=lambda t: t.id + ".png"))
    (toy/"sample_submission.csv").unlink()
    full = find_pictures(toy)
    assert bare.items.file.tolist() == full.items.file.tolist() and full.form.ids[0] == "test_000.png"


def test_order_and_columns_are_the_template_s(toy):
    template = pd.read_csv(toy/"sample_submission.csv").iloc[::-1].rename(columns=dict(label="p"))
    template.to_csv(toy/"sample_submission.csv", index=False)
    found = find_pictures(toy)
    assert found.form.columns == ["id", "p"] and found.test.id.tolist() == template.id.tolist()
    assert [f"test/{i}.png" for i in template.id] == found.test.file.tolist()


def test_a_picture_that_the_template_does_not_ask_for_is_left_out(toy):
    pd.read_csv(toy/"sample_submission.csv").iloc[1:].to_csv(toy/"sample_submission.csv", index=False)
    found = find_pictures(toy)
    assert found.left_out.file.tolist() == ["test/test_000.png"] and len(found.test) == 7


def test_folders_named_by_class(toys):
    found = find_pictures(toys/"folders")
    assert found.classes == ("NORMAL", "OPACITY") and "pooled" in found.layout
    assert found.test.truth.tolist() == [int("OPACITY" in f) for f in found.test.file]
    assert found.test.id.str.fullmatch(r"test_\d+\.png").all(), "the answer's ids do not hold the label"


def test_folders_of_classes_without_a_split(toys, tmp_path):
    for name in ("NORMAL", "OPACITY"): shutil.copytree(toys/"folders/train"/name, tmp_path/"set"/name)
    found = find_pictures(tmp_path/"set")
    assert found.form is None and not len(found.test) and found.kind == "binary"


def test_a_table_of_something_else_beside_folders_of_classes(toys, tmp_path):
    folder = shutil.copytree(toys/"folders", tmp_path/"set")
    (folder/"notes.csv").write_text("day,what\n1,copied\n2,counted\n")
    assert find_pictures(folder).layout == find_pictures(toys/"folders").layout
    (folder/"train_labels.csv").write_text("day,what\n1,copied\n2,counted\n")
    fails("train_labels.csv: no column names a picture", folder)


def test_an_archive_with_its_own_copy_inside_is_read_once(toys, tmp_path):
    shutil.copytree(toys/"folders", tmp_path/"set")
    shutil.copytree(toys/"folders", tmp_path/"set/chest_xray")
    shutil.copytree(toys/"folders", tmp_path/"set/__MACOSX/chest_xray")
    found = find_pictures(tmp_path/"set")
    assert found.items.file.tolist() == find_pictures(toys/"folders").items.file.tolist()
    assert len(found.left_out) == len(found.items)


def test_labels_may_stand_in_the_metadata(toy):
    "Paths as names; ids are then the files' names."
    table = labels(toy).rename(columns=dict(label="diagnosis"))
    table["file"] = "train/" + table.pop("id") + ".png"
    (toy/"train_labels.csv").unlink(), (toy/"sample_submission.csv").unlink()
    table.assign(view="AP", subject_id=range(24)).to_csv(toy/"metadata.csv", index=False)
    found = find_pictures(toy)
    assert found.train.patient.nunique() == 24 and set(found.train.view) == {"AP"}
    assert found.form.columns == ["id", "diagnosis"] and found.form.ids[0] == "test_000.png"


def test_any_table_with_named_columns(toy):
    table = labels(toy).assign(where=lambda t: t.id + ".png", number=range(100, 124)).drop(columns="id")
    (toy/"train_labels.csv").unlink()
    table.rename(columns=dict(label="grade_of_reader")).to_csv(toy/"mine.tsv", sep="\t", index=False)
    found = find_pictures(toy, PictureSettings(labels_csv="mine.tsv", path_column="where",
        label_columns="grade_of_reader", id_column="number"))
    assert found.train.id.tolist() == [str(i) for i in range(100, 124)]


def test_a_table_that_says_the_split_and_pictures_in_one_folder(toy):
    os.rename(toy/"train", toy/"all")
    for file in (toy/"test").iterdir(): os.rename(file, toy/"all"/file.name)
    (toy/"sample_submission.csv").unlink(), (toy/"metadata.csv").unlink()
    table = labels(toy)
    more = pd.DataFrame(dict(id=[f"test_{i:03d}" for i in range(8)], label=""))
    write_labels(toy, pd.concat([table, more]))
    found = find_pictures(toy)
    assert len(found.train) == 24 and found.form.ids == tuple(more.id)


@pytest.mark.parametrize("kind, classes, columns", [("multiclass", ("clear", "left", "right"), 3),
    ("multilabel", ("left", "right"), 2)])
def test_many_classes_and_many_labels(toys, tmp_path, kind, classes, columns):
    made = prepared(toys/kind, tmp_path, PictureSettings(input_px=16, folds=3))
    assert (made.kind, made.classes) == (kind, classes) and len(made.form.targets) == columns
    shape = (30,) if kind == "multiclass" else (30, 2)
    assert made.targets().shape == shape and made.dataset(made.train).batch([0, 1])[1].shape == (2, *shape[1:])
    assert made.dataset(made.train).target.dtype == (torch.int64 if kind == "multiclass" else torch.float32)


def test_metadata_that_is_known_of_training_pictures_only_is_not_kept(toy):
    table = pd.read_csv(toy/"metadata.csv", dtype=str)
    train = table.file.str.startswith("train")
    table["finding"], table["age"], table["fold"] = np.where(train, "x", None), range(len(table)), 3
    table.to_csv(toy/"metadata.csv", index=False)
    found = find_pictures(toy)
    assert "finding" not in found.items and found.items.age.tolist() == [float(i) for i in range(32)]
    assert "given_fold" in found.items and "fold" not in found.items


def test_patients_and_sites_from_names(toy, tmp_path):
    (toy/"metadata.csv").unlink()
    guessed = find_pictures(toy)
    assert guessed.train.patient[0] == "patient000" and "from names" in guessed.layout
    asked = find_pictures(toy, PictureSettings(patient_pattern=r"patient(\d)", site_pattern=r"^[a-z]+"))
    assert set(asked.train.patient) == {"0"} and set(asked.items.site) == {"patient", "test"}
    fails("matches none of 32 names", toy, patient_pattern=r"person(\d+)")


def test_links_and_deep_folders(toy, tmp_path):
    deep = tmp_path/"elsewhere/a/b"
    shutil.move(toy/"train", deep)
    (toy/"train").symlink_to(deep)
    assert len(find_pictures(toy).train) == 24


# names

@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_spaces_and_accents(toy, form):
    table = labels(toy)
    for i, name in enumerate(("Zoë Müller (1)", "a b", "Žluťoučký+kůň;#1")):
        os.rename(toy/f"train/{table.id[i]}.png", toy/f"train/{unicodedata.normalize(form, name)}.png")
        table.loc[i, "id"] = name
    write_labels(toy, table)
    (toy/"metadata.csv").unlink()
    assert find_pictures(toy).train.id.tolist() == table.id.tolist()


def test_leading_zeros_of_ids_stay(toy):
    table = labels(toy)
    for i, name in enumerate(table.id): os.rename(toy/f"train/{name}.png", toy/f"train/{i:05d}.png")
    write_labels(toy, table.assign(id=[f"{i:05d}" for i in range(24)]))
    (toy/"metadata.csv").unlink()
    assert find_pictures(toy).train.id[7] == "00007"


def test_ten_thousand_files_in_one_folder(tmp_path):
    (tmp_path/"train").mkdir()
    Image.new("L", (8, 8)).save(tmp_path/"one.png")
    for i in range(10_000): os.link(tmp_path/"one.png", tmp_path/f"train/{i}.png")
    (tmp_path/"one.png").unlink()
    pd.DataFrame(dict(id=range(10_000), label=np.arange(10_000) % 2)).to_csv(tmp_path/"labels.csv", index=False)
    start = time.perf_counter()
    assert len(find_pictures(tmp_path).train) == 10_000
    assert time.perf_counter() - start < 20


def test_memory_does_not_grow_with_the_number(toys, tmp_path):
    def peak(times):
        found = find_pictures(toys/"csv")
        found.items = pd.concat([found.items] * times, ignore_index=True)
        tracemalloc.start()
        decode_pictures(tmp_path/f"{times}.npy", found, PictureSettings(input_px=64))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    peak(1)
    assert peak(10) < peak(3) + 1.2e6, "224 more pictures of 12 kB would be 2.7 MB"


# bad input: one line each

def test_a_folder_that_is_not_there(toys): fails("did you mean 'csv'", toys/"csw")
def test_a_file_instead_of_a_folder(toys): fails("is a file; unpack it", toys/"csv/train_labels.csv")


def test_no_pictures(tmp_path): fails("holds no pictures", tmp_path)


def test_no_labels(toy):
    for table in toy.glob("*.csv"): table.unlink()
    fails("no labels; add train_labels.csv", toy)


def test_a_label_without_its_picture(toy):
    (toy/"train"/f"{labels(toy).id[3]}.png").unlink()
    assert labels(toy).id[3] in fails("1 of 24 rows name pictures that are not there", toy)


def test_a_picture_without_its_label(toy):
    write_labels(toy, labels(toy).iloc[2:])
    assert labels(toy).id[0] not in fails("2 training pictures have no label in train_labels.csv", toy)


def test_an_empty_label(toy):
    table = labels(toy)
    table.loc[3, "label"] = ""
    write_labels(toy, table)
    fails("1 training pictures have an empty label", toy)


def test_one_class_only(toy):
    write_labels(toy, labels(toy).assign(label=1))
    fails("all 24 labels are '1', so there is nothing to tell apart", toy)


def test_measurements_are_no_classes(toy):
    write_labels(toy, labels(toy).assign(label=np.linspace(0, 1, 24)))
    fails("these are no classes", toy)


def test_a_picture_twice_in_the_table(toy):
    write_labels(toy, pd.concat([labels(toy), labels(toy).iloc[:1]]))
    fails("is there twice", toy)


def test_test_ids_twice_in_the_template(toy):
    (toy/"sample_submission.csv").write_text("id,label\ntest_000,0\ntest_001,0\ntest_000,0\n")
    fails("test_000 is there twice", toy)


def test_test_ids_twice_in_the_folder(toy):
    (toy/"sample_submission.csv").unlink()
    Image.new("L", (32, 32)).save(toy/"test/test_000.jpg")
    fails("'test_000' is there twice", toy)


def test_a_template_that_asks_for_what_is_not_there(toy):
    (toy/"sample_submission.csv").write_text("id,label\ntest_000,0\ntest_999,0\n")
    fails("1 of 2 ids name no test picture (test_999)", toy)


def test_a_template_with_another_class(toys, tmp_path):
    folder = shutil.copytree(toys/"multiclass", tmp_path/"set")
    text = (folder/"sample_submission.csv").read_text().replace("right", "rigt", 1)
    (folder/"sample_submission.csv").write_text(text)
    fails("column 'rigt' is no class (did you mean 'right'?)", folder)


def test_a_name_that_may_be_two_pictures(toy):
    Image.new("L", (32, 32)).save(toy/"train"/f"{labels(toy).id[0]}.jpg")
    fails("may be", toy)


@pytest.mark.parametrize("settings, text", [(dict(labels_csv="train_label.csv"), "did you mean 'train_labels.csv'"),
    (dict(label_columns="lable"), "did you mean 'label'"), (dict(path_column="ids"), "did you mean 'id'"),
    (dict(id_column="nr"), "no column 'nr'"), (dict(positive="2"), "unknown positive class '2'")])
def test_names_that_are_nearly_right(toy, settings, text): fails(text, toy, **settings)


def test_too_few_cases_for_the_folds(toy, tmp_path):
    many = PictureSettings(input_px=16, folds=20)
    with pytest.raises(BadInput, match="use fewer folds"): prepared(toy, tmp_path, many)


# damaged files

def damage_empty(path): path.write_bytes(b"")
def damage_text(path): path.write_text("not a picture")
def damage_dot(path): Image.new("L", (1, 1)).save(path)
def damage_bomb(path): Image.new("1", (20_000, 10_000)).save(path)


def damage_jpeg(path):
    whole = path.with_suffix(".tmp.jpg")
    Image.effect_noise((64, 64), 50).save(whole, quality=95)
    path.write_bytes(whole.read_bytes()[:1500])
    whole.unlink()


DAMAGE = {"0-byte": (damage_empty, "cannot be read as a picture"), "text": (damage_text, "cannot be read as a picture"),
    "1 x 1": (damage_dot, "has 1 x 1 pixels, which show nothing"), "truncated": (damage_jpeg, "truncated"),
    "bomb": (damage_bomb, "too large to be read whole (20000 x 10000 pixels)")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_and_left_out_or_stops_the_run(toy, tmp_path, kind):
    harm, text = DAMAGE[kind]
    name = f"train/{labels(toy).id[5]}.png"
    harm(toy/name)
    made = prepared(toy, tmp_path)
    assert len(made.train) == 23 and name not in set(made.items.file)
    out = [row for row in made.facts["left_out"] if row["file"] == name]
    assert len(out) == 1 and name in out[0]["why"] and "\n" not in out[0]["why"]
    assert any(name in str(f) for f in check_files(made))
    with pytest.raises(BadInput) as caught: prepared(toy, tmp_path, PictureSettings(input_px=16, on_damaged="stop"))
    assert text in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert made.pixels.shape[0] == 31, "what was made before is still there"


def test_a_damaged_test_picture_is_still_answered(toy, tmp_path):
    (toy/"test/test_003.png").write_bytes(b"")
    made = prepared(toy, tmp_path)
    assert made.items.id[made.test].tolist() == [str(i) for i in made.form.ids]
    assert made.items.damaged.sum() == 1 and "black one" in str(check_files(made)[0])


def test_a_class_of_damaged_files(toy, tmp_path):
    table = labels(toy)
    for name in table.id[table.label.eq("1")]: (toy/f"train/{name}.png").write_bytes(b"")
    with pytest.raises(BadInput, match="no picture of class 1 can be read; the first that cannot: .*train/"):
        prepared(toy, tmp_path)


# reading

def grey(size=40): return np.add.outer(np.arange(size), np.arange(size)).astype(np.uint16)


@pytest.mark.parametrize("save", [
    lambda a, p: Image.fromarray((a * 50).astype(np.uint16)).save(p.with_suffix(".png")),
    lambda a, p: Image.fromarray(a.astype(np.float32) / 7 - 3).save(p.with_suffix(".tif")),
    lambda a, p: write_dicom(p.with_suffix(".dcm"), a * 50),
    lambda a, p: write_dicom(p.with_suffix(".dcm"), 4000 - a * 50, PhotometricInterpretation="MONOCHROME1"),
    lambda a, p: Image.fromarray(a.astype(np.uint8)).convert("P").save(p.with_suffix(".png")),
    lambda a, p: Image.fromarray(a.astype(np.uint8)).convert("CMYK").save(p.with_suffix(".jpg"), quality=100),
    lambda a, p: Image.fromarray(a.astype(np.uint8)).convert("RGBA").save(p.with_suffix(".png"))],
    ids=["16 bits", "floats", "DICOM", "MONOCHROME1", "palette", "CMYK", "RGBA"])
def test_every_kind_of_file_shows_the_same_ramp(tmp_path, save):
    save(grey(), tmp_path/"a")
    path, = tmp_path.iterdir()
    pixels = read_square(path, 20).pixels.astype(float)
    line = (pixels if pixels.ndim == 2 else pixels.mean(-1))[np.arange(20), np.arange(20)]
    assert np.corrcoef(line, np.arange(20))[0, 1] > .99 and np.ptp(line) > 60


def test_a_photograph_lies_as_it_was_taken(tmp_path):
    image, held = Image.fromarray(grey(64).astype(np.uint8)).crop((0, 0, 64, 48)), Image.Exif()
    held[274] = 6
    image.save(tmp_path/"a.jpg", exif=held, quality=100)
    square = read_square(tmp_path/"a.jpg", 16, "pad")
    assert (square.width, square.height) == (48, 64) and square.pixels[:, 0].max() == 0 < square.pixels[0, 8]


def test_a_folder_of_dicom_files(toy, tmp_path):
    for path in [*(toy/"train").iterdir(), *(toy/"test").iterdir()]:
        deep = np.asarray(Image.open(path)).astype(np.uint16) * 16
        write_dicom(path.with_suffix(""), deep, BitsStored=12, HighBit=11)
        path.unlink()
    (toy/"metadata.csv").unlink()
    made = prepared(toy, tmp_path)
    assert made.facts["left_out"] == [] and made.facts["grey"] and made.pixels.std() > 30


def test_dicom_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    write_dicom(tmp_path/"a.dcm", grey())
    def missing(name): raise ImportError(name)
    monkeypatch.setattr(dicom.importlib, "import_module", missing)
    with pytest.raises(BadInput, match="pip install pydicom"): read_picture(tmp_path/"a.dcm")


def test_dicom_with_several_frames_or_without_pixels(tmp_path):
    write_dicom(tmp_path/"film.dcm", np.zeros((8, 4), np.uint8), Rows=4, NumberOfFrames=2)
    with pytest.raises(BadInput, match="holds 2 pictures"): read_picture(tmp_path/"film.dcm")
    (tmp_path/"cut.dcm").write_bytes(b"\0" * 128 + b"DICM\x08\x00")
    for read in (read_picture, picture_size):
        with pytest.raises(BadInput, match="cut.dcm"): read(tmp_path/"cut.dcm")


# splits and checks

def test_sites_are_left_out_one_after_the_other(toy, tmp_path):
    made = prepared(toy, tmp_path, PictureSettings(input_px=16, split="site"))
    assert pd.Series(made.folds()[0]).groupby(made.items.site[made.train].to_numpy()).nunique().tolist() == [1, 1]


def test_repeated_folds_keep_patients_whole(toy, tmp_path):
    made = prepared(toy, tmp_path, PictureSettings(input_px=16, folds=3, repeats=4))
    assert [c for c in made.items if c.startswith("fold")] == ["fold", "fold_1", "fold_2", "fold_3"]
    for fold in made.folds(): assert pd.Series(fold).groupby(made.groups()).nunique().max() == 1
    assert len({tuple(fold) for fold in made.folds()}) > 1


def test_a_copy_under_another_patient_and_class_is_held_together_and_said(toy, tmp_path):
    table = labels(toy)
    a, b = table.id[table.label.eq("0")].iloc[0], table.id[table.label.eq("1")].iloc[0]
    Image.open(toy/f"train/{a}.png").resize((40, 40)).save(toy/f"train/{b}.png")
    made = prepared(toy, tmp_path)
    group = made.items.set_index("id").group
    assert group[a] == group[b]
    assert "different labels" in " ".join(map(str, check_duplicates(made)))


def test_a_sound_set_has_no_giveaway_and_no_error(toys, tmp_path):
    made = prepared(toys/"folders", tmp_path)
    assert max(v for source, v in giveaways(made).items() if source.startswith("the file")) < .75
    assert not [f for part in check_pictures(made).values() for f in part if f.level == "error"]


def test_what_was_prepared_opens_again(toy, tmp_path):
    made = prepared(toy, tmp_path)
    again = open_pictures(tmp_path/"run")
    pd.testing.assert_frame_equal(made.items, again.items)
    assert again.form == made.form and again.root == toy.resolve()
    with pytest.raises(BadInput, match="run its stage 10_images first"): open_pictures(tmp_path)


# batches

@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_are_the_same_in_threads_and_processes(toys, tmp_path, workers):
    made = prepared(toys/"csv", tmp_path)
    dataset = made.dataset(made.train, augmentation=PictureAugmentation(rotate=40))
    seen = {}
    for size in (5, 24):
        batches = list(loader(dataset, size, seed=3, workers=workers))
        seen[size] = torch.cat([inputs["image"] for inputs, _ in batches])
        assert torch.equal(torch.cat([target for _, target in batches]), torch.from_numpy(made.targets()))
    assert torch.equal(seen[5], seen[24])
    assert not torch.equal(seen[5], torch.cat([x["image"] for x, _ in loader(dataset, 24, seed=4)]))


def test_a_dataset_travels_without_its_pixels(toys, tmp_path):
    made = prepared(toys/"csv", tmp_path)
    dataset = made.dataset(made.train, augmentation=PictureAugmentation())
    dataset.batch([0])
    packed = pickle.dumps(dataset)
    assert len(packed) < 5000
    assert torch.equal(pickle.loads(packed).batch([4])[0]["image"], dataset.batch([4])[0]["image"])
    with pytest.raises(BadInput, match="3 pictures but 2 targets"): made.dataset(made.train[:3], [0, 1])


@pytest.mark.parametrize("size", [(96, 96), (40, 80)])
def test_three_channels_at_once_are_each_channel_by_itself(size):
    "Colours are moved in lanes of one number; a channel comes out as it would alone, to the bit."
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, *size), dtype=np.uint8))
    settings = PictureAugmentation(rotate=180, shift=.3, scale=.4, crop=.2, flip=True, brightness=0, contrast=0)
    drawn = settings.draw(6)
    together = augment_pictures(images, settings, drawn)
    alone = [augment_pictures(images[:, c:c + 1], settings, drawn) for c in range(3)]
    assert torch.equal(together, torch.cat(alone, 1)) and together.float().std() > 10
