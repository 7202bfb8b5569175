"""A person's own images: any size and mode in, uint8 squares and class names out, errors that name files."""

import os

import pytest
import torch
from PIL import Image

from bnexp.data.folder import Folder
from bnexp.data.pictures import read_picture
from bnexp.errors import UserError


def save(path, size=(8, 8), color=100, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Ten grey images of each of two classes; a cat is dark, a dog light, each has a value of its own."""
    for i in range(10):
        save(tmp_path / f"photos/train/dog/{i}.png", color=200 + i)
        save(tmp_path / f"photos/train/cat/{i}.png", color=100 + i)
    return tmp_path / "photos"


def values(split):
    """The value in the middle of each image."""
    return split.images[:, 0, split.images.shape[2] // 2, split.images.shape[3] // 2].tolist()


def test_classes_are_the_sorted_folders_and_known_before_loading(photos):
    source = Folder(root=photos)
    assert source.class_names == ("cat", "dog")
    assert source.in_shape == (1, 64, 64)


def test_without_other_folders_validation_comes_from_training_and_test_is_empty(photos):
    dataset = Folder(root=str(photos), size=16, valid=0.2).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [16, 4, 0]
    assert sorted(values(dataset.train) + values(dataset.valid)) == [*range(100, 110), *range(200, 210)]
    for split in (dataset.train, dataset.valid):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (1, 16, 16)
        assert [value >= 200 for value in values(split)] == split.labels.bool().tolist()
    assert dataset.test.images.shape == (0, 1, 16, 16)


def test_validation_and_test_folders_are_used_as_they_are(photos):
    save(photos / "valid/dog/a.png", color=250)
    save(photos / "test/dog/b.png", color=240)
    save(photos / "test/cat/c.png", color=140)
    dataset = Folder(root=photos, size=8, valid=5).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [20, 1, 2]
    assert (values(dataset.valid), dataset.valid.labels.tolist()) == ([250], [1])
    assert (values(dataset.test), dataset.test.labels.tolist()) == ([140, 240], [0, 1])


@pytest.mark.parametrize("name", ["val", "Val", "VALIDATION", "validation", "valid", "Valid"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_splits_are_found_under_their_usual_names(photos, train, name):
    (photos / "train").rename(photos / train)
    save(photos / name / "dog/a.png", color=250)
    save(photos / "Testing/cat/b.png", color=140)
    source = Folder(root=photos, size=8, valid=5, test=5)
    dataset = source.load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [20, 1, 1]
    assert (values(dataset.valid), values(dataset.test)) == ([250], [140])
    assert f"20 train ({train}/), 1 valid ({name}/), 1 test (Testing/)" in dataset.about


def test_two_folders_for_one_split_and_folders_of_no_split_are_refused(photos):
    save(photos / "val/dog/a.png")
    save(photos / "validation/dog/a.png")
    with pytest.raises(UserError, match=rf"^{photos}/validation: val/ beside it is the valid split already"):
        Folder(root=photos)
    (photos / "validation").rename(photos / "holdout")
    with pytest.raises(UserError, match=rf"^{photos}/holdout: beside train/ only valid/ .* or hide it as \.holdout"):
        Folder(root=photos)
    (photos / "holdout").rename(photos / ".holdout")
    assert len(Folder(root=photos, size=8).load().valid) == 1
    (photos / "train").rename(photos / ".train")
    with pytest.raises(UserError, match=r"^data\.root=.*: holds val/ and no train/; .*train/cat/1\.jpg"):
        Folder(root=photos)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (16, 2, 2)), ({"test": 5}, (13, 2, 5)), ({"test": 0}, (18, 2, 0)), ({"test": 0.25, "valid": 0}, (15, 0, 5))],
)
def test_class_folders_without_train_are_split_always_in_the_same_way(photos, options, expected):
    for name in ("cat", "dog"):
        (photos / "train" / name).rename(photos / name)
    (photos / "train").rmdir()
    source = Folder(root=photos, size=8, **options)
    assert source.class_names == ("cat", "dog")
    dataset, again = source.load(), Folder(root=photos, size=8, **options).load()
    splits = [dataset.train, dataset.valid, dataset.test]
    assert tuple(map(len, splits)) == expected
    assert sorted(v for split in splits for v in values(split)) == [*range(100, 110), *range(200, 210)]
    assert values(dataset.test) == values(again.test) and values(dataset.valid) == values(again.valid)
    if options.get("test") == 5:
        assert values(dataset.test) == values(Folder(root=photos, size=8, test=5, valid=7).load().test)
    assert "no train/, so every folder is a class" in dataset.about
    assert f"{expected[0]} train (photos/), {expected[1]} valid (data.valid=" in dataset.about
    assert f"of photos/), {expected[2]} test (data.test=" in dataset.about


def test_a_test_split_can_be_set_aside_beside_train_too(photos):
    dataset = Folder(root=photos, size=8, test=3, valid=0.1).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [15, 2, 3]
    with pytest.raises(UserError, match=r"data\.test=20: takes 20 of 20 training images and leaves none"):
        Folder(root=photos, size=8, test=20).load()
    with pytest.raises(UserError, match=r"^data\.test=-1: neither a part nor a number"):
        Folder(root=photos, test=-1)


def test_images_in_deeper_folders_belong_to_the_class_above(photos):
    save(photos / "train/cat/tabby/old/x.png", color=150)
    save(photos / "train/cat/tabby/y.png", color=151)
    source = Folder(root=photos, size=8, valid=0)
    dataset = source.load()
    assert source.class_names == ("cat", "dog")
    assert [v for v, label in zip(values(dataset.train), dataset.train.labels, strict=True) if not label] == [
        *range(100, 110), 150, 151,
    ]  # fmt: skip
    assert "cat 12, dog 10" in dataset.about
    assert dataset.about.endswith("; images in folders below a class belong to it")
    (photos / "train/cat/tabby/new").mkdir()
    with pytest.raises(UserError, match=r"^.*/train/cat/tabby/new: a folder without images"):
        Folder(root=photos)


def test_a_description_is_one_line_on_what_was_found(photos):
    save(photos / "test/dog/a.png", mode="RGB", color=(1, 2, 3))
    assert Folder(root=photos, size=32, limit=1000).load().about == (
        f"data=folder: {photos} has 2 classes: cat 10, dog 11; 18 train (train/), 2 valid (data.valid=0.1 of train/), "
        "1 test (test/); grey, scaled to 32x32; at most 1,000 images of each split are used"
    )
    for i in range(20):
        save(photos / f"train/z{i}/a.png", mode="RGB", color=(1, 2, 3))
    told = Folder(root=photos).load().about
    assert "22 classes: cat 10, dog 11, z0 1, z1 1, z10 1, z11 1, z12 1, z13 1, z14 1, z15 1, ...;" in told
    assert "; colour, scaled to 64x64" in told and "\n" not in told


def test_limit_caps_every_split(photos):
    for i in range(5):
        save(photos / f"test/dog/{i}.png")
    dataset = Folder(root=photos, size=8, limit=3).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [3, 2, 3]


def test_hidden_files_and_files_beside_the_classes_are_passed_over(photos):
    for name in ("train/.DS_Store", "train/cat/.DS_Store", "train/notes.txt", ".hidden"):
        (photos / name).write_text("no image")
    (photos / "train/.thumbnails").mkdir()
    for name in ("Thumbs.db", "thumbs.db", "desktop.ini", "Icon\r", "._0.png", "0.png:Zone.Identifier"):
        (photos / "train/dog" / name).write_text("no image")
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information"):
        for folder in ("", "train", "train/cat"):
            (photos / folder / name).mkdir()
            (photos / folder / name / "cat.png").write_text("no image")
    source = Folder(root=photos, size=8, valid=0)
    assert source.class_names == ("cat", "dog")
    assert len(source.load().train) == 20


@pytest.mark.parametrize(
    "name",
    ["@SynoResource", "@Recently-Snapshot", "@sharebin", "~snapshot", "Network Trash Folder", "Temporary Items",
     "__pycache__", "ZbThumbnail.info", "WPSettings.dat", "IndexerVolumeGuid", "Thumbs.db:encryptable"],
)  # fmt: skip
def test_folders_and_files_of_systems_are_no_classes_and_no_images(photos, name):
    (photos / "train/dog" / name).write_text("no image")
    save(photos / "train" / name / "a.png")
    assert len(Folder(root=photos, size=8, valid=0).load().train) == 20


def test_files_outside_of_the_class_folders_are_named(photos):
    save(photos / "train/stray.png")
    about = Folder(root=photos, size=8).load().about
    assert about.endswith(f"; not read, because in no class folder: {photos}/train/stray.png")
    (photos / "labels.csv").write_text("")
    (photos / "val").write_text("")  # not a folder
    assert Folder(root=photos, size=8).load().about.endswith(f": {photos}/labels.csv and 2 more")


@pytest.mark.parametrize("names", [("fold0", "fold1"), ("train-set", "holdout"), ("tr", "te"), ("2019", "2020")])
def test_folders_that_hold_folders_of_the_same_names_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        for inner in "ab":
            save(tmp_path / name / inner / "a.png")
    with pytest.raises(UserError, match="both hold a/ and b/, as splits do"):
        Folder(root=tmp_path)
    (tmp_path / "train").mkdir()
    for name, other in zip(names, ("cat", "dog"), strict=True):
        (tmp_path / name).rename(tmp_path / "train" / other)
    assert Folder(root=tmp_path).class_names == ("cat", "dog"), "in two places each"


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("train2017", "val2017"), ("seg_train", "seg_test"),
                                   ("TrainImages", "ValidationImages")])  # fmt: skip
def test_splits_of_other_names_are_not_taken_for_classes(photos, names):
    (photos / "train").rename(photos / names[0])
    save(photos / names[1] / "cat/a.png")
    with pytest.raises(UserError, match=rf"^data\.root={photos}: .*{names[1]}/.* seem to be splits, not classes"):
        Folder(root=photos)
    save(photos / "steam_train/a.png")
    save(photos / "bus/a.png")
    for name in names:
        (photos / name).rename(photos / f".{name}")
    assert Folder(root=photos).class_names == ("bus", "steam_train")


@pytest.mark.parametrize("split", ["train", "Val", "testing"])
def test_a_split_inside_a_class_is_refused(photos, split):
    save(photos / f"train/cat/{split}/a.png")
    with pytest.raises(UserError, match=rf"^{photos}/train/cat/{split}: the \w+ split inside a class; .*train/cat/1"):
        Folder(root=photos)
    (photos / f"train/cat/{split}").rename(photos / f"train/{split}")  # a class may have this name
    assert split in Folder(root=photos).class_names


@pytest.mark.parametrize("place", ["val", "train/fox"])
def test_a_link_to_nothing_in_the_place_of_a_folder_is_named(photos, place):
    (photos / place).symlink_to(photos / "nowhere")
    with pytest.raises(UserError, match=rf"^{photos}/{place}: a link to nothing; restore"):
        Folder(root=photos)


def test_accents_may_be_stored_either_way(photos):
    save(photos / "train/caf\N{LATIN SMALL LETTER E WITH ACUTE}/a.png", color=50)
    save(photos / "val/cafe\N{COMBINING ACUTE ACCENT}/b.png", color=60)
    source = Folder(root=photos, size=8)
    assert source.class_names == ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cat", "dog")
    assert source.load().valid.labels.tolist() == [0]


def test_a_relative_root_is_described_by_its_name(photos, monkeypatch):
    monkeypatch.chdir(photos / "train")
    assert "16 train (train/), 2 valid (data.valid=0.1 of train/)" in Folder(root=".", size=8).load().about


def test_one_colour_image_makes_all_of_them_colour(photos):
    save(photos / "train/cat/colour.png", mode="RGB", color=(10, 20, 30))
    source = Folder(root=photos, size=8, valid=0)
    assert source.in_shape == (3, 8, 8)
    images = source.load().train.images
    assert images.shape == (21, 3, 8, 8)
    assert images[10, :, 0, 0].tolist() == [10, 20, 30]  # cat/0 .. cat/9, cat/colour
    assert images[0, :, 0, 0].tolist() == [100, 100, 100]


def test_channels_can_be_asked_for(photos):
    assert Folder(root=photos, size=8, channels=3).load().train.images.shape[1] == 3
    save(photos / "train/cat/colour.png", mode="RGB", color=(255, 0, 0))
    source = Folder(root=photos, size=8, channels=1, valid=0)
    assert source.in_shape == (1, 8, 8)
    assert values(source.load().train)[10] == 76  # luma: 0.299 of 255
    with pytest.raises(UserError, match=r"data\.channels=2: not 1 .* 3 .* or null"):
        Folder(root=photos, channels=2)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255]),
        ("L", 77, [77]),
        ("LA", (77, 255), [77]),
        ("LA", (77, 0), [255]),  # transparent is white
        ("I;16", 257 * 200, [200]),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
    ],
)
def test_modes_of_an_image_are_understood(tmp_path, mode, color, expected):
    save(tmp_path / "a.png", mode=mode, color=color)
    assert read_picture(tmp_path / "a.png", len(expected), 4)[:, 1, 1].tolist() == expected
    for name in "xy":
        save(tmp_path / f"photos/train/{name}/a.png", mode=mode, color=color)
    assert Folder(root=tmp_path / "photos").in_shape[0] == len(expected)


def test_palettes_are_understood(tmp_path):
    Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4).save(tmp_path / "a.gif")
    assert read_picture(tmp_path / "a.gif", 3, 4)[:, 1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("size", "rows", "columns"), [((40, 20), (4, 12), (0, 16)), ((5, 10), (0, 16), (4, 12))])
def test_the_aspect_ratio_is_kept_and_the_rest_is_black(tmp_path, size, rows, columns):
    save(tmp_path / "a.png", size=size, color=200)
    image = read_picture(tmp_path / "a.png", 1, 16)
    expected = torch.zeros(1, 16, 16, dtype=torch.uint8)
    expected[:, rows[0] : rows[1], columns[0] : columns[1]] = 200
    assert torch.equal(image, expected)


def test_photographs_are_turned_as_the_camera_noted(tmp_path):
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 16, 8))  # the upper half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to look at it
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    turned = read_picture(tmp_path / "a.jpg", 1, 16)
    assert turned[0, :, 12:].min() > 240 and turned[0, :, :4].max() < 15  # JPEG is not exact


def test_large_jpegs_are_reduced(tmp_path):
    save(tmp_path / "a.jpg", size=(1024, 512), mode="RGB", color=(200, 100, 50), quality=95)
    image = read_picture(tmp_path / "a.jpg", 3, 32).int()
    assert (image[:, 8:24] - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 3  # JPEG is not exact
    assert image[:, :8].max() == 0 and image[:, 24:].max() == 0


# Errors


def test_no_root_says_which_layout_is_expected():
    with pytest.raises(UserError, match=r"which folder\? .*data\.root=photos/.*train/cat/1\.jpg"):
        Folder()


def test_a_root_that_is_a_file_or_has_no_folders_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.root=.*/file: a file; give the folder"):
        Folder(root=tmp_path / "file")
    with pytest.raises(UserError, match=r": holds fewer than two class folders; .*train/cat/1\.jpg.* or cat/1\.jpg"):
        Folder(root=tmp_path)
    with pytest.raises(UserError, match=r"data\.root=.*/nowhere: no such folder; .*train/cat/1\.jpg"):
        Folder(root=tmp_path / "nowhere")


def test_fewer_than_two_classes_are_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"/train: holds fewer than two class folders; .*train/cat/1\.jpg"):
        Folder(root=tmp_path)
    save(tmp_path / "train/cat/1.png")
    with pytest.raises(UserError, match="fewer than two class folders"):
        Folder(root=tmp_path)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_class_folder_without_images_is_named(photos, split):
    folder = photos / split / ("fox" if split == "train" else "cat")
    folder.mkdir(parents=True)
    (folder / ".DS_Store").write_text("")
    with pytest.raises(UserError, match=rf"^{folder}: a folder without images"):
        Folder(root=photos)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_with_an_unknown_class_or_no_classes_is_named(photos, split):
    save(photos / split / "a.png")
    with pytest.raises(UserError, match=rf"^{photos / split}: no class folders"):
        Folder(root=photos)
    save(photos / split / "fox/a.png")
    with pytest.raises(UserError, match=rf"^{photos / split / 'fox'}: no such class in {photos / 'train'}"):
        Folder(root=photos)


def test_a_linked_folder_or_a_pipe_among_the_images_is_named(photos):
    (photos / "train/cat/more").symlink_to(photos / "train")  # round in a circle
    with pytest.raises(UserError, match=r"^.*/train/cat/more: a pipe, a device, or a link to a folder"):
        Folder(root=photos)
    (photos / "train/cat/more").unlink()
    os.mkfifo(photos / "train/cat/more")
    with pytest.raises(UserError, match=r"^.*/train/cat/more: a pipe"):
        Folder(root=photos)


@pytest.mark.parametrize("channels", [None, 1])
@pytest.mark.parametrize("harm", ["text", "truncated"])
def test_an_image_that_cannot_be_decoded_is_named(photos, harm, channels):
    path = photos / "train/dog/5.png"
    path.write_bytes(b"no image" if harm == "text" else path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"^{path}: cannot be decoded as an image \(.*; replace or"):
        Folder(root=photos, channels=channels).load()


def test_a_folder_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(photos), "iterdir", refuse)
    with pytest.raises(UserError, match=r"/photos: cannot be read \(Permission denied\)"):
        Folder(root=photos)


@pytest.mark.parametrize(("option", "value"), [("size", 0), ("valid", -1), ("limit", 0), ("augment", "turn")])
def test_an_option_that_cannot_be_is_named(photos, option, value):
    with pytest.raises(UserError, match=rf"^data\.{option}={value}: "):
        Folder(root=photos, **{option: value})
