"""Settings for every test: where JAX runs and caches, hypothesis profiles, and what the marks ask for.

No platform is forced: JAX takes an accelerator where it finds one and the CPU otherwise.
"""

import importlib.util
import os
from collections.abc import Iterator

import hypothesis
import pytest

from fedjax_llm.assets import cache_dir

# In the environment rather than in jax.config, so that the processes that tests start have the same.
os.environ["JAX_ENABLE_X64"] = "0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # most programs are small, and many
# Eight CPU devices, which meshes need; work that names no device goes to the first of them as ever.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share one GPU

hypothesis.settings.register_profile("local", deadline=None)  # the first example of a shape compiles
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Thousands of tests compile more programs than a process may hold."""
    yield
    from fedjax_llm.experiment.memory import make_room_for_programs

    make_room_for_programs(0.6)


@pytest.fixture(scope="module")
def short_reports() -> Iterator[None]:
    """Most of a tiny run's time is the drawing of its report, which tests that ask for this do not look into."""
    from fedjax_llm.runs import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda folder: (folder / "report.html").write_text("short"))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to compare with torch where there is none: a skipped comparison would look like a passed one."""
    if config.option.markexpr == "parity" and importlib.util.find_spec("torch") is None:
        raise pytest.UsageError(
            "the parity tests need torch and peft: run them with `make parity`, which installs both"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests for accelerators where JAX sees none; asks JAX only if there is such a test."""
    wanting = [item for item in items if item.get_closest_marker("accelerator")]
    if not wanting:
        return
    import jax

    platforms = {device.platform for device in jax.devices()}
    if platforms == {"cpu"}:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="wants an accelerator; jax.devices() has only the CPU"))
