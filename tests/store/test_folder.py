"""A person's own images: any size and mode in, uint8 squares and class names out, errors that name files."""

import pytest
import torch
from PIL import Image

from bnexp.data.folder import Folder, read_image
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


def test_limit_caps_every_split(photos):
    for i in range(5):
        save(photos / f"test/dog/{i}.png")
    dataset = Folder(root=photos, size=8, limit=3).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [3, 2, 3]


def test_hidden_files_and_files_beside_the_classes_are_passed_over(photos):
    for name in ("train/.DS_Store", "train/cat/.DS_Store", "train/notes.txt", ".hidden"):
        (photos / name).write_text("no image")
    (photos / "train/.thumbnails").mkdir()
    source = Folder(root=photos, size=8, valid=0)
    assert source.class_names == ("cat", "dog")
    assert len(source.load().train) == 20


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
    assert read_image(tmp_path / "a.png", (len(expected), 4, 4))[:, 1, 1].tolist() == expected
    for name in "xy":
        save(tmp_path / f"photos/train/{name}/a.png", mode=mode, color=color)
    assert Folder(root=tmp_path / "photos").in_shape[0] == len(expected)


def test_palettes_are_understood(tmp_path):
    Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4).save(tmp_path / "a.gif")
    assert read_image(tmp_path / "a.gif", (3, 4, 4))[:, 1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((40, 20), (4, 12), (0, 16)), ((5, 10), (0, 16), (4, 12))]
)
def test_the_aspect_ratio_is_kept_and_the_rest_is_black(tmp_path, size, rows, columns):
    save(tmp_path / "a.png", size=size, color=200)
    image = read_image(tmp_path / "a.png", (1, 16, 16))
    expected = torch.zeros(1, 16, 16, dtype=torch.uint8)
    expected[:, rows[0] : rows[1], columns[0] : columns[1]] = 200
    assert torch.equal(image, expected)


def test_photographs_are_turned_as_the_camera_noted(tmp_path):
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 16, 8))  # the upper half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to look at it
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    turned = read_image(tmp_path / "a.jpg", (1, 16, 16))
    assert turned[0, :, 12:].min() > 240 and turned[0, :, :4].max() < 15  # JPEG is not exact


def test_large_jpegs_are_reduced(tmp_path):
    save(tmp_path / "a.jpg", size=(1024, 512), mode="RGB", color=(200, 100, 50), quality=95)
    image = read_image(tmp_path / "a.jpg", (3, 32, 32)).int()
    assert (image[:, 8:24] - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 3  # JPEG is not exact
    assert image[:, :8].max() == 0 and image[:, 24:].max() == 0


# Errors


def test_no_root_says_which_layout_is_expected():
    with pytest.raises(UserError, match=r"which folder\? .*data\.root=photos/.*train/cat/1\.jpg"):
        Folder()


def test_a_root_that_is_a_file_or_has_no_train_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.root=.*/file: a file; give the folder"):
        Folder(root=tmp_path / "file")
    with pytest.raises(UserError, match=r"data\.root=.*: no folder train/ in it; .*train/cat/1\.jpg"):
        Folder(root=tmp_path)
    with pytest.raises(UserError, match=r"data\.root=.*/nowhere: no folder train/ in it"):
        Folder(root=tmp_path / "nowhere")


def test_fewer_than_two_classes_are_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"fewer than two class folders in train/; .*train/cat/1\.jpg"):
        Folder(root=tmp_path)
    save(tmp_path / "train/cat/1.png")
    with pytest.raises(UserError, match="fewer than two class folders"):
        Folder(root=tmp_path)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_class_folder_without_images_is_named(photos, split):
    folder = photos / split / ("fox" if split == "train" else "cat")
    folder.mkdir(parents=True)
    (folder / ".DS_Store").write_text("")
    with pytest.raises(UserError, match=rf"^{folder}: a class folder without images"):
        Folder(root=photos)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_with_an_unknown_class_or_no_classes_is_named(photos, split):
    save(photos / split / "a.png")
    with pytest.raises(UserError, match=rf"^{photos / split}: no class folders"):
        Folder(root=photos)
    save(photos / split / "fox/a.png")
    with pytest.raises(UserError, match=rf"^{photos / split / 'fox'}: no such class in {photos / 'train'}"):
        Folder(root=photos)


def test_a_folder_among_the_images_is_named(photos):
    save(photos / "train/cat/more/a.png")
    with pytest.raises(UserError, match=r"^.*/train/cat/more: a folder where images are expected"):
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
    with pytest.raises(UserError, match=r"/train: cannot be read \(Permission denied\)"):
        Folder(root=photos)


@pytest.mark.parametrize(("option", "value"), [("size", 0), ("valid", -1), ("limit", 0), ("augment", "turn")])
def test_an_option_that_cannot_be_is_named(photos, option, value):
    with pytest.raises(UserError, match=rf"^data\.{option}={value}: "):
        Folder(root=photos, **{option: value})
