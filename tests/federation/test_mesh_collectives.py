"""What travels between devices, read from the compiled programs of a round on the mesh."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from toy_mesh import CUBE, on_mesh, play_from
from toy_rounds import toy_model, toy_plan, toy_trainer

from fedjax_llm import mesh as meshes
from fedjax_llm import trees
from fedjax_llm.federation import effective, release
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.types import PyTree

STEPS = LocalTraining(batch_size=3, local_steps=2)
GROUP = CUBE.size // CUBE.clients
"""Neighbouring devices that work for the same clients."""
_COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\((?P<rest>.*)"
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_ORDER = r"\[(?P<of>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
_COUNTED = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=" + _ORDER)
_NAMED = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\(" + _ORDER + r"\))? \{(?P<over>[^}]*)\}")
_AXIS = re.compile(r"'(?P<name>\w+)'(?:=(?P<size>\d+)|:\((?P<before>\d+)\)(?P<part>\d+))?")


class Collective(NamedTuple):
    """An instruction by which devices exchange something."""

    kind: str
    groups: tuple[tuple[int, ...], ...]
    values: int

    @property
    def between_clients(self) -> bool:
        """Whether it joins devices that work for different clients."""
        return any(len({device // GROUP for device in group}) > 1 for group in self.groups)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(",") if one)


def ordered(of: str, order: str | None) -> np.ndarray:
    """Devices counted, reshaped and transposed."""
    devices = np.arange(math.prod(numbers(of))).reshape(numbers(of))
    return devices.transpose(numbers(order)) if order else devices


def groups_of(text: str) -> tuple[tuple[int, ...], ...]:
    """Devices that exchange something, in each of three ways to say so: axes of a mesh, a count, or a list."""
    if found := _NAMED.search(text):
        return groups_over(found)
    if found := _COUNTED.search(text):
        return tuple(map(tuple, ordered(found["of"], found["order"]).reshape(numbers(found["shape"])).tolist()))
    listed = _LISTED.search(text)
    assert listed, text
    found = tuple(numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed["groups"]))
    return found or (tuple(range(CUBE.size)),)  # none are named: all of them


def groups_over(found: re.Match[str]) -> tuple[tuple[int, ...], ...]:
    """Devices that differ in nothing but these axes, or these parts of axes, of a mesh."""
    sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(found["axes"])}
    devices = ordered(found["of"] or str(math.prod(sizes.values())), found["order"]).reshape(tuple(sizes.values()))
    places, group = np.indices(devices.shape), np.zeros_like(devices)
    asked = {axis["name"]: axis for axis in _AXIS.finditer(found["over"])}
    for place, (name, size) in zip(places, sizes.items(), strict=True):
        if name not in asked:
            rest = place
        elif asked[name]["part"] is None:
            rest = 0 * place
        else:
            part = int(asked[name]["part"])
            after = size // int(asked[name]["before"]) // part
            rest = place // (part * after) * after + place % after
        group = group * size + rest
    return tuple(sorted(tuple(sorted(devices[group == one].tolist())) for one in np.unique(group)))


def collectives(text: str) -> list[Collective]:
    """All of a compiled program."""
    found = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["result"])
            values = sum(math.prod(numbers(shape)) for shape in shapes)
            found.append(Collective(match["kind"], groups_of(match["rest"]), values))
    return found


def compiled(function: Any, arguments: tuple, options: dict) -> list[Collective]:
    return collectives(function.lower(*arguments, **options).compile().as_text())


Calls = dict[str, tuple[Callable[..., Any], tuple, dict]]
WATCHED = {
    "accumulate": (client_update, "_accumulate"),
    "step": (client_update, "step"),
    "updates": (release, "_updates"),
    "sum": (trees, "weighted_sum"),
    "products": (effective, "_products"),
}


@pytest.fixture(scope="module")
def calls() -> Calls:
    """The programs of a round on the mesh, with what they were last called with."""
    plan = on_mesh(toy_plan(toy_trainer("adamw", 0.01), STEPS, layout="in pairs", cohort=5))
    found: Calls = {}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            found[name] = (function, arguments, options)
            return function(*arguments, **options)

        return watched

    for module, attribute in list(WATCHED.values())[:2]:
        getattr(module, attribute).clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, attribute) in WATCHED.items():
            patch.setattr(module, attribute, watch(name, getattr(module, attribute)))
        play_from(plan, *toy_model()[1:], rounds=2)
    assert found.keys() == WATCHED.keys()
    return found


def values(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_local_training_exchanges_nothing_between_clients(calls):
    found = compiled(*calls["accumulate"])
    assert not [one for one in found if one.between_clients]
    within = {tuple(sorted(np.diff(group).tolist())) for one in found for group in one.groups if len(group) > 1}
    assert (1,) in within  # neighbours share a product
    assert (2,) in within  # and the others of the group sum up their rows
    weights = [one for one in found if one.kind == "all-gather"]
    assert weights


def test_a_sum_over_the_clients_would_be_seen(calls, monkeypatch):
    psum = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda tree, axis: psum(tree, ("clients", axis)))
    function, arguments, options = calls["accumulate"]
    anew = jax.jit(lambda *them: function.__wrapped__(*them), static_argnums=range(5))
    assert [one for one in compiled(anew, arguments, options) if one.between_clients]


def test_a_step_is_compiled_once_for_a_shape(calls):
    """However the compiler would cut what it gives, the next microbatch and the next round find the same program."""
    function, arguments, _ = calls["accumulate"]
    assert function._cache_size() == 1
    assert calls["step"][0]._cache_size() == 1
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(arguments[6])} == {meshes.CLIENTS}


def test_an_optimiser_step_exchanges_nothing(calls):
    assert compiled(*calls["step"]) == []


def test_bounding_the_updates_exchanges_no_update(calls):
    """What a chunk's clients have to tell each other is how many there are below the clip norm."""
    found = compiled(*calls["updates"])
    assert sum(one.values for one in found if one.between_clients) <= 1


