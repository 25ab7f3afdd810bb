"""What every network of this package returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from emoe_med.moe import Routing


@dataclass(frozen=True)
class ModelOutput:
    """What a model returns.

    Attributes:
        output: [B, O], for a head of `heads.py` or the logits of O classes.
        aux_loss: [] sum of the routers' auxiliary losses.
        routing: of each routed layer by name, for its N routed tokens (those inside the brain; patches).
        token_mask: [B, T] bool by layer name; True where a token was routed, in the order of `routing`.
        side_output: [B, O], a second answer to be trained on the same target; None where there is none to train.
        gates: [B, C] by layer name, factors on the channels of convolutions; 0 is off.
    """

    output: Tensor
    aux_loss: Tensor
    routing: dict[str, Routing]
    token_mask: dict[str, Tensor]
    side_output: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
