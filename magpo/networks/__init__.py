"""Networks that several systems share, as flax.linen modules."""
