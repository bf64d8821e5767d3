"""The schema of files of figures: types with ranges, and the models made of them.

Infinities, lone surrogates and values of another type do not pass. A damaged optional field is left out; a damaged
required one invalidates the object that requires it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from types import GenericAlias
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, create_model, field_validator

LARGEST = 1e30
"""Beyond every count of bytes, tokens and operations, and small enough that products and sums stay finite."""


def numbered(name: str, known: Collection[str]) -> str:
    """The name, with a number where another one is called so."""
    names = itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2)))
    return next(one for one in names if one not in known)


def printable(text: str) -> str:
    """On one line; what no terminal and no page can show is written as its number."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


Text: Any = Annotated[str, Field(strict=True), AfterValidator(lambda text: printable(text)[:1000])]
Name: Any = Annotated[Text, AfterValidator(lambda text: text[:100])]
Flag: Any = Annotated[bool, Field(strict=True)]
Number: Any = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Amount: Any = Annotated[Number, Field(ge=0)]
Positive: Any = Annotated[Number, Field(ge=1 / LARGEST)]
Ratio: Any = Annotated[Number, Field(ge=1e-9, le=1e9)]
Index: Any = Annotated[int, Field(strict=True, ge=0, le=10**7)]
Count: Any = Annotated[Index, Field(ge=1)]


