"""What cannot go together with secure aggregation is refused when the experiment is built, with the way out."""

from dataclasses import replace
from typing import Any

import pytest

from fedjax_llm import adversaries, aggregation
from fedjax_llm.adversaries.label_flip import LabelFlip
from fedjax_llm.catalogue import makers
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.config import Experiment, Output
from fedjax_llm.errors import UserError
from fedjax_llm.federation.availability import Asynchronous
from fedjax_llm.federation.plan import Federation
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.types import Sum

SECURE = SecAgg()


def built(**fields: Any) -> Experiment:
    """An experiment under secure aggregation."""
    return replace(Experiment(secure=SECURE), **fields)


@pytest.mark.parametrize("kind", makers(aggregation), ids=lambda kind: kind.__name__)
def test_algorithms_that_look_at_single_messages_are_refused_and_all_others_are_not(kind: Any):
    if kind().make().view is Sum:
        built(aggregation=kind())
        return
    with pytest.raises(UserError, match=f"{kind.__name__} must see every client's message.*FedAvg.*secure to None"):
        built(aggregation=kind())


@pytest.mark.parametrize("kind", makers(adversaries), ids=lambda kind: kind.__name__)
def test_attackers_that_see_the_messages_of_others_are_refused(kind: Any):
    attack = kind()
    if attack.make().corrupt is None:
        built(attack=attack, malicious=0.3)
        return
    with pytest.raises(UserError, match=r"messages of others.*secure to None"):
        built(attack=attack, malicious=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": Quantise(8)}, "compression makes messages that the server decodes one by one"),
        ({"federation": Federation(cohort=4, asynchronous=Asynchronous(8))}, r"federation\.asynchronous"),
        ({"output": Output(client_metrics=True)}, r"output\.client_metrics"),
    ],
    ids=["compression", "asynchronous", "client metrics"],
)
def test_what_needs_single_clients_is_refused(fields: dict[str, Any], message: str):
    Experiment(**fields)  # without secure aggregation it is fine
    with pytest.raises(UserError, match=message):
        built(**fields)


@pytest.mark.parametrize("setting", ["local", "centralised", "base"])
def test_baselines_of_the_same_configuration_have_nothing_to_hide_from_a_server(setting: Any):
    built(setting=setting, compression=Quantise(8))


def test_poisoned_text_is_nobody_elses_message():
    built(attack=LabelFlip(), malicious=0.2)
