"""Networks: SFCN with and without a routed layer, and the heads that turn outputs into ages."""
