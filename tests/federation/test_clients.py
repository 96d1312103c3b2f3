"""Who the clients are by setting, and how much each of them does."""

import pytest
from toy_rounds import toy_example, toy_sites

from fedjax_llm.errors import UserError
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.sampling import client_id
from fedjax_llm.training.client_update import LocalTraining


@pytest.mark.parametrize("setting", ["federated", "local"])
def test_sites_are_clients_with_ids_of_their_names(setting):
    clients = clients_of(setting, toy_sites())
    assert [(client.name, client.id, client.examples) for client in clients] == [
        (name, client_id(name), examples) for name, examples in toy_sites()
    ]


def test_one_client_holds_everything_in_the_order_of_the_sites():
    (client,) = clients_of("centralised", toy_sites())
    assert client.name == "all"
    pooled = [example for _, examples in toy_sites() for example in examples]
    assert all(one is other for one, other in zip(client.examples, pooled, strict=True))


def test_names_with_one_hash_are_refused_since_their_noise_would_be_the_same():
    pair = ("Luke Oak County John Mary", "Clinic Park Luke Saint South")
    assert client_id(pair[0]) == client_id(pair[1])
    with pytest.raises(UserError, match=f"'{pair[0]}' and '{pair[1]}' have names with the same hash.*rename one"):
        clients_of("federated", [(name, (toy_example(0, 6, 2),)) for name in pair])


@pytest.mark.parametrize("setting", ["federated", "local", "centralised"])
def test_an_empty_site_and_a_name_used_twice_are_refused(setting):
    example = toy_example(0, 6, 2)
    with pytest.raises(UserError, match="site 'skin' has no training example left; give it more records"):
        clients_of(setting, [("nervous", (example,)), ("skin", ())])
    with pytest.raises(UserError, match="two sites are called 'skin'"):
        clients_of(setting, [("skin", (example,)), ("nervous", (example,)), ("skin", (example,))])


@pytest.mark.parametrize(
    ("setting", "keep", "steps"), [("federated", "no", 2), ("local", "yes", 2), ("centralised", "yes", 10)]
)
def test_settings_differ_in_steps_and_in_what_lasts(setting, keep, steps):
    local = local_training_of(setting, LocalTraining(local_steps=2), 5)
    assert local == LocalTraining(local_steps=steps, keep_optimizer=keep)


@pytest.mark.parametrize("setting", ["federated", "local", "centralised"])
@pytest.mark.parametrize("keep", ["yes", "no"])
def test_what_the_experiment_says_about_the_optimizer_counts(setting, keep):
    assert local_training_of(setting, LocalTraining(keep_optimizer=keep), 5).keep_optimizer == keep


@pytest.mark.parametrize("name", ["../up", "/etc", "..", "a\\b", " ", "two\nlines"])
def test_a_name_that_cannot_name_a_folder_is_refused(name):
    with pytest.raises(UserError, match=r"a site is called .*; names must not be empty, nor hold slashes"):
        clients_of("local", [(name, (toy_example(1, 6, 2),))])
