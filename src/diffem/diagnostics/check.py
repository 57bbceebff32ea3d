r"""Checks of the observations before any training, in seconds: can a model learn from them at all?

:func:`check` returns all findings, problems first; each comes from a function that checks one property. One pass over
all observations counts what they show (:class:`Survey`). Values and second moments come from a subset
(:class:`Sample`), so that memory does not grow with the number of observations (except for three numbers each).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import memory
from diffem.corruptions import Corruption, Fourier, LinearCorruption, PoissonGaussian
from diffem.corruptions.diagonal import LEAST_GAIN, DiagonalCorruption
from diffem.data import Observations, evenly
from diffem.data.layout import FEW as FEW_CHANNELS
from diffem.data.observations import read_rows
from diffem.diagnostics.diagnose import FEWEST
from diffem.diagnostics.noise import BY_PIXEL, Noise, estimate
from diffem.diagnostics.spectrum import DIRECTIONS, Spectrum
from diffem.errors import DiffemError

LEVELS = ("problem", "warning", "note")
SAMPLE = 8192  # the largest number of observations in the sample,
NUMBERS = 2**23  # and of numbers in them
CHUNK = 1024
BLANK = 8  # fewer equal values may be chance
FEW = 20  # fewer observations of an entry are too few to learn from
SERIES = 32  # a table with more columns may be series
SURE = 5.0  # standard errors, large since the smallest of thousands of values is tested
CLIPPED = 0.01  # a larger share of values at the minimum or maximum means clipping
CORNER = 10.0  # the power of the zero frequency over that of any other coefficient
DETAIL = 0.08  # details of images without noise, as a fraction of the standard deviation of their pixels
UNEQUAL, FAR_APART = 1.25, 2.0  # noise in bright over noise in dark regions: limits of a warning and of a problem
SENTINELS = (-999, -9999, -99999, -32768, 32767, 65535, 2**31 - 1, -(2**31), 1e20, 1e30, -1e20, -1e30, 9.96921e36)
SHARED = 1e-3  # a sentinel is a value that at least this share of entries has,
FAR_VALUE = 10.0  # at a distance of this many ranges of the other values (0.5 for a known sentinel)


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: `problem` (training will fail or mislead), `warning` (it may), or `note`.
        name: What was found, e.g. `never-observed`; stable, for scripts.
        text: One sentence with the number, and what to do.
    """

    level: str
    name: str
    text: str


def quick(observations: Observations) -> list[Finding]:
    """Problems that a sample of the observations shows, in seconds; a run checks for them before it trains."""
    sample = Sample(observations)
    quiet = noise(observations, sample, None) if isinstance(observations.corruption.noise, float) else []
    findings = [
        *layout(observations),
        *inverted(observations),
        *quiet,
        *photons(observations, sample),
        *not_measured(observations),
        *centre(observations),
        *sentinels(sample),
        *value_range(observations, sample),
    ]
    return [finding for finding in findings if finding.level == "problem"]


def check(observations: Observations, seed: int = 0) -> list[Finding]:
    """All findings, problems first.

    Arguments:
        observations: The observations; they are not changed.
        seed: Seed of the run; it decides which observations are held out.

    Raises:
        DiffemError: If there are too few observations.
    """
    train, *halves = observations.split(seed)
    observations.rehearse(observations.units(train))
    survey, sample = Survey(observations), Sample(observations)
    known, level = observations.corruption.diagonal or sample.matrix is not None, observations.corruption.noise
    uniform = isinstance(level, float)  # else the noise is not checked
    spectrum = Spectrum.of(sample.z, sample.seen, sample.matrix, level) if known and uniform else None
    upside_down = inverted(observations)  # then no value says anything
    quiet = noise(observations, sample, spectrum) if uniform and not upside_down else []
    findings = [
        *layout(observations),
        *too_few(halves),
        *observed(observations, survey),
        *never_together(observations, survey),
        *upside_down,
        *mask_rate(observations, survey),
        *duplicates(survey, train, np.concatenate(halves)),
        *([] if upside_down else blank(sample)),
        *quiet,
        *photons(observations, sample),
        *not_measured(observations),
        *centre(observations),
        *sentinels(sample),
        *value_range(observations, sample),
    ]
    if uniform and all(finding.level == "note" for finding in quiet):  # these tests rely on the declared noise
        findings += constant_entries(observations, sample)
        findings += constant_directions(observations, spectrum)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def too_few(halves: list[np.ndarray]) -> list[Finding]:
    """Fewer held-out observations than `diffem diagnose` needs: a warning."""
    validation, test = map(len, halves)
    if min(validation, test) >= FEWEST:
        return []
    text = f"{validation} validation and {test} test observations are too few to tell whether a run went well; it takes {FEWEST} of each, so {2 * FEWEST * 10} observations, or a larger held_out.npy"
    return [Finding("warning", "too-few", text)]


