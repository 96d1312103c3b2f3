"""What a tuned model gives away of its ground: planted secrets, membership, and what audits show, as plain figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.evaluation.evaluate import Phase
from fedjax_llm.experiment.ground import Attacks, Candidate, Ground, Planted
from fedjax_llm.leakage import audit, membership, shadows
from fedjax_llm.leakage.exposure import Exposure, exposures
from fedjax_llm.leakage.extraction import discoverable, greedy_prefix
from fedjax_llm.leakage.roc import roc
from fedjax_llm.leakage.token_scores import TokenScores, token_scores
from fedjax_llm.lora import Lora
from fedjax_llm.models.beam import beam_search
from fedjax_llm.training.client_update import Trainer
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters

_PROMPTS_AT_ONCE = 16
_SHADOWS_AT_ONCE = 16


class Tuned(NamedTuple):
    """A model under attack.

    Attributes:
      lora: the adapters' kind.
      adapters: whole ones, shared; never empty.
      trunk: what lies below them.
    """

    lora: Lora
    adapters: Adapters
    trunk: TrunkCache | None

    @property
    def scaling(self) -> float:
        """Alpha / rank."""
        return self.lora.scaling


class Shadows(NamedTuple):
    """Who is in which shadow [S, N], and what shadows say of candidates [S, N] and population [S, Z]: mean log p."""

    included: np.ndarray
    mean: np.ndarray
    population: np.ndarray


def measure(
    ground: Ground,
    tuned: Tuned,
    attacks: Attacks,
    phase: Phase,
    *,
    base_scores: Sequence[TokenScores] | None = None,
    base_coins: Mapping[int, float] | None = None,
    shadows_of: Shadows | None = None,
    claim: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All attacks on one model.

    Args:
      ground: what to attack with.
      tuned: the model.
      attacks: how hard.
      phase: shows progress.
      base_scores: of the candidates under the untuned model (:func:`candidate_scores`), where they are known.
      base_coins: the same of the secrets that were planted by coins (:func:`coin_scores`).
      shadows_of: from :func:`shadow_statistics`, where LiRA and RMIA shall run.
      claim: ``epsilon`` and ``delta`` of one record, where the run claims differential privacy.

    Returns:
      ``membership`` (a ROC curve by attack), ``secrets`` (figures of every planted secret and control) and ``audit`` (a
      lower bound on epsilon; ``None`` where no secret was planted by a coin), as JSON holds them.
    """
    scores = candidate_scores(ground, tuned, phase)
    if base_scores is None:
        base_scores = candidate_scores(ground, untuned(ground, tuned), phase)
    if base_coins is None:
        base_coins = coin_scores(ground, untuned(ground, tuned), phase)
    secrets = planted_figures(ground, tuned, attacks, phase) if ground.planted else []
    return {
        "membership": _membership(ground, scores, base_scores, shadows_of, tuned, phase),
        "secrets": secrets,
        "audit": text_audit(secrets, base_coins, attacks.significance, claim),
    }


def untuned(ground: Ground, tuned: Tuned) -> Tuned:
    """The base model under adapters that change nothing, so that all its programs and its trunk are shared."""
    return tuned._replace(adapters=low_rank.silent(tuned.adapters, ground.base.params))


def candidate_scores(ground: Ground, tuned: Tuned, phase: Phase) -> list[TokenScores]:
    """Token scores of all candidates, a record's examples joined."""
    with phase("Scoring candidates", len(ground.candidates)) as advance:
        return _joined(ground, tuned, ground.candidates, advance)


def _joined(ground: Ground, tuned: Tuned, records: Sequence[Candidate], advance: Callable) -> list[TokenScores]:
    """Token scores by record."""
    scores = iter(_scores(ground, tuned, [one for record in records for one in record.examples], lambda count: None))
    found = []
    for record in records:
        found.append(membership.joined([next(scores) for _ in record.examples]))
        advance(1)
    return found


def _scores(
    ground: Ground, tuned: Tuned, examples: Sequence[EncodedExample], advance: Callable[[int], None]
) -> list[TokenScores]:
    """Token scores of examples."""
    base, options = ground.base, {"shapes": ground.shapes, "advance": advance, "trunk": tuned.trunk}
    return token_scores(base.model, tuned.scaling, base.params, tuned.adapters, examples, **options)


