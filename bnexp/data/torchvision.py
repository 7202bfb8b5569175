"""Any set of torchvision.datasets that gives (picture, label) pairs."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bnexp.data.dataset import find_root
from bnexp.data.download import download
from bnexp.data.pairs import Pairs, stats_of
from bnexp.errors import UserError, nearest

SPLITS = {  # what torchvision's argument split calls them
    "train": ("train", "trainval", "train-standard"), "valid": ("val", "valid"), "test": ("test",),
}  # fmt: skip
FOLDER_ATTRIBUTES = ("raw_folder", "_base_folder", "base_folder", "_data_dir", "_data_path", "split_folder")
LABELS = ("labels", "targets", "_labels", "y")
ABSENT = (RuntimeError, FileNotFoundError)  # what torchvision raises where files are missing


class Torchvision(Pairs):
    """The set ``torchvision.datasets.<name>`` in ``root``; torchvision downloads it if it is not there and it can.

    ``args`` are further arguments of the class. ``classes`` names the classes of a set that does not say them.
    """

    name = "torchvision"

    def __init__(
        self, name: str | None = None, root: str | None = None, args: Mapping[str, Any] = MappingProxyType({}),
        classes=None, size=None, valid=0.1, test=None, limit=None, augment="none", normalize=True,
        channels=None, corrupt="none", strength=None, resident="auto",
    ):  # fmt: skip
        from torchvision import datasets  # takes a second to import

        kind = getattr(datasets, str(name), None)
        parameters = inspect.signature(kind).parameters if name in datasets.__all__ else {}
        if "root" not in parameters:
            known = nearest(str(name), datasets.__all__)
            raise UserError(f"data.name={name}: no data set of torchvision{known}; give one, data.name=SVHN say")
        self.root = self.folder = find_root(root)
        self._kind, self._args = kind, {**args}
        self._has_train = "train" in parameters or issubclass(kind, datasets.MNIST)
        self._has_split = "split" in parameters and "split" not in self._args and not self._has_train
        self._has_download = "download" in parameters or self._has_train
        try:
            opened = self._open(self.root)
        except ABSENT as error:
            if not self._has_download:
                raise UserError(
                    f"data.name={name}: not in {self.root} ({str(error).partition('. ')[0]}), and torchvision cannot "
                    "download it; copy its files there, or name another folder by data.root"
                ) from error
            download(self, None, str(name))
            opened = self._open(self.root)
        classes = classes or names_of(opened["train"])
        if classes is None:
            raise UserError(f"data.name={name}: does not say its classes; name them, data.classes=[cat,dog] say")
        super().__init__(
            opened, classes, ("torchvision", name, str(self.root.resolve()), self._args),
            lambda: files_of(opened["train"], self.root), size=size, valid=valid, test=test, limit=limit,
            augment=augment, normalize=normalize, channels=channels, corrupt=corrupt, strength=strength,
            resident=resident,
        )  # fmt: skip

    def fetch(self, root: Path) -> None:
        """Have torchvision download and check the files into ``root``."""
        self._open(root, download=True)

    def _open(self, root: Path, **options) -> dict[str, Sequence]:
        if self._has_train:
            choices = {"train": [{"train": True}], "test": [{"train": False}]}
        elif self._has_split:
            choices = {split: [{"split": word} for word in words] for split, words in SPLITS.items()}
        else:
            choices = {"train": [{}]}
        found, refusal = {}, None
        for split, ways in choices.items():
            for way in ways:
                try:
                    found[split] = self._kind(root, **self._args, **way, **options)
                    break
                except (TypeError, ValueError) as error:  # it has no such split
                    refusal = refusal or error
        if "train" not in found:
            raise UserError(f"data.args={self._args}: {self._kind.__name__} refuses its arguments: {refusal}")
        return found


def names_of(opened) -> list[str] | None:
    """The names of the classes of a set of torchvision; their numbers if it has labels only, None if it has neither."""
    if names := getattr(opened, "classes", None) or getattr(opened, "categories", None):
        return [name if isinstance(name, str) else str(name[0]) for name in names]
    labels = next((getattr(opened, each) for each in LABELS if hasattr(opened, each)), None)
    if labels is None:
        labels = [label for _, label in getattr(opened, "_samples", [])]
    return [str(i) for i in range(max(map(int, labels)) + 1)] if len(labels) else None


def files_of(opened, root: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a set of torchvision: of its own folders, or of those in ``root``."""
    folders = {root / getattr(opened, each) for each in FOLDER_ATTRIBUTES if getattr(opened, each, None)}
    paths = {path for folder in folders for path in folder.rglob("*")} or {*root.glob("*")}
    return stats_of(sorted(path for path in paths if path.is_file()), root)