# --- what is read from the observations --------------------------------------------------------------


class Survey:
    """Counts from one pass over all observations.

    Attributes:
        looks: The sum of A^T A: its diagonal (d,) if all A are diagonal in one basis, else (features, features);
            None for a black box, and for matrices of more than :data:`DIRECTIONS` features.
        together: How many observations show both entries of a pair, (d, d); None without masks, or for more than
            :data:`DIRECTIONS` entries.
        hidden: The fraction of false entries in the mask of each observation, (N,); 0 without masks.
        shown: How many entries of y each observation shows, (N,).
        keys: A checksum of the values and parameters of each observation, (N,).
    """

    def __init__(self, observations: Observations) -> None:
        n, corruption, params = len(observations), observations.corruption, observations.params
        d, features = math.prod(observations.y.shape[1:]), math.prod(observations.shape)
        diagonal, matrices = corruption.diagonal, "matrix" in params and features <= DIRECTIONS
        alone = corruption.by_entry and not corruption.linear
        self.looks = np.zeros(d) if diagonal or alone else np.zeros((features, features)) if matrices else None
        self.together = np.zeros((d, d)) if "mask" in params and d <= DIRECTIONS else None
        self.hidden, self.shown, self.keys = np.zeros(n), np.zeros(n, int), np.zeros(n, np.uint64)
        for rows in observations.chunks(size=CHUNK):
            y, params = observations.batch(rows)
            seen = corruption.seen(y, params).expand_as(y).flatten(1)
            self.shown[rows] = seen.sum(1).numpy()
            self.keys[rows] = _keys([y, *params.values()])
            if "mask" in params:
                self.hidden[rows] = 1 - params["mask"].flatten(1).float().mean(1).numpy()
            if self.together is not None:
                self.together += (seen.double().T @ seen.double()).numpy()
            if alone:
                self.looks += seen.sum(0).numpy()
            elif diagonal:
                self.looks += seen.sum(0).numpy() * _gains(observations) ** 2
            elif matrices:
                a = params["matrix"].flatten(0, 1).double()
                self.looks += (a.T @ a).numpy()


class Sample:
    """An evenly spaced sample of the observations, limited by memory.

    Attributes:
        corruption: That of the observations.
        y: Observations (n, *y shape), 0 where nothing was observed.
        blank: The value of each channel of each observation that has one value everywhere, which noise would not leave
            so, else NaN, (n, channels). Such channels do not count as seen.
        seen: Which of the coefficients z were observed, (n, d).
        z: Coefficients (n, d): the entries of y, or its cosine coefficients if it is blurred.
        matrix: Matrices (n, m, features), or None.
        values: All observed values, flattened.
        whole: Whether they are integers, as from digital cameras.
        count, mean, variance: Of each coefficient, over the observations that show it, (d,).
    """

    def __init__(self, observations: Observations) -> None:
        self.corruption = corruption = observations.corruption
        limit = NUMBERS // math.prod(observations.y.shape[1:])
        self.y, params = observations.batch(evenly(np.arange(len(observations)), min(SAMPLE, max(limit, FEW))))
        seen = corruption.seen(self.y, params).expand_as(self.y)
        self.blank = _blank(self.y, seen, corruption)
        self.seen = (seen & self.blank.isnan().view(*self.blank.shape, *(1,) * (seen.ndim - 2))).flatten(1).numpy()
        self.z = corruption.compared(self.y).flatten(1).double().numpy()
        self.matrix = params.get("matrix")
        self.values = self.y.flatten(1).numpy()[self.seen]
        self.whole = bool((self.values == np.rint(self.values)).all()) and bool((np.abs(self.values) > 1.5).any())
        self.count = self.seen.sum(0)
        self.mean = (self.z * self.seen).sum(0) / np.maximum(self.count, 1)
        self.variance = (np.square(self.z - self.mean) * self.seen).sum(0) / np.maximum(self.count - 1, 1)