def _membership(
    ground: Ground,
    scores: Sequence[TokenScores],
    base_scores: Sequence[TokenScores],
    shadows_of: Shadows | None,
    tuned: Tuned,
    phase: Phase,
) -> dict[str, Any]:
    """A ROC curve for every attack."""
    found = membership.attack_scores(scores, base_scores, [one.text for one in ground.candidates])
    if shadows_of is not None:
        with phase("Scoring the population", len(ground.population)) as advance:
            population = np.array([one.log_prob.mean() for one in _joined(ground, tuned, ground.population, advance)])
        mean = np.array([one.log_prob.mean() for one in scores])
        told = (membership.confidence(mean), membership.confidence(shadows_of.mean), shadows_of.included)
        found["lira"] = membership.lira(*told)
        found["lira_offline"] = membership.lira(*told, offline=True)
        found["rmia"] = membership.rmia(mean, shadows_of.mean, shadows_of.included, population, shadows_of.population)
    count = len(ground.members)
    return {name: roc(name, values[:count], values[count:]).to_json() for name, values in found.items()}


def planted_figures(ground: Ground, tuned: Tuned, attacks: Attacks, phase: Phase) -> list[dict[str, Any]]:
    """The figures of every planted secret and control.

    ``greedy`` and ``foreign_greedy`` count the tokens of the value that greedy decoding gives right (of ``tokens``, the
    end of turn included); ``beam`` and ``foreign_beam`` are the place of the value among the beams, or ``None``, and
    absent where no beams were made; nobody else asks for what a coin has planted. ``tries`` is the n of
    (n, 0.5)-discoverable extraction.
    """
    exact = [one for one in ground.planted if not one.secret.coin]
    with phase("Asking for planted secrets", len(ground.planted) + len(exact)) as advance:
        own = _scores(ground, tuned, [one.answer for one in ground.planted], advance)
        others = _scores(ground, tuned, [one.foreign for one in exact], advance)
    bits: list[Exposure | None] = [None] * len(exact)
    if ground.rows:
        with phase("Ranking secrets among other values", sum(map(len, ground.rows))) as advance:
            options = {"tokens_per_microbatch": attacks.tokens_per_microbatch, "trunk": tuned.trunk}
            bits = list(exposures(ground.base, tuned.scaling, tuned.adapters, ground.rows, advance=advance, **options))
    told = [one for one in exact if one.secret.repetitions] if attacks.beams else []
    with phase("Beam search", 2 * len(told)) as advance:
        beams = [_beam_places(ground, tuned, told, attacks, name, advance) for name in ("answer", "foreign")]
    places = {
        one.secret.number: {"beam": mine, "foreign_beam": theirs}
        for one, mine, theirs in zip(told, *beams, strict=True)
    }
    ranked = {one.secret.number: found for one, found in zip(exact, bits, strict=True)}
    foreign = {one.secret.number: found for one, found in zip(exact, others, strict=True)}
    return [
        _figures(one, mine, foreign.get(number), ranked.get(number)) | places.get(number, {})
        for one, mine in zip(ground.planted, own, strict=True)
        for number in (one.secret.number,)
    ]


def _figures(one: Planted, own: TokenScores, foreign: TokenScores | None, found: Exposure | None) -> dict[str, Any]:
    """What JSON holds of one secret. Its value is made up, so it may be shown."""
    secret = one.secret
    return {
        "number": secret.number,
        "kind": secret.kind,
        "person": secret.person,
        "value": secret.value,
        "site": secret.site,
        "repetitions": secret.repetitions,
        "coin": secret.coin,
        "tokens": len(own.log_prob),
        "log_probability": float(own.log_prob.sum()),
        "greedy": greedy_prefix(own),
        "foreign_greedy": None if foreign is None else greedy_prefix(foreign),
        "foreign_log_probability": None if foreign is None else float(foreign.log_prob.sum()),
        "tries": min(discoverable(own.log_prob, (0.5,)).tries[0.5], 1e300),
        "exposure": None if found is None else found.bits,
        "extrapolated_exposure": None if found is None else found.extrapolated,
        "rank": None if found is None else found.rank,
        "references": None if found is None else found.references,
    }


def _beam_places(
    ground: Ground,
    tuned: Tuned,
    told: Sequence[Planted],
    attacks: Attacks,
    asked: Literal["answer", "foreign"],
    advance: Callable[[int], None],
) -> list[int | None]:
    """At which beam the value stands, counted from 1; ``None`` where no beam is it."""
    base, found = ground.base, []
    examples = [getattr(one, asked) for one in told]
    prompts = [example.tokens[: example.prompt_length] for example in examples]
    longest = max((len(example.tokens) - example.prompt_length for example in examples), default=0)
    for first in range(0, len(told), _PROMPTS_AT_ONCE):
        block = told[first : first + _PROMPTS_AT_ONCE]
        filled = prompts[first : first + _PROMPTS_AT_ONCE]
        filled += [prompts[first]] * (_PROMPTS_AT_ONCE - len(block))  # one compiled program for all blocks
        beams = beam_search(
            base.model,
            base.params,
            low_rank.scaled(tuned.adapters, tuned.scaling),
            filled,
            beams=attacks.beams,
            max_new_tokens=longest,
            end_ids=base.tokenizer.end_ids,
            pad_id=base.tokenizer.pad_id,
        )
        for one, own in zip(block, beams, strict=False):
            texts = [base.tokenizer.decode(tokens).strip() for tokens, _ in own]
            found.append(texts.index(one.secret.value) + 1 if one.secret.value in texts else None)
        advance(len(block))
    return found


