"""`LSHConfig`: which keys a query of LSH attention meets. It lives in a model's configuration, not in a run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from .values import validate_choice


LSH_LAYOUTS = ("causal", "reformer")
LSH = "lsh"  # the attention name, and the kernel's
# Under this name the settings stand in the configuration of a model's text part, and so in its config.json.
LSH_KEY = "hf_longctx_lsh"
_MOST_BUCKETS = 2**31 - 2


@dataclass(frozen=True, kw_only=True)
class LSHConfig:
    """How LSH attention hashes tokens into buckets, and which tokens of a bucket a query sees.

    Args:
        num_hashes (`int`, *optional*, defaults to 4): rounds of hashing, each with rotations of its own. A model that
            was trained with some may run with more or fewer: the first rounds stay the same.
        window (`int`, *optional*, defaults to 64): `"causal"`: a query sees the last `window` tokens of its bucket,
            itself included. `"reformer"`: tokens of a chunk; a query sees its chunk and the one before.
        num_buckets (`int`, *optional*, defaults to 64): even, since a bucket and its opposite are found together; 1
            hashes nothing. It is fixed for the run, whatever the length of a row.
        hash_seed (`int`, *optional*, defaults to 0): rotations are drawn from it, the layer and the head.
        layout (`str`, *optional*, defaults to `"causal"`): `"causal"` depends on earlier tokens only. `"reformer"`
            has the paper's chunks of sorted tokens, whose places depend on later tokens too.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    num_hashes: int = field(default=4, metadata={"help": "Rounds of hashing of LSH attention."})
    window: int = field(default=64, metadata={"help": "Tokens of a bucket that a query sees, or of a chunk."})
    num_buckets: int = field(default=64, metadata={"help": "Buckets of a round: even, fixed for the run."})
    hash_seed: int = field(default=0, metadata={"help": "What rotations are drawn from, with layer and head."})
    layout: str = field(default="causal", metadata={"help": "Who meets whom: " + " or ".join(LSH_LAYOUTS) + "."})

    def __post_init__(self) -> None:
        for name, least in (("num_hashes", 1), ("window", 2), ("num_buckets", 1), ("hash_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                reason = {
                    "window": ": the query itself is one of them, and it sees itself only if nothing else",
                    "num_buckets": ": it is fixed for the run and never taken from the length of a row",
                }.get(name, "")
                raise ValueError(f"`{name}` ({value!r}) must be an integer of at least {least}{reason}.")
        if self.num_buckets > 1 and self.num_buckets % 2 or self.num_buckets > _MOST_BUCKETS:
            raise ValueError(
                f"`num_buckets` ({self.num_buckets}) must be even and at most {_MOST_BUCKETS}, since every rotation "
                f"makes a bucket and its opposite: take {2 * (min(self.num_buckets, _MOST_BUCKETS) // 2)}, or 1 for "
                "no hashing."
            )
        validate_choice("layout", self.layout, LSH_LAYOUTS)

    def to_dict(self) -> dict[str, int | str]:
        """Plain values, as they stand in a config.json."""
        return asdict(self)

    @classmethod
    def of_model(cls, config: object) -> LSHConfig | None:
        """The settings in a model's configuration, or `None` where it has none.

        Raises:
            ValueError: they are not what this version writes.
        """
        stored = getattr(config, LSH_KEY, None)
        if stored is None:
            return None
        known = {each.name for each in fields(cls)}
        if not isinstance(stored, Mapping) or set(stored) != known:
            raise ValueError(
                f"`config.{LSH_KEY}` ({stored!r}) must have the fields {', '.join(sorted(known))}, no others: write "
                "it with `hf_longctx.use_lsh(model, LSHConfig(...))`."
            )
        try:
            return cls(**stored)
        except ValueError as error:
            raise ValueError(f"`config.{LSH_KEY}` of the model cannot be used: {error}") from error
