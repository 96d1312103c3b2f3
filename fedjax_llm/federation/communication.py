"""Bytes on the wire: what a run exchanges, and what exchanging the whole model would have taken."""

from dataclasses import dataclass

from fedjax_llm.types import Setting


@dataclass(frozen=True)
class Exchange:
    """What one client receives and sends in one round, in bytes.

    Attributes:
      download: the server's adapters.
      upload: the client's update.
      full_model: one copy of the whole model, for comparison.
    """

    download: int
    upload: int
    full_model: int


def exchange_of(setting: Setting, adapter_bytes: int, model_bytes: int) -> Exchange:
    """The exchange of a setting: adapters both ways where it is federated, nothing where it is not.

    The setting centralised moves the data itself to one place, which no number of bytes makes comparable.
    """
    if setting != "federated":
        return Exchange(download=0, upload=0, full_model=0)
    return Exchange(download=adapter_bytes, upload=adapter_bytes, full_model=model_bytes)


def seconds(nbytes: float, bandwidth_mbps: float) -> float:
    """Time on a line of ``bandwidth_mbps`` megabits a second."""
    return nbytes * 8 / (bandwidth_mbps * 1e6)


def totals(exchange: Exchange, rounds: int, client_rounds: int, bandwidth_mbps: float) -> dict[str, float | int | None]:
    """The figures of a run.

    Args:
      exchange: of one client in one round.
      rounds: that were run.
      client_rounds: the sum over rounds of the clients that took part.
      bandwidth_mbps: of a client's line; the clients of a round send side by side.

    Returns:
      ``upload_bytes``, ``download_bytes``, ``full_model_bytes`` (2 x client rounds x model), their ratio
      ``communication_ratio``, and seconds at the bandwidth, for the adapters and for the full model.
    """
    adapters = (exchange.download + exchange.upload) * client_rounds
    full = 2 * exchange.full_model * client_rounds
    return {
        "upload_bytes": exchange.upload * client_rounds,
        "download_bytes": exchange.download * client_rounds,
        "full_model_bytes": full,
        "communication_ratio": full / adapters if adapters else None,
        "bandwidth_mbps": bandwidth_mbps,
        "communication_seconds": seconds((exchange.download + exchange.upload) * rounds, bandwidth_mbps),
        "full_model_seconds": seconds(2 * exchange.full_model * rounds, bandwidth_mbps),
    }
