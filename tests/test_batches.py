"""The batch stream: every image once per epoch, the same for the same seed, continued bit for bit."""

import io

import pytest
import torch

from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset, Split
from bnexp.errors import UserError

NUM_IMAGES = 50


def make_dataset(num_images=NUM_IMAGES, shape=(2, 5, 7), augment="none", normalize=False, in_shape=None):
    """Random images whose label is their number, so that a batch tells which images it holds."""
    images = torch.randint(1, 256, (num_images, *shape), generator=torch.Generator().manual_seed(0))
    train = Split(images.to(torch.uint8), torch.arange(num_images))
    mean, std = torch.full((shape[0],), 0.4), torch.full((shape[0],), 0.2)
    in_shape = in_shape or shape
    return Dataset("made", train, train, train, ("a", "b"), in_shape, mean, std, augment, normalize)


def to_bytes(x):
    """Undo the scaling to [0, 1]: rounding is safe, neighbours are 1/255 apart."""
    return (x * 255).round().to(torch.uint8)


def labels_of_epoch(batches):
    return torch.cat([batches.next()[1] for _ in range(batches.steps_per_epoch)])


def draw(batches, num_batches):
    return [batches.next() for _ in range(num_batches)]


def assert_same(some, others):
    for (x, labels), (other_x, other_labels) in zip(some, others, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(x, other_x)  # bit for bit


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("batch_size", [1, 8, 10, 50])
def test_an_epoch_holds_every_image_once(batch_size):
    batches = Batches(make_dataset(), batch_size, seed=3, drop_last=False)
    for _ in range(3):
        assert labels_of_epoch(batches).sort().values.tolist() == list(range(NUM_IMAGES))


def test_each_epoch_has_another_order():
    batches = Batches(make_dataset(), 10, seed=3)
    first, second = labels_of_epoch(batches), labels_of_epoch(batches)
    assert not torch.equal(first, second)
    assert first.tolist() != list(range(NUM_IMAGES))


def test_images_and_labels_belong_together():
    dataset = make_dataset()
    x, labels = Batches(dataset, 16, seed=0).next()
    assert x.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(to_bytes(x), dataset.train.images[labels])


def test_drop_last_leaves_out_the_short_batch_and_nothing_else():
    dropped = Batches(make_dataset(), 8, seed=1, drop_last=True)
    kept = Batches(make_dataset(), 8, seed=1, drop_last=False)
    assert (dropped.steps_per_epoch, dropped.num_images) == (6, 48)
    assert (kept.steps_per_epoch, kept.num_images) == (7, 50)
    for _ in range(3):
        some, every = labels_of_epoch(dropped), labels_of_epoch(kept)
        assert len(some) == 48 and len(every) == 50
        assert torch.equal(some, every[:48])


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_the_order_depends_on_the_seed_and_not_on_the_augmentation(augment):
    plain = [labels_of_epoch(b) for b in [Batches(make_dataset(), 8, seed=5)] for _ in range(3)]
    batches = Batches(make_dataset(augment=augment), 8, seed=5)
    assert all(torch.equal(labels_of_epoch(batches), labels) for labels in plain)
    assert not torch.equal(labels_of_epoch(Batches(make_dataset(augment=augment), 8, seed=6)), plain[0])


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_the_same_seed_gives_the_same_batches_whatever_is_drawn_elsewhere(augment):
    dataset = make_dataset(augment=augment)
    batches = Batches(dataset, 8, seed=2)
    quiet = draw(batches, 20)
    torch.manual_seed(99)
    batches, noisy = Batches(dataset, 8, seed=2), []
    for _ in range(20):
        torch.rand(3)
        noisy.append(batches.next())
    assert_same(quiet, noisy)


def test_another_seed_augments_differently():
    one, other = (Batches(make_dataset(1, augment="crop_flip"), 1, seed) for seed in (2, 3))
    assert any(not torch.equal(one.next()[0], other.next()[0]) for _ in range(20))  # the order is always [0]


def test_drawing_batches_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    draw(Batches(make_dataset(augment="crop_flip"), 8, seed=2), 10)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("num_before", [0, 1, 4, 6, 7, 16])  # start, mid-epoch, both ends of an epoch, later
def test_a_loaded_state_continues_bit_for_bit(num_before, augment, drop_last):
    dataset = make_dataset(augment=augment)
    batches = Batches(dataset, 8, seed=4, drop_last=drop_last)
    draw(batches, num_before)
    state = through_a_file(batches.state_dict())
    expected = draw(batches, 20)
    fresh = Batches(dataset, 8, seed=77, drop_last=drop_last)
    draw(fresh, 3)
    fresh.load_state_dict(state)
    assert_same(draw(fresh, 20), expected)


def test_a_state_does_not_change_while_the_stream_goes_on():
    batches = Batches(make_dataset(), 8, seed=4)
    state = batches.state_dict()
    expected = draw(batches, 20)
    batches.load_state_dict(state)
    assert_same(draw(batches, 20), expected)


def test_a_state_is_small():
    state = Batches(make_dataset(20_000, shape=(1, 1, 1)), 8, seed=4).state_dict()
    assert sum(v.nbytes for v in state.values() if torch.is_tensor(v)) < 20_000  # the order takes 160,000


def test_a_state_of_other_data_or_another_device_is_refused():
    batches = Batches(make_dataset(), 8, seed=4)
    with pytest.raises(UserError, match=r"saw 40 training images, this run has 50.*data\.limit"):
        batches.load_state_dict(Batches(make_dataset(40), 8, seed=4).state_dict())
    with pytest.raises(UserError, match=r"on cuda.*device=cuda"):
        batches.load_state_dict(batches.state_dict() | {"device": "cuda"})


def test_iterating_is_drawing():
    batches, others = Batches(make_dataset(), 8, seed=4), Batches(make_dataset(), 8, seed=4)
    assert_same([batch for _, batch in zip(range(10), batches, strict=False)], draw(others, 10))


def test_a_batch_larger_than_the_data_is_an_error_only_with_drop_last():
    with pytest.raises(UserError, match=r"batch_size=51: only 50 .*=50 or less, or drop_last=false"):
        Batches(make_dataset(), 51, seed=0)
    batches = Batches(make_dataset(), 51, seed=0, drop_last=False)
    assert batches.steps_per_epoch == 1 and len(batches.next()[1]) == 50


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "8"])
def test_a_batch_size_that_is_no_number_of_images_is_an_error(batch_size):
    with pytest.raises(UserError, match=f"batch_size={batch_size}: .* give 1 or more"):
        Batches(make_dataset(), batch_size, seed=0)


