"""Scalars as a TensorBoard reader sees them."""

import struct

from private_runs import spent
from tensorboardX.proto import event_pb2

from fedjax_llm.runs.tensorboard import Scalars, scalars

LINE = {
    "round": 3, "loss": 2.5, "cohort": ["a", "b"], "excluded": [], "sites": {"a": {"loss": 2.25, "tokens": 10}},
    "validation": None, "epsilon": None, "timing": {"seconds": 1.5},
}  # fmt: skip


def events(folder):
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the message, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_every_number_has_its_path():
    assert dict(scalars(LINE)) == {
        "loss": 2.5, "cohort": 2, "excluded": 0, "sites/a/loss": 2.25, "sites/a/tokens": 10, "timing/seconds": 1.5,
    }  # fmt: skip


def test_scalars_reach_the_file_at_their_round(tmp_path):
    with Scalars(tmp_path) as writer:
        writer.round(LINE)
    found = {value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value}
    assert found == {name: (3, value) for name, value in scalars(LINE)}


def test_a_resume_tells_the_viewer_from_where_to_forget(tmp_path):
    with Scalars(tmp_path, resumed_at=3) as writer:
        writer.round(LINE)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [3]


def test_epsilon_is_a_scalar_that_names_its_terms(tmp_path):
    line = LINE | {"epsilon": spent({"a": 3.25, "b": 2.0}, unit="patient", delta=1e-6)}
    with Scalars(tmp_path) as writer:
        writer.round(line)
    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    assert values["epsilon/max"].simple_value == 3.25
    assert values["epsilon/accounts/b"].simple_value == 2.0
    assert "+/-1 patient, delta 1e-06" in values["epsilon/max"].metadata.summary_description
    assert values["loss"].metadata.summary_description == ""
