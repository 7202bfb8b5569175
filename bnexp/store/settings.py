"""Settings as plain dictionaries: flat, and what each of them decides."""


FREE_TO_RESUME = ("out", "quiet", "allow", "resume")  # between two starts of one run; none of them changes its files
# The seed, and what decides where files go or how often one looks, but not what is trained. The device and
# the engine are missing on purpose: they round differently, so the table says when they differ. So may replicas, but
# which of a variant's runs are computed as one, and which alone, is chance.
HOUSEKEEPING = frozenset((
    "seed", "out", "quiet", "threads", "deterministic", "allow", "log_every", "eval_train", "eval_test",
    "checkpoint_every", "keep", "probe", "resume", "replicas", "sweep_order",
))  # fmt: skip


def flatten(config: dict, prefix: str = "") -> dict:
    """Dotted keys to values, without the housekeeping and without Hydra's ``_partial_``."""
    flat = {}
    for key, value in config.items():
        if key == "_partial_" or (not prefix and key in HOUSEKEEPING):
            continue
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
