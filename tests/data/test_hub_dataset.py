"""Datasets by name, with a stand-in for the ``datasets`` package."""

import sys
from types import SimpleNamespace

import pytest

from fedjax_llm.data.hub import HubDataset
from fedjax_llm.errors import UserError

ROWS = [{"prompt": "q1", "answer": "a1", "ward": "north"}, {"prompt": "q2", "answer": "a2", "ward": "south"}]


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds ``ROWS``; it keeps what it was asked for."""
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_one_site_where_no_column_is_named(hub):
    dataset = HubDataset("owner/cards", subset="small", split="train", revision="abc").load()
    assert hub == [("owner/cards", "small", "train", "abc")]
    assert [(site.name, len(site.records)) for site in dataset.sites] == [("all", 2)]
    assert dataset.version == "owner/cards@abc:train"
    assert "owner/cards" in dataset.citation


def test_sites_by_column(hub):
    dataset = HubDataset("owner/cards", site_column="ward").load()
    assert [site.name for site in dataset.sites] == ["north", "south"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site_column": "wards"}, r"owner/cards\[train\] row 0: no column 'wards'; did you mean 'ward'"),
        ({"prompt_column": "question"}, r"owner/cards\[train\] row 0: no column 'question'"),
    ],
)
def test_bad_columns(hub, options, message):
    with pytest.raises(UserError, match=message):
        HubDataset("owner/cards", **options).load()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        HubDataset("owner/cards").load()


def test_without_a_hub(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"(?s)'owner/cards': ConnectionError: no route to host.*SiteFiles") as caught:
        HubDataset("owner/cards").load()
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_an_empty_split_and_an_empty_site(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **options: []))
    with pytest.raises(UserError, match="the split 'test' holds no rows"):
        HubDataset("owner/cards", split="test").load()
    rows = [ROWS[0] | {"ward": None}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **options: rows))
    with pytest.raises(UserError, match="row 0: the site column 'ward' is empty"):
        HubDataset("owner/cards", site_column="ward").load()