def _blank(y: Tensor, seen: Tensor, corruption: Corruption) -> Tensor:
    level, nothing = corruption.noise, torch.full(y.shape[:2], math.nan)
    if y.ndim < 3 or not corruption.linear or not corruption.same_units or not isinstance(level, float) or not level:
        return nothing
    low = torch.where(seen, y, math.inf).flatten(2).amin(2)
    high = torch.where(seen, y, -math.inf).flatten(2).amax(2)
    return torch.where((low == high) & (seen.flatten(2).sum(2) >= BLANK), low, nothing)


def _keys(tensors: list[Tensor]) -> np.ndarray:
    rows = zip(*(tensor.reshape(len(tensor), -1).contiguous().numpy() for tensor in tensors), strict=True)
    digests = (hashlib.blake2b(b"".join(map(bytes, row)), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), np.uint64)


def _gains(observations: Observations) -> np.ndarray:
    """The factor by which a diagonal corruption multiplies each coefficient, (d,): 1, or less if it blurs."""
    corruption, shape = observations.corruption, tuple(observations.y.shape[1:])
    assert isinstance(corruption, DiagonalCorruption)
    return torch.as_tensor(corruption.gains(shape)[1]).double().expand(shape).flatten().numpy()


def _blurs(observations: Observations) -> bool:
    return observations.corruption.diagonal and bool((_gains(observations) != 1).any())


# --- axes --------------------------------------------------------------------------------------------


def layout(observations: Observations) -> list[Finding]:
    """Images whose channels seem to be last: a problem. A shape (N, A, B), which may be images or series: a note."""
    shape = tuple(observations.y.shape)
    if observations.axes is None and len(shape) == 4 and shape[-1] <= FEW_CHANNELS < shape[1]:
        text = f"y of shape {shape} is read as {shape[1]} channels of {shape[2]} x {shape[3]} pixels; if its channels are last add `axes: NHWC` to corruption.yaml, else `axes: NCHW`"
        return [Finding("problem", "channels-last", text)]
    if observations.axes is None and observations.layout.axes == "NHW" and shape[2] != shape[3]:
        series = f"{shape[2]} series of length {shape[3]} add `axes: NCT`"
        if shape[3] <= FEW_CHANNELS < shape[2]:
            series = f"series of length {shape[2]} with {shape[3]} columns add `axes: NTF`"
        text = f"y is read as images of one channel, {shape[2]} x {shape[3]} pixels; if they are {series} to corruption.yaml"
        return [Finding("note", "layout", text)]
    if observations.axes is None and observations.layout.axes == "NF" and shape[1] > SERIES:
        text = f"y is read as a table of {shape[1]} columns without an order; if they are points of a series add `axes: NT` to corruption.yaml"
        return [Finding("note", "layout", text)]
    return []


# --- what the observations show ----------------------------------------------------------------------


def observed(observations: Observations, survey: Survey) -> list[Finding]:
    """Directions that no operator observes, or hardly any: eigenvectors of the mean of A^T A.

    For masks, its eigenvalues are the fractions of observations that show an entry; for matrices, whose rows have
    length 1, the number of rows per observation along a direction; for a blur, squared gains of cosine coefficients. A
    problem if an eigenvalue is 0 (except for a blur, where this is normal), a warning if it corresponds to fewer than
    :data:`FEW` observations, else a note.
    """
    if not observations.corruption.linear and survey.looks is None:
        return [Finding("note", "black-box", "what a black box hides cannot be told from its observations")]
    looks, vectors, n, found = survey.looks, None, len(observations), []
    if looks is None and "matrix" not in observations.params:
        name = observations.corruption.config["name"]
        return [Finding("note", "observed", f"what {name} hides cannot be told from its observations")]
    if looks is None:
        text = f"{math.prod(observations.shape)} features are too many to look for directions that no matrix sees"
        return [Finding("note", "observed", text)]
    if _blurs(observations):
        deleted = int((_gains(observations) <= LEAST_GAIN).sum())
        text = f"the blur deletes {deleted:,} of {looks.size:,} cosine coefficients; what it deletes comes from the prior alone"
        return [Finding("note", "observed", text)]
    if looks.ndim == 2:
        looks, vectors = np.linalg.eigh(looks)
    never = np.flatnonzero(looks <= 1e-6 * looks.max())
    rare = np.setdiff1d(np.flatnonzero(looks < min(FEW, n)), never)
    if len(never):
        text = f"no observation shows {_where(observations, never, vectors)}, so that nothing can be learned there; leave out what was never measured, or train with --allow-unobserved"
        found.append(Finding("problem", "never-observed", text))
    if len(rare):
        text = f"fewer than {FEW} observations show {_where(observations, rare, vectors)}; what is drawn there is little more than a guess"
        found.append(Finding("warning", "rarely-observed", text))
    what, least = "an entry" if vectors is None else "a direction", _where(observations, looks.argsort()[:1], vectors)
    text = f"{what} is seen by {_percent(looks.mean() / n)} of the observations on average, and by {_percent(looks.min() / n)} at the least ({least})"
    return [*found, Finding("note", "observed", text)]


