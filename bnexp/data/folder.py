"""Image files of one's own in class folders, of any size, grey or colour.

Read are ``root/train/<class>/*`` and, if they exist, ``root/valid/<class>/*`` and ``root/test/<class>/*``, each under
any of its usual names; or ``root/<class>/*`` alone, of which test and validation images are set aside.
"""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from torch import Tensor

from bnexp.data.dataset import Dataset, Options, check_size, find_root
from bnexp.data.pairs import load_decoded, stats_of
from bnexp.data.pictures import has_colour, read_picture
from bnexp.errors import UserError, unread
from bnexp.store.untrusted import check_name, printable

LAYOUT = "one folder per class is expected, as in train/cat/1.jpg and train/dog/2.jpg, or cat/1.jpg and dog/2.jpg"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}  # in any case
SPLIT_HINTS = {  # in names such as training_set, train2017 and seg_test
    split: re.compile(rf"(?<![a-z])({'|'.join(names)})(set|data|images)?(?![a-z])")
    for split, names in SPLIT_NAMES.items()
}
SYSTEM_NAMES = (  # in any case; what Windows, macOS, Linux and network storage put into folders
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r",
    "__macosx", "__pycache__", "@eadir", "@synoresource", "@synoeastream", "@sharebin", "@recently-snapshot", "@tmp",
    "@recycle", "#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "system volume information",
    "wpsettings.dat", "indexervolumeguid", "lost+found", "network trash folder", "temporary items",
)  # fmt: skip
STREAMS = (":zone.identifier", ":encryptable")  # Windows' notes on a file, which some systems keep as files beside it
MOST_SHOWN = 10  # classes with their counts in a description


class Folder:
    """Images in folders, scaled to fit into ``size`` x ``size`` with their aspect ratio kept and the rest black.

    The classes are the folders in ``train/``, sorted; images in folders below a class belong to it. Without
    ``valid/`` the part ``valid`` of the training images is set aside, and without ``test/`` the part ``test``;
    ``test=None`` is 0 if there is ``train/``, and 0.1 if ``root`` itself holds the classes. The images set aside are
    the same for every seed. ``channels=1`` makes all images grey and 3 makes all of them colour; None is 3 if any
    training image has colours, else 1. Hidden files and those of operating systems are passed over. Of an animation
    the first picture is read. Files of other formats are refused, and so are pictures of more than 89 million pixels:
    a small file can hold one that fills the memory.
    """

    name = "folder"

    def __init__(
        self, root: str | None = None, size=64, valid=0.1, limit=None, augment="none", normalize=True, channels=None,
        test=None, corrupt="none", strength=None, resident="auto",
    ):  # fmt: skip
        if root is None:
            raise UserError(f"data=folder: which folder? Name it with data.root=photos/; {LAYOUT}")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels}: not 1 (grey), 3 (colour) or null (as the images are)")
        size = check_size(size, default=64)
        self.root = find_root(root)
        if not self.root.is_dir():
            raise UserError(f"data.root={root}: no such folder; {LAYOUT}")
        self._folders = find_splits(self.root) or {"train": self.root}
        self._is_flat = self._folders["train"] == self.root
        if test is None:
            test = 0.1 if self._is_flat else 0
        self.options = Options(valid, limit, augment, normalize, test, resident, corrupt, strength)
        self.class_names = tuple(dict.fromkeys(map(_class_name, _folders_in(self._folders["train"]))))
        for name in self.class_names:
            check_name(self._folders["train"] / name)
        if len(self.class_names) < 2:
            raise UserError(f"{self._folders['train']}: holds fewer than two class folders; {LAYOUT}")
        self._files = {split: self._scan(folder) for split, folder in self._folders.items()}
        if channels is None:
            channels = 3 if any(has_colour(path) for path, _ in self._files["train"]) else 1
        self.in_shape = (channels, size, size)

    def load(self) -> Dataset:
        files = [file for each in self._files.values() for file in each]
        channels, size, _ = self.in_shape

        def decode(i: int) -> tuple[Tensor, int]:
            path, label = files[i]
            return read_picture(path, channels, size), label

        counts = {split: len(each) for split, each in self._files.items()}
        settings, stats = ("folder", str(self.root.resolve())), stats_of([path for path, _ in files], self.root)
        dataset = load_decoded(self, settings, [counts, self.class_names, stats], counts, decode)
        return dataset.like(about=self._describe(dataset))

    def _describe(self, dataset: Dataset) -> str:
        """One line on the files and what became of them: classes, splits and their origin, colour and size."""
        counts = Counter(label for files in self._files.values() for _, label in files)
        classes = [f"{name} {counts[i]:,}" for i, name in enumerate(self.class_names[:MOST_SHOWN])]
        if len(self.class_names) > MOST_SHOWN:
            classes.append("...")
        origins = {split: printable(f"{folder.absolute().name}/") for split, folder in self._folders.items()}
        for split in origins.keys() ^ SPLIT_NAMES.keys():
            origins[split] = f"data.{split}={getattr(self.options, split)} of {origins['train']}"
        images = [f"{len(getattr(dataset, split)):,} {split} ({origins[split]})" for split in SPLIT_NAMES]
        notes = [f"at most {self.options.limit:,} images of each split are used"] if self.options.limit else []
        notes += ["no train/, so every folder is a class"] if self._is_flat else []
        depths = {split: len(folder.parts) + 2 for split, folder in self._folders.items()}
        if any(len(path.parts) > depths[split] for split, files in self._files.items() for path, _ in files):
            notes.append("images in folders below a class belong to it")
        folders = {self.root, *self._folders.values()}
        if beside := sorted(path for folder in folders for path in _visible(folder) if not path.is_dir()):
            more = f" and {len(beside) - 1:,} more" if len(beside) > 1 else ""
            notes.append(f"not read, because in no class folder: {printable(beside[0])}{more}")
        channels, size, _ = self.in_shape
        return "; ".join([
            f"data=folder: {printable(self.root)} has {len(self.class_names)} classes: {', '.join(classes)}",
            ", ".join(images), f"{'grey' if channels == 1 else 'colour'}, scaled to {size}x{size}", *notes,
        ])  # fmt: skip

    def _scan(self, folder: Path) -> list[tuple[Path, int]]:
        """Every image file of a split's folder with its label."""
        found = []
        for class_folder in _folders_in(folder):
            if _class_name(class_folder) not in self.class_names:
                raise UserError(f"{class_folder}: no such class in {self._folders['train']}; rename or remove it")
            label = self.class_names.index(_class_name(class_folder))
            found += [(path, label) for path in _files_below(class_folder)]
        if not found:
            raise UserError(f"{folder}: no class folders in it; add some or remove it")
        return found


