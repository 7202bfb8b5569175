"""``optimizer.only``: which parameters are trained, where the others keep their initial values."""

from torch import nn

from bnexp.errors import UserError
from bnexp.norms.base import Norm, contract_of

ONLY = ("norm", "classifier")


def train_only(model: nn.Module, only: str | None) -> nn.Module:
    """Return ``model`` with gradients for no parameters but those that ``only`` names; all of them if it is None.

    ``norm`` is the scale and shift of every norm, and the shift that ``norm=none`` has in its place (Frankle, Schwab &
    Morcos 2021, arXiv:2003.00152, "Training BatchNorm and only BatchNorm"). ``classifier`` is the last layer, the
    control of that paper. :class:`UserError` for another word, and if the model has no such parameters.
    """
    if only is None:
        return model
    if only not in ONLY:
        raise UserError(f"optimizer.only={only}: not known; choose one of {', '.join(ONLY)}, or null to train all")
    parts = [getattr(model, "classifier", None)] if only == "classifier" else filter(is_norm, model.modules())
    chosen = {id(p) for part in parts if part is not None for p in part.parameters()}
    if not chosen:
        why = "has no layer named classifier" if only == "classifier" else "has no norm with a scale or a shift"
        raise UserError(f"optimizer.only={only}: the model {why}, so nothing would be trained; choose another")
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
    return model


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` stands at a norm's place, torch's own batch norms included."""
    contract = contract_of(module)
    return isinstance(module, Norm) or contract.normalizes or contract.keeps_running_statistics()