def never_together(observations: Observations, survey: Survey) -> list[Finding]:
    """Pairs of entries that are never observed together, though each is observed: a warning."""
    if survey.together is None:
        return []
    shown = survey.together.diagonal() > 0
    apart = np.argwhere(np.triu(survey.together == 0) & np.outer(shown, shown))
    if not len(apart):
        return []
    first, second = (_where(observations, k[None]) for k in apart[0])
    more = f", nor {len(apart) - 1:,} more pairs" if len(apart) > 1 else ""
    text = f"no observation shows both {first} and {second}{more}; how they depend on each other comes from the prior alone"
    return [Finding("warning", "never-together", text)]


def mask_rate(observations: Observations, survey: Survey) -> list[Finding]:
    """Masks whose rate differs from the declared formula, by more than 0.01 and four standard errors: a problem."""
    if "mask" not in observations.params or not observations.formula:
        return []
    corruption, rate = observations.corruption, float(survey.hidden.mean())
    declared, error = getattr(corruption, "rate", 0.0), survey.hidden.std() / math.sqrt(len(observations))
    if abs(rate - declared) <= max(4 * error, 0.01):
        return []
    use = "use" if hasattr(corruption, "rate") else "use `name: RandomMask` with"
    text = f"declared rate {declared:g}, but the observed fraction is {1 - rate:.3g}, so that re-corruption would draw the wrong masks; {use} `rate: {rate:.3g}`, or leave out `formula: true`"
    return [Finding("problem", "mask-rate", text)]


def inverted(observations: Observations) -> list[Finding]:
    """Masks that show one value only, such as 0, and hide others: a problem, since a mask is true where y was observed."""
    if "mask" not in observations.params:
        return []
    rows = _some(observations)
    y = read_rows(observations, observations.y, rows, np.float32).nan_to_num()
    mask = read_rows(observations, observations.params["mask"], rows, bool).expand_as(y)
    shown, hidden = y[mask], y[~mask]
    if not len(shown) or (shown != shown[0]).any() or (hidden == shown[0]).all() or not hidden.any():
        return []
    text = f"what the mask shows is {float(shown[0]):g} everywhere, and what it hides is not; is mask.npy inverted? It is true where y was observed"
    return [Finding("problem", "mask-inverted", text)]


def blank(sample: Sample) -> list[Finding]:
    """Channels with one value everywhere, such as those of a detector that was off: a warning."""
    if not (share := (~sample.blank.isnan()).double().mean(0)).any():
        return []
    channel = int(share.argmax())
    value = sample.blank[:, channel].nanmedian()
    text = f"channel {channel} is exactly {value:g} everywhere in {_percent(float(share[channel]))} of the observations, which noise would not leave so; if it was not measured, hide it in mask.npy"
    return [Finding("warning", "blank-channel", text)]


def duplicates(survey: Survey, train: np.ndarray, held_out: np.ndarray) -> list[Finding]:
    """Observations whose values and parameters equal those of an earlier one: a warning.

    Observations of fewer than four entries do not count: they may be equal by chance.
    """
    _, first, inverse = np.unique(survey.keys, return_index=True, return_inverse=True)
    telling = survey.shown >= max(1, min(4, survey.shown.max()))
    copy = np.flatnonzero((first[inverse] != np.arange(len(inverse))) & telling)
    if not len(copy):
        return []
    leaked = int((np.isin(inverse[held_out], inverse[train]) & telling[held_out]).sum())
    text = f"{len(copy):,} of {len(inverse):,} observations are copies of an earlier one (first: {copy[0]} of {first[inverse[copy[0]]]})"
    if leaked:
        text += f", and {leaked:,} of {len(held_out):,} held-out ones are in training, too, so that their scores would be too good"
    return [Finding("warning", "duplicates", f"{text}; remove them, unless they were measured so")]


