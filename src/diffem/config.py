"""The configuration of a run: one documented, validated dataclass per component, presets, and overrides."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from diffem import safe_yaml
from diffem.denoiser import DenoiserConfig
from diffem.errors import DiffemError, suggest
from diffem.networks import NetworkConfig
from diffem.samplers import MOST_STEPS, SamplerConfig
from diffem.starts import StartConfig
from diffem.trainer import MStepConfig


@dataclass(frozen=True)
class DataConfig:
    """Observations that a preset makes from a clean data set (for benchmarks); unused with --observations.

    Attributes:
        source: Name or path of the clean data set, as in `diffem corrupt`; empty for none. Leave it to the presets.
        corruption: Name and arguments of the corruption that makes observations of it. Leave it to the presets.
        limit: The largest number of items; 0 for all. Lower it for a quick trial of a preset.
    """

    source: str = ""
    corruption: dict = field(default_factory=dict)
    limit: int = 0


@dataclass(frozen=True)
class EMConfig:
    """The EM loop.

    Attributes:
        iterations: Number of EM iterations.
        seed: Seed of all random numbers, also of the choice which observations are held out. Change it to see how much
            a result depends on chance.
        refresh: Fraction of the reconstructions that an E-step draws anew; the last E-step draws all of them. Lower it
            if E-steps take most of the time.
        renoise: Whether an E-step, from the second iteration on, begins at the last reconstruction plus noise of a
            middle level, instead of pure noise. It then takes a quarter of the steps of the sampler, but at least 2
            (all, if it has fewer). The last E-step always begins from pure noise. It applies where parameters differ
            between observations (see m_step.imputed_weight). Otherwise no observation corrects the errors of short
            E-steps in what none of them measures, and they add up. Set it false if the draws hardly change between
            iterations, or to reproduce the paper.
        score_items: The largest number of validation observations on which an iteration is scored. Raise it if the
            printed standard errors are too large to tell iterations apart, and more observations are held out. A
            black box is scored on training observations instead.
        guard: The guard: keep an iteration only if validation does not get clearly worse. Validation also decides which
            iteration is the best, when the run ends (see `diffem.selection`), and how wide the final draws are. If
            false, every iteration with a score is accepted, and the last one is kept. Set it false to reproduce other
            methods, or if there are too few observations to validate.
        patience: Early stopping: the run ends after this many iterations in a row without a new best; 0 turns it off.
            Raise it if iterations are short. Unused without guard.
    """

    iterations: int = 20
    seed: int = 0
    refresh: float = 1.0
    renoise: bool = True
    score_items: int = 128
    guard: bool = True
    patience: int = 8

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise DiffemError(f"em.patience: must be a number of iterations >= 0, got {self.patience}")
        if self.iterations < 0 or self.score_items < 2:
            raise DiffemError("em: iterations must be >= 0, score_items >= 2")
        if not 0 < self.refresh <= 1:
            raise DiffemError(f"em.refresh: must be in (0, 1], got {self.refresh}")


@dataclass(frozen=True)
class PriorConfig:
    """The prior that generates new data.

    Attributes:
        kind: `unconditional`: after the last iteration, the denoiser is trained further, without observations, on the
            best reconstructions (the paper's separate model); `joint`: the posterior's own network, with the
            observation withheld. Choose `joint` to save this training.
        steps: Optimiser steps of this training (`unconditional` only). Raise it if samples of the prior look worse than
            reconstructions.
        sampler_steps: Steps of the prior's sampler (`unconditional` only; `joint` uses sampler.steps). Lower it if
            samples take too long.
    """

    kind: str = "unconditional"
    steps: int = 1000
    sampler_steps: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ("unconditional", "joint"):
            raise DiffemError(f"prior.kind: must be unconditional or joint, got {self.kind!r}")
        if self.steps < 1 or not 1 <= self.sampler_steps <= MOST_STEPS:
            raise DiffemError(f"prior.steps: must be at least 1, and prior.sampler_steps from 1 to {MOST_STEPS:,}")


@dataclass(frozen=True)
class Config:
    """The configuration of a whole run; its fields are the sections."""

    data: DataConfig = field(default_factory=DataConfig)
    start: StartConfig = field(default_factory=StartConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    m_step: MStepConfig = field(default_factory=MStepConfig)
    em: EMConfig = field(default_factory=EMConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        if self.prior.kind == "joint" and not self.denoiser.observation_dropout:
            raise DiffemError("prior.kind: joint needs denoiser.observation_dropout > 0: the network must know both")

    def to_dict(self) -> dict:
        """Plain lists, dictionaries and numbers, as config.yaml holds them."""
        return _plain(dataclasses.asdict(self))


def described() -> list[tuple[str, object, str]]:
    """Every setting: section.field, its default, and its description in the docstring of the section."""
    found = []
    for section in dataclasses.fields(Config):
        default = section.default_factory()  # type: ignore[operator]
        text = inspect.cleandoc(type(default).__doc__ or "").partition("Attributes:")[2]
        words = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE))
        for name, value in dataclasses.asdict(default).items():  # type: ignore[arg-type]
            found.append((f"{section.name}.{name}", _plain(value), " ".join(words[name].split())))
    return found


def _plain(value: object) -> typing.Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def presets() -> list[str]:
    """The names of the presets."""
    return sorted(f.name[:-5] for f in (resources.files("diffem") / "presets").iterdir() if f.name.endswith(".yaml"))


def load_config(
    preset: str | None = None, overrides: Mapping[str, object] | Sequence[tuple[str, object]] = ()
) -> Config:
    """A preset (a name, or the path of a YAML file) with overrides: {'section.field': value}, or pairs; text is read as
    YAML.

    Raises:
        DiffemError: If a preset, section or field is unknown (with a suggestion), or a value does not fit.
    """
    values: dict = {}
    source = preset or "configuration"
    if preset is not None:
        file = resources.files("diffem") / "presets" / f"{preset}.yaml"
        if preset in presets():
            values = safe_yaml.parse(file.read_text(), preset)
        elif Path(preset).is_file():
            values = safe_yaml.read(Path(preset)) or {}
            if not isinstance(values, dict) or not all(isinstance(v, dict | None) for v in values.values()):
                raise DiffemError(f"{preset}: must hold sections of `field: value` lines")
        else:
            raise DiffemError(f"{preset}: unknown preset;{suggest(preset, presets())}")
    for key, text in overrides.items() if isinstance(overrides, Mapping) else overrides:
        section, _, name = key.partition(".")
        values[section] = {
            **(values.get(section) or {}),
            name: safe_yaml.parse(text, f"--{key}") if isinstance(text, str) else text,
        }
    return from_dict(values, source)


def from_dict(values: Mapping, source: str = "configuration") -> Config:
    """A configuration from nested mappings; missing settings have their defaults."""
    sections = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
    built = {}
    for section, content in values.items():
        if section not in sections:
            raise DiffemError(f"{source}: {section}: unknown section;{suggest(str(section), sections)}")
        kind = sections[section]
        hints = typing.get_type_hints(kind)
        arguments = {}
        for name, value in (content or {}).items():
            if name not in hints:
                raise DiffemError(f"{source}: {section}.{name}: unknown field;{suggest(str(name), hints)}")
            arguments[name] = _convert(value, hints[name], f"{source}: {section}.{name}")
        built[section] = kind(**arguments)
    return Config(**built)


def _convert(value: object, hint: typing.Any, where: str) -> object:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, str) and "," in value:
            raise DiffemError(f"{where}: must be a list, [{value}], got {value!r}")
        sequence = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(v, inner, where) for v in sequence)
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise DiffemError(f"{where}: must be of type {getattr(hint, '__name__', hint)}, got {value!r}")
