"""Jobs: what can be done between real sites, and what each side of one holds."""

from dataclasses import replace

import pytest
from small_job import NAMES, quiet, sources, tiny, write_job

from fedjax_llm.config import Data
from fedjax_llm.data.at_sites import AtSites
from fedjax_llm.data.packing import pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.deployment.job import check_job, fixed_shapes, job_hash, load_job, ready, with_sites
from fedjax_llm.deployment.site import Site, read_site
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import prepare
from fedjax_llm.federation.availability import Availability
from fedjax_llm.federation.plan import Execution
from fedjax_llm.runs.progress import RunProgress


@pytest.fixture
def job(tmp_path):
    return load_job(write_job(tmp_path))


def test_each_side_reads_the_text_that_it_holds_and_all_have_one_configuration(job, tmp_path):
    held = sources(tmp_path)
    server, site, whole = (with_sites(job, NAMES, part) for part in ({}, {"hill": held["hill"]}, held))
    sizes = [[len(one.records) for one in side.data.source.load().sites] for side in (server, site, whole)]
    assert sizes == [[0, 0, 0], [0, 9, 0], [14, 9, 20]]
    assert len({job_hash(side) for side in (job, server, site, whole)}) == 1
    assert len({side.data.source.load().version for side in (server, site, whole)}) == 1


def test_a_source_of_several_sites_is_refused(job, tmp_path):
    both = replace(sources(tmp_path)["hill"], paths=tuple(str(tmp_path / f"sites/{name}.jsonl") for name in NAMES[:2]))
    with pytest.raises(UserError, match="gives 2 sites"):
        with_sites(job, NAMES, {"hill": both}).data.source.load()


def test_a_stranger_is_no_site_of_the_job(job):
    with pytest.raises(UserError, match="no site 'moon'"):
        with_sites(job, ("hill", "moon"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setting": "local"}, "'federated'"),
        ({"federation": {"availability": Availability(dropout=0.1)}}, "federation.availability is for simulations"),
        ({"federation": {"finetune_rounds": 1}}, "federation.finetune_rounds is for simulations"),
    ],
)
def test_what_cannot_be_done_between_sites_is_refused(change, words, job):
    fields = {
        name: replace(getattr(job, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    with pytest.raises(UserError, match=words):
        check_job(replace(job, **fields))


def test_a_job_needs_text_at_its_sites(job, tmp_path):
    with pytest.raises(UserError, match="must be AtSites"):
        check_job(replace(job, data=Data(sources(tmp_path)["hill"])))
    with pytest.raises(UserError, match="name every site once"):
        AtSites(("a", "a"))


@pytest.mark.parametrize("rows_of_unit", [1, 4])
@pytest.mark.parametrize("buckets", [1, 3])
def test_fixed_shapes_hold_whatever_the_configuration_lets_through(buckets, rows_of_unit, job):
    import numpy as np

    job = replace(job, execution=Execution(tokens_per_microbatch=256, buckets=buckets))
    shapes = fixed_shapes(job, rows_of_unit)
    longest = job.data.max_length
    unit = tuple(EncodedExample(f"r{i}", np.ones(longest, np.int32), 1) for i in range(rows_of_unit))
    short = EncodedExample("s", np.ones(5, np.int32), 4)
    batches = list(pack([[[unit, (short,), unit]]], shapes, clients=1))
    assert sum(batch.real_tokens for batch in batches) == 2 * rows_of_unit * longest + 5
    assert len(shapes) == buckets


def test_a_site_file_gives_a_site_and_a_site_has_a_source(tmp_path):
    path = tmp_path / "site.py"
    path.write_text(
        "from fedjax_llm.deployment.site import Site\ndef get_site():\n    return Site('a', None, 'job.py')\n"
    )
    with pytest.raises(UserError, match="must be a source"):
        read_site(path)
    site = Site("a", sources(tmp_path)["hill"], "job.py", folder="here")
    assert site.budget_path.as_posix() == "here/budget.jsonl"


def test_the_trunk_too_is_computed_in_shapes_of_the_configuration(tmp_path):
    """Its states depend on them: shapes of the text that happens to be held give each side bits of its own."""
    job = load_job(write_job(tmp_path, lora="Lora(rank=2, alpha=4.0, layers=(-1,))"))
    prepared = prepare(with_sites(job, NAMES, sources(tmp_path)), RunProgress(1, quiet()), tiny)
    assert prepared.plan is not None
    assert prepared.plan.trunk is not None
    plan = ready(prepared).plan
    assert plan is not None
    assert plan.trunk is not None
    assert plan.trunk.shapes == plan.shapes == fixed_shapes(job, 1)
    assert prepared.plan.trunk.shapes != plan.trunk.shapes
