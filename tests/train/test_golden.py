"""The science stays: losses that were once computed come out again, whatever was made faster in between."""

import pytest

from bnexp.config import build
from bnexp.config.compose import composed

# Those with torch's weights were computed at a commit that measured everything by hand-written references, before there
# were engines; the others by the same code when weights became those of model.init=auto. A change of the initial
# weights, of the order of the images, of the preparation, of a schedule or of a norm moves the third decimal.
FIXED = ("device=cpu", "threads=1", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "schedule=cosine",
         "steps=5", "batch_size=32")  # fmt: skip
GOLDEN = [
    (("model=mlp", "norm=none", "model.init=torch"),
     [2.2829638, 2.3049083, 2.2072952, 2.2622948, 2.1864238], 2.1379664),
    (("model=mlp", "norm=none", "optimizer.lr=0.01"),
     [3.1336460, 2.4693377, 2.1859722, 2.1831520, 2.1442480], 2.0260203),
    (("model=lenet", "norm=scratch", "model.init=torch"),
     [2.4356275, 2.0246522, 1.7057121, 1.6067345, 1.4468774], 2.1809129),
    (("model=lenet", "norm=library", "data.augment=crop_flip"),
     [2.6662123, 2.6596274, 2.6638680, 2.4212060, 2.2989748], 2.7209545),
    (("model=mlp", "norm=group", "classes_per_batch=2"),
     [2.3291359, 2.3305433, 1.1664319, 4.4054542, 3.9423175], 3.1751033),
    (("model=resnet", "norm=library", "data.size=8", "model.stem=cifar", "model.widths=[8]", "model.blocks=[1]"),
     [2.6858902, 2.4033232, 2.4219670, 2.3094656, 2.2726481], 2.3030826),
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
