"""The parameters of a notebook: validated fields, bound from the notebook in one line.

Every error is a ValueError with one readable line per parameter: its name, its value, the way out.
"""

import ast
import difflib
import importlib
import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from minerlib.artifacts import remember
from minerlib.scoring import METRICS
from minerlib.selection import PAPER_WEIGHTS, STRATEGIES, weightings
from minerlib.separation import SPLITS
from minerlib.tasks import REGISTRY
from minerlib.tasks.media import FRAMES

COVERED = ("model", "source")  # fields whose content keys hold as fingerprints
NEUTRAL = ("run_dir", "device", "batch_size")  # change where and how fast results come, not them


def value(text: str) -> Any:
    """A value as YAML; JSON first, for to YAML 1.1 a number such as 1e-3 is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


def _among(names: Collection[str]) -> AfterValidator:
    """The value, or each of several, is one of the names that are registered by then."""

    def check(value):
        for one in [value] if isinstance(value, str) else value or ():
            if one not in names:
                raise ValueError(f"no {one!r}; use one of {', '.join(names)}")
        return value

    return AfterValidator(check)


def _weights(value: Any) -> Any:
    """Weights by name, as a mapping, or one for each of the paper's metrics; all also as text."""
    near: list[str] = []
    if isinstance(value, str):
        near = difflib.get_close_matches(value, weightings(), 1)
        with suppress(yaml.YAMLError):
            value = weightings().get(value) or yaml.safe_load(value)
    if isinstance(value, list | tuple) and len(value) == len(PAPER_WEIGHTS):
        value = dict(zip(PAPER_WEIGHTS, value, strict=True))
    if not isinstance(value, Mapping):
        how = f"{', '.join(PAPER_WEIGHTS)}, or use one of {', '.join(weightings())}"
        guess = f"did you mean {near[0]!r}? Else " if near else ""
        raise ValueError(f"{guess}give a number for each of {how}")
    return value


def listed(value: Any) -> Any:
    """Text with commas or blanks as a list."""
    return re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value


Whole = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
Maybe = Annotated[int | None, Field(ge=1, description="a whole number of at least 1, or None")]
Ratio = Annotated[float, Field(gt=0, le=1, description="a share of all neurons, in (0, 1]")]
Seed = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
Text = Annotated[str, Field(description="give text")]
Place = Annotated[str | None, Field(description="give text, or None")]
Names = Annotated[tuple[str, ...] | None, BeforeValidator(listed), _among(REGISTRY)]
Weights = Annotated[dict[str, float], BeforeValidator(_weights), _among(METRICS)]