# --- what does not vary ------------------------------------------------------------------------------


def constant_entries(observations: Observations, sample: Sample) -> list[Finding]:
    """Entries whose variance is that of the declared noise, s^2, within :data:`SURE` standard errors, s^2 sqrt(2 / n).

    A note, since such entries only cost time; a problem if all entries are constant.
    """
    if not observations.corruption.diagonal or not len(sample.values):
        return []
    variance, level = sample.variance, _noise(observations) ** 2
    excess = (
        SURE * np.sqrt(2 / np.maximum(sample.count, 2)) * level
        + 1e-12 * np.square(sample.values, dtype=np.float64).mean()
    )
    use = (sample.count > 1) & (_gains(observations) > LEAST_GAIN)
    still, beyond = np.flatnonzero(use & (np.abs(variance - level) <= excess)), " beyond the noise" if level else ""
    if len(still) == use.sum():
        return [Finding("problem", "constant-entries", f"nothing varies{beyond}; look whether y holds what you think")]
    if not len(still):
        return []
    text = f"{len(still):,} of {len(variance):,} never change{beyond}: {_where(observations, still)}; they cost nothing but time"
    return [Finding("note", "constant-entries", text)]


def constant_directions(observations: Observations, spectrum: Spectrum | None) -> list[Finding]:
    """Weighted sums of varying entries that do not vary beyond the noise: a warning.

    See :class:`Spectrum`. Not tested for more than :data:`DIRECTIONS` entries, or if some pair is seldom seen together.
    """
    if spectrum is None or not (count := spectrum.constant):
        return []
    vectors = np.zeros((math.prod(observations.shape), count))
    vectors[spectrum.kept] = spectrum.vectors[:, :count]
    text = f"what does not vary: {_where(observations, np.arange(count), vectors)}; draws keep to that only nearly, so leave out what follows from the rest"
    return [Finding("warning", "constant-directions", text)]


# --- noise -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quiet:
    """A quantity with standard deviation `value`, surely at most `bound`; the noise cannot be larger. If the quantity
    is likely pure noise, a `value` above `least` means that the noise is larger than declared."""

    where: str
    value: float
    bound: float
    least: float = math.inf


def noise(observations: Observations, sample: Sample, spectrum: Spectrum | None) -> list[Finding]:
    """Compares the declared noise with its estimate, and with the quantities of the data that vary least: coefficients,
    directions, details.

    A problem if the declared noise is larger, by a tenth and :data:`SURE` standard errors. A warning if it is smaller
    than the estimate, or than a quantity that is likely pure noise and half as large again. `noise-not-uniform` if the
    noise grows with the signal. The warning `clipped` if many values are exactly the minimum or the maximum.
    """
    declared, values = _noise(observations), sample.values
    if not observations.corruption.linear or not len(values):
        return []
    told = _estimate_or_none(sample)
    if told is not None and (found := _not_uniform(observations, told, values)):
        return found
    end, count = max(((v, (values == v).sum()) for v in (values.min(), values.max())), key=lambda pair: pair[1])
    if declared and count > max(1, CLIPPED * len(values)):
        if declared > FAR_APART * (all_of_it := float(values.std(dtype=np.float64))):  # clipping hides less than half
            text = f"declared noise {declared:g}, but the values vary by {all_of_it:.3g} in all; it is a standard deviation, in the units of y"
            return [Finding("problem", "noise-too-large", text)]
        text = f"{_percent(count / len(values))} of the values are exactly {end:g}, which noise would not leave so; use `noise: 0` if there is none, or `name: Saturate` if a sensor clips"
        return [Finding("warning", "clipped", text)]
    quiet = [*_quiet_coefficients(observations, sample), *_quiet_details(observations, sample, told)]
    if spectrum is not None:
        variance = declared**2 + (spectrum.share + SURE * spectrum.error) / spectrum.width
        std = np.sqrt(variance.clip(min=0))
        quiet.append(_quietest("the quietest weighted sums of entries", std, 0 * std, declared))
    if not quiet:
        return []
    low = min(quiet, key=lambda q: q.bound)
    text = f"declared noise {declared:g}, but {low.where} vary by {low.value:.3g}"
    if low.bound < 0.9 * declared:
        return [Finding("problem", "noise-too-large", f"{text}; use `noise: {low.value:.3g}` or less")]
    for q in quiet:
        if q.least < q.value <= low.bound:
            text = f"declared noise {declared:g}, but {q.where} vary by {q.value:.3g}; if nothing but noise is there, use `noise: {q.value:.3g}`"
            return [Finding("warning", "noise-too-small", text)]
    text = f"at most about {low.value:.3g}, by which {low.where} vary; declared {declared:g}"
    return [Finding("note", "noise", text)]


