"""A pre-trained model cut short: its first layers with its output layer. Quick to train, and not of its quality."""

from dataclasses import replace

import jax

from fedjax_llm.errors import UserError
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.quantised import is_quantised


def truncated(base: BaseModel, layers: int) -> BaseModel:
    """The first ``layers`` layers of a model, then its final norm and output layer, which were not trained for that.

    Its name and fingerprint say that it is cut, so that nothing takes it for the whole one.

    Raises:
      UserError: the model has fewer layers, or none would be left.
    """
    count = base.model.config.layers
    if not 1 <= layers <= count:
        raise UserError(f"cannot keep {layers} layers of {base.name}, which has {count}; choose 1 to {count}")
    if layers == count:
        return base
    params = {**base.params, "layers": base.params["layers"][:layers]}
    return replace(
        base,
        model=replace(base.model, config=replace(base.model.config, layers=layers)),
        params=params,
        name=f"{base.name}, first {layers} of {count} layers",
        fingerprint=f"{base.fingerprint}, {layers} layers",
        size=sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_quantised)),
    )
