"""What cannot be done while the server sees nothing but sums: the reason, and the way out."""

from fedjax_llm.errors import UserError

_OUT = ", or set secure to None"


def check(
    *,
    aggregation: str,
    needs_stack: bool,
    compressed: bool,
    attacked: bool,
    asynchronous: bool,
    client_metrics: bool | None,
) -> None:
    """Refuses an experiment that has to look at single clients, or at times of their own.

    Args:
      aggregation: the algorithm's name.
      needs_stack: whether it must see every client's message.
      compressed: whether clients compress what they send.
      attacked: whether simulated attackers make messages of what they see of others'.
      asynchronous: whether clients train at times of their own.
      client_metrics: whether every client's loss and update norm are asked for.

    Raises:
      UserError: with the reason and the way out.
    """
    if needs_stack:
        raise UserError(
            f"{aggregation} must see every client's message (to compare, stack or take it apart), and under secure "
            "aggregation nobody sees more than their sum. Choose an aggregation of sums (such as FedAvg, FedAdam or "
            f"DiLoCo){_OUT}"
        )
    if compressed:
        raise UserError(
            "compression makes messages that the server decodes one by one, and under secure aggregation they are "
            f"masked integers that only make sense when they are added up. Set compression to None{_OUT}"
        )
    if attacked:
        raise UserError(
            "the attack has malicious clients look at the messages of others, which secure aggregation hides from all. "
            f"Choose an attack on data (such as LabelFlip){_OUT}"
        )
    if asynchronous:
        raise UserError(
            "federation.asynchronous has clients answer at times of their own, and masks cancel only among clients "
            f"that exchanged keys at the beginning of one round. Set federation.asynchronous to None{_OUT}"
        )
    if client_metrics:
        raise UserError(
            "output.client_metrics is True: it keeps every client's loss, number of examples and update norm in clear, "
            "which secure aggregation is there to hide (they tell of a client's text what the masked update does not). "
            f"Set it to None or False (the cohort's mean is kept){_OUT}"
        )