def photons(observations: Observations, sample: Sample) -> list[Finding]:
    """Compares declared photon and read noise with the estimate, where most values are and in the bright, as far as it was measured:
    a warning if they differ by a quarter, a problem if by a factor of two."""
    corruption = observations.corruption
    if not isinstance(corruption, PoissonGaussian) or (told := _estimate_or_none(sample)) is None:
        return []
    most = told.ends[1] if told.gain else min(told.reach, told.ends[1])
    signals = min(float(sample.values.mean(dtype=np.float64)), most), most
    pairs = [(math.sqrt(corruption.gain * max(s, 0.0) + corruption.noise**2), told.std(s)) for s in signals]
    factors = [max(a, b) / max(min(a, b), 1e-12) for a, b in pairs]
    if max(factors) < UNEQUAL:
        return []
    declared, found = pairs[factors.index(max(factors))]
    use = ", ".join(f"`{key}: {value:g}`" for key, value in told.arguments.items())
    use = f"; they fit {use}" if told.gain else f" up to a signal of {most:.3g}"
    text = f"declared gain {corruption.gain:g} and noise {corruption.noise:g} make a standard deviation of {declared:.3g} where the observations show {found:.3g}{use}"
    return [Finding("problem" if max(factors) > FAR_APART else "warning", "photons", text)]


def not_measured(observations: Observations) -> list[Finding]:
    """Exact zeros in noisy measurements that are not images, such as lines of k-space that were not acquired: a problem."""
    corruption = observations.corruption
    if not isinstance(corruption, LinearCorruption) or corruption.same_units or "matrix" in observations.params:
        return []
    y, params = observations.batch(_some(observations))
    seen = corruption.seen(y, params).expand_as(y) & (corruption.noise_std(y, params) > 0)
    if not seen.any() or (fraction := float((y[seen] == 0).float().mean())) <= CLIPPED:
        return []
    text = f"{_percent(fraction)} of the values are exactly 0, which noise would not leave so; if these were not measured, hide them in mask.npy (true = observed)"
    return [Finding("problem", "not-measured", text)]


