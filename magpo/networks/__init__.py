"""Networks that several systems share: flax.linen modules, no batch axis assumed beyond the last."""
