"""What no mechanism can protect, and what each kind of mechanism cannot: the reason, and the way out."""

import math
from collections.abc import Sequence
from typing import Any, get_args

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.mechanism import Regime
from fedjax_llm.types import Setting, Unit

GRADIENT_UNITS: tuple[Unit, ...] = ("record", "patient")


def one_of(name: str, value: object, literal: object) -> None:
    """Refuses a value that a ``Literal`` does not list."""
    options = get_args(literal)
    if value not in options:
        raise UserError(f"{name} is {value!r}{nearest(str(value), options)}")


def parameters(name: str, clip: Clip, noise_multiplier: float | None) -> None:
    """Refuses a noise multiplier or a scope of clipping that no mechanism has.

    Raises:
      UserError: with the value.
    """
    if clip.scope not in ("flat", "layers"):
        raise UserError(f"{name}.scope is {clip.scope!r}{nearest(str(clip.scope), ('flat', 'layers'))}")
    if noise_multiplier is not None and not 0 < noise_multiplier < math.inf:
        raise UserError(
            f"{name}.noise_multiplier is {noise_multiplier}; it must be positive and finite. For a run without "
            "differential privacy set privacy.mechanism to None"
        )


def sampling(name: str, probability: float | None, examples_per_unit: int) -> None:
    """Refuses impossible ways to sample units.

    Raises:
      UserError: with the value.
    """
    if probability is not None and not 0 < probability <= 1:
        raise UserError(f"{name}.sampling_probability is {probability}; it must be above 0 and at most 1")
    if examples_per_unit < 1:
        raise UserError(f"{name}.examples_per_unit is {examples_per_unit}; it must be at least 1")


def noise_source(name: str, noise_multiplier: float | None, epsilon: float | None) -> None:
    """Refuses noise that nothing decides, or two things do.

    Raises:
      UserError: neither or both of a noise multiplier and a target are given.
    """
    if noise_multiplier is None and epsilon is None:
        raise UserError(
            f"nothing says how much noise {name} adds: set privacy.target_epsilon (noise is calibrated to it), "
            f"or {name}'s noise_multiplier"
        )
    if noise_multiplier is not None and epsilon is not None:
        raise UserError(
            f"privacy.target_epsilon is {epsilon} and {name}.noise_multiplier is {noise_multiplier}: only one can "
            "decide the noise. Leave one out; to stop a run of given noise at an epsilon, set privacy.budget_epsilon"
        )


def _algorithm(name: str, regime: Regime) -> None:
    """Refuses algorithms whose clients do more than the mechanism accounts for.

    Raises:
      UserError: with the reason and the way out.
    """
    out = "Choose another aggregation, or set privacy.mechanism to None"
    if regime.probes:
        raise UserError(
            f"the aggregation asks clients for loss or gradient at the server's adapters, which {name} neither clips "
            f"nor noises: it would be a release that no epsilon covers. {out}"
        )
    if regime.own:
        raise UserError(
            "the aggregation trains each client's own adapters besides the shared ones, a second release for each unit "
            f"that {name} does not account for. {out}"
        )
    if regime.finetunes:
        raise UserError(
            f"federation.finetune_rounds trains on at the sites without {name}'s noise, and the results are shown. "
            "Set it to 0, or privacy.mechanism to None"
        )
    if regime.asynchronous:
        raise UserError(
            "federation.asynchronous lets clients take part as often as they are fast, which no calibration knows "
            "before. Set it to None, or privacy.mechanism to None"
        )
    if regime.ranks:
        raise UserError(
            f"lora.ranks gives clients adapters of different ranks, and {name}'s noise would fill the components that "
            "a client does not train. Set lora.ranks to (), or privacy.mechanism to None"
        )


def basics(name: str, regime: Regime, units: Sequence[Unit], settings: Sequence[Setting]) -> None:
    """Refuses what has nothing to do with how a mechanism works inside: setting, unit, precision.

    Raises:
      UserError: with the reason and the way out.
    """
    if regime.setting not in settings:
        why = (
            "nothing is trained in it"
            if regime.setting == "base"
            else f"{name} is for the settings {', '.join(settings)}"
        )
        out = "" if regime.setting == "base" else " (DpSgd serves every setting that trains)"
        raise UserError(
            f"{name} cannot protect the setting {regime.setting!r}: {why}. Choose another setting, or another "
            f"mechanism{out}; without differential privacy set privacy.mechanism to None"
        )
    if regime.unit not in units:
        raise UserError(_wrong_unit(name, regime.unit))
    if regime.adapter_dtype != "float32":
        raise UserError(
            f"the adapters are {regime.adapter_dtype}: rounding moves norms above the clip norm and leaves noise only "
            "a few distinct values, so that no guarantee would hold. Set the adapters' dtype to float32"
        )
    _algorithm(name, regime)


def availability(name: str, regime: Regime, correlated: bool) -> None:
    """Refuses clients that may not answer where the noise of one round makes up for that of others.

    Raises:
      UserError: with the reason and the way out.
    """
    if correlated and regime.unreliable:
        raise UserError(
            f"{name}'s noise is correlated over steps, which rests on every selected client taking part; "
            "federation.availability lets some drop out. Set it to None, or leave the mechanism's noise independent"
        )