def test_flip_mirrors_about_half_of_the_images_and_changes_nothing_else():
    dataset = make_dataset(400, augment="flip")
    x, labels = Batches(dataset, 400, seed=0).next()
    stored = dataset.train.images[labels]
    same = (to_bytes(x) == stored).flatten(1).all(1)
    mirrored = (to_bytes(x) == stored.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260  # 200 +- 10 (one standard deviation), so six of them


def test_crop_flip_moves_each_image_on_its_own_by_up_to_four_pixels():
    dataset = make_dataset(400, shape=(3, 9, 11), augment="crop_flip")
    x, labels = Batches(dataset, 400, seed=0).next()
    margin = torch.nn.functional.pad(dataset.train.images[labels], (4, 4, 4, 4))
    seen = {}
    for top in range(9):
        for left in range(9):
            window = margin[:, :, top : top + 9, left : left + 11]
            for flipped, candidate in ((False, window), (True, window.flip(3))):
                for i in (to_bytes(x) == candidate).flatten(1).all(1).nonzero().flatten().tolist():
                    seen.setdefault(i, []).append((top, left, flipped))
    assert sorted(seen) == list(range(400))  # each output is one crop of its own image, flipped or not
    moves = [found for founds in seen.values() for found in founds]
    assert len(moves) == 400
    assert {top for top, _, _ in moves} == {left for _, left, _ in moves} == set(range(9))
    assert len({(top, left) for top, left, _ in moves}) > 60  # of 81: not one move for the whole batch
    assert 140 < sum(flipped for *_, flipped in moves) < 260


def test_augmentation_draws_anew_in_every_epoch():
    batches = Batches(make_dataset(augment="crop_flip"), 50, seed=0)
    (x, labels), (later_x, later_labels) = draw(batches, 2)
    assert not torch.equal(x[labels.argsort()], later_x[later_labels.argsort()])


def test_augmentation_leaves_the_stored_images_alone():
    dataset = make_dataset(augment="crop_flip")
    before = dataset.train.images.clone()
    draw(Batches(dataset, 8, seed=0), 10)
    assert torch.equal(dataset.train.images, before)


def test_batches_come_as_the_model_wants_them():
    dataset = make_dataset(augment="crop_flip", normalize=True, in_shape=(2, 16, 16))
    x, _ = Batches(dataset, 8, seed=0).next()
    assert x.shape == (8, 2, 16, 16) and x.is_contiguous()
    assert x.min() < 0
