"""The science stays: losses that were once computed come out again, whatever was made faster in between."""

import pytest

from bnexp.config import build
from bnexp.config.compose import composed

# Computed at a commit that measured everything by hand-written references, before there were engines. A change of the
# initial weights, of the order of the images, of the preparation, of a schedule or of a norm moves the third decimal.
FIXED = ("device=cpu", "threads=1", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "schedule=cosine",
         "steps=5", "batch_size=32")  # fmt: skip
GOLDEN = [
    (("model=mlp", "norm=none"), [2.2829638, 2.3049083, 2.2072952, 2.2622948, 2.1864238], 2.1379664),
    (("model=lenet", "norm=scratch"), [2.4356275, 2.0246522, 1.7057121, 1.6067345, 1.4468774], 2.1809129),
    (("model=lenet", "norm=library", "data.augment=crop_flip"),
     [2.3527143, 2.3557918, 2.1561158, 2.1626277, 2.0939901], 2.2682976),
    (("model=mlp", "norm=group", "classes_per_batch=2"),
     [2.5676877, 2.3630614, 1.4869374, 3.7056925, 3.1089625], 2.7947865),
    (("model=resnet", "norm=library", "data.size=8", "model.stem=cifar", "model.widths=[8]", "model.blocks=[1]"),
     [2.4078033, 2.2842054, 2.4036064, 2.4713140, 2.4116111], 2.3437027),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "losses", "valid"), GOLDEN, ids=lambda each: "-".join(map(str, each))[:40]
                         if isinstance(each, tuple) else "")  # fmt: skip
def test_losses_are_those_of_old(overrides, losses, valid):
    run = build.build(composed([*FIXED, *overrides]))
    for _ in range(5):
        run.step()
    # On one processor they are the same to the bit; others add up in vectors of another width, which after five steps
    # is a few units in the sixth decimal.
    assert run.meter.read().losses == pytest.approx(losses, abs=2e-5)
    assert run.evaluate(run.dataset.valid)[0] == pytest.approx(valid, abs=1e-4)
