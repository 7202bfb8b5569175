"""Any set of the library ``datasets`` with a column of pictures and one of labels: local files or a repository."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bnexp.data.pairs import Pairs
from bnexp.errors import UserError, first_line, home_path

PARTS = {"train": ("train",), "valid": ("validation", "valid", "val"), "test": ("test",)}
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


class HuggingFace(Pairs):
    """The set that ``datasets.load_dataset(name, **args)`` loads; a folder that ``save_to_disk`` wrote is one too.

    Pictures are in the first column of type Image, or else in ``image``; labels in the column ``label``, by default
    the first of type ClassLabel.
    """

    name = "huggingface"

    def __init__(
        self, name: str | None = None, args: Mapping[str, Any] = MappingProxyType({}), image: str = "image",
        label: str | None = None, size=None, valid=0.1, test=None, limit=None, augment="none", normalize=True,
        channels=None, corrupt="none", strength=None, resident="auto",
    ):  # fmt: skip
        if not name:
            raise UserError("data=huggingface: which set? Name a folder or a repository with data.name=...")
        try:
            import datasets
        except ImportError:
            raise UserError("data=huggingface: needs the library datasets; pip install 'bnexp[huggingface]'") from None
        path = home_path(name, "data.name=")
        try:
            if any((path / each).is_file() for each in SAVED):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path) if path.exists() else name, **args)
        except Exception as error:  # the library and the network fail in many ways
            raise UserError(f"data.name={name}: datasets cannot load it: {first_line(error)}") from error
        if not isinstance(found, dict):
            found = {"train": found}
        splits = {split: found[each] for split, names in PARTS.items() for each in names if each in found}
        if "train" not in splits:
            raise UserError(f"data.name={name}: has no split train, but {', '.join(found)}; give data.args.split=...")
        features = splits["train"].features
        image = next((key for key, each in features.items() if isinstance(each, datasets.Image)), image)
        label = label or next((key for key, each in features.items() if isinstance(each, datasets.ClassLabel)), "label")
        for key, setting in ((image, "image"), (label, "label")):
            if key not in features:
                raise UserError(f"data.{setting}={key}: no such column; {name} has {', '.join(features)}")
        names, number = getattr(features[label], "names", None), int
        if names is None:  # the values of a plain column are the names
            names = sorted(set(splits["train"][label]))
            number = names.index
        self._rows = splits
        super().__init__(
            {split: Columns(rows, image, label, number) for split, rows in splits.items()},
            [*map(str, names)], ("huggingface", name, dict(args), image, label), self._files_of,
            size=size, valid=valid, test=test, limit=limit,
            augment=augment, normalize=normalize, channels=channels, corrupt=corrupt, strength=strength,
            resident=resident,
        )  # fmt: skip

    def _files_of(self) -> list:
        """The fingerprints that the library gives, and names, sizes and times of the files that hold the rows."""
        paths = [Path(each["filename"]) for rows in self._rows.values() for each in rows.cache_files]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return [[rows._fingerprint for rows in self._rows.values()], stats]


class Columns(Sequence):
    """Two columns of a table as (picture, label) pairs."""

    def __init__(self, rows, image: str, label: str, number) -> None:
        self.rows, self.image, self.label, self.number = rows.select_columns([image, label]), image, label, number

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple:
        row = self.rows[i]
        return row[self.image], self.number(row[self.label])