def find_splits(root: Path) -> dict[str, Path]:
    """The folder of ``root`` for each split, under any of the split's names; {} if no folder has such a name.

    Raises :class:`UserError` if only some folders have such names, or names that hint at splits: images would be left
    out, or splits taken for classes, without a word.
    """
    splits, others, hints = {}, [], {}
    for folder in _folders_in(root):
        split = _split_named(folder.name)
        hints |= {name: folder for name, pattern in SPLIT_HINTS.items() if pattern.search(folder.name.casefold())}
        if split is None:
            others.append(folder)
        elif split in splits:
            raise UserError(f"{folder}: {splits[split].name}/ beside it is the {split} split already; keep one of them")
        else:
            splits[split] = folder
    if splits and "train" not in splits:
        folder = next(iter(splits.values()))
        beside = f" beside {others[0].name}/" if others else ""
        raise UserError(f"data.root={root}: holds {folder.name}/{beside} and no train/; {LAYOUT}")
    if splits and others:
        raise UserError(
            f"{others[0]}: beside {splits['train'].name}/ only valid/ (val, validation) and test/ (testing) are read; "
            f"rename it, move it into {splits['train'].name}/ if it is a class, or hide it as .{others[0].name}"
        )
    if not splits and "train" in hints and len(hints) > 1:
        found, names = (" and ".join(f"{name}/" for name in each) for each in ((f.name for f in hints.values()), hints))
        raise UserError(f"data.root={root}: {found} seem to be splits, not classes; rename them to {names}")
    inner = [each.name for each in _folders_in(others[0])] if len(others) > 1 and not splits else []
    if len(same := [name for name in inner if all((folder / name).is_dir() for folder in others)]) > 1:
        raise UserError(
            f"data.root={root}: {others[0].name}/ and {others[1].name}/ both hold {same[0]}/ and {same[1]}/, as splits "
            "do; rename them to train and test or, if they are classes, move them into train/"
        )
    return splits


def _split_named(name: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def _class_name(folder: Path) -> str:
    """The name of a class folder, whose accents macOS may store as characters of their own."""
    return unicodedata.normalize("NFC", folder.name)


def _files_below(folder: Path) -> list[Path]:
    """All visible files in ``folder`` and the folders below it, sorted; raises :class:`UserError` if one is empty."""
    found, folders = [], [folder]
    while folders:
        folder = folders.pop()
        paths = _visible(folder)
        if not paths:
            raise UserError(f"{folder}: a folder without images; add some or remove it")
        for path in paths:
            if path.is_dir() and not path.is_symlink():  # a link can lead round in a circle
                if split := _split_named(path.name):
                    raise UserError(f"{path}: the {split} split inside a class; {LAYOUT}")
                folders.append(path)
            elif path.is_file():  # a pipe would be waited for
                found.append(path)
            else:
                raise UserError(f"{path}: a pipe, a device, or a link to a folder or nothing; replace or remove it")
    return sorted(found)


def _folders_in(folder: Path) -> list[Path]:
    """The visible folders in ``folder``, sorted; raises :class:`UserError` for a link to nothing among them."""
    paths = _visible(folder)
    if lost := next((path for path in paths if path.is_symlink() and not path.exists()), None):
        raise UserError(f"{lost}: a link to nothing; restore what it leads to, or remove it")
    return [path for path in paths if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """What is in ``folder``, sorted, without hidden files and those of operating systems."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise unread(error, folder) from None
    return [
        path for path in paths
        if not path.name.startswith(".") and path.name.casefold() not in SYSTEM_NAMES
        and not path.name.casefold().endswith(STREAMS)
    ]  # fmt: skip