class Model(BaseModel):
    """A damaged optional field is None, and its name added to the validation's context, a list."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _leave_out_damaged(cls, value: Any, check: Any, info: ValidationInfo) -> Any:
        definition = cls.model_fields[str(info.field_name)]
        if definition.is_required() or definition.default is not None:
            return check(value)
        try:
            return None if value is None else check(value)
        except ValidationError:
            assert isinstance(info.context, list)
            info.context.append(info.field_name)
            return None


def model(name: str, required: dict[str, Any], optional: dict[str, Any] | None = None, base: Any = Model) -> Any:
    """A model of fields by type; a key holds the names of all fields of its type."""
    fields: dict[str, Any] = {field: (kind, ...) for names, kind in required.items() for field in names.split()}
    fields |= {field: (kind | None, None) for names, kind in (optional or {}).items() for field in names.split()}
    return create_model(name, __base__=base, **fields)


def many(item: Any) -> Any:
    """The type of a list."""
    return GenericAlias(list, (item,))


def by_name(value: Any) -> Any:
    """The type of a mapping of names."""
    return GenericAlias(dict, (Name, value))


def no_two_alike(item: Any, *names: str) -> Any:
    """The type of a list that is not empty, whose items differ in these fields."""

    def differ(found: list[Any]) -> list[Any]:
        if len({tuple(getattr(one, name) for name in names) for one in found}) < len(found):
            raise ValueError(f"two have the same {' and '.join(names)}")
        return found

    return Annotated[many(item), Field(min_length=1), AfterValidator(differ)]


Memory = model("Memory", {"weights optimizer gradients activations": Amount})
StepMemory: Any = create_model(  # type: ignore[call-overload]
    "StepMemory",
    __base__=model("StepState", {"weights gradients optimizer kept": Amount, "transient": Number}),
    **dict.fromkeys(("buffers", "reduction", "update"), (Amount, 0)),
)
"""The finer parts of an estimate or a simulation (`planning`)."""
Flow = model("Flow", {"group kind": Name, "bytes": Amount})
Operations: Any = create_model(
    "Operations", __base__=model("OperationsOfPasses", {"passes recomputation": Amount}), update=(Amount, 0)
)
Profile = model("Profile", {"memory": StepMemory}, {"operations": Operations, "flops": Amount, "flows": many(Flow)})
"""One rank's step, estimated or counted in a simulation."""
Step = model("Step", {"fingerprint": Name, "line": Text})
Hardware = {"name processor": Name, "cores": Count, "gpus": many(Name), "peak_flops": Positive}
Machine = model("Machine", {}, {**Hardware, "load_average load_average_at_end": Amount})
Origin = {"kind": Name, "command": Text, "machine": Machine, "versions": by_name(Name)}
Head = model("Head", {}, {**Origin, "step": Step, "world_size": Count})
"""What stands at the head of every file of figures, and in a run's run.json."""
Rank = model("Rank", {"memory": Memory, "traffic": by_name(Amount)}, {"operations": Amount})
Row = model(
    "Row",
    {
        "sweep name": Name,
        "processes": Count,
        "parameters flops_per_token tokens_per_step spread peak_bytes": Amount,
        "median_s tokens_per_s": Positive,
        "speed_of_first cpu_speed_of_first": Ratio,
        "memory": Memory,
        "traffic": by_name(Amount),
    },
    {"mfu mfu_whole_attention": Amount, "step": Step, "ranks": many(Rank)},
)
"""A measured row of a benchmark."""
Rates = {"tokens step_time_s tokens_per_s tflops_per_device tflops_per_device_whole_attention": Amount}
Losses = {"loss validation_loss validation_perplexity": Number}
MetricsLine = model("MetricsLine", {"step": Annotated[Amount, Field(le=1e15)]}, {**Rates, **Losses})
Kind = model("Kind", {"kind": Name, "ms share launches": Amount})
Kernel = model("Kernel", {"name": Text, "kind": Name, "ms launches": Amount})
Peak = {"peak_flops": Positive, "peak_source": Text}
Speed = {"seconds": model("Seconds", {"step": Positive}), "tokens_per_second": Positive}
Errors = model("RankErrors", {"rank": Count, "low_rank": Amount}, {"difference": Amount, "coefficient": Number})
ObservedMap = model(
    "ObservedMap",
    {
        "layer": Index,
        "position": Name,
        "errors": no_two_alike(Errors, "rank"),
        "spectrum": many(many(Number | None)),
    },
    {"cosine": Number},
)
ObservedModel = model(
    "ObservedModel",
    {
        "name": Name,
        "ranks": Annotated[many(Count), Field(min_length=1)],
        "maps": no_two_alike(ObservedMap, "layer", "position"),
    },
    {"step": Index, "tokens": Amount},
)
KINDS = {
    "observation": model("Observation", {"models": Annotated[many(ObservedModel), Field(min_length=1)]}, {}, Head),
    "benchmark": model("Benchmark", {"rows": many(Any)}, {"device": Name, "complete": Flag, **Peak}, Head),
    "estimate": model("Estimate", {"stages": Annotated[many(Profile), Field(min_length=1)]}, Speed, Head),
    "simulation": model("Simulation", {"counted": Profile}, {"rank": Index}, Head),
    "profile": model(
        "StepsProfile",
        {
            "steps": Annotated[many(Count), Field(min_length=2, max_length=2)],
            "step_s": Positive,
            "kinds": many(Kind),
            "kernels": many(Kernel),
        },
        {"device": Name},
        Head,
    ),
}
"""Files of figures by kind; the rows of a benchmark are checked one by one, as `Row`."""


def check(kind: Any, value: Any, damaged: list[str]) -> dict[str, Any]:
    """The value's known fields; names of damaged ones are added to the list.

    Raises:
        ValueError: a required one is damaged.
    """
    found: dict[str, Any] = kind.model_validate(value, context=damaged).model_dump()
    return found


def parse(text: str) -> Any:
    """A JSON value; a number that no range holds is infinite, whatever its number of digits."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 25 else float(digits))


def reason(error: Exception) -> str:
    """Why something could not be read."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        return f"is damaged ({f'{place}: ' if place else ''}{first['msg']})"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON at line {error.lineno}"
    if isinstance(error, RecursionError):
        return "is not valid JSON: it nests too deeply"
    return f"cannot be read ({(error.strerror if isinstance(error, OSError) else None) or 'it is not text'})"
