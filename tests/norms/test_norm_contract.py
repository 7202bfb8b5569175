"""What bnexp asks of a norm: the defaults, what norms of bnexp answer, and what stands in for foreign modules."""

import pytest
import torch
from test_models import NORMS, make_norm
from torch import nn

from bnexp.errors import UserError
from bnexp.norms.base import CONTRACT, Norm, contract_of


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_bnexp_answers_for_itself(name):
    module = make_norm(name)(6, activation="relu")
    assert isinstance(module, Norm) and contract_of(module) is module
    assert (module.activation, module.num_features) == ("relu", 6)
    assert module.uses_batch_statistics() or module.share_left(1) == 0
    module.check_batch_size(4)


def test_a_norm_without_a_word_of_its_own_has_nothing_special():
    norm = Norm()
    norm.check_batch_size(1)
    norm.require_device(torch.device("meta"))
    assert (norm.normalizes, norm.activation, norm.num_features, norm.virtual_batch) == (True, "identity", None, None)
    assert norm.reduces_over(4) == "" and norm.momentum == norm.share_left(3) == 0.0
    assert not any((norm.implements_batch_norm, norm.uses_batch_statistics(), norm.is_interpreted()))


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Identity(), nn.Sequential()], ids=repr)
def test_a_module_that_is_no_norm_is_answered_for(module):
    contract = contract_of(module)
    assert not contract.normalizes and not contract.keeps_running_statistics()
    contract.check_batch_size(1)


def test_torchs_batch_norm_is_answered_for_by_its_buffers_and_its_mode():
    tracking, other = contract_of(nn.BatchNorm2d(3, momentum=None)), contract_of(nn.BatchNorm2d(3).eval())
    assert tracking.keeps_running_statistics() and tracking.uses_batch_statistics() and tracking.momentum is None
    assert other.num_features == 3 and other.momentum == 0.1 and not other.uses_batch_statistics()
    forgetful = contract_of(nn.BatchNorm2d(3, track_running_stats=False).eval())
    assert forgetful.uses_batch_statistics() and not forgetful.keeps_running_statistics()


def test_what_a_foreign_norm_says_counts_and_the_rest_is_the_default():
    class Foreign(nn.Module):
        activation = torch.relu  # another meaning of the word

        def reduces_over(self, num_dims):
            return "half of N"

        def check_batch_size(self, batch_size):
            raise UserError("no")

    contract = contract_of(Foreign())
    assert contract.normalizes and contract.reduces_over(4) == "half of N" and contract.activation == "identity"
    with pytest.raises(UserError, match="no"):
        contract.check_batch_size(2)
    contract.require_device(torch.device("cpu"))


def test_every_name_of_the_contract_can_be_given_by_a_foreign_module():
    foreign = nn.Module()
    given = {name: (lambda *_: "mine") if callable(getattr(Norm, name)) else "relu" for name in CONTRACT}
    for name, value in given.items():
        setattr(foreign, name, value)
    assert {name: getattr(contract_of(foreign), name) for name in CONTRACT} == given


@pytest.mark.parametrize("base", [nn.Module, Norm])
def test_a_method_that_is_a_value_or_a_value_that_is_a_method_does_not_count(base):
    norm, default = base(), Norm()
    for name in set(CONTRACT) - {"normalizes"}:
        setattr(norm, name, None if callable(getattr(Norm, name)) else lambda: 3)
    contract = contract_of(norm)
    assert contract.reduces_over(4) == "" and contract.share_left(1) == 0 and not contract.uses_batch_statistics()
    assert not contract.keeps_running_statistics() and contract.normalizes is (base is Norm)
    assert (contract.activation, contract.num_features) == (default.activation, default.num_features)
    contract.check_batch_size(1)
