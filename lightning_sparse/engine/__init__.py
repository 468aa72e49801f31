"""The swap of latent and sparse weights, and the callback that drives it."""
