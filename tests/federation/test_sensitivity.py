"""What one unit can do: without its noise, a release moves by at most what the noise was made for.

Every unit takes part (sampling probability 1), so that neighbouring data give samples that differ in the one unit.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same
from toy_private import CLIP, ROWS, SHOW, length, private_plan, silent, toy_adapters, toy_base, unit_gradient
from toy_rounds import LAYOUTS, LENGTHS, toy_example

from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Stack, Sum

ROUNDING = 1e-5  # of f32 sums, relative to the clip norm
ONE = LocalTraining(batch_size=2, local_steps=1, optimizer=Optimizer("sgd", 1.0))
TWO = LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("sgd", 0.1))
ALL = {"noise_multiplier": 0.7, "sampling_probability": 1.0}
SITES = 4  # one more than a chunk, so that a site may leave without another shape
HOSTILE = {"large": 94, "infinite": 95, "undefined": 96}  # tokens
SCALES = (1.0, 1e3, 4e18)  # of all gradients; with the last, some norms are beyond float32
MODES = tuple(LAYOUTS)
SOME = ("together", "in pairs")


class Case(NamedTuple):
    """A mechanism, what it does locally, what of its rounds is noised, and where it is played."""

    config: Any
    unit: str
    local: LocalTraining
    view: type
    layouts: tuple[str, ...] = MODES
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


CASES = {
    "DpSgd, record": Case(DpSgd(CLIP, **ALL), "record", ONE, Stack),
    "DpSgd, patient": Case(DpSgd(CLIP, **ALL, examples_per_unit=ROWS), "patient", ONE, Stack),
    "DpSgd, patient, layers": Case(
        DpSgd(CLIP, **ALL, examples_per_unit=ROWS, scope="layers"), "patient", ONE, Stack, SOME
    ),
    "DpSgd, local": Case(DpSgd(CLIP, **ALL), "record", ONE, Stack, ("in pairs",), {"setting": "local"}),
    "DpSgd, centralised": Case(
        DpSgd(CLIP, **ALL), "record", ONE, Stack, ("one by one",), {"setting": "centralised", "cohort": 1}
    ),
    "DpSgd, one factor": Case(DpSgd(CLIP, **ALL), "record", ONE, Stack, ("in pairs",), {"base": "b"}),
    "DpSgd, kept trunk": Case(DpSgd(CLIP, **ALL), "record", ONE, Stack, ("in pairs",), {"base": "upper"}),
    "DpSgd, dropout": Case(DpSgd(CLIP, **ALL), "record", ONE, Stack, ("in pairs",), {"dropout": 0.4}),
    "DpFedSgd, record": Case(DpFedSgd(CLIP, **ALL), "record", ONE, Sum),
    "DpFedSgd, patient": Case(DpFedSgd(CLIP, **ALL, examples_per_unit=ROWS), "patient", ONE, Sum),
    "DpFedSgd, patient, layers": Case(
        DpFedSgd(CLIP, **ALL, examples_per_unit=ROWS, scope="layers"), "patient", ONE, Sum, SOME
    ),
    "DpFedAvg": Case(DpFedAvg(0.3, 0.7), "site", TWO, Sum),
    "DpFedAvg, layers": Case(DpFedAvg(0.3, 0.7, scope="layers"), "site", TWO, Sum, SOME),
    "DpFedAvg, capped": Case(
        DpFedAvg(0.3, 0.7, examples_cap=1), "site", TWO, Sum, ("in pairs",), {"weighting": "examples"}
    ),
    "LocalDp": Case(LocalDp(0.3, 0.7), "site", TWO, Stack),
    "LocalDp, layers": Case(LocalDp(0.3, 0.7, scope="layers"), "site", TWO, Stack, SOME),
}


@cache
def hostile_params(scale: float = 1.0, kind: str = "whole"):
    """The weights of a toy base with scaled gradients, and with tokens that no number comes of."""
    params = toy_base(kind).params
    table = params["embed_tokens"]["embedding"]
    rows = {"large": table[HOSTILE["large"]] * 1e30, "infinite": jnp.inf, "undefined": jnp.nan}
    for name, token in HOSTILE.items():
        table = table.at[token].set(rows[name])
    head = params["lm_head"]["embedding"] * scale
    return params | {"embed_tokens": {"embedding": table}, "lm_head": {"embedding": head}}


@st.composite
def units(draw, most: int):
    """A unit of up to so many examples, equal ones among them; some hold a hostile token."""
    made = []
    for _ in range(draw(st.integers(1, most))):
        example = toy_example(draw(st.integers(0, 3)), draw(st.sampled_from(LENGTHS)), draw(st.integers(0, 4)))
        tokens = example.tokens % min(HOSTILE.values())
        kind = draw(st.sampled_from([None, None, None, *HOSTILE]))
        if kind is not None:
            tokens[draw(st.integers(0, len(tokens) - 1))] = HOSTILE[kind]
        made.append(replace(example, tokens=tokens))
    return tuple(made)


def sites_of(held):
    """[site][unit] of examples as sites, a unit being one record of one patient."""
    return tuple(
        (
            f"site-{s}",
            tuple(
                replace(example, record_id=f"record-{s}-{u}", owner=f"patient-{s}-{u}")
                for u, unit in enumerate(units)
                for example in unit
            ),
        )
        for s, units in enumerate(held)
    )


def noiseless(case: Case, held, layout: str):
    """A plan over these sites that shows what it would have noised."""
    options = {"layout": layout, "cohort": SITES, "aggregation": SHOW[case.view], "sites": sites_of(held)}
    return private_plan(case.config, case.unit, case.local, **options | case.options)


def released(plan, adapters, params=None):
    """What noise is added to, for each site that releases something of its own, or the one sum."""
    mechanism, params = plan.mechanism, hostile_params() if params is None else params
    if plan.trunk is not None:
        plan = plan._replace(trunk=replace(plan.trunk, params=params))
    state, _ = run_round(silent(plan), params, initial_state(plan, adapters))
    if isinstance(state.server_state, Sum):
        return {"all": state.server_state.total}
    deltas = state.server_state.messages if state.server_state else jax.tree.map(np.subtract, state.adapters, adapters)
    each = [jax.tree.map(lambda leaf, c=c: leaf[c], deltas) for c in range(len(plan.clients))]
    if mechanism.noised == "steps":  # a step of SGD at rate 1 is the sum over the public denominator
        each = [
            jax.tree.map(lambda leaf, d=d: leaf * d, one) for one, d in zip(each, mechanism.denominators, strict=True)
        ]
    return dict(zip((client.name for client in plan.clients), each, strict=True))


def declared(plan) -> float:
    """What the noise was made for: its standard deviation over the noise multiplier that is charged."""
    mechanism = plan.mechanism
    charged = next(iter(mechanism.events.values()))
    return float(mechanism.stddev[0]) * mechanism.clip.norm / charged.noise_multiplier


def without(plan, site: int, unit: int):
    """The neighbouring plan: the public constants stay."""
    if plan.mechanism.unit == "site":
        return plan._replace(clients=plan.clients[:site] + plan.clients[site + 1 :])
    client = plan.clients[site]
    left = client.units[:unit] + client.units[unit + 1 :]
    changed = replace(client, units=left, examples=tuple(example for held in left for example in held))
    return plan._replace(clients=(*plan.clients[:site], changed, *plan.clients[site + 1 :]))


def moved(one, other) -> float:
    """How far all that is released moves, over whatever sites are in both."""
    return length(
        [jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, one[k], other[k]) for k in one if k in other]
    )


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in CASES for layout in CASES[name].layouts])
@settings(max_examples=6)
@given(data=st.data())
def test_one_unit_moves_a_release_by_at_most_the_declared_sensitivity(name, layout, data):
    case = CASES[name]
    most = ROWS if case.unit != "record" else 1
    held = [data.draw(st.lists(units(most), min_size=1, max_size=3)) for _ in range(SITES)]
    plan = noiseless(case, held, layout)
    base = case.options.get("base", "whole")
    adapters, _ = toy_adapters(base, seed=data.draw(st.integers(0, 9)))
    params = hostile_params(data.draw(st.sampled_from(SCALES)), base)
    here, site = released(plan, adapters, params), data.draw(st.integers(0, len(plan.clients) - 1))
    if plan.mechanism.name == "LocalDp":  # that the site takes part is public: all of its data is replaced
        held[site] = data.draw(st.lists(units(most), min_size=1, max_size=3))
        other = noiseless(case, held, layout)
    else:
        last = len(plan.clients[site].units) - 1
        # Dropout's masks go by the place in a batch: those of the others stay the same where the last unit leaves.
        other = without(plan, site, last if "dropout" in case.options else data.draw(st.integers(0, last)))
    assert np.isfinite(moved(here, here))
    assert moved(here, released(other, adapters, params)) <= declared(plan) * (1 + ROUNDING)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("DpSgd, record", 1),
        ("DpSgd, patient", 1),
        ("DpSgd, local", 1),
        ("DpSgd, centralised", 1),
        ("DpSgd, one factor", 1),
        ("DpSgd, kept trunk", 1),
        ("DpSgd, dropout", 1),
        ("DpFedSgd, patient", 1),
        ("DpFedAvg", 1),
        ("DpFedAvg, capped", 1),
        ("LocalDp", 0.5),
    ],
)
def test_the_bound_is_reached(name, share):
    """Else the property would hold of any bound that is large enough, or of releases that hold nothing."""
    case = CASES[name]
    loud, ordinary = (toy_example(102, 6, 4),), (toy_example(1, 9, 2),)
    held = [[ordinary, loud], [ordinary], [ordinary], [loud]]
    plan = noiseless(case, held, "in pairs")
    base = case.options.get("base", "whole")
    adapters, params = toy_adapters(base)[0], hostile_params(1.0, base)
    here, last = released(plan, adapters, params), len(plan.clients[0].units) - 1
    if name == "LocalDp":
        assert length(here["site-0"]) == pytest.approx(share * declared(plan), rel=ROUNDING)
    else:
        there = released(without(plan, 0, last), adapters, params)
        assert moved(here, there) == pytest.approx(declared(plan), rel=ROUNDING)


def test_hostile_weights_and_tokens_are_hostile():
    norms = {}
    for scale in SCALES:
        base = toy_base()._replace(params=hostile_params(scale))
        for kind in (None, *HOSTILE):
            example = toy_example(102, 6, 4)
            tokens = example.tokens % min(HOSTILE.values())
            tokens[2:4] = tokens[2:4] if kind is None else HOSTILE[kind]
            norms[scale, kind] = length(unit_gradient(base, base.adapters, (replace(example, tokens=tokens),)))
    assert norms[1e3, None] > 100 * CLIP
    assert norms[4e18, None] ** 2 > float(np.finfo(np.float32).max)
    assert not np.isfinite([norms[1.0, "infinite"], norms[1.0, "undefined"]]).any()


@pytest.mark.parametrize("name", ["DpFedAvg", "LocalDp"])
def test_a_site_that_is_not_finite_sends_nothing_and_weighs_what_it_weighed(name):
    """That it was not finite tells something of its data, which nothing covers but the noise on its update."""
    ordinary, spoilt = (toy_example(1, 9, 2),), toy_example(2, 9, 2)
    spoilt.tokens[:] = HOSTILE["undefined"]
    held = [[ordinary], [(spoilt,)], [ordinary, ordinary], [ordinary]]
    plan = silent(noiseless(CASES[name], held, "in pairs"))
    views = []
    for one in (plan, plan._replace(clients=plan.clients[:1] + plan.clients[2:])):
        state, report = run_round(one, hostile_params(), initial_state(one, toy_base().adapters))
        assert [client.included for client in report.clients] == [client.name != "site-1" for client in one.clients]
        views.append(state.server_state)
    whole, others = views
    if CASES[name].view is Sum:
        assert same(whole.total, others.total)
        assert float(whole.weight) == float(others.weight) == plan.mechanism.weight
    else:
        assert whole.weights.tolist() == [1.0] * SITES
        assert length(jax.tree.map(lambda leaf: leaf[1], whole.messages)) == 0
        kept = np.array([0, 2, 3])
        assert same(jax.tree.map(lambda leaf: leaf[kept], whole.messages), others.messages)


def test_a_site_that_is_not_finite_spoils_no_unit_of_another():
    """Padding rows carry some site's adapters; as part of a unit they would let one site decide about another."""
    # The longer rows come first, so the microbatch's first unit is another site's.
    held = [[(toy_example(102, 6, 4),)], *[[(toy_example(1, 9, 2),)]] * (SITES - 1)]
    plan = noiseless(CASES["DpSgd, patient"], held, "together")
    plan = silent(plan._replace(setting="local"))
    state = initial_state(plan, toy_base().adapters)
    broken = replace(state, adapters=jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), state.adapters))
    ended, spoilt = (run_round(plan, toy_base().params, one)[0].adapters for one in (state, broken))
    for c in range(1, SITES):
        assert same(jax.tree.map(lambda leaf, c=c: leaf[c], spoilt), jax.tree.map(lambda leaf, c=c: leaf[c], ended))
