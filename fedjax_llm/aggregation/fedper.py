"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the lower layers are averaged, every client keeps its upper ones.

The paper has K_B base layers and K_P personalisation layers above them. Here they are layers with adapters, and the
border is given by the base layers, since an algorithm is made before the depth of the model is known.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedPer:
    """The mean of the deltas of the base layers, added to the server's; the adapters above them never travel.

    Attributes:
      base_layers: K_B, how many of the model's layers from the lowest on are shared; the adapters of layer number
        ``base_layers`` (counted from 0) and of those above it are every client's own. In a model of 30 layers, 28
        leaves two personal ones.
      server_lr: how far to go along the mean delta; 1 is the paper's average.
    """

    base_layers: int = 1
    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr)
        if self.base_layers < 1:
            raise UserError(f"aggregation.base_layers is {self.base_layers}; else nothing travels; at least 1")
        base_layers = self.base_layers

        def personal(module: str, factor: str) -> bool:
            kind, _, rest = module.partition(".")
            return kind == "layers" and int(rest.partition(".")[0]) >= base_layers

        return from_optax(optax.sgd(self.server_lr))._replace(personal=personal)