def coin_scores(ground: Ground, tuned: Tuned, phase: Phase) -> dict[int, float]:
    """The log-likelihoods of the secrets that were planted by coins, by their numbers."""
    coins = [one for one in ground.planted if one.secret.coin]
    with phase("Scoring canaries", len(coins)) as advance:
        scores = _scores(ground, tuned, [one.answer for one in coins], advance)
    return {one.secret.number: float(found.log_prob.sum()) for one, found in zip(coins, scores, strict=True)}


def text_audit(
    secrets: Sequence[Mapping[str, Any]],
    base_coins: Mapping[int, float],
    significance: float,
    claim: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """A one-run audit with secrets that were planted by coins.

    The score of one is by how much its log-likelihood has risen over the base model's, which knows nothing of coins, in
    standard deviations of the secrets of its kind: all addresses rise as a model learns what an address is.

    Args:
      secrets: from :func:`planted_figures`.
      base_coins: from :func:`coin_scores` of the base model.
      significance: probability with which the bound may exceed the true epsilon.
      claim: of the run: the bound is at its delta, else at 1e-5.

    Returns:
      Plain values; ``None`` where no secret was planted by a coin.
    """
    coins = [one for one in secrets if one["coin"]]
    rise = np.array([one["log_probability"] - base_coins[one["number"]] for one in coins])
    for kind in {one["kind"] for one in coins}:
        own = np.array([one["kind"] == kind for one in coins])
        rise[own] = (rise[own] - rise[own].mean()) / max(float(rise[own].std()), 1e-9)
    stated = np.array([one["repetitions"] for one in coins])
    sides = [rise[stated == count].tolist() for count in (1, 0)]
    if not all(sides):
        return None
    delta = 1e-5 if claim is None else claim["delta"]
    options = {"significance": significance, "delta": delta}
    bound = audit.one_run(np.array(sides[0]), np.array(sides[1]), **options)
    claimed = None if claim is None else claim["epsilon"]
    return {
        "method": bound.method,
        "lower_bound": bound.epsilon,
        "delta": delta,
        "confidence": bound.confidence,
        "canaries": bound.canaries,
        "claimed": claimed,
        "contradicted": claimed is not None and audit.beats(bound, claimed),
        "auc": roc("coins", *map(np.array, sides)).to_json(),
    }


def shadow_statistics(ground: Ground, tuned: Tuned, attacks: Attacks, phase: Phase) -> Shadows:
    """Trains shadow adapters like the target's, each on a random half of the candidates, and lets them score all.

    They know neither the target's data besides the candidates nor its optimiser: an attacker would not either.
    """
    base, pool = ground.base, [record.examples for record in ground.candidates]
    included = shadows.coins(np.random.default_rng([attacks.seed, 13]), attacks.shadows, len(pool))
    trainer = Trainer(base.model, tuned.scaling, Optimizer("adamw", attacks.shadow_learning_rate).make())
    key = jax.random.key(attacks.seed)
    plain = replace(tuned.lora, init="kaiming", train="both", dora=False)
    fresh = low_rank.init(jax.random.fold_in(key, 0), plain, base.model)
    examples = sum(map(len, pool)) / 2
    steps = max(1, round(attacks.shadow_epochs * examples / attacks.shadow_batch))
    layout = {"shapes": ground.shapes, "trunk": tuned.trunk}
    with phase("Training shadows", attacks.shadows * steps) as advance:
        trained = shadows.train_shadows(
            trainer, base.params, fresh, pool, included, steps=steps, batch_size=attacks.shadow_batch,
            key=jax.random.fold_in(key, 1), chunk=_SHADOWS_AT_ONCE, advance=advance, **layout,
        )  # fmt: skip
    every = [*pool, *(record.examples for record in ground.population)]
    with phase("Shadows score", attacks.shadows * len(every)) as advance:
        means = shadows.shadow_scores(base.model, tuned.scaling, base.params, trained, every, advance=advance, **layout)
    return Shadows(included, means[:, : len(pool)], means[:, len(pool) :])