def centre(observations: Observations) -> list[Finding]:
    """K-space whose largest coefficient is in the corner, not in the middle: a problem."""
    corruption = observations.corruption
    if not isinstance(corruption, Fourier):
        return []
    y, _ = observations.batch(_some(observations))
    power = y.square().mean((0, 1))
    if (
        not CORNER * float(power[tuple(n // 2 for n in power.shape)])
        < float(power[(0,) * power.ndim])
        == float(power.max())
    ):
        return []
    text = "the zero frequency seems to be in the corner of y, and Fourier has it in the middle; apply fftshift to the spatial axes of y"
    return [Finding("problem", "zero-frequency", text)]


def _some(observations: Observations) -> np.ndarray:
    """Rows of a sample that is limited by memory."""
    return evenly(np.arange(len(observations)), memory.at_once(math.prod(observations.y.shape[1:]), CHUNK, NUMBERS))


def estimated(sample: Sample) -> Noise:
    """The noise estimated from the observations: see :func:`diffem.diagnostics.noise.estimate`."""
    if not sample.corruption.same_units:
        raise DiffemError(
            f"y of {sample.corruption.config['name']} is not an image whose flat patches would tell the noise; take it from"
            " repeated measurements, or from a part without signal"
        )
    return estimate(sample.y.numpy(), sample.seen.reshape(sample.y.shape))


def _estimate_or_none(sample: Sample) -> Noise | None:
    try:
        return estimated(sample)
    except DiffemError:  # the noise cannot be estimated
        return None


def _not_uniform(observations: Observations, told: Noise, values: np.ndarray) -> list[Finding]:
    """Noise that grows with the signal, if that matters."""
    dark, bright = (told.std(signal) for signal in told.ends)
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if bright < UNEQUAL * dark or told.std(mean) < DETAIL * std:
        return []
    use = ", ".join(f"`{key}: {value:g}`" for key, value in told.arguments.items())
    remedy = f"use `name: PoissonGaussian`, {use}"
    if told.offset:
        remedy = f"subtract the dark level of the camera from y, at least {told.offset:.3g}, and use `name: PoissonGaussian` with what `diffem check --estimate` then says"
    level, name = "problem" if bright > FAR_APART * dark else "warning", observations.corruption.config["name"]
    if name not in BY_PIXEL:
        level, remedy = (
            "warning",
            f"{name} has one noise for all, so that error bars are too wide in the dark or too narrow in the bright",
        )
    text = f"declared noise {_noise(observations):g} everywhere, but {told.text}; {remedy}"
    return [Finding(level, "noise-not-uniform", text)]


def _noise(observations: Observations) -> float:
    """The declared noise, which must be the same everywhere."""
    level = observations.corruption.noise
    assert isinstance(level, float)
    return level


def _quietest(where: str, std: np.ndarray, error: np.ndarray, declared: float) -> Quiet:
    """The first of the sorted standard deviations; likely pure noise if the first three agree, far below the others."""
    agree = len(std) > 3 and std[2] <= min(1.1 * std[0] + 4 * error[0], 0.1 * np.sqrt(np.square(std).mean()))
    return Quiet(where, float(std[0]), float(std[0] + SURE * error[0]), 1.5 * declared if agree else math.inf)


def _quiet_coefficients(observations: Observations, sample: Sample) -> list[Quiet]:
    """Entries of y, or cosine coefficients of a blur; those that the blur deletes contain only noise."""
    use = np.flatnonzero(sample.count >= FEW)
    if not observations.corruption.diagonal or not len(use):
        return []
    declared, deleted = _noise(observations), _gains(observations) <= LEAST_GAIN
    if deleted.any():
        value, count = math.sqrt(sample.variance[deleted].mean()), deleted.sum() * len(sample.z)
        least = 1.1 * declared + LEAST_GAIN * math.sqrt(sample.variance.max())
        return [Quiet("coefficients that the blur deletes", value, value * (1 + SURE / math.sqrt(2 * count)), least)]
    use = use[np.argsort(sample.variance[use])]
    std = np.sqrt(sample.variance[use] + sample.whole / 4)  # rounding hides smaller variations
    where = f"the quietest coefficients ({_where(observations, use[:1])} and others)"
    return [_quietest(where, std, std / np.sqrt(2 * sample.count[use]), math.hypot(declared, sample.whole / 2))]


def _quiet_details(observations: Observations, sample: Sample, told: Noise | None) -> list[Quiet]:
    """Flat patches, if the estimate `told` comes from them; else diagonal details (a - b - c + d) / 2 of 2x2 observed
    pixels, which are likely noise if they are large compared with the pixels.

    The value is the lower quartile of their absolute values, divided by that of a Gaussian, 0.3186, like the median in
    Donoho & Johnstone (1994), Ideal spatial adaptation by wavelet shrinkage. An image only raises it (Anderson, 1955).
    """
    least = DETAIL * float(sample.values.std(dtype=np.float64))
    if told is not None and not told.gain:
        value = min(told.channels, default=told.std())
        return [Quiet("flat patches", value, value + SURE * told.error, max(UNEQUAL * _noise(observations), least))]
    y, seen = sample.y, torch.from_numpy(sample.seen).view_as(sample.y)
    if y.ndim != 4 or not observations.corruption.diagonal:
        return []
    if sample.whole:  # quantiles of rounded values are rounded, so undo the rounding by uniform noise
        y = y + torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    for axis in (2, 3):
        first, second = (torch.arange(start, y.shape[axis] - 1 + start, 2) for start in (0, 1))
        y = y.index_select(axis, first) - y.index_select(axis, second)
        seen = seen.index_select(axis, first) & seen.index_select(axis, second)
    details = (y[seen].abs() / 2).numpy()
    if len(details) < 100 or not (value := float(np.quantile(details, 0.25)) / 0.3186):
        return []
    bound = value * (1 + SURE * 1.8 / math.sqrt(len(details)))  # the standard error of a quartile
    return [Quiet("details of a pixel's width", value, bound, math.hypot(1.5 * _noise(observations), least))]


# --- values ------------------------------------------------------------------------------------------


def sentinels(sample: Sample) -> list[Finding]:
    """A value far from all others that many entries share, such as -999 for missing data: a problem.

    Each channel (column) is searched separately.
    """
    y, seen = sample.y.numpy(), sample.seen.reshape(sample.y.shape)
    for channel in range(y.shape[1]):
        values = np.sort(y[:, channel][seen[:, channel]].astype(np.float64))
        for value in values[:1], values[-1:]:
            rest = values[values != value]
            count = len(values) - len(rest)
            if count < max(FEW, SHARED * len(values)) or not len(rest) or not (width := rest[-1] - rest[0]):
                continue
            known = np.isclose(value, SENTINELS, rtol=1e-6).any()
            telling = known or len(np.unique(rest[:CHUNK])) > FEW
            if telling and np.abs(value - rest).min() > (0.5 if known else FAR_VALUE) * width:
                where = f" of channel {channel}" if y.shape[1] > 1 else ""
                text = f"{_percent(count / len(values))} of the values{where} are exactly {value[0]:g}, far from all others ({rest[0]:g} to {rest[-1]:g}), as where nothing was measured; write NaN there, or hide them by mask.npy"
                return [Finding("problem", "sentinel", text)]
    return []


def value_range(observations: Observations, sample: Sample) -> list[Finding]:
    """Values that do not fit the stated range, and 8-bit images that were read as floats.

    A problem if more than a thousandth of the values lie outside the range by more than five times the noise plus a
    tenth of the range; a warning if 99.8 % of them span less than a fifth of it. Integers from 0 to 255 stored as
    floats are a warning if no range is stated. Only entrywise corruptions and blurs are checked, and what lies outside only if
    the corruption is linear.
    """
    corruption, stated, values = observations.corruption, observations.range, sample.values
    if not (corruption.diagonal or corruption.by_entry) or not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    floats = observations.y.dtype.kind == "f" and sample.whole and low >= 0 and high <= 255
    eight = f"y holds whole numbers from {low:g} to {high:g} as floats, as 8-bit images do"
    if stated is None:
        text = f"{eight}; state `range: [0, 255]`, or what the range is"
        return [Finding("warning", "eight-bit", text)] if floats else []
    margin = 5 * corruption.noise if isinstance(corruption.noise, float) else 0.0
    margin += 0.1 * (stated[1] - stated[0])
    beyond = float(((values < stated[0] - margin) | (values > stated[1] + margin)).mean()) if corruption.linear else 0.0
    said, used = f"`range: [{stated[0]:g}, {stated[1]:g}]`", float(np.ptp(np.quantile(values, [0.001, 0.999])))
    if beyond > 0.001 and floats:
        return [Finding("problem", "eight-bit", f"{eight}, but {said} is stated; use `range: [0, 255]`")]
    if beyond > 0.001:
        text = f"{_percent(beyond)} of the values lie far outside of the stated {said}; they are {low:g} to {high:g}"
        return [Finding("problem", "range", text)]
    if used < 0.2 * (stated[1] - stated[0]):
        text = f"the values use {_percent(used / (stated[1] - stated[0]))} of the stated {said}; models expect data that span it"
        return [Finding("warning", "range", text)]
    return []


# --- words -------------------------------------------------------------------------------------------


def _where(observations: Observations, indices: np.ndarray, vectors: np.ndarray | None = None) -> str:
    """In words: the first of some entries of the flattened item, and how many more; or the main entries of directions
    (columns of `vectors`)."""
    if vectors is not None:
        weight = np.square(vectors[:, indices]).sum(1)
        heavy = np.argsort(-weight)[: (weight > 0.02 * weight.max()).sum()]
        return f"{len(indices)} direction{'s' * (len(indices) > 1)}, mostly of {_where(observations, heavy)}"
    shape = observations.shape if "matrix" in observations.params else observations.y.shape[1:]
    first = [int(k) for k in np.unravel_index(indices[0], shape)]
    more = f" and {len(indices) - 1:,} more" if len(indices) > 1 else ""
    return f"{'cosine coefficient' if _blurs(observations) else 'entry'} {first}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