def gradients(name: str, regime: Regime) -> None:
    """Refuses steps in which a unit does more than add its clipped gradient to a Poisson sample's sum.

    Raises:
      UserError: with the reason and the way out.
    """
    if regime.local_epochs is not None:
        raise UserError(
            f"training.local_epochs is {regime.local_epochs}: passes over shuffled data in batches of a fixed size are "
            f"not Poisson samples, and accounting them as such states an epsilon that does not hold. {name} samples by "
            "itself: set training.local_epochs to None and training.local_steps to the number of steps"
        )
    if regime.poisoned:
        raise UserError(
            "the attack puts answers of one record into others, so that a record's presence changes more than its own "
            f"gradient, which {name} does not account for. Choose another attack, or set privacy.mechanism to None"
        )
    if regime.normalise == "token":
        raise UserError(
            "training.normalise is 'token': the number of target tokens of the whole batch would divide every unit's "
            "gradient, so that one unit changes the share of all others, which no clip bounds. Set it to 'example'"
        )


def deltas(name: str, regime: Regime) -> None:
    """Refuses messages that are more than the delta that a mechanism clips and noises.

    Raises:
      UserError: with the reason and the way out.
    """
    if regime.messages != "deltas":
        raise UserError(
            f"{name} clips and noises the clients' deltas, but the aggregation has them send something else or more. "
            "Choose an aggregation of deltas (such as FedAvg or FedAdam), or a mechanism that adds noise in the "
            "sites' own steps (DpSgd)"
        )
    if regime.personal:
        raise UserError(
            f"the aggregation leaves factors at the clients, trained without {name}'s noise: what is sent later "
            "depends on them, and they are exported. Choose an aggregation of all factors, or DpSgd, whose noise "
            "is in them"
        )


def sum_view(name: str, regime: Regime) -> None:
    """Refuses an aggregator that looks behind the noised sum.

    Raises:
      UserError: with the reason and the way out.
    """
    if regime.server_view != "Sum":
        raise UserError(
            f"{name} adds noise once, to the sum over the sites, but the aggregator must see every site's update "
            "before that, without noise. Choose an aggregator that needs the sum alone (such as FedAvg or FedAdam), "
            "or a mechanism that adds noise at the sites (DpSgd, LocalDp)"
        )
    deltas(name, regime)
    if regime.attacked:
        raise UserError(
            f"the attack lets malicious clients use the messages of others before {name}'s noise, so that one site "
            "would move the sum by more than its clip norm. Set attack to None, or choose DpSgd or LocalDp"
        )
    if regime.compressed:
        raise UserError(
            f"compression changes what clients send after {name} has clipped it: rounding moves norms above the clip "
            "norm, and no noise covers that. Set compression to None, or choose a mechanism that adds noise at the "
            "sites (DpSgd, LocalDp)"
        )


def distributed(name: str, regime: Regime, noise: Any, correlated: Any, adaptive: Any = None) -> None:
    """Refuses noise that is shared out where shares are seen, or are too few, or the noise has more to do.

    Args:
      name: of the mechanism.
      regime: the experiment.
      noise: what is shared out; ``None``: nothing, which is not refused.
      correlated: how noise is correlated over rounds.
      adaptive: how the clip norm changes.

    Raises:
      UserError: with the reason and the way out.
    """
    if noise is None:
        return
    if not hasattr(noise, "draw"):
        raise UserError(f"{name}.distributed is {noise!r}; it must be Skellam(), DDGauss() or None")
    if not regime.secure:
        raise UserError(
            f"{name}.distributed is {type(noise).__name__}(...), so that every site adds a share of the noise, but the "
            "server sees every site's message by itself, for which one share is too little. Set "
            f"secure=SecAgg(...), or {name}.distributed to None (the server adds the noise)"
        )
    if correlated is not None:
        raise UserError(
            f"{name} has distributed and correlated noise: later noise takes earlier noise away again, and the shares "
            "of sites that dropped out would stay. Set its noise or its distributed to None"
        )
    if adaptive is not None:
        raise UserError(
            f"{name} has distributed noise and adaptive clipping, which counts unclipped updates with noise of its own "
            "that the server would have to add. Set clip_norm by hand (adaptive=None), or distributed to None"
        )
    if regime.survivors and regime.survivors - regime.colluders < 1:
        raise UserError(
            f"a secure sum may hold {regime.survivors} sites, of which {regime.colluders} may tell the server their "
            "shares of the noise: no share is left that is sure to be there and secret. Set secure.colluders lower, or "
            "secure.survivors higher"
        )


def _wrong_unit(name: str, unit: Unit) -> str:
    """Why a mechanism cannot protect a unit."""
    if unit == "site":
        return (
            f"{name} bounds what one record or patient does to a step, not what a whole site does. Set privacy.unit to "
            "'record' or 'patient', or choose a mechanism for whole sites (DpFedAvg, LocalDp)"
        )
    return (
        f"{name} clips and noises what a site did in several steps without noise. One {unit} changes every gradient "
        f"after its own, so the clip norm does not bound what one {unit} changes. Set privacy.unit to 'site', or "
        "choose DpSgd (noise in every step) or DpFedSgd (one step a round)"
    )
