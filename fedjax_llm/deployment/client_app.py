"""Flower's ClientApp of a site: it carries messages to the site's worker and back, and knows nothing of either."""

from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedjax_llm.deployment.flower import from_records, to_records
from fedjax_llm.deployment.relay import call

app = ClientApp()


def _relayed(message: Any, context: Any) -> Any:
    """The worker's answer; where there is none, Flower tells the server the reason."""
    socket = Path(str(context.node_config["socket"]))
    return Message(to_records(call(socket, from_records(message.content))), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Greetings and the preparation."""
    return _relayed(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round, or a stage of secure aggregation."""
    return _relayed(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Held-out figures."""
    return _relayed(message, context)