class Parameters(BaseModel):
    """The fields that notebooks share; `workbook.Workbook` says what they mean."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)

    model: Text = "data/models/tiny-qwen2-vl"
    benchmarks: Annotated[Names, Field(description="names, as a list or with commas")] = None
    source: Text = "auto"
    limit: Whole = 96
    eval_limit: Whole = 96
    ratio: Ratio = 0.02
    strategy: Annotated[Text, _among(STRATEGIES)] = "LA_MU"
    weights: Annotated[Weights, Field(description="give numbers")] = PAPER_WEIGHTS
    split: Annotated[Text, _among(SPLITS)] = "special_text_separate"
    seed: Seed = 0
    batch_size: Whole = 32
    max_new_tokens: Maybe = None
    min_pixels: Maybe = None
    max_pixels: Maybe = None
    frames: Whole = FRAMES
    run_dir: Place = None
    device: Place = None
    dtype: Annotated[Text, _among(("auto", "float32", "bfloat16", "float16"))] = "auto"
    on_error: Annotated[Literal["raise", "skip"], Field(description="use raise or skip")] = "raise"

    _own: dict[str, Any] = {}
    _declared: Collection[str] = ()

    def __init__(self, **given: Any):
        for module in os.environ.get("MINER_PLUGINS", "").split():
            try:
                remember(importlib.import_module(module))
            except ModuleNotFoundError as error:
                if error.name != module:  # one that the plug-in itself imports
                    raise
                where = f"in {os.getcwd()} or on PYTHONPATH; names are separated by blanks"
                raise ValueError(f"MINER_PLUGINS: no module {module!r} {where}") from None
        try:
            super().__init__(**given)
        except pydantic.ValidationError as error:
            raise ValueError("\n".join(map(self._line, error.errors()))) from None
        self._declared = type(self).model_fields

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _typed(cls, value: Any, info: Any) -> Any:
        """No field is a truth value; text from a command line can mean None."""
        field = cls.model_fields[info.field_name]
        if isinstance(value, bool):
            raise ValueError(field.description)
        return None if field.default is None and _is_none(value) else value

    @classmethod
    def _line(cls, error: Any) -> str:
        """pydantic's error as one line."""
        name = str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            return _unknown(name, cls.model_fields)
        why = error.get("ctx", {}).get("error")  # a validator's own words, where it has any
        return f"{name}={error['input']!r}: {why or cls.model_fields[name].description}"

    @classmethod
    def bind(cls, namespace: dict[str, Any]) -> Self:
        """From a notebook's `globals()`: what its parameters cell declares, as it is now.

        Names that are no fields are the notebook's `own`, of their default's type. All are written
        back: `limit` in the notebook is what it is here. Undeclared injected names are refused.
        """
        own = declared(namespace, cls.model_fields)
        bound = cls(**{name: own.pop(name) for name in cls.model_fields if name in own})
        bound._own, bound._declared = own, bound.model_fields_set
        namespace |= own | {name: getattr(bound, name) for name in bound._declared}
        return bound

    @property
    def own(self) -> dict[str, Any]:
        """The parameters that only this notebook has."""
        return self._own

    @property
    def parameters(self) -> dict[str, Any]:
        """All declared parameters that can change a result, but those `COVERED` otherwise."""
        fields = {*self._declared} - {*COVERED, *NEUTRAL}
        return self.model_dump(mode="json", include=fields) | self._own


def declared(namespace: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The names that a notebook's parameters cell assigns, with the values they have now.

    The first cell executed that assigns `model` or `runs`; an injected one starts with
    "# Parameters". Outside a notebook: the fields that the namespace holds.
    """
    cells = [(text.startswith("# Parameters"), assigned(text)) for text in namespace.get("In", [])]
    own = [names for injected, names in cells if not injected and {"model", "runs"} & names.keys()]
    known = own[0] if own else {name: None for name in fields if name in namespace}
    for name in (name for injected, names in cells if injected for name in names):
        if name not in known:
            raise ValueError(_unknown(name, known))
    return {n: namespace[n] if n in fields else _like(n, namespace[n], known[n]) for n in known}


def assigned(cell: str) -> dict[str, Any]:
    """The names that a cell assigns literals to, and these."""
    try:
        lines = [line for line in ast.parse(cell).body if isinstance(line, ast.Assign)]
        return {t.id: ast.literal_eval(x.value) for x in lines for t in x.targets}  # type: ignore
    except (SyntaxError, ValueError, AttributeError):  # a cell of another kind
        return {}


def _like(name: str, value: Any, default: Any) -> Any:
    """The value in its default's type, also from a command line's text."""
    if default is None:
        return None if _is_none(value) else value
    try:
        return pydantic.TypeAdapter(type(default)).validate_python(value)
    except pydantic.ValidationError:
        what = f"give a {type(default).__name__}, such as {default!r}"
        raise ValueError(f"{name}={value!r}: {what}") from None


def at_least(**given: tuple[float, float]) -> None:
    """A notebook's own rule for its own parameters: at_least(draws=(draws, 10))."""
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{name}={value!r}: give at least {least}")


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in ("", "none", "null")


def _unknown(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    way_out = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(known))}"
    return f"unknown parameter {name!r}; {way_out}"