def test_at_the_end_of_a_round_sums_of_adapters_travel_and_nothing_else(calls):
    function, (weights, messages), options = calls["sum"]
    found = compiled(jax.jit(function), (weights, messages), options)
    between = [one for one in found if one.between_clients]
    adapters = values(toy_model()[2])
    assert {one.kind for one in between} == {"all-reduce"}
    # All of a sum, or the parts of it that a device computes.
    assert adapters / GROUP <= sum(one.values for one in between) <= adapters
    assert values(messages) == 4 * adapters  # four slots, none of which left its devices
    assert all(one.values <= adapters for one in found)


def test_measuring_what_averaging_loses_sends_the_products_once(calls):
    between = [one for one in compiled(*calls["products"]) if one.between_clients]
    sizes = [factors["a"].shape[0] * factors["b"].shape[1] for factors in toy_model()[2].values()]
    assert {one.kind for one in between} == {"all-reduce"}
    assert sum(sizes) / 8 <= sum(one.values for one in between) <= sum(sizes)


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("%a = f32[2]{0} all-reduce(%b), replica_groups={{0,1},{2,3}}, to_apply=%c", ((0, 1), (2, 3))),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=[2,2]<=[4], to_apply=%c", ((0, 1), (2, 3))),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%c", ((0, 2), (1, 3))),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=2,'y'=2] {'x'}, to_apply=%c", ((0, 2), (1, 3))),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=2,'y'=2] {'x','y'}, to_apply=%c", ((0, 1, 2, 3),)),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=4] {'x':(1)2}, to_apply=%c", ((0, 2), (1, 3))),
        ("%a = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=4] {'x':(2)2}, to_apply=%c", ((0, 1), (2, 3))),
        (
            "%a = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}",
            ((0, 1), (2, 3)),
        ),
        ("%a = f32[2]{0} all-gather(%b), replica_groups={}, dimensions={0}", (tuple(range(8)),)),
        ("%a = f32[2]{0} collective-permute(%b), source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("%a = (f32[1]{0}, bf16[1]{0}) all-to-all(%b, %d), replica_groups={{0,4}}", ((0, 4),)),
    ],
)
def test_the_compilers_ways_to_write_groups_are_understood(line, groups):
    (found,) = collectives(line)
    assert found.groups == groups
    assert found.values == 2
